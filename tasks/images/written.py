"""Reading back just what a sync wrote: of a leaf that changed in part, that part, held to what came from the source."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, groupby
from pathlib import Path

from tasks.images.changes import Changes
from tasks.images.digests import LEAF_BYTES, RECORD_BYTES, Digests, leaf_count
from tasks.images.extents import leaf_extent, pieces
from tasks.images.verify import PIECE_BYTES, Count, differing, on_clients, reading, records_of
from tasks.models import Extent, ImageFormat, ReadBack
from tasks.nbd import NbdClient

MOST_LEAVES = 1024 * 1024  # whose parts are known, 33 MiB in memory; the others are read back whole


class Written:
    """A record of what came of each leaf that changed in part. For several threads.

    whole: leaves that are read back whole all the same, since an earlier sync wrote in them that was not read back.
    """

    def __init__(self, changes: Changes, *, whole: Iterable[Extent] = ()) -> None:
        self.changes = changes
        self._runs = changes.leaves
        self._starts = [run.start // LEAF_BYTES for run in self._runs]
        self._places = [0, *accumulate(leaf_count(run.length) for run in self._runs)]
        known = min(self._places[-1], MOST_LEAVES)
        self._records, self._known = bytearray(known * RECORD_BYTES), bytearray(known)
        self._whole = {leaf for each in whole for leaf in range(each.start // LEAF_BYTES, leaf_count(each.end))}

    def note(self, leaf: int, record: bytes) -> None:
        """Keep the record of what came of a leaf, its parts one after the other."""
        place = self._place(leaf)
        if place < len(self._known) and leaf not in self._whole:
            self._records[place * RECORD_BYTES : (place + 1) * RECORD_BYTES] = record
            self._known[place] = True

    def record(self, leaf: int) -> bytes | None:
        """Return the record of what came of a leaf; None for one that is read back whole."""
        place = self._place(leaf)
        if 0 <= place < len(self._known) and self._known[place] and self.changes.kept(leaf):
            return bytes(self._records[place * RECORD_BYTES : (place + 1) * RECORD_BYTES])
        return None

    def _place(self, leaf: int) -> int:
        run = bisect_right(self._starts, leaf) - 1
        if run < 0 or leaf >= self._starts[run] + leaf_count(self._runs[run].length):
            return -1
        return self._places[run] + leaf - self._starts[run]


def verify_written(
    path: Path,
    extents: Iterable[Extent],
    written: Written,
    *,
    format: ImageFormat,
    digests: Digests,
    stop: threading.Event | None = None,
) -> tuple[ReadBack, int]:
    """Read what was written in `extents` (whole leaves) back; return how, and how many bytes of the image that took.

    Leaves of which `written` knows no parts are compared whole, with `digests`. Raises as `tasks.images.verify.verify`.
    """
    bad, lock, read_bytes = Count(), threading.Lock(), 0

    def work(client: NbdClient, piece: Extent, check: Callable[[], None]) -> None:
        nonlocal read_bytes
        with reading(path, piece, check):
            for in_part, run in _runs(piece, written):
                check()
                found, length = (
                    _leaf(client, run[0], written, digests) if in_part else _leaves(client, run, digests, check)
                )
                with lock:
                    read_bytes += length
                    for leaf in found:
                        bad.add(leaf)

    road = on_clients(path, pieces(extents, PIECE_BYTES), work, format=format, size=digests.size, stop=stop)
    bad.raise_if_any(path)
    return road, read_bytes


def _runs(piece: Extent, written: Written) -> Iterable[tuple[bool, Sequence[int]]]:
    """Yield the leaves of a piece: one that is read back in part by itself, others as many as follow each other."""
    leaves = range(piece.start // LEAF_BYTES, leaf_count(piece.end))
    for known, group in groupby(leaves, key=lambda leaf: written.record(leaf) is not None):
        run = list(group)
        yield from ((True, [leaf]) for leaf in run) if known else [(False, run)]


def _leaf(client: NbdClient, leaf: int, written: Written, digests: Digests) -> tuple[list[int], int]:
    """Return a leaf if the parts of it that were written differ, and how many bytes these are."""
    content, at = memoryview(bytearray(LEAF_BYTES)), 0
    whole = leaf_extent(leaf, size=digests.size)
    for start, end in written.changes.within(whole.start, whole.end):
        client.read_into(start, content[at : at + end - start])
        at += end - start
    same = digests.record_of(content[:at]) == written.record(leaf)
    return ([] if same else [leaf]), at


def _leaves(
    client: NbdClient, run: Sequence[int], digests: Digests, check: Callable[[], None]
) -> tuple[list[int], int]:
    """Return the leaves of a run that differ, and how many bytes were read: holes are not."""
    extent = Extent(
        start=run[0] * LEAF_BYTES, length=min((run[-1] + 1) * LEAF_BYTES, digests.size) - run[0] * LEAF_BYTES
    )
    records, length = records_of(client, extent, digests.record_of, check)
    return [run[0] + at for at in differing(records, digests.records(run[0], len(run)))], length
