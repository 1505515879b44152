"""Proving again what a manifest says of one file here: which of its leaves differ, and what of it is to be believed.

An image is read whole, through its own format. Its digest is compared with the manifest's, and so is that of the
sidecar: whichever agrees with the manifest is sound, and the other one has rotted. Nothing is mended.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from tasks import process
from tasks.errors import FileLocked, IntegrityMismatch, InvalidInput, ToolFailed, UnsupportedDisk
from tasks.images import qemu
from tasks.images.digests import LEAF_BYTES, Digests, algorithm_of, leaf_count
from tasks.images.extents import leaf_extent, whole_disk
from tasks.images.layout import DiskFiles
from tasks.images.verify import differing, read_back
from tasks.models import (
    DownloadManifest,
    Extent,
    ImageFormat,
    Manifest,
    ReadBack,
    SampledDisk,
    Value,
    Verdict,
    VerifiedFile,
)

RANGES_TOLD = 8

AGAIN = "Put it back from a backup, or export the VM again to another folder"
REMEDIES: dict[Verdict, str] = {
    "content differs": f"Something wrote to it, or the storage below it rots. {AGAIN}",
    "digests differ": "The image itself is as it was exported: keep it, and look at the storage below it. Put the "
    "digests back from a backup, or export the VM again to another folder",
    "both differ": f"Which of the two is right cannot be told. {AGAIN}",
    "manifest differs": "The image and its digests agree with each other: manifest.json was changed, or is another "
    "export's. Put it back from a backup",
    "missing": AGAIN,
    "damaged": f"It was cut, resized or damaged since. {AGAIN}",
    "unreadable": "See that it is a file, that this account can read it, and that the storage below it is well",
    "in use": "A guest that runs from it changes it: verify before its first start, or what it runs from no more",
}


class Claim(Value):
    """What a manifest says of one file. sidecar: the digests of its leaves; None where there are none."""

    name: str
    path: Path
    format: ImageFormat
    size_bytes: int
    digest: str
    sidecar: Path | None


def claims_of(folder: Path, manifest: Manifest | DownloadManifest) -> tuple[Claim, ...]:
    """Return what a manifest says of each file in `folder`."""
    if isinstance(manifest, DownloadManifest):
        files = (*manifest.files, *manifest.earlier)
        return tuple(_claim(folder, file.path, "raw", file.size_bytes, file.digest) for file in files)
    return tuple(
        _claim(
            folder, image.path, image.format, image.virtual_size, image.digest, DiskFiles(folder, image.index).digests
        )
        for image in manifest.disks
    )


def _claim(
    folder: Path, name: str, format: ImageFormat, size_bytes: int, digest: str, sidecar: Path | None = None
) -> Claim:
    return Claim(name=name, path=folder / name, format=format, size_bytes=size_bytes, digest=digest, sidecar=sidecar)


def prove(
    claim: Claim, *, progress: Callable[[int], None] | None = None, stop: threading.Event | None = None
) -> VerifiedFile:
    """Return what is to be said of a file; that it is gone, or cannot be read, is such a thing as well.

    progress: called with the bytes done since the last call, holes included. Raises Stopped, and ToolFailed where QEMU
    is not installed.
    """
    try:
        if not claim.path.exists():
            return _row(claim, "missing", "there is no such file")
        return _examined(claim, progress, stop)
    except FileLocked:
        return _row(claim, "in use", "another program has it open for writing")
    except ToolFailed as error:
        if error.status == process.MISSING:
            raise
        return _row(claim, "damaged", error.cause)
    except (UnsupportedDisk, IntegrityMismatch) as error:
        return _row(claim, "damaged", error.reason if isinstance(error, UnsupportedDisk) else error.where)
    except OSError as error:
        return _row(claim, "unreadable", error.strerror or str(error))


def _examined(claim: Claim, progress: Callable[[int], None] | None, stop: threading.Event | None) -> VerifiedFile:
    _check_size(claim)
    complaint = _complaint(claim, stop)
    with (
        tempfile.TemporaryDirectory(prefix="hyper2kvm-") as scratch,
        Digests.create(Path(scratch) / "found", size=claim.size_bytes, algorithm=algorithm_of(claim.digest)) as found,
    ):
        road, bytes_read = _read_into(found, claim, progress, stop)
        verdict, detail, differences = _judged(claim, found)
    if complaint and verdict == "equal":
        verdict = "damaged"
    row = _row(claim, verdict, "; ".join(filter(None, (detail, complaint))), differences)
    return row.model_copy(update={"bytes_read": bytes_read, "read": road})


def _check_size(claim: Claim) -> None:
    """Raise IntegrityMismatch for a file of another size, to the byte: what serves it rounds up to a sector."""
    if claim.format == "raw" and (there := claim.path.stat().st_size) != claim.size_bytes:
        where = f"it has {there:,} bytes, and the manifest says {claim.size_bytes:,}"
        raise IntegrityMismatch(path=str(claim.path), where=where)


def _complaint(claim: Claim, stop: threading.Event | None) -> str:
    """Return what `qemu-img check` finds wrong with the metadata, which does not keep the content from being read."""
    try:
        qemu.check(claim.path, format=claim.format, stop=stop)
    except IntegrityMismatch as error:
        return str(error.where)
    return ""


def _read_into(
    found: Digests, claim: Claim, progress: Callable[[int], None] | None, stop: threading.Event | None
) -> tuple[ReadBack, int]:
    """Put the records of what the image holds into `found`; return how it was read, and how many bytes of it."""
    counts: list[int] = []  # of pieces, by several threads: an append needs no lock

    def take(piece: Extent, records: bytes, read_bytes: int) -> None:
        found.put(piece.start // LEAF_BYTES, records)
        counts.append(read_bytes)

    if not found.size:
        return "direct", 0
    extents = whole_disk(found.size)
    road = read_back(claim.path, extents, take, format=claim.format, like=found, progress=progress, stop=stop)
    return road, sum(counts)


class _Differences(Value):
    """Where the leaves of an image are not those of its sidecar: how many, and the first ranges of bytes."""

    leaves: int
    first: tuple[Extent, ...]


def _judged(claim: Claim, found: Digests) -> tuple[Verdict, str, _Differences | None]:
    """Return the verdict, what there is to say beyond it, and the differences where leaves have digests."""
    image_right = found.image_digest() == claim.digest
    if claim.sidecar is None:
        return ("equal" if image_right else "content differs"), "", None
    try:
        with Digests.open(claim.sidecar) as known:
            if known.size != found.size:
                raise InvalidInput(what="", why=f"it is of a disk of {known.size:,} bytes", remedy="")
            differences, sidecar_right = _compared(found, known), known.image_digest() == claim.digest
    except (FileNotFoundError, InvalidInput) as error:
        why = error.why if isinstance(error, InvalidInput) else "it is missing"
        return ("digests differ" if image_right else "both differ"), f"{claim.sidecar.name}: {why}", None
    return _verdict(image_right, sidecar_right, agree=not differences.leaves), "", differences


def _verdict(image_right: bool, sidecar_right: bool, *, agree: bool) -> Verdict:
    """Say what has changed: what agrees with the manifest has not."""
    if image_right or sidecar_right:
        return "equal" if agree else "digests differ" if image_right else "content differs"
    return "manifest differs" if agree else "both differ"


def _compared(found: Digests, known: Digests) -> _Differences:
    leaves = 0
    first: list[Extent] = []
    for leaf in _differing_leaves(found, known):
        leaves += 1
        extent = leaf_extent(leaf, size=found.size)
        if first and first[-1].end == extent.start:
            first[-1] = Extent(start=first[-1].start, length=extent.end - first[-1].start)
        elif len(first) < RANGES_TOLD:
            first.append(extent)
    return _Differences(leaves=leaves, first=tuple(first))


def _differing_leaves(found: Digests, known: Digests) -> Iterator[int]:
    for (first, records), (_, others) in zip(found.chunks(), known.chunks(), strict=True):
        yield from (first + at for at in differing(records, others))


def _row(claim: Claim, verdict: Verdict, detail: str, differences: _Differences | None = None) -> VerifiedFile:
    return VerifiedFile(
        path=claim.name,
        format=claim.format if claim.sidecar else "file",
        size_bytes=claim.size_bytes,
        wrong_leaves=differences.leaves if differences else None,
        first_wrong=differences.first if differences else (),
        verdict=verdict,
        detail=detail,
        remedy=REMEDIES.get(verdict, ""),
    )


def wrong_leaves(file: VerifiedFile) -> str:
    """Return how many leaves differ, and where, for a table: `2 at bytes 0–524,287`."""
    if not file.first_wrong:
        return "" if file.wrong_leaves is None else "0"
    told = sum(leaf_count(extent.length) for extent in file.first_wrong)
    places = [f"{extent.start:,}–{extent.end - 1:,}" for extent in file.first_wrong]
    more = ["…"] if told < (file.wrong_leaves or 0) else []
    return f"{file.wrong_leaves} at bytes {', '.join([*places, *more])}"


def in_words(file: VerifiedFile) -> str:
    """Return the verdict on a file, and what there is to say beyond it, on one line."""
    leaves = f"{_leaves(file)}, the first at byte {file.first_wrong[0].start}" if file.first_wrong else ""
    return ", ".join(filter(None, (file.verdict, leaves, file.detail)))


def sample_in_words(disk: SampledDisk) -> str:
    """Return what a sample of a disk at the source says, on one line."""
    if not disk.wrong:
        return f"{disk.leaves:,} leaves read, all equal"
    return f"{len(disk.wrong)} of {disk.leaves:,} leaves differ, the first at byte {disk.wrong[0] * LEAF_BYTES}"


def _leaves(file: VerifiedFile) -> str:
    return "1 leaf" if file.wrong_leaves == 1 else f"{file.wrong_leaves} leaves"
