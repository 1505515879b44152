"""The `cbt_sync` mode: a whole copy first, and from then on only what changed, into the same images."""

from __future__ import annotations

import time
from functools import partial

from prefect import flow

from blocks import ESXiHost, NbdSource, VCenter, VddkToolkit
from flows.export import copy_whole, frozen
from tasks.describe import describe_domain
from tasks.disks import Choice, copyable_disks
from tasks.errors import TrackingOff
from tasks.images.base import base_of, paired
from tasks.images.state import JobState
from tasks.job import Job, job_at_work
from tasks.models import Manifest, Roads, Snapshot, SyncJob, Value
from tasks.report import manifest_of
from tasks.route import Means, on_a_road, roads_for
from tasks.snapshot import check_snapshot
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
async def cbt_sync(
    vcenter: VCenter,
    options: SyncJob,
    toolkit: VddkToolkit | None = None,
    nbd_source: NbdSource | None = None,
    esxi_host: ESXiHost | None = None,
) -> Manifest:
    """Bring the copy of a VM up to now: the first run copies its disks, each later one only what changed since.

    vSphere's changed block tracking says what changed; where it cannot, all is read and what differs is written. The
    images and `manifest.json` lie in `<output folder>/<VM>/`, as `export` leaves them, and count as of the new point in
    time once the manifest says so; a run that was killed is made good by the next. The source VM is left as it was.

    Args:
        vcenter: Where the VM is now: a saved vCenter, or a new one through Add.
        options: Which VM to copy, where to, and how.
        toolkit: For the transports vddk and auto: where VMware's VDDK lies on the worker's machine.
        nbd_source: For the transports nbd and auto: the server, or the command, that disks are read from.
        esxi_host: For the transports ssh and auto: the host that has the disks' files.
    """
    roads = roads_for(options, Means(toolkit=toolkit, nbd_source=nbd_source, esxi_host=esxi_host))
    async with job_at_work(vcenter, options) as job:
        if not job.vm.cbt_enabled:
            if not options.enable_cbt:
                raise TrackingOff(vm=job.vm.name, why="changeTrackingEnabled is false")
            await enable_tracking(vcenter, job.vm, job.snapshot_name)
        base = base_of(job.folder)
        if base is None:
            return await copy_whole(vcenter, job, options, roads, Choice())
        # Never a snapshot of a run before: from the manifest's changeId on, one of now costs hardly more. So a run that
        # was killed keeps none: `clean_up` removes its snapshot.
        async with frozen(vcenter, job, options, roads, Choice()) as snapshot:
            return (await sync_to(vcenter, job, snapshot, base, options, roads)).manifest


class SyncedCopy(Value):
    """A copy as of a new point in time: its manifest, the job there and its road, how many seconds fetching took."""

    manifest: Manifest
    job: JobState
    transfer_s: float


async def sync_to(
    vcenter: VCenter, job: Job, snapshot: Snapshot | None, base: Manifest, options: SyncJob, roads: Roads
) -> SyncedCopy:
    """Bring the copy of a job up to `snapshot`, which stands meanwhile, all disks at once; it counts on return."""
    vm, folder = job.vm, job.folder
    disks = await copyable_disks(vcenter, job.server, vm, snapshot, Choice())
    pairs = paired(folder, base, vm, disks)
    afresh = job.state(snapshot, disks).model_copy(update={"resumable": False})
    async with on_a_road(vcenter, afresh, roads, folder) as state:
        calls = [
            partial(sync_disk, vcenter, state, each, folder, skip_readback=options.skip_readback) for each in pairs
        ]
        started = time.monotonic()
        synced = await side_by_side(calls, at_once=options.parallel_disks)
        transfer_s = time.monotonic() - started
        await check_snapshot(vcenter, vm, snapshot, disks)
    images = tuple(sorted((each.image for each in synced), key=lambda image: image.index))
    domain, xml = await describe_domain(state, images, folder, options)
    manifest = manifest_of(vcenter, state, images, domain, quiesce=options.quiesce)
    await commit_sync(manifest, synced, folder, xml)
    return SyncedCopy(manifest=manifest, job=state, transfer_s=transfer_s)
