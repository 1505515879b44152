"""`tasks.text`: what was meant to be one line is one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.text import fenced, one_line


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("web", "web"),
        ("caf\u00e9 \U0001f680 \U0001f469\u200d\U0001f4bb", "caf\u00e9 \U0001f680 \U0001f469\u200d\U0001f4bb"),
        ("a\nb\tc\rd", r"a\nb\tc\rd"),
        ("\x1b[31mred\x07", r"\x1b[31mred\x07"),
        ("a\u2028b\x85c", r"a\u2028b\x85c"),
        ("a\u202exe.b", r"a\u202exe.b"),
    ],
)
def test_what_breaks_erases_or_reorders_a_line_is_escaped(text, line):
    assert one_line(text) == line


@given(st.text())
def test_any_text_becomes_one_line_and_stays_so(text):
    line = one_line(text)
    assert len(line.splitlines()) <= 1
    assert one_line(line) == line


@pytest.mark.parametrize("line", ["```", "~~~", "a ```` b", "`" * 9, "plain", "\x1b[2J```\n```", "</code></pre>"])
def test_nothing_in_a_code_block_ends_it(line):
    first, *inside, last = fenced(["before", line, "after"]).split("\n")
    assert first.removesuffix("text") == last
    assert len(inside) == 3
    assert not any(each.strip().startswith(last) for each in inside)
