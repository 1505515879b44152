"""What one disk is copied into: begun anew, or gone on with where an earlier run of the same job was killed."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from tasks.errors import InvalidInput
from tasks.images.digests import LEAF_BYTES, Digests
from tasks.images.extents import whole_disk, without
from tasks.images.files import sync
from tasks.images.journal import Journal
from tasks.images.layout import DiskFiles
from tasks.images.raw import RawWriter
from tasks.images.verify import compare
from tasks.models import Extent

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Target:
    """An open raw part with its digests and journal. missing: what to copy. kept_bytes: what need not be."""

    writer: RawWriter
    digests: Digests
    journal: Journal
    missing: tuple[Extent, ...]
    kept_bytes: int


@contextmanager
def open_target(
    files: DiskFiles, *, size: int, binding: Mapping[str, str | int], stop: threading.Event | None = None
) -> Iterator[Target]:
    """Open the target of a disk of `size` bytes for the block.

    binding: what the bytes are of, down to the point in time; what was kept under any other is not used.
    Every leaf that is kept has been read back and compared with its digest, past the page cache where the file system
    lets us; those that differ are among the missing. Raises DiskFull, ToolFailed, FileLocked, Stopped.
    """
    with Journal.open(files.journal, binding={**binding, "size": size}) as journal:
        kept = _kept(files, size, journal, stop)
        if not kept:
            journal.restart()  # first: what it covers is gone with the next step
        with _writer(files, size, anew=not kept) as writer, _digests(files, size, anew=not kept) as digests:
            sync(files.folder)
            missing = without(whole_disk(size), kept)
            yield Target(writer, digests, journal, missing, sum(extent.length for extent in kept))


def _writer(files: DiskFiles, size: int, *, anew: bool) -> RawWriter:
    return RawWriter.create(files.raw_part, size=size) if anew else RawWriter.open(files.raw_part)


def _digests(files: DiskFiles, size: int, *, anew: bool) -> Digests:
    if anew:
        return Digests.create(files.digests_part, size=size)
    return Digests.open(files.digests_part, writable=True)


def _kept(files: DiskFiles, size: int, journal: Journal, stop: threading.Event | None) -> tuple[Extent, ...]:
    """Return what the journal covers and the target still holds."""
    if not journal.covered or not _of_size(files, size):
        return ()
    bad: list[Extent] = []
    with Digests.open(files.digests_part) as digests:

        def differs(leaf: int) -> None:
            start = leaf * LEAF_BYTES
            bad.append(Extent(start=start, length=min(LEAF_BYTES, size - start)))

        compare(files.raw_part, journal.covered, differs, format="raw", digests=digests, stop=stop)
    if bad:
        _log.warning("kept leaves differ and are fetched again path=%s leaves=%d", files.raw_part, len(bad))
    return without(journal.covered, bad)


def _of_size(files: DiskFiles, size: int) -> bool:
    """Tell whether raw part and sidecar are there, and those of a disk of `size` bytes."""
    try:
        with Digests.open(files.digests_part) as digests:
            return files.raw_part.stat().st_size == size == digests.size
    except (FileNotFoundError, InvalidInput) as error:
        _log.warning("a journal without its target is not used path=%s error=%s", files.journal, error)
        return False
