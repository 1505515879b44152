"""A random sample of a disk's leaves, read at the source once more and compared with the digests here."""

from __future__ import annotations

import random
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

from tasks.images.copy import copy
from tasks.images.digests import Buffer, Digests, leaf_count
from tasks.images.extents import leaf_extent
from tasks.rate import Rate
from tasks.reader import Reader


def chosen_leaves(size: int, *, count: int, seed: str) -> tuple[int, ...]:
    """Return `count` leaves (all, where there are no more) of a disk of `size` bytes, in order; a seed's, always."""
    leaves = leaf_count(size)
    return tuple(sorted(random.Random(seed).sample(range(leaves), min(count, leaves))))


def differing_at_source(
    reader: Reader,
    digests: Digests,
    leaves: Sequence[int],
    *,
    progress: Callable[[int], None] | None = None,
    stop: threading.Event | None = None,
    rate: Rate | None = None,
) -> tuple[int, ...]:
    """Return which of `leaves` (in order) an entered `reader` gives otherwise than `digests` says.

    Nothing of what is read is kept. Raises what `copy` raises.
    """
    extents = [leaf_extent(leaf, size=digests.size) for leaf in leaves]
    with (
        tempfile.TemporaryDirectory(prefix="hyper2kvm-") as scratch,
        Digests.create(Path(scratch) / "found", size=digests.size, algorithm=digests.algorithm) as found,
        _Nowhere(found.path) as nowhere,
    ):
        copy(reader, extents, nowhere, digests=found, progress=progress, stop=stop, rate=rate)
        return tuple(leaf for leaf in leaves if found.get(leaf) != digests.get(leaf))


class _Nowhere:
    """A writer that keeps nothing. See `tasks.images.writer.Writer`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None: ...

    def write(self, offset: int, buffer: Buffer) -> None: ...

    def zero(self, offset: int, length: int) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...
