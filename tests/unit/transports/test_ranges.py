"""Bodies of several parts taken apart: what fits is given out, and of what does not nothing is believed."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.models import Extent
from tasks.transports.ranges import FalseParts, OneEach, asked, body_bytes, boundary_of, groups, parts_of

CONTENT = random.Random(1).randbytes(20_000)
BOUNDARY = b"--b0undary"


def extents_of(ends: list[tuple[int, int]]) -> list[Extent]:
    return [Extent(start=start, length=end - start) for start, end in ends]


def body_of(ends: list[tuple[int, int]], *, total: int = len(CONTENT), first: bytes = b"") -> bytes:
    """Return a body with a part for each `(start, end)`, as RFC 9110 (14.6) and Go have it."""
    parts = (
        b"--b0undary\r\nContent-Range: bytes %d-%d/%d\r\nContent-Type: a/b\r\n\r\n%b\r\n"
        % (start, end - 1, total, CONTENT[start:end])
        for start, end in ends
    )
    return first + b"".join(parts) + b"--b0undary--\r\n"


def taken(body: bytes, ends: list[tuple[int, int]]) -> list[tuple[int, bytes]]:
    stale = bytearray(body) + bytearray(body_of([(0, 9)]))  # memory that held another body before
    found = parts_of(stale, len(body), BOUNDARY, extents_of(ends), size=len(CONTENT))
    return [(start, bytes(part)) for start, part in found]


ENDS = st.lists(st.integers(0, len(CONTENT)), min_size=2, max_size=16, unique=True).map(
    lambda cuts: [*zip(sorted(cuts)[::2], sorted(cuts)[1::2], strict=False)]
)


@given(ENDS, st.sampled_from([b"", b"\r\n"]))
def test_each_part_is_given_out_with_its_place(ends: list[tuple[int, int]], first: bytes) -> None:
    assert taken(body_of(ends, first=first), ends) == [(start, CONTENT[start:end]) for start, end in ends]


@given(ENDS, st.data())
def test_of_a_body_that_was_cut_or_spoilt_no_false_byte_is_believed(
    ends: list[tuple[int, int]], data: st.DataObject
) -> None:
    body = bytearray(body_of(ends))
    del body[data.draw(st.integers(0, len(body))) :]
    if data.draw(st.booleans()) and body:
        at = data.draw(st.integers(0, len(body) - 1))
        del body[at : at + data.draw(st.integers(1, 40))]
    try:
        found = taken(bytes(body), ends)
    except (FalseParts, OneEach):
        return
    assert [(start, len(part)) for start, part in found] == [(start, end - start) for start, end in ends]


WANTED = [(0, 100), (500, 600), (900, 1000)]


@pytest.mark.parametrize(
    ("got", "error", "words"),
    [
        ([(0, 100), (500, 600)], OneEach, "3 ranges with 2 parts"),
        ([(0, 600), (900, 1000)], OneEach, "2 parts"),
        ([(500, 600), (0, 100), (900, 1000)], OneEach, "their order"),
        ([(0, 100), (50, 150), (900, 1000)], FalseParts, "50-99 twice"),
        ([(0, 100), (500, 600), (900, 1001)], FalseParts, "nobody asked"),
        ([(0, 100), (500, 600), (5000, 5100)], FalseParts, "nobody asked"),
    ],
)
def test_parts_that_are_not_what_was_asked_for_are_allowed_or_lies(
    got: list[tuple[int, int]], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        taken(body_of(got), WANTED)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (body_of(WANTED, total=7), "file of 7 bytes"),
        (body_of(WANTED).replace(b"bytes 0-99", b"bytes 0-98"), "not as long as it says"),
        (body_of(WANTED).replace(b"bytes 0-99", b"bytes 99-0"), "has bytes 99-0"),
        (body_of(WANTED).replace(b"Content-Range", b"Content-Rage"), "which bytes"),
        (body_of(WANTED).replace(b"\r\n\r\n", b"\r\nX: y\r\n"), "end of a head|which bytes|as long"),
        (body_of(WANTED).removesuffix(b"--b0undary--\r\n"), "last one is missing"),
        (b"", "last one is missing"),
    ],
)
def test_a_body_that_lies_is_named(body: bytes, words: str) -> None:
    with pytest.raises(FalseParts, match=words):
        taken(body, WANTED)


def test_the_boundary_is_found_however_it_is_written() -> None:
    for written in ("boundary=b0undary", 'boundary="b0undary"', 'x=y; boundary="b0undary"'):
        assert boundary_of(f"multipart/byteranges; {written}") == BOUNDARY
    for other in ("", "application/octet-stream", "multipart/byteranges"):
        with pytest.raises(OneEach, match="answers several ranges"):
            boundary_of(other)


def test_a_request_has_few_ranges_and_a_header_that_servers_take() -> None:
    block, disk = 64 * 1024, 64 * 1024**4  # bytes: the largest disk that vSphere has
    many = [Extent(start=disk - 2 * block * (number + 1), length=block) for number in reversed(range(1000))]
    runs = [*groups(many)]
    assert [extent for run in runs for extent in run] == many
    assert max(len(asked(run)) for run in runs) < 4096
    assert len(runs) == -(-1000 // 64)
    assert max(body_bytes(run) for run in runs) < 5 * 1024**2
