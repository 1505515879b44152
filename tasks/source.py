"""Steps that ask the source of a copy again: whether its point in time is still there, and a sample of its leaves."""

from __future__ import annotations

import threading
from datetime import datetime
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from blocks import VCenter
from tasks.errors import InvalidInput, SourceChanged
from tasks.images.digests import LEAF_BYTES, Digests
from tasks.images.layout import DiskFiles
from tasks.images.sample import chosen_leaves, differing_at_source
from tasks.images.state import JobState
from tasks.models import (
    Connection,
    DiskImage,
    Manifest,
    SampledDisk,
    Snapshot,
    VirtualDisk,
    VirtualMachine,
)
from tasks.road import opened
from tasks.steps import Meter, connection_of, in_thread, metered, on_vcenter
from tasks.vsphere.browse import vm_files
from tasks.vsphere.session import Session
from tasks.vsphere.snapshots import existing_snapshot


@task(name="point-in-time", task_run_name="point in time of {vm.name}", cache_policy=NO_CACHE)
async def snapshot_of_copy(vcenter: VCenter, vm: VirtualMachine, manifest: Manifest) -> Snapshot | None:
    """Return the snapshot that a copy was made of, if it still exists; None where the VM is off and was not changed.

    Raises SourceChanged where neither holds, so far as that can be told before its disks are known.
    """
    copied = manifest.snapshot
    there = await on_vcenter(vcenter, _still_there, vm, copied) if copied else None
    if there:
        return there
    gone = f"its snapshot {copied.name} is gone" if copied else "it was copied without a snapshot"
    if vm.power_state != "poweredOff":
        raise SourceChanged(vm=vm.name, reason=f"{gone}, and it is not powered off")
    if copied is None and vm.change_version != manifest.vm.change_version:
        raise SourceChanged(vm=vm.name, reason=f"{gone}, and was started or reconfigured since")
    return None


def _still_there(session: Session, vm: VirtualMachine, copied: Snapshot) -> Snapshot | None:
    try:
        there = existing_snapshot(session, vm, copied.moref)
    except InvalidInput:
        return None
    return there if (there.name, there.created) == (copied.name, copied.created) else None


@task(name="unchanged", task_run_name="disks of {vm.name}", cache_policy=NO_CACHE)
async def source_disks(
    vcenter: VCenter, vm: VirtualMachine, manifest: Manifest, snapshot: Snapshot | None, disks: tuple[VirtualDisk, ...]
) -> tuple[VirtualDisk, ...]:
    """Return the disk of each image, in order, and see that it is what was copied.

    Without a snapshot (the VM is off), its flat files must not have been written to since the copy's point in time.
    Raises SourceChanged.
    """
    by_key = {disk.key: disk for disk in disks}
    found = []
    for image in manifest.disks:
        disk = by_key.get(image.disk_key)
        if disk is None or (disk.datastore_path, disk.uuid) != (image.source, image.uuid):
            now = disk.datastore_path if disk else "gone"
            raise SourceChanged(vm=vm.name, reason=f"disk {image.index} lay at {image.source} and is now {now}")
        found.append(disk)
    if snapshot is None:
        await on_vcenter(vcenter, _check_not_written, vm, manifest, tuple(found))
    return tuple(found)


def _check_not_written(
    session: Session, vm: VirtualMachine, manifest: Manifest, disks: tuple[VirtualDisk, ...]
) -> None:
    """Both times are the source's own clock where there was a snapshot; else the copy's end is ours."""
    since = manifest.snapshot.created if manifest.snapshot else manifest.created
    written = {file.datastore_path: file.modified for file in vm_files(session, vm, disks)}
    for disk in disks:
        at = written.get(f"{disk.datastore_path.removesuffix('.vmdk')}-flat.vmdk", "")
        if not at or datetime.fromisoformat(at) > datetime.fromisoformat(since):
            when = f"was written to at {at}" if at else "does not say when it was last written to"
            raise SourceChanged(vm=vm.name, reason=f"{disk.title} {when}, and the copy is of {since}")


@task(name="sample", task_run_name="sample {job.vm.name} disk {image.index}", cache_policy=NO_CACHE)
async def sample_disk(
    vcenter: VCenter, job: JobState, image: DiskImage, folder: Path, *, count: int, seed: int
) -> SampledDisk:
    """Read `count` random leaves of a job's disk by its road, and compare them with the digests of the disk's image.

    Cancelled, it returns only when no thread of it reads any more. Raises FileLocked, TransferInterrupted, ….
    """
    vm, stop, key = job.vm, threading.Event(), f"sample-{job.vm.moref}-disk-{image.index}"
    (disk,) = (each for each in job.disks if each.key == image.disk_key)
    leaves = chosen_leaves(image.virtual_size, count=count, seed=f"{seed}-{image.index}")
    async with metered(f"sample {vm.name} disk {image.index}", len(leaves) * LEAF_BYTES, key=key) as meter:
        sidecar = DiskFiles(folder, image.index).digests
        wrong = await in_thread(_sampled, stop, connection_of(vcenter), job, disk, sidecar, leaves, meter, stop)
    get_run_logger().info("sampled vm=%s disk=%d leaves=%d wrong=%d", vm.moref, image.index, len(leaves), len(wrong))
    return SampledDisk(path=image.path, source=image.source, leaves=len(leaves), wrong=wrong)


def _sampled(
    connection: Connection,
    job: JobState,
    disk: VirtualDisk,
    sidecar: Path,
    leaves: tuple[int, ...],
    meter: Meter,
    stop: threading.Event,
) -> tuple[int, ...]:
    with Digests.open(sidecar) as digests, opened(disk, job, connection, stop=stop, scattered=True) as reader:
        return differing_at_source(reader, digests, leaves, progress=meter.add, stop=stop)
