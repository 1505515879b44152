"""Extent arithmetic: widening to leaves, cutting into pieces of work."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence

from tasks.images.digests import LEAF_BYTES
from tasks.models import Extent


def leaf_extent(leaf: int, *, size: int) -> Extent:
    """Return where a leaf of a disk of `size` bytes lies; the last one may be short."""
    start = leaf * LEAF_BYTES
    return Extent(start=start, length=min(LEAF_BYTES, size - start))


def whole_disk(size: int) -> tuple[Extent, ...]:
    """Return the extents of all of a disk of `size` bytes: one, or none where it is empty."""
    return (Extent(start=0, length=size),) if size else ()


def merged(extents: Iterable[Extent]) -> tuple[Extent, ...]:
    """Return the same bytes as sorted extents, those that touch or overlap made one."""
    runs = runs_of((extent.start, extent.end) for extent in extents)
    return tuple(Extent(start=start, length=end - start) for start, end in runs)


def runs_of(ends: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return `(start, end)` of runs of bytes, sorted, those that touch or overlap made one."""
    runs: list[tuple[int, int]] = []
    for start, end in sorted(ends):
        if runs and start <= runs[-1][1]:
            runs[-1] = (runs[-1][0], max(end, runs[-1][1]))
        else:
            runs.append((start, end))
    return runs


def leaf_aligned(extents: Iterable[Extent], *, size: int) -> tuple[Extent, ...]:
    """Return sorted extents, widened to whole leaves of a disk of `size` bytes, those that touch made one."""

    def wide(extent: Extent) -> Extent:
        start = extent.start // LEAF_BYTES * LEAF_BYTES
        end = min(-(-extent.end // LEAF_BYTES) * LEAF_BYTES, size)
        return Extent(start=start, length=end - start)

    return merged(map(wide, extents))


def without(extents: Iterable[Extent], others: Iterable[Extent]) -> tuple[Extent, ...]:
    """Return what is in `extents` and not in `others`, sorted."""
    rest: list[Extent] = []
    holes = deque(merged(others))
    for extent in merged(extents):
        start = extent.start
        while holes and holes[0].start < extent.end:
            if start < holes[0].start:
                rest.append(Extent(start=start, length=holes[0].start - start))
            start = max(start, holes[0].end)
            if start >= extent.end:
                break
            holes.popleft()
        if start < extent.end:
            rest.append(Extent(start=start, length=extent.end - start))
    return tuple(rest)


def within(extents: Iterable[Extent], bounds: Iterable[Extent]) -> tuple[Extent, ...]:
    """Return what is in both `extents` and `bounds`, sorted."""
    there = merged(extents)
    return without(there, without(there, bounds))


def pieces(extents: Iterable[Extent], piece_bytes: int) -> Iterator[Extent]:
    """Cut leaf-aligned `extents` into leaf-aligned pieces of at most `piece_bytes` (at least one leaf)."""
    step = max(piece_bytes // LEAF_BYTES, 1) * LEAF_BYTES
    for extent in extents:
        for start in range(extent.start, extent.end, step):
            yield Extent(start=start, length=min(step, extent.end - start))


def check_plan(extents: Sequence[Extent], *, size: int) -> None:
    """Raise ValueError where extents are not whole leaves of a disk of `size` bytes, in order, none twice."""
    position = 0
    for extent in extents:
        if extent.start < position or extent.start % LEAF_BYTES:
            raise ValueError(f"{extent} is out of order, or begins inside a leaf")
        if extent.end > size or (extent.end % LEAF_BYTES and extent.end != size):
            raise ValueError(f"{extent} ends inside a leaf, or past the end of the disk at {size}")
        position = extent.end
