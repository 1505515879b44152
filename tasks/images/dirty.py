"""`disk-<n>.dirty`: which leaves of an image a sync is about to change, written durably before it changes the first.

While there is one, the image is of no point in time, and what is in those leaves, and their digests, is not known. It
goes once a manifest says what the image is of.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from tasks.errors import InvalidInput
from tasks.images.extents import leaf_aligned, whole_disk
from tasks.images.files import sync, write_atomically
from tasks.images.layout import DiskFiles
from tasks.images.manifest import MANIFEST, read_manifest
from tasks.models import FORMAT_VERSION, Extent, Manifest

_log = logging.getLogger(__name__)
_EXTENTS = TypeAdapter(tuple[Extent, ...])


def dirty_leaves(files: DiskFiles, *, size: int) -> tuple[Extent, ...]:
    """Return the leaves that a sync, not come to its end, was about to change; all, where that cannot be read."""
    try:
        content = json.loads(files.dirty.read_bytes())
        if content["version"] != FORMAT_VERSION:
            raise ValueError(f"version {content['version']}")
        return leaf_aligned(_EXTENTS.validate_python(content["leaves"]), size=size)
    except FileNotFoundError:
        return ()
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        _log.warning("a dirty list is damaged: all is fetched path=%s error=%s", files.dirty, type(error).__name__)
        return whole_disk(size)


def begin(files: DiskFiles, leaves: Iterable[Extent]) -> None:
    """Say durably that `leaves` are about to change, in place of what was said before. Raises DiskFull."""
    told = [leaf.model_dump() for leaf in leaves]
    write_atomically(files.dirty, json.dumps({"version": FORMAT_VERSION, "leaves": told}) + "\n")


def forget(folder: Path) -> None:
    """Drop every dirty list of a folder, durably: its manifest says what its images are of."""
    for path in folder.glob("disk-*.dirty"):
        path.unlink(missing_ok=True)
    sync(folder)


def refuse_torn(folder: Path) -> None:
    """Raise InvalidInput where images of a folder are of no one point in time: nothing else may be made of them."""
    if any(folder.glob("disk-*.dirty")):
        raise _torn(folder, "a sync was killed in it, and its images are of no point in time")
    if (folder / MANIFEST).exists():
        manifest = read_manifest(folder)
        if isinstance(manifest, Manifest) and not manifest.consistent:
            raise _torn(folder, "its manifest says that its disks are of several points in time")


def _torn(folder: Path, why: str) -> InvalidInput:
    return InvalidInput(what=f"copy in {folder}", why=why, remedy="Run cbt-sync again, to its end")
