"""Steps of a sync: changed block tracking on, and one image brought up to a later point in time."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from prefect import task
from prefect.artifacts import acreate_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from blocks import VCenter
from tasks.errors import ChangeIdInvalid
from tasks.images.base import Base
from tasks.images.copy import Limits
from tasks.images.state import JobState
from tasks.images.sync import Synced, bring_up_to_date, count
from tasks.limits import lease, resources_of
from tasks.models import Connection, Extent, Manifest, VirtualDisk, VirtualMachine
from tasks.rate import RATE
from tasks.road import opened
from tasks.snapshot import description
from tasks.steps import Meter, connection_of, in_thread, metered, on_vcenter, quietly
from tasks.text import cell, one_line
from tasks.vsphere import changes as tracking
from tasks.vsphere.session import Session, borrow


@task(name="enable-cbt", task_run_name="enable CBT of {vm.name}", cache_policy=NO_CACHE)
async def enable_tracking(vcenter: VCenter, vm: VirtualMachine, name: str) -> None:
    """Switch changed block tracking on. Raises FenceClosed for a VM with snapshots, TrackingOff, PermissionMissing."""
    await on_vcenter(vcenter, tracking.enable_tracking, vm, name=name, description=description())
    get_run_logger().info("changed block tracking switched on vm=%s", vm.moref)


@task(name="sync", task_run_name="sync {job.vm.name} disk {base.image.index}", cache_policy=NO_CACHE)
async def sync_disk(vcenter: VCenter, job: JobState, base: Base, folder: Path, *, skip_readback: bool) -> Synced:
    """Fetch what changed of a disk since its image was made, into the image: which is of no point in time meanwhile.

    Where vSphere cannot tell what changed, all is read, and what differs is written. Cancelled, it returns only when no
    thread of it reads or writes any more. Raises TransferInterrupted, DiskFull, IntegrityMismatch, FileLocked, ….
    """
    stop, started = threading.Event(), time.monotonic()
    label, key = f"sync {job.vm.name} disk {base.image.index}", f"sync-{job.vm.moref}-disk-{base.image.index}"
    slots = lease(resources_of(job.vm, [base.disk]), vcenter=vcenter.host)
    async with slots, metered(label, base.disk.capacity_bytes, key=key) as meter:
        where = (connection_of(vcenter), job, base, folder)
        synced = await in_thread(_sync, stop, *where, meter, stop, skip_readback=skip_readback)
    get_run_logger().info(
        "synced vm=%s disk=%d how=%s why=%r changed=%d fetched=%d written=%d seconds=%.1f",
        *(job.vm.moref, base.image.index, synced.how, synced.why, synced.changed_bytes),
        *(synced.image.bytes_transferred, synced.written_bytes, time.monotonic() - started),
    )
    return synced


def _sync(
    connection: Connection,
    job: JobState,
    base: Base,
    folder: Path,
    meter: Meter,
    stop: threading.Event,
    *,
    skip_readback: bool,
) -> Synced:
    started = time.monotonic()
    with borrow(connection) as session, opened(base.disk, job, connection, stop=stop) as reader:
        changed = partial(_changed, session, job, base.disk)
        done = bring_up_to_date(
            reader,
            base,
            folder,
            changed,
            skip_readback=skip_readback,
            limits=Limits(threads=reader.depth),
            expect=meter.expect,
            progress=meter.add,
            stop=stop,
            rate=RATE.get(),
        )
        took = {"road": reader.road, "road_reason": reader.road_reason, "seconds": time.monotonic() - started}
    return done.model_copy(update={"image": done.image.model_copy(update=took)})


def _changed(session: Session, job: JobState, disk: VirtualDisk, since: str) -> tuple[Extent, ...]:
    if not job.snapshot:
        raise ChangeIdInvalid(disk=disk.title, reason="there is no snapshot to tell what changed until")
    return tracking.changed_extents(session, job.vm, job.snapshot, disk, since=since)


@task(name="manifest", task_run_name="manifest of {manifest.vm.name}", cache_policy=NO_CACHE)
async def commit_sync(manifest: Manifest, synced: Sequence[Synced], folder: Path, domain_xml: str) -> None:
    """Say in `manifest.json`, for all disks at once, that the images are of the new point in time.

    Leaves the report among the run's artifacts.
    """
    await in_thread(count, None, folder, manifest, domain_xml)
    key, words = f"sync-{manifest.vm.moref}", f"Sync of {one_line(manifest.vm.name)}"
    await quietly(acreate_markdown_artifact(markdown(manifest, synced, folder), key=key, description=words))


def markdown(manifest: Manifest, synced: Sequence[Synced], folder: Path) -> str:
    """Return the report of a sync as GitHub markdown."""
    snapshot = manifest.snapshot
    rows = (
        f"| {each.image.index} | {each.how} | {each.changed_bytes:,} | {each.image.bytes_transferred:,} "
        f"| {each.written_bytes:,} | {each.leaves_in_doubt} | {each.image.verified} | {cell(each.why)} |"
        for each in synced
    )
    lines = [
        f"# Sync of {cell(manifest.vm.name)}",
        "",
        *(f"> **Note:** {warning}\n" for warning in manifest.warnings),
        f"As of {cell(snapshot.name)}, {snapshot.created}, in {cell(str(folder))}" if snapshot else "As of now",
        "",
        "| Disk | How | Changed | Fetched | Written | Leaves in doubt | Read back | Why |",
        "| ---: | --- | ---: | ---: | ---: | ---: | --- | --- |",
        *rows,
    ]
    return "\n".join(lines)
