"""Step: which files of a VM a download takes; what cannot be taken is refused here, before the first byte."""

from __future__ import annotations

import re
from collections.abc import Sequence

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from blocks import VCenter
from tasks.errors import FileLocked, FileMissing
from tasks.models import DatastoreFile, DownloadJob, LeftOut, Snapshot, Value, VirtualDisk, VirtualMachine
from tasks.selection import check_count, check_names, select
from tasks.steps import on_vcenter
from tasks.vsphere.browse import extents_of, vm_files
from tasks.vsphere.disks import live_disks, powered_off_disks, snapshot_disks
from tasks.vsphere.session import Session

LIVE = "it is written by the running VM: its frozen base is here"


class Plan(Value):
    """What is downloaded. `own`: the paths of those files that disks are made of; `thick`: of disks that are not thin.
    `frozen`: the disks of the point in time. `missing`: what the configuration names, as datastore paths."""

    files: tuple[DatastoreFile, ...]
    own: tuple[str, ...]
    thick: tuple[str, ...]
    left_out: tuple[LeftOut, ...]
    missing: tuple[str, ...]
    frozen: tuple[VirtualDisk, ...]


@task(name="browse", task_run_name="browse {vm.name}", cache_policy=NO_CACHE)
async def browse(vcenter: VCenter, vm: VirtualMachine, options: DownloadJob, snapshot: Snapshot | None) -> Plan:
    """Return the files to download, as they are in the datastores now.

    Raises FileLocked for a VM that runs without a snapshot (none is held, and none is asked for), FileUnfit for a name
    that cannot be taken, InvalidInput for too many files or none, FileMissing where that is to fail.
    """
    found = await on_vcenter(vcenter, _planned, vm, options, snapshot)
    total = sum(file.size_bytes for file in found.files)
    get_run_logger().info("browsed vm=%s files=%d bytes=%d", vm.moref, len(found.files), total)
    for each in found.left_out:
        get_run_logger().info("left out path=%r: %s", each.path, each.why)
    return found


def _planned(session: Session, vm: VirtualMachine, options: DownloadJob, snapshot: Snapshot | None) -> Plan:
    running = vm.power_state != "poweredOff"
    live = live_disks(session, vm) if running else powered_off_disks(session, vm)
    frozen = snapshot_disks(session, snapshot) if snapshot else () if running else live
    found = vm_files(session, vm, (*live, *frozen))
    files, left_out = select(found, include=options.include_glob, exclude=options.exclude_glob, running=running)
    if snapshot:
        files, deltas = _without_live(files, live)
        left_out += deltas
    elif running and not options.snapshot:
        _refuse_locked(vm, files, live)
    check_names(files)
    check_count(files, max_files=options.max_files)
    missing = _missing(found, frozen or live)
    if missing and options.fail_on_missing:
        raise FileMissing(
            path=missing[0],
            why=f"the configuration of {vm.name} names it",
            remedy="Look for it in vSphere; without --fail-on-missing the rest is downloaded",
        )
    patterns = [extents_of(path) for disk in (*live, *frozen) for path in (disk.datastore_path, *disk.parents)]
    own = tuple(file.path for file in files if _any(patterns, file))
    solid = _patterns([disk for disk in frozen if not disk.thin])
    thick = tuple(file.path for file in files if _any(solid, file))
    return Plan(files=files, own=own, thick=thick, left_out=left_out, missing=missing, frozen=frozen)


def _without_live(
    files: Sequence[DatastoreFile], live: Sequence[VirtualDisk]
) -> tuple[tuple[DatastoreFile, ...], tuple[LeftOut, ...]]:
    patterns = _patterns(live)
    out = tuple(file for file in files if _any(patterns, file))
    kept = tuple(file for file in files if file not in out)
    return kept, tuple(LeftOut(path=file.path, why=LIVE) for file in out)


def _refuse_locked(vm: VirtualMachine, files: Sequence[DatastoreFile], live: Sequence[VirtualDisk]) -> None:
    descriptors, patterns = {disk.datastore_path for disk in live}, _patterns(live)
    for file in files:
        if file.datastore_path not in descriptors and _any(patterns, file):
            raise FileLocked(
                path=file.datastore_path,
                remedy=f"{vm.name} is not powered off: download with a snapshot (--snapshot), power it off, or leave "
                "its disks out (--exclude-glob '*.vmdk')",
            )


def _missing(found: Sequence[DatastoreFile], disks: Sequence[VirtualDisk]) -> tuple[str, ...]:
    """Return what the configuration names and the datastores do not list: descriptors, and at least one extent each."""
    there = [file.datastore_path for file in found]
    missing = []
    for path in [path for disk in disks if not disk.object_id for path in (disk.datastore_path, *disk.parents)]:
        mine = [each for each in there if extents_of(path).fullmatch(each)]
        if path not in mine:
            missing.append(path)
        elif len(mine) == 1:
            missing.append(f"{path} (the file with its content)")
    return tuple(missing)


def _patterns(disks: Sequence[VirtualDisk]) -> list[re.Pattern[str]]:
    return [extents_of(disk.datastore_path) for disk in disks]


def _any(patterns: Sequence[re.Pattern[str]], file: DatastoreFile) -> bool:
    return any(pattern.fullmatch(file.datastore_path) for pattern in patterns)
