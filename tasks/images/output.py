"""The folder of one exported VM: refused when it holds a copy already, filled under final names at the end only."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from tasks.errors import OutputExists
from tasks.images.domain import DOMAIN
from tasks.images.files import publish, sync
from tasks.images.layout import DiskFiles
from tasks.images.manifest import MANIFEST, write_manifest
from tasks.images.state import JobState, discard
from tasks.models import ImageFormat, Manifest

__all__ = ["MANIFEST", "DiskFiles", "land_all", "refuse_existing"]


def refuse_existing(folder: Path, state: JobState | None) -> None:
    """Raise OutputExists where a folder holds a manifest, a domain, or anything of a disk under its final name.

    Such files of a job whose disks have all arrived pass: it was killed while it gave names, and whoever calls
    adopts them once they are verified. What a job left that was killed after its manifest goes.
    """
    if (folder / MANIFEST).exists():
        discard(folder)
        raise OutputExists(path=folder / MANIFEST, why="an earlier export put it there")
    if state and state.all_arrived:
        return
    for pattern in (*(f"disk-*.{ending}" for ending in (*get_args(ImageFormat), "digests")), DOMAIN):
        for path in sorted(folder.glob(pattern)):
            raise OutputExists(path=path, why="an earlier export put it there")


def land_all(folder: Path, manifest: Manifest, domain_xml: str) -> None:
    """Give the images of a manifest and their digests their final names, commit it, drop what they were made of.

    The domain that uses them is written in between; one of an earlier run of the job is replaced.

    May be killed anywhere, and called again: what has its name keeps it. The manifest is written after every image,
    durably, by rename. Raises OutputExists where a name was taken meanwhile.
    """
    for image in manifest.disks:
        files = DiskFiles(folder, image.index)
        _name(files.digests_part, files.digests)
        _name(files.unnamed(image.format, converted=image.converted), files.final(image.format))
    sync(folder)
    write_manifest(folder, manifest, domain_xml)
    discard(folder)


def give_up(folder: Path) -> None:
    """Forget the job of a folder, unless `land_all` was killed in it: names once given can only be gone on with."""
    if not any(folder.glob("disk-*.digests")):
        discard(folder)


def _name(part: Path, final: Path) -> None:
    if not part.exists() and final.exists():
        return
    if part.exists() and final.exists() and part.samefile(final):  # publish fell between its link and its unlink
        part.unlink()
        return
    publish(part, final)
