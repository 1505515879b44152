"""Putting whole leaves together from the buffers of a stream, which come in any order."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from operator import itemgetter

from tasks.images.digests import LEAF_BYTES, Buffer, leaf_count
from tasks.images.extents import runs_of
from tasks.models import Extent
from tasks.reader import Hole, aligned_buffer


class Misread(Exception):
    """A reader gave bytes that nobody asked for, gave some twice, or left some out."""


class Piece:
    """Leaf-aligned extents on their way in: which of their leaves are missing, and those that are half there.

    extents: sorted, at least one. spare: memory of whole leaves, which pieces pass on to each other: fresh memory costs
    as much as filling it.
    """

    def __init__(self, extents: Sequence[Extent], spare: list[memoryview] | None = None) -> None:
        self._end = extents[-1].end
        self._missing = runs_of((each.start // LEAF_BYTES, leaf_count(each.end)) for each in extents)
        self._open: dict[int, OpenLeaf] = {}
        self._spare = [] if spare is None else spare

    @property
    def left(self) -> int:
        """How many leaves are not complete."""
        return sum(end - first for first, end in self._missing)

    @property
    def first_missing(self) -> int:
        """Offset of the first leaf that is not complete."""
        return self._missing[0][0] * LEAF_BYTES if self._missing else self._end

    def missing(self) -> list[Extent]:
        """Forget the leaves that are half there, and return what to ask for: all that is not complete."""
        self._open.clear()
        ends = ((first * LEAF_BYTES, min(end * LEAF_BYTES, self._end)) for first, end in self._missing)
        return [Extent(start=start, length=end - start) for start, end in ends]

    def take(self, offset: int, buffer: memoryview | Hole) -> Iterator[tuple[int, Buffer | Hole]]:
        """Yield `(leaf, content)` for what `buffer` completes: the leaves from `leaf` on, the last perhaps a short one.

        Content is good until the next is asked for. Leaves that lie whole in `buffer` are not copied, those of a hole
        are one. Raises Misread.
        """
        while buffer:
            leaf, at = divmod(offset, LEAF_BYTES)
            length = min(LEAF_BYTES, self._end - leaf * LEAF_BYTES)
            whole = self._whole_leaves(offset, len(buffer)) or LEAF_BYTES - at
            part, buffer = buffer[:whole], buffer[whole:]
            leaves = range(leaf, leaf + leaf_count(at + len(part)))
            if offset + len(part) > self._end or not self._are_missing(leaves):
                raise Misread(f"the source gave bytes at {offset} twice, or unasked")
            offset += len(part)
            if len(part) >= length:
                yield self._complete(leaves, part)
            elif self._put(leaf, length, at, part):
                content = self._open.pop(leaf).content
                yield self._complete(leaves, content)
                self._keep(content)

    def _whole_leaves(self, offset: int, length: int) -> int:
        """Return how many of `length` bytes at `offset` are whole leaves, the extent's last one among them."""
        if offset % LEAF_BYTES:
            return 0
        return length if offset + length == self._end else length // LEAF_BYTES * LEAF_BYTES

    def _put(self, leaf: int, length: int, at: int, part: memoryview | Hole) -> bool:
        if leaf not in self._open:
            self._open[leaf] = OpenLeaf(self._memory(length), [(0, length)])
        return self._open[leaf].put(at, part)

    def _complete(self, leaves: range, content: Buffer | Hole) -> tuple[int, Buffer | Hole]:
        if any(leaf in leaves for leaf in self._open):
            raise Misread(f"the source gave bytes of a leaf from {leaves[0] * LEAF_BYTES} on twice")
        at = self._run_of(leaves[0])
        first, end = self._missing[at]
        rest = ((first, leaves.start), (leaves.stop, end))
        self._missing[at : at + 1] = [run for run in rest if run[0] < run[1]]
        return leaves[0], content

    def _are_missing(self, leaves: range) -> bool:
        at = self._run_of(leaves[0])
        return at >= 0 and leaves.stop <= self._missing[at][1]

    def _run_of(self, leaf: int) -> int:
        """Return which run of missing leaves is the last that begins no later than `leaf`; -1 for none."""
        return bisect_right(self._missing, leaf, key=itemgetter(0)) - 1

    def _memory(self, length: int) -> memoryview:
        with suppress(IndexError):  # several threads take from it
            return self._spare.pop() if length == LEAF_BYTES else aligned_buffer(length)
        return aligned_buffer(length)

    def _keep(self, content: memoryview) -> None:
        if len(content) == LEAF_BYTES:
            self._spare.append(content)


class OpenLeaf:
    """A leaf that is not all there yet, and `(start, end)` of the gaps in it."""

    def __init__(self, content: memoryview, gaps: Iterable[tuple[int, int]]) -> None:
        self.content = content
        self._gaps = [*gaps]

    def put(self, at: int, part: memoryview | Hole) -> bool:
        """Put `part` at `at`; tell whether the leaf is whole now. Raises Misread where something is there already."""
        end = at + len(part)
        for index, (start, stop) in enumerate(self._gaps):
            if start <= at and end <= stop:
                self.content[at:end] = bytes(len(part)) if isinstance(part, Hole) else part
                rest = [gap for gap in ((start, at), (end, stop)) if gap[0] < gap[1]]
                self._gaps[index : index + 1] = rest
                return not self._gaps
        raise Misread(f"the source gave bytes at {at} of a leaf twice, or unasked")
