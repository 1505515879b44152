"""Which bytes of a disk are fetched to bring a copy of it up to a later point in time. Arithmetic, nothing is read.

CBT speaks of blocks of 64 KiB and more; digests are of leaves of 256 KiB. Of a leaf that changed in part the rest is
here already, unless it is in doubt.
"""

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence

from tasks.images.digests import LEAF_BYTES
from tasks.images.extents import leaf_aligned, leaf_extent, merged, runs_of, whole_disk
from tasks.models import Extent


def closed_up(extents: Iterable[Extent], *, gap_bytes: int) -> tuple[Extent, ...]:
    """Return sorted extents, those with at most `gap_bytes` between them made one: a request saved is worth that."""
    runs: list[Extent] = []
    for extent in merged(extents):
        if runs and extent.start - runs[-1].end <= gap_bytes:
            runs[-1] = Extent(start=runs[-1].start, length=extent.end - runs[-1].start)
        else:
            runs.append(extent)
    return tuple(runs)


class Changes:
    """What is fetched of a disk of `size` bytes: `extents`, and whole leaves where there is doubt.

    `doubtful` are whole leaves of which it is not known what is here. leaves: those that have any of it. Safe to use
    from several threads.
    """

    def __init__(self, extents: Iterable[Extent], *, size: int, doubtful: Iterable[Extent] = ()) -> None:
        self.size = size
        runs = merged([*extents, *leaf_aligned(doubtful, size=size)])
        self._starts, self._ends = [run.start for run in runs], [run.end for run in runs]
        self.length = sum(self._ends) - sum(self._starts)
        self.leaves = leaf_aligned(runs, size=size)
        self._doubtful: set[int] = set()
        self._lock = threading.Lock()

    @property
    def doubted(self) -> int:
        """How many leaves came into doubt on the way."""
        return len(self._doubtful)

    def doubt(self, leaf: int) -> None:
        """Fetch all of a leaf: what is here of it is not what its digest says."""
        with self._lock:
            self._doubtful.add(leaf)

    def within(self, start: int, end: int) -> Sequence[tuple[int, int]]:
        """Return `(start, end)` of what is fetched between two offsets, sorted. It is asked several times a leaf."""
        first = max(bisect_right(self._starts, start) - 1, 0)
        last = bisect_left(self._starts, end, lo=first)
        if last == first + 1 and self._starts[first] <= start and end <= self._ends[first]:
            return [(start, end)]
        cut = ((max(self._starts[at], start), min(self._ends[at], end)) for at in range(first, last))
        found = [run for run in cut if run[0] < run[1]]
        return runs_of([*found, *self._doubted_within(start, end)]) if self._doubtful else found

    def are_whole(self, start: int, end: int) -> bool:
        """Tell whether all leaves that have any of these bytes are fetched whole."""
        first, last = start // LEAF_BYTES * LEAF_BYTES, min(-(-end // LEAF_BYTES) * LEAF_BYTES, self.size)
        return self.within(first, last) == [(first, last)]

    def of_all(self, windows: Iterable[Extent]) -> Iterator[Extent]:
        """Yield what is fetched of several windows (sorted)."""
        for window in windows:
            for start, end in self.within(window.start, window.end):
                yield Extent(start=start, length=end - start)

    def kept(self, leaf: int) -> Sequence[tuple[int, int]]:
        """Return `(start, end)` of what is not fetched of a leaf."""
        whole = leaf_extent(leaf, size=self.size)
        kept, at = list[tuple[int, int]](), whole.start
        for start, end in self.within(whole.start, whole.end):
            if start > at:
                kept.append((at, start))
            at = end
        if at < whole.end:
            kept.append((at, whole.end))
        return kept

    def _doubted_within(self, start: int, end: int) -> list[tuple[int, int]]:
        leaves = range(start // LEAF_BYTES, -(-end // LEAF_BYTES))
        with self._lock:
            bad = [leaf_extent(leaf, size=self.size) for leaf in leaves if leaf in self._doubtful]
        return [(max(leaf.start, start), min(leaf.end, end)) for leaf in bad]


def everything(size: int) -> Changes:
    """Return all of a disk as changes."""
    return Changes(whole_disk(size), size=size)
