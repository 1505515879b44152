"""A copy that is here, as what a sync brings up to date: which image is whose, and how each is to be gone about."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

from tasks.errors import CopyUnfit
from tasks.images.changes import Changes, closed_up, everything
from tasks.images.cutover import refuse_cut_over
from tasks.images.digests import Digests
from tasks.images.layout import DiskFiles
from tasks.images.manifest import MANIFEST, read_manifest
from tasks.models import ArrivalFormat, DiskImage, Extent, Manifest, Value, VirtualDisk, VirtualMachine

GAP_BYTES = 128 * 1024  # what a request more costs over a network of a millisecond and 100 MB/s
SYNCED = get_args(ArrivalFormat)


class Base(Value):
    """One disk as the source has it now, and its image as the manifest has it."""

    disk: VirtualDisk
    image: DiskImage

    @property
    def grown(self) -> str:
        """Why vSphere's word on what changed is not asked for: the disk was resized; "" where it was not."""
        before, now = self.image.virtual_size, self.disk.capacity_bytes
        return "" if before == now else f"the disk was resized from {before} to {now} bytes"

    @property
    def format(self) -> ArrivalFormat:
        return "raw" if self.image.format == "raw" else "qcow2"

    def files(self, folder: Path) -> DiskFiles:
        return DiskFiles(folder, self.image.index)


class Plan(Value):
    """How a disk is brought up to date: by what `changed`, or, None, by reading all and writing what differs; why."""

    changed: tuple[Extent, ...] | None
    why: str

    @property
    def how(self) -> Literal["changes", "everything"]:
        return "everything" if self.changed is None else "changes"

    def changes(self, size: int, dirty: Sequence[Extent]) -> Changes:
        """Return what is fetched of a disk of `size` bytes of which the leaves `dirty` are in doubt."""
        if self.changed is None:
            return everything(size)
        return Changes(closed_up(self.changed, gap_bytes=GAP_BYTES), size=size, doubtful=dirty)


def base_of(folder: Path) -> Manifest | None:
    """Return the manifest of the copy in `folder`; None where there is none.

    Raises InvalidInput for a damaged one, CopyUnfit for one of a download, or one that a domain may run from.
    """
    if not (folder / MANIFEST).exists():
        return None
    refuse_cut_over(folder)
    manifest = read_manifest(folder)
    if not isinstance(manifest, Manifest):
        raise CopyUnfit(folder=folder, reason="it is a download, byte for byte, and no images")
    return manifest


def paired(folder: Path, base: Manifest, vm: VirtualMachine, disks: Sequence[VirtualDisk]) -> tuple[Base, ...]:
    """Return each disk of the VM with its image, by the disks' UUIDs. Raises CopyUnfit where they do not match."""
    if base.vm.instance_uuid != vm.instance_uuid:
        raise CopyUnfit(folder=folder, reason=f"it is of another VM ({base.vm.name}, {base.vm.instance_uuid})")
    images = {image.uuid: image for image in base.disks}
    for disk in disks:
        if disk.uuid is None or disk.uuid not in images:
            raise CopyUnfit(folder=folder, reason=f"{disk.title} is not in it")
    pairs = tuple(Base(disk=disk, image=images[disk.uuid]) for disk in disks)
    if gone := set(images) - {disk.uuid for disk in disks}:
        names = ", ".join(images[uuid].path for uuid in sorted(gone, key=str))
        raise CopyUnfit(folder=folder, reason=f"the VM has no disk for {names} any more")
    for pair in pairs:
        _check_image(folder, pair)
    return pairs


def _check_image(folder: Path, pair: Base) -> None:
    image = pair.image
    if image.format not in SYNCED or not (folder / image.path).is_file():
        what = "is not there" if image.format in SYNCED else f"is {image.format}, and raw or qcow2 is needed"
        raise CopyUnfit(folder=folder, reason=f"{image.path} {what}")
    if image.virtual_size > pair.disk.capacity_bytes:
        sizes = f"{image.virtual_size} bytes, and {pair.disk.title} has {pair.disk.capacity_bytes}"
        raise CopyUnfit(folder=folder, reason=f"{image.path} has {sizes}: vSphere shrinks no disk, so it is another")


def sound(pair: Base, digests: Digests) -> str:
    """Return why the digests of an image are not those of its manifest; "" where they are."""
    there = digests.image_digest()
    return "" if there == pair.image.digest else f"the digests here are {there}, and the manifest's {pair.image.digest}"


def same_tracking(before: str | None, now: str | None) -> str:
    """Return why a changeId says nothing of what happened since another; "" where it does.

    A changeId is `<uuid>/<number>`: another uuid means that tracking began anew in between, and a number that did not
    go up that the disk was put back, its tracking with it, as an array or a backup does that restores files.
    """
    if not before:
        return "the copy was made without changed block tracking"
    if not now:
        return "the disk has no changeId"
    (tracked, _, at), (tracking, _, since) = before.partition("/"), now.partition("/")
    if tracked != tracking:
        return "changed block tracking was reset since the last copy"
    if at.isdecimal() and since.isdecimal() and int(since) <= int(at):
        return f"its changeId has number {since} and the copy's has {at}: the disk was put back to an older state"
    return ""
