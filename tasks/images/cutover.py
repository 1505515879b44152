"""What a warm migration leaves beside a copy: what its rounds took, what it did to the source, what its domain starts.

    .hyper2kvm.warm.json    the migration, for the run that follows one that was killed
    rollback.json           what was done to the source, each before it was done, until that is rolled back
    cutover/                images that the domain starts from, domain.xml, and, last, cutover.json

The copy itself is never given to anything that writes: the images in `cutover/` are overlays on it, or copies of it.
"""

from __future__ import annotations

import shutil
import threading
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

from pydantic import ValidationError

from tasks.errors import CopyUnfit, InvalidInput
from tasks.images import qemu
from tasks.images.digests import Digests
from tasks.images.domain import DOMAIN, describe
from tasks.images.files import sync, write_atomically
from tasks.images.layout import DiskFiles
from tasks.images.verify import verify
from tasks.models import Aside, DiskImage, Domain, ImageFormat, Manifest, Migration, Round, Value

CAMPAIGN = ".hyper2kvm.warm.json"
ASIDE = "rollback.json"
PLACE, REHEARSAL = "cutover", ".hyper2kvm.rehearsal"
RESULT = "cutover.json"
ROLLED_BACK = "rolled-back"


class Campaign(Value):
    """One warm migration, over all its runs. `approval`: the flow run in which a person is asked; "" before that.

    preparing_s: what a rehearsal of what follows the last sync took; None before it.
    """

    id: str
    rounds: tuple[Round, ...] = ()
    preparing_s: float | None = None
    approval: str = ""


def read_campaign(folder: Path) -> Campaign:
    """Return the migration that goes on in `folder`; a new one where there is none, or none that can be read."""
    try:
        return Campaign.model_validate_json((folder / CAMPAIGN).read_bytes())
    except (FileNotFoundError, ValidationError):
        return Campaign(id=uuid.uuid4().hex)


def write_campaign(folder: Path, campaign: Campaign) -> None:
    write_atomically(folder / CAMPAIGN, campaign.model_dump_json(indent=2) + "\n")


def forget_campaign(folder: Path) -> None:
    """Have the next migration of `folder` begin with a history, and an approval, of its own."""
    (folder / CAMPAIGN).unlink(missing_ok=True)
    sync(folder)


def read_aside(folder: Path) -> Aside | None:
    """Return what was done to the source; None where nothing was. Raises InvalidInput for what cannot be read."""
    try:
        return Aside.model_validate_json((folder / ASIDE).read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise InvalidInput(
            what=f"record {folder / ASIDE}",
            why="it is damaged, or of another version",
            remedy="Put the source back by hand: its power, name and network cards",
        ) from error


def write_aside(folder: Path, aside: Aside) -> None:
    """Say durably what is about to be done to the source."""
    write_atomically(folder / ASIDE, aside.model_dump_json(indent=2) + "\n")


def refuse_cut_over(folder: Path) -> None:
    """Raise CopyUnfit where a domain may run from the copy in `folder`: under its overlays nothing must change."""
    if (folder / PLACE / RESULT).exists():
        raise CopyUnfit(folder=folder, reason="a cutover was made of it, and its domain may run (see cutover.json)")


def put_away(folder: Path, *, when: str) -> None:
    """Give what a domain was to start from another name, since the source runs again."""
    if (folder / PLACE).is_dir():
        (folder / PLACE).rename(folder / f"{ROLLED_BACK}-{when}")
        sync(folder)


def deliver(
    folder: Path,
    manifest: Manifest,
    place: str,
    *,
    format: ImageFormat,
    converted: bool,
    networks: dict[str, str],
    progress: Callable[[float], None] | None = None,
    stop: threading.Event | None = None,
) -> Manifest:
    """Make what the domain starts from in `place`, anew, and return the manifest of that.

    converted: a copy of each image, read back and compared; else an overlay. The images of `folder` are only read.
    Raises DiskFull, IntegrityMismatch, FileLocked, ToolFailed.
    """
    target = folder / place
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    images = tuple(
        _made(folder, target, image, format=format, converted=converted, progress=progress, stop=stop)
        for image in manifest.disks
    )
    domain, xml = _domain_of(manifest, images, target, networks)
    write_atomically(target / DOMAIN, xml)
    sync(target)
    return manifest.model_copy(update={"disks": images, "domain": domain})


def _made(
    folder: Path,
    target: Path,
    image: DiskImage,
    *,
    format: ImageFormat,
    converted: bool,
    progress: Callable[[float], None] | None,
    stop: threading.Event | None,
) -> DiskImage:
    source, made = folder / image.path, target / f"disk-{image.index}.{format}"
    if converted:
        qemu.convert(source, made, source_format=image.format, target_format=format, progress=progress, stop=stop)
        with Digests.open(DiskFiles(folder, image.index).digests) as digests:
            verify(made, format=format, digests=digests, stop=stop)
    else:
        qemu.overlay(source, made, format=image.format)
    return image.model_copy(update={"path": made.name, "format": format, "converted": converted})


def _domain_of(
    manifest: Manifest, images: Sequence[DiskImage], target: Path, networks: dict[str, str]
) -> tuple[Domain, str]:
    """Return the domain that starts `images`; what the copy's own is known to lack, this one lacks too."""
    domain, xml = describe(manifest.vm, images, target, networks)
    lacks = manifest.domain.not_carried if manifest.domain else ()
    return domain.model_copy(update={"not_carried": tuple(dict.fromkeys((*domain.not_carried, *lacks)))}), xml


def drop(folder: Path, place: str) -> None:
    """Remove what `deliver` made in `place`."""
    shutil.rmtree(folder / place, ignore_errors=True)


def land(folder: Path, migration: Migration) -> None:
    """Say in `cutover.json` what came of it: from here on the domain may be started."""
    write_atomically(folder / PLACE / RESULT, migration.model_dump_json(indent=2) + "\n")
