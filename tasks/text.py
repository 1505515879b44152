"""Text from elsewhere on one line of ours: a name may hold a line break, and must not forge a line of a log by it."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

_UNFIT = frozenset(("Cc", "Cs", "Zl", "Zp"))  # controls (line breaks, escapes), surrogates, separators of lines
_REORDERING = frozenset(("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"))  # Unicode TR 9

_NOT_IN_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # XML 1.0, production 2


def one_line(text: str) -> str:
    r"""Return `text` with what would break, erase or reorder its line written as an escape: `a\nb`."""
    return "".join(_escaped(each) if _unfit(each) else each for each in text)


def _unfit(character: str) -> bool:
    return unicodedata.category(character) in _UNFIT or unicodedata.bidirectional(character) in _REORDERING


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def fenced(lines: Iterable[str]) -> str:
    """Return lines from elsewhere as a code block of markdown, which nothing in them ends."""
    said = "\n".join(map(one_line, lines))
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", said)), default=0))
    return f"{fence}text\n{said}\n{fence}"


def for_xml(text: str) -> str:
    """Return `text` with what no XML document can hold, not even escaped, given as U+FFFD."""
    return _NOT_IN_XML.sub("\ufffd", text)


def cell(text: str) -> str:
    """Return a name from vSphere as plain text in a table cell. Backslashes, since one of the UIs shows entities."""
    return "".join(f"\\{sign}" if sign in "\\`*_[]<>|~&" else sign for sign in " ".join(text.split()))
