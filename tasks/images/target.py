"""What one disk is copied into: begun anew, or gone on with where an earlier run of the same job was killed."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tasks.errors import IntegrityMismatch, InvalidInput, UnsupportedDisk
from tasks.images.digests import Digests
from tasks.images.extents import leaf_extent, whole_disk, without
from tasks.images.files import sync
from tasks.images.journal import Journal
from tasks.images.layout import DiskFiles
from tasks.images.qcow2 import Qcow2Writer
from tasks.images.qemu import check, virtual_size
from tasks.images.raw import RawWriter
from tasks.images.verify import compare
from tasks.images.writer import Writer
from tasks.models import ArrivalFormat, DigestName, Extent

WRITERS: dict[str, type[RawWriter] | type[Qcow2Writer]] = {"raw": RawWriter, "qcow2": Qcow2Writer}

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Target:
    """An open part with its digests and journal. missing: what to copy. kept_bytes: what need not be."""

    writer: Writer
    digests: Digests
    journal: Journal
    missing: tuple[Extent, ...]
    kept_bytes: int


@contextmanager
def open_target(
    files: DiskFiles,
    *,
    size: int,
    binding: Mapping[str, str | int],
    format: ArrivalFormat = "raw",
    algorithm: DigestName = "blake3",
    stop: threading.Event | None = None,
) -> Iterator[Target]:
    """Open the target of a disk of `size` bytes for the block: the part of `files` in that format.

    binding: what the bytes are of, down to the point in time; what was kept under any other is not used.
    Every leaf that is kept has been read back and compared with its digest, past the page cache where the file system
    lets us; those that differ are among the missing. Raises DiskFull, ToolFailed, FileLocked, Stopped.
    """
    part = files.part(format)
    bound = {**binding, "size": size, "format": format, "digest": algorithm}
    with Journal.open(files.journal, binding=bound) as journal:
        kept = _kept(files, format, size, journal, stop)
        if not kept:
            journal.restart()  # first: what it covers is gone with the next step
        anew = not kept
        with (
            _writer(part, format, size, anew=anew) as writer,
            _digests(files, size, algorithm, anew=anew) as digests,
        ):
            sync(files.folder)
            missing = without(whole_disk(size), kept)
            yield Target(writer, digests, journal, missing, sum(extent.length for extent in kept))


def _writer(part: Path, format: ArrivalFormat, size: int, *, anew: bool) -> Writer:
    kind = WRITERS[format]
    return kind.create(part, size=size) if anew else kind.open(part)


def _digests(files: DiskFiles, size: int, algorithm: DigestName, *, anew: bool) -> Digests:
    if anew:
        return Digests.create(files.digests_part, size=size, algorithm=algorithm)
    return Digests.open(files.digests_part, writable=True)


def _kept(
    files: DiskFiles, format: ArrivalFormat, size: int, journal: Journal, stop: threading.Event | None
) -> tuple[Extent, ...]:
    """Return what the journal covers and the target still holds."""
    part = files.part(format)
    if not journal.covered or not _usable(files, format, size, stop):
        return ()
    bad: list[int] = []
    with Digests.open(files.digests_part) as digests:
        compare(part, journal.covered, bad.append, format=format, digests=digests, stop=stop)
    if bad:
        _log.warning("kept leaves differ and are fetched again path=%s leaves=%d", part, len(bad))
    return without(journal.covered, (leaf_extent(leaf, size=size) for leaf in bad))


def _usable(files: DiskFiles, format: ArrivalFormat, size: int, stop: threading.Event | None) -> bool:
    """Tell whether part and sidecar are there, sound, and those of a disk of `size` bytes."""
    try:
        with Digests.open(files.digests_part) as digests:
            if not virtual_size(files.part(format), format=format) == size == digests.size:
                return False
        check(files.part(format), format=format, mend_leaks=True, stop=stop)
    except (FileNotFoundError, InvalidInput, UnsupportedDisk, IntegrityMismatch) as error:
        _log.warning("a journal without its target is not used path=%s error=%s", files.journal, error)
        return False
    return True
