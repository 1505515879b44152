"""The `export` mode: a VM's disks, of one point in time, as verified qcow2 or raw images."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

from prefect import flow

from blocks import ESXiHost, NbdSource, VCenter, VddkToolkit
from tasks.boot import check_boot, proven
from tasks.convert import land
from tasks.define import check_definable, define
from tasks.describe import describe_domain
from tasks.disks import Choice, check_problems, copyable_disks
from tasks.images.boot import need_tools
from tasks.images.files import allocated_bytes
from tasks.images.output import DiskFiles, give_up, refuse_existing
from tasks.images.state import JobState, discard, read_state, resumable, write_state
from tasks.job import Job, job_at_work
from tasks.models import DiskJob, ExportJob, Manifest, Roads, Snapshot
from tasks.report import commit, manifest_of
from tasks.road import road_of
from tasks.route import Means, chains, on_a_road, roads_for
from tasks.snapshot import check_snapshot, drop_snapshot, kept_if_interrupted, point_in_time
from tasks.steps import check_room, side_by_side
from tasks.succession import clean_up
from tasks.transfer import transfer


@flow(
    name="export",
    flow_run_name="export {options.vm_name}",
    on_cancellation=[clean_up],
    on_crashed=[clean_up],
    on_failure=[clean_up],
)
async def export_vm(
    vcenter: VCenter,
    options: ExportJob,
    toolkit: VddkToolkit | None = None,
    nbd_source: NbdSource | None = None,
    esxi_host: ESXiHost | None = None,
) -> Manifest:
    """Copy a VM's disks out of vSphere and land them, verified, as images that KVM starts from.

    A snapshot freezes the VM, each disk is read by the road chosen, the snapshot is removed whatever happens,
    the images are read back and compared, and only then get their names: `<output folder>/<VM>/disk-<n>.qcow2`,
    with `domain.xml`, which libvirt starts them by, and `manifest.json` beside them. The source VM is left as it was.
    A run that was killed, or whose vCenter went away, is gone on with by the next run to the same folder. On request
    the copy is started aside at the end; it is kept whatever comes of that.

    Args:
        vcenter: Where the VM is now: a saved vCenter, or a new one through Add.
        options: Which VM to export, where to, and how.
        toolkit: For the transports vddk and auto: where VMware's VDDK lies on the worker's machine.
        nbd_source: For the transports nbd and auto: the server, or the command, that disks are read from.
        esxi_host: For the transports ssh and auto: the host that has the disks' files.
    """
    roads = roads_for(options, Means(toolkit=toolkit, nbd_source=nbd_source, esxi_host=esxi_host))
    async with job_at_work(vcenter, options) as job:
        if options.boot_check:
            need_tools(uefi=job.vm.firmware == "efi")
        await check_definable(job.vm, job.folder, options)
        manifest = await copy_whole(vcenter, job, options, roads, Choice())
        if options.boot_check:
            proven(await check_boot(job.folder, options.boot), job.folder)
        if options.define:
            await define(vcenter, manifest, job.folder, options)
        return manifest


@asynccontextmanager
async def frozen(
    vcenter: VCenter, job: Job, options: DiskJob, roads: Roads, choice: Choice, *, before: Snapshot | None = None
) -> AsyncIterator[Snapshot | None]:
    """Yield a point in time of a job's VM for the block, as `point_in_time` does, for whichever of `roads` is taken.

    Raises UnsupportedDisk besides, for a disk that no road can copy.
    """
    by_chains = chains(roads)
    if by_chains and not options.snapshot_moref:  # else the fence before a snapshot sees to it
        await check_problems(vcenter, job.vm, choice)
    point = point_in_time(
        vcenter,
        job.vm,
        options,
        name=job.snapshot_name,
        before=before,
        give_up=partial(discard, job.folder),
        going_on=partial(resumable, job.folder),
        chains=by_chains,
    )
    async with point as snapshot:
        yield snapshot


async def copy_whole(vcenter: VCenter, job: Job, options: DiskJob, roads: Roads, choice: Choice) -> Manifest:
    """Return the manifest of a job of which nothing, or parts only, are here, once every disk chosen is."""
    state = await _arrived(vcenter, job, options, roads, choice)
    return await _landed(vcenter, state, job.folder, options)


async def _arrived(vcenter: VCenter, job: Job, options: DiskJob, roads: Roads, choice: Choice) -> JobState:
    """Return the job's state once every disk chosen lies here as a part, copied now or by an earlier run."""
    vm, folder = job.vm, job.folder
    state = read_state(folder)
    other_disks = state and state.disks and state.selection != choice.words  # were wanted then
    if state and (other_disks or not state.resumable):
        discard(folder)
        state = None
    refuse_existing(folder, state)
    if state and state.all_arrived:
        await drop_snapshot(vcenter, vm, job.snapshot_name)
        return state
    before = state.snapshot if state else None
    async with frozen(vcenter, job, options, roads, choice, before=before) as snapshot:
        there = await copyable_disks(vcenter, job.server, vm, snapshot, choice)
        disks = choice.of(there)
        chosen = {
            "digest": options.digest,
            "tracked": options.tracked,
            "selection": choice.words,
            "left_out": tuple(disk.title for disk in there if disk not in disks),
            "resumable": state is not None,  # else from the first byte on
        }
        state = job.state(snapshot, disks).model_copy(update=chosen)
        async with on_a_road(vcenter, state, roads, folder) as state:
            state = await _transferred(vcenter, state.model_copy(update={"resumable": True}), folder, options)
    return state


async def _transferred(vcenter: VCenter, state: JobState, folder: Path, options: DiskJob) -> JobState:
    """Return the state of a job whose road is known, once its disks lie here as parts of one point in time."""
    arriving = options.arrival_format
    parts = {disk: DiskFiles(folder, disk.index) for disk in state.disks}
    room = {disk: disk.capacity_bytes - allocated_bytes(files.part(arriving)) for disk, files in parts.items()}
    # a sparse road says later what is allocated, and reads only that
    sure = [] if options.overcommit or road_of(state).sparse else [disk for disk in state.disks if not disk.thin]
    check_room(
        folder,
        sure_bytes=sum(max(0, room[disk]) for disk in sure),
        most_bytes=sum(max(0, left) for left in room.values()),
    )
    write_state(folder, state)
    calls = [partial(transfer, vcenter, state, disk, files, arriving) for disk, files in parts.items()]
    arrivals = await side_by_side(calls, at_once=options.parallel_disks)
    await check_snapshot(vcenter, state.vm, state.snapshot, state.disks)
    state = state.model_copy(update={"arrivals": tuple(arrivals)})
    write_state(folder, state)
    return state


async def _landed(vcenter: VCenter, state: JobState, folder: Path, options: DiskJob) -> Manifest:
    """Return the manifest of a job whose disks have arrived, once they have their final names."""
    calls = [partial(land, state.vm, each, DiskFiles(folder, each.disk.index), options) for each in state.arrivals]
    with kept_if_interrupted(partial(give_up, folder)):
        images = await side_by_side(calls, at_once=options.parallel_disks)
        domain, xml = await describe_domain(state, images, folder, options)
    manifest = manifest_of(vcenter, state, tuple(images), domain, quiesce=options.quiesce)
    await commit(manifest, folder, xml)
    return manifest
