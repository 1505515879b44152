"""Which bytes of a disk are fetched to bring a copy of it up to a later point in time. Arithmetic, nothing is read.

CBT speaks of blocks of 64 KiB and more; digests are of leaves of 256 KiB. Of a leaf that changed in part the rest is
here already, unless it is in doubt.
"""

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence

from tasks.images.digests import LEAF_BYTES
from tasks.images.extents import leaf_aligned, leaf_extent, merged, whole_disk
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
        self._extents = merged([*extents, *leaf_aligned(doubtful, size=size)])
        self._starts = [extent.start for extent in self._extents]
        self.leaves = leaf_aligned(self._extents, size=size)
        self._doubtful: set[int] = set()
        self._lock = threading.Lock()

    @property
    def length(self) -> int:
        """How many bytes are fetched, as far as is known."""
        return sum(extent.length for extent in self._extents)

    @property
    def doubted(self) -> int:
        """How many leaves came into doubt on the way."""
        return len(self._doubtful)

    def doubt(self, leaf: int) -> None:
        """Fetch all of a leaf: what is here of it is not what its digest says."""
        with self._lock:
            self._doubtful.add(leaf)

    def within(self, window: Extent) -> Sequence[Extent]:
        """Return what is fetched of a window, sorted."""
        first = max(bisect_right(self._starts, window.start) - 1, 0)
        found = []
        for at in range(first, bisect_left(self._starts, window.end)):
            extent = self._extents[at]
            start, end = max(extent.start, window.start), min(extent.end, window.end)
            if end - start == extent.length:
                found.append(extent)
            elif start < end:
                found.append(Extent(start=start, length=end - start))
        return merged([*found, *self._doubted_within(window)]) if self._doubtful else found

    def of_all(self, windows: Iterable[Extent]) -> Iterator[Extent]:
        """Yield what is fetched of several windows (sorted)."""
        for window in windows:
            yield from self.within(window)

    def kept(self, leaf: int) -> Sequence[Extent]:
        """Return what is not fetched of a leaf: asked of each, so not by `without`, which sorts first."""
        whole = leaf_extent(leaf, size=self.size)
        kept, at = list[Extent](), whole.start
        for extent in self.within(whole):
            if extent.start > at:
                kept.append(Extent(start=at, length=extent.start - at))
            at = extent.end
        if at < whole.end:
            kept.append(Extent(start=at, length=whole.end - at))
        return kept

    def _doubted_within(self, window: Extent) -> list[Extent]:
        leaves = range(window.start // LEAF_BYTES, -(-window.end // LEAF_BYTES))
        with self._lock:
            bad = [leaf for leaf in leaves if leaf in self._doubtful]
        whole = (leaf_extent(leaf, size=self.size) for leaf in bad)
        ends = ((max(each.start, window.start), min(each.end, window.end)) for each in whole)
        return [Extent(start=start, length=end - start) for start, end in ends]


def everything(size: int) -> Changes:
    """Return all of a disk as changes."""
    return Changes(whole_disk(size), size=size)
