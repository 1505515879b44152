"""The folder of one downloaded VM: what is here already, where files arrive, and how they get their names."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path

from blake3 import blake3
from pydantic import ValidationError

from tasks.errors import OutputExists
from tasks.images.digests import LEAF_BYTES, Digests, algorithm_of
from tasks.images.files import BLOCK_BYTES, naming_full_disk, part_of, publish, sync, write_atomically
from tasks.images.job import LOCK
from tasks.images.layout import DiskFiles
from tasks.images.manifest import MANIFEST
from tasks.images.state import STATE
from tasks.models import DatastoreFile, DigestName, DownloadedFile, DownloadManifest, VirtualMachine
from tasks.process import Stopped

PARTS = ".hyper2kvm.parts"
LANDING = ".hyper2kvm.landing.json"  # the manifest to be, while files get their names
COARSEST_TIME_S = 2.0  # of the file systems that Linux writes to: FAT's


def parts_of(folder: Path, file: DatastoreFile) -> DiskFiles:
    """Return the files that one file arrives in; their names say nothing of its own."""
    return DiskFiles(folder / PARTS, int.from_bytes(blake3(file.path.encode()).digest(length=6)))


def begin(folder: Path) -> None:
    """Make the folder that files arrive in, if it is missing. Raises DiskFull."""
    with naming_full_disk(folder / PARTS, need=BLOCK_BYTES):
        (folder / PARTS).mkdir(exist_ok=True)


def known_files(folder: Path, *, vcenter_uuid: str, vm: VirtualMachine) -> dict[str, DownloadedFile]:
    """Return by path what earlier runs have downloaded of this VM into `folder`.

    Raises OutputExists where the folder holds anything else: also under a name that an earlier run meant to give.
    """
    known: dict[str, DownloadedFile] = {}
    for name in (MANIFEST, LANDING):
        manifest = _manifest(folder / name)
        if manifest and (manifest.vcenter_uuid, manifest.vm.instance_uuid) != (vcenter_uuid, vm.instance_uuid):
            raise OutputExists(path=folder / name, why="it is of another VM, or of one from another vCenter")
        files = (*manifest.earlier, *manifest.files) if manifest else ()
        known |= {file.path: file for file in files if name == MANIFEST or _was_named(folder / file.path, file)}
    for path in _all_in(folder):
        if path not in known:
            raise OutputExists(path=folder / path, why="no download of ours put it there")
    return known


def _was_named(path: Path, file: DownloadedFile) -> bool:
    """Tell whether a file has the size and time that ours get with their name: the list is written before that."""
    if not file.modified or path.is_symlink() or not path.is_file():
        return False
    there = path.stat()
    return there.st_size == file.size_bytes and abs(there.st_mtime - _time_of(file)) < COARSEST_TIME_S


def _time_of(file: DatastoreFile) -> float:
    return datetime.fromisoformat(file.modified).timestamp()


def _manifest(path: Path) -> DownloadManifest | None:
    try:
        return DownloadManifest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise OutputExists(path=path, why="it is no manifest of a download of ours") from error


def _all_in(folder: Path) -> Iterator[str]:
    """Yield the relative path of everything in `folder` that is no folder and has no name of ours. Links are not
    followed."""
    ours = {LOCK, STATE, MANIFEST, LANDING, *(part_of(Path(name)).name for name in (STATE, MANIFEST, LANDING))}
    for top, folders, names in os.walk(folder):
        at_the_top = Path(top) == folder
        links = [name for name in folders if (Path(top) / name).is_symlink()]
        for name in (*links, *names):
            if not (at_the_top and name in ours):
                yield (Path(top) / name).relative_to(folder).as_posix()
        if at_the_top and PARTS not in links:
            folders[:] = [name for name in folders if name != PARTS]


def still_here(
    folder: Path, file: DatastoreFile, *, known: DownloadedFile | None, point: str, stop: threading.Event
) -> bool:
    """Tell whether a file is here as it is at the source: same size, time and digest, of the same kind of point.

    What a host has open may change and keep its time, so a disk of a VM that ran is believed only within one point.
    """
    path = folder / file.path
    if not known or not file.modified or (known.size_bytes, known.modified) != (file.size_bytes, file.modified):
        return False
    if file.path.endswith(".vmdk") and known.point != point and not (is_off(known.point) and is_off(point)):
        return False
    if path.is_symlink() or not path.is_file() or path.stat().st_size != file.size_bytes:
        return False
    scratch = parts_of(folder, file).digests_part
    return digest_of(path, scratch=scratch, algorithm=algorithm_of(known.digest), stop=stop) == known.digest


def is_off(point: str) -> bool:
    """Tell whether a point in time is that of a VM that is powered off."""
    return point.startswith("off")


def digest_of(path: Path, *, scratch: Path, algorithm: DigestName = "blake3", stop: threading.Event) -> str:
    """Return the digest of a file, read from its first byte to its last. Raises Stopped."""
    size = path.stat().st_size
    with path.open("rb") as content, Digests.create(scratch, size=size, algorithm=algorithm) as digests:
        leaf = 0
        while chunk := content.read(LEAF_BYTES):
            if stop.is_set():
                raise Stopped
            digests.put(leaf, digests.record_of(chunk))
            leaf += 1
        return digests.image_digest()


def land_files(folder: Path, manifest: DownloadManifest, known: Mapping[str, DownloadedFile]) -> None:
    """Give every file that has arrived its name, then write the manifest, and drop what files arrived in.

    May be killed anywhere, or fail: what is half done is known to the next run. Only a file that a download of ours
    put there is replaced. Raises OutputExists, DiskFull.
    """
    write_atomically(folder / LANDING, manifest.model_dump_json(indent=2) + "\n")
    for file in manifest.files:
        part = parts_of(folder, file).raw_part
        if part.exists():
            _name(part, folder / file.path, file, ours=file.path in known)
    write_atomically(folder / MANIFEST, manifest.model_dump_json(indent=2) + "\n")
    (folder / LANDING).unlink()
    forget(folder)


def _name(part: Path, final: Path, file: DownloadedFile, *, ours: bool) -> None:
    with naming_full_disk(final, need=BLOCK_BYTES):
        final.parent.mkdir(parents=True, exist_ok=True)
    if file.modified:
        os.utime(part, (_time_of(file), _time_of(file)))
    if ours and final.is_file() and not final.is_symlink():
        sync(part)
        part.replace(final)
        sync(final.parent)
    else:
        publish(part, final)


def forget(folder: Path) -> None:
    """Drop what files arrived in, and what is known of a run under way. What has its name stays, and known to be ours.

    May be cut short anywhere, and called again.
    """
    (folder / STATE).unlink(missing_ok=True)
    sync(folder)
    shutil.rmtree(folder / PARTS, ignore_errors=True)
    sync(folder)
