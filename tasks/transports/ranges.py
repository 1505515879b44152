"""Several ranges of a file by one GET: what is asked, and the parts of the reply taken out of its body.

Whether a server does that, only asking it tells; it need not (RFC 9110, section 14.2). Nothing is sent from here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise

from tasks.models import Extent
from tasks.reader import runs_within

MOST_RANGES = 64  # a request: at 28 bytes each the header stays far below the 4 KiB that a careful server takes
MOST_BYTES = 4 * 1024 * 1024  # of them, which a body in memory holds
PART_HEAD_BYTES = 1024  # at most, boundary and header fields
BODY_BYTES = MOST_BYTES + (MOST_RANGES + 1) * PART_HEAD_BYTES  # of any reply

_BOUNDARY = re.compile(
    r'multipart/byteranges\s*;(?:.*;)?\s*boundary=(?:"([^"]{1,200})"|([^\s;"]{1,200}))', re.IGNORECASE
)
_RANGE = re.compile(rb"^content-range:\s*bytes (\d+)-(\d+)/(\d+)\s*$", re.IGNORECASE | re.MULTILINE)


class OneEach(Exception):
    """The server does not answer several ranges with just these, which it need not: they are asked for one by one."""


class FalseParts(Exception):
    """The parts of a reply cannot be what was asked for."""


def asked(extents: Sequence[Extent]) -> str:
    """Return the value of `Range` for them."""
    return "bytes=" + ",".join(f"{extent.start}-{extent.end - 1}" for extent in extents)


def groups(extents: Sequence[Extent]) -> Iterator[Sequence[Extent]]:
    """Yield sorted extents, as many at a time as go into a request; a larger one alone."""
    return runs_within(extents, most=MOST_RANGES, most_bytes=MOST_BYTES)


def body_bytes(extents: Sequence[Extent]) -> int:
    """Return how long a body with these parts is at most."""
    return sum(extent.length + PART_HEAD_BYTES for extent in extents) + PART_HEAD_BYTES


def boundary_of(content_type: str) -> bytes:
    """Return what stands between the parts. Raises OneEach for a body that has none."""
    match = _BOUNDARY.match(content_type)
    if not match:
        raise OneEach(f"it answers several ranges with {content_type.partition(';')[0] or 'a body of no type'}")
    return b"--" + (match[1] or match[2]).encode()


def parts_of(
    body: bytearray, length: int, boundary: bytes, extents: Sequence[Extent], *, size: int
) -> list[tuple[int, memoryview]]:
    """Return `(offset, bytes)` for each of `extents`, out of the first `length` bytes of a body that has all its parts.

    Nothing is copied. Raises FalseParts where ranges and bytes do not fit each other, a file of `size` bytes, or what
    was asked for; OneEach where they do, and are joined, left out or in another order (RFC 9110, section 15.3.7.2).
    """
    whole, found = memoryview(body)[:length], list[tuple[int, int, memoryview]]()
    at = body.find(boundary, 0, min(PART_HEAD_BYTES, length))
    while at >= 0 and whole[at : at + len(boundary)] == boundary:
        at += len(boundary)
        if bytes(whole[at : at + 2]) == b"--":
            return _as_asked(found, extents)
        head_end = body.find(b"\r\n\r\n", at, min(at + PART_HEAD_BYTES, length))
        if head_end < 0:
            raise FalseParts("a part of its reply has no end of a head")
        start, end = _range_of(bytes(whole[at : head_end + 2]), size)
        at = head_end + 4 + end - start
        found.append((start, end, whole[head_end + 4 : at]))
        if bytes(whole[at : at + 2]) != b"\r\n":
            raise FalseParts(f"a part of its reply is not as long as it says (bytes {start}-{end - 1})")
        at += 2
    raise FalseParts("a part of its reply is not where the one before it ends, or the last one is missing")


def _range_of(head: bytes, size: int) -> tuple[int, int]:
    """Return where the bytes of a part begin and end."""
    match = _RANGE.search(head.replace(b"\r\n", b"\n"))
    if not match:
        raise FalseParts("a part of its reply does not say which bytes it has")
    first, last, total = map(int, match.groups())
    if total != size:
        raise FalseParts(f"a part of its reply is of a file of {total} bytes, not of {size}")
    if not first <= last < size:
        raise FalseParts(f"a part of its reply has bytes {first}-{last}")
    return first, last + 1


def _as_asked(found: Sequence[tuple[int, int, memoryview]], extents: Sequence[Extent]) -> list[tuple[int, memoryview]]:
    if [(start, end) for start, end, _ in found] == [(extent.start, extent.end) for extent in extents]:
        return [(start, content) for start, _, content in found]
    ordered = sorted((start, end) for start, end, _ in found)
    for (_, end), (start, after) in pairwise(ordered):
        if start < end:
            raise FalseParts(f"it sends bytes {start}-{min(end, after) - 1} twice")
    if ordered and not extents[0].start <= ordered[0][0] <= ordered[-1][1] <= extents[-1].end:
        raise FalseParts(f"it sends bytes {ordered[0][0]}-{ordered[-1][1] - 1}, which nobody asked for")
    raise OneEach(f"it answers {len(extents)} ranges with {len(found)} parts that are not just these, in their order")
