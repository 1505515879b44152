"""The `cbt_sync` mode: a whole copy first, and from then on only what changed, into the same images."""

from __future__ import annotations

import time
from functools import partial

from prefect import flow

from blocks import VCenter
from flows.export import copy_whole
from tasks.describe import describe_domain
from tasks.disks import Choice, check_flat, copyable_disks
from tasks.errors import TrackingOff
from tasks.images.base import base_of, paired
from tasks.images.state import discard
from tasks.job import Job, job_at_work
from tasks.models import Manifest, Roads, Snapshot, SyncJob, Value, VirtualDisk
from tasks.probe import probe
from tasks.report import manifest_of
from tasks.snapshot import check_snapshot, point_in_time
from tasks.steps import side_by_side
from tasks.succession import clean_up
from tasks.sync import commit_sync, enable_tracking, sync_disk


@flow(
    name="cbt-sync",
    flow_run_name="sync {options.vm_name}",
    on_cancellation=[clean_up],
    on_crashed=[clean_up],
    on_failure=[clean_up],
)
async def cbt_sync(vcenter: VCenter, options: SyncJob) -> Manifest:
    """Bring the copy of a VM up to now: the first run copies its disks, each later one only what changed since.

    vSphere's changed block tracking says what changed; where it cannot, all is read and what differs is written. The
    images and `manifest.json` lie in `<output folder>/<VM>/`, as `export` leaves them, and count as of the new point in
    time once the manifest says so; a run that was killed is made good by the next. The source VM is left as it was.

    Args:
        vcenter: Where the VM is now: a saved vCenter, or a new one through Add.
        options: Which VM to copy, where to, and how.
    """
    async with job_at_work(vcenter, options) as job:
        if not job.vm.cbt_enabled:
            if not options.enable_cbt:
                raise TrackingOff(vm=job.vm.name, why="changeTrackingEnabled is false")
            await enable_tracking(vcenter, job.vm, job.snapshot_name)
        base = base_of(job.folder)
        if base is None:
            return await copy_whole(vcenter, job, options, Roads(), Choice())
        return await _brought_up_to_date(vcenter, job, base, options)


async def _brought_up_to_date(vcenter: VCenter, job: Job, base: Manifest, options: SyncJob) -> Manifest:
    """Return the manifest of the copy as of a new point in time, of all its disks at once."""
    give_up, name = partial(discard, job.folder), job.snapshot_name
    # Never a snapshot of a run before: from the manifest's changeId on, one of now costs hardly more. So no state is
    # written either, and a run that was killed keeps none: `clean_up` removes its snapshot.
    async with point_in_time(vcenter, job.vm, options, name=name, before=None, give_up=give_up) as snapshot:
        return (await sync_to(vcenter, job, snapshot, base, options)).manifest


class SyncedCopy(Value):
    """A copy as of a new point in time: its manifest, the source's disks there, how many seconds fetching took."""

    manifest: Manifest
    disks: tuple[VirtualDisk, ...]
    transfer_s: float


async def sync_to(
    vcenter: VCenter, job: Job, snapshot: Snapshot | None, base: Manifest, options: SyncJob
) -> SyncedCopy:
    """Bring the copy of a job up to `snapshot`, which stands meanwhile; it counts on return."""
    vm, folder = job.vm, job.folder
    disks = await copyable_disks(vcenter, job.server, vm, snapshot, Choice())
    check_flat(disks, snapshot)
    pairs = paired(folder, base, vm, disks)
    state = job.state(snapshot, disks)
    await probe(vcenter, state)
    calls = [partial(sync_disk, vcenter, state, pair, folder, skip_readback=options.skip_readback) for pair in pairs]
    started = time.monotonic()
    synced = await side_by_side(calls, at_once=options.parallel_disks)
    transfer_s = time.monotonic() - started
    await check_snapshot(vcenter, vm, snapshot, disks)
    images = tuple(sorted((each.image for each in synced), key=lambda image: image.index))
    domain, xml = await describe_domain(state, images, folder, options)
    manifest = manifest_of(vcenter, state, images, domain, quiesce=options.quiesce)
    await commit_sync(manifest, synced, folder, xml)
    return SyncedCopy(manifest=manifest, disks=disks, transfer_s=transfer_s)
