"""The folder of one exported VM: refused when it holds a copy already, filled under final names at the end only."""

from __future__ import annotations

from pathlib import Path

from tasks.errors import OutputExists
from tasks.images.files import part_of, publish
from tasks.images.manifest import MANIFEST, write_manifest
from tasks.models import Manifest

__all__ = ["MANIFEST", "land_all", "refuse_existing"]


def refuse_existing(folder: Path) -> None:
    """Raise OutputExists where a folder holds a manifest or an image under its final name: before the first byte."""
    for pattern in (MANIFEST, "disk-*.qcow2", "disk-*.raw"):
        for path in sorted(folder.glob(pattern)):
            raise OutputExists(path=path, why="an earlier export put it there")


def land_all(folder: Path, manifest: Manifest) -> None:
    """Give the images of a manifest and their digests their final names, drop what they were made of, commit.

    Raises OutputExists; the manifest is written last, durably, by rename.
    """
    for image in manifest.disks:
        digests, final = folder / f"disk-{image.index}.digests", folder / image.path
        publish(part_of(digests), digests)
        publish(part_of(final), final)
    write_manifest(folder, manifest)
    for image in manifest.disks:
        part_of(folder / f"disk-{image.index}.raw").unlink(missing_ok=True)
