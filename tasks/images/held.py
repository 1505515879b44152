"""Changes of a disk that were fetched and wait in memory for the rest of their leaves."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from tasks.images.leaves import Misread
from tasks.models import Extent
from tasks.reader import Hole


class Held:
    """The bytes of `extents` (sorted, apart from each other), one extent after the other in `memory`."""

    def __init__(self, extents: Sequence[Extent], memory: memoryview) -> None:
        self._extents, self._memory = extents, memory
        self._starts = [extent.start for extent in extents]
        self._places = [0, *accumulate(extent.length for extent in extents)]
        self._came: list[tuple[int, int]] = []

    def put(self, offset: int, buffer: memoryview | Hole) -> None:
        """Take bytes that came from the source. Raises Misread where they are not all of one of the extents."""
        number = bisect_right(self._starts, offset) - 1
        end = offset + len(buffer)
        if number < 0 or end > self._extents[number].end:
            raise Misread(f"the source gave bytes at {offset} unasked")
        at = self._places[number] + offset - self._starts[number]
        self._memory[at : at + len(buffer)] = bytes(len(buffer)) if isinstance(buffer, Hole) else buffer
        self._came.append((at, at + len(buffer)))

    def parts(self) -> list[tuple[int, memoryview]]:
        """Return each extent's offset and bytes. Raises Misread unless everything came, and once."""
        filled = 0
        for start, end in sorted(self._came):
            if start != filled:
                raise Misread(f"the source gave bytes twice, or left some out, of {len(self._extents)} changes")
            filled = end
        if filled != self._places[-1]:
            raise Misread(f"the source left out {self._places[-1] - filled} bytes")
        ends = zip(self._places, self._places[1:], strict=False)
        return [(start, self._memory[at:end]) for start, (at, end) in zip(self._starts, ends, strict=True)]
