"""The `export` mode: a VM's disks, of one point in time, as verified qcow2 or raw images."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from prefect import flow
from prefect.runtime import flow_run

from blocks import VCenter
from tasks.connect import connected
from tasks.convert import land
from tasks.disks import copyable_disks
from tasks.images.files import allocated_bytes, need_space, safe_name
from tasks.images.job import job_id, job_lock, last_holder
from tasks.images.output import DiskFiles, refuse_existing
from tasks.images.state import JobState, discard, read_state, write_state
from tasks.models import ExportJob, Manifest, VCenterInfo, VirtualDisk, VirtualMachine
from tasks.place import place_that_stays
from tasks.probe import probe
from tasks.report import commit, manifest_of
from tasks.resolve import resolve
from tasks.snapshot import check_snapshot, drop_snapshot, point_in_time
from tasks.steps import side_by_side
from tasks.succession import clean_up, close_predecessor
from tasks.transfer import transfer
from tasks.vsphere.snapshots import NAME_PREFIX


@flow(
    name="export",
    flow_run_name="export {options.vm_name}",
    on_cancellation=[clean_up],
    on_crashed=[clean_up],
    on_failure=[clean_up],
)
async def export_vm(vcenter: VCenter, options: ExportJob) -> Manifest:
    """Copy a VM's disks out of vSphere and land them, verified, as images that KVM starts from.

    A snapshot freezes the VM, each disk is read by the road chosen, the snapshot is removed whatever happens,
    the images are read back and compared, and only then get their names: `<output folder>/<VM>/disk-<n>.qcow2`,
    with `manifest.json` beside them. The source VM is left as it was. A run that was killed, or whose vCenter went
    away, is gone on with by the next run to the same folder.

    Args:
        vcenter: Where the VM is now: a saved vCenter, or a new one through Add.
        options: Which VM to export, where to, and how.
    """
    output_dir, run_id = place_that_stays(options.output_dir), flow_run.get_id() or ""
    async with connected(vcenter) as server:
        vm = await resolve(vcenter, options.vm_name)
        folder = output_dir / safe_name(vm.name)
        job = job_id(vcenter_uuid=server.uuid, instance_uuid=vm.instance_uuid, folder=folder)
        snapshot_name, before = f"{NAME_PREFIX}{job}", last_holder(folder)
        holder = {"flow_run": flow_run.get_name() or "", "flow_run_id": run_id}
        with job_lock(folder, holder | {"vm": vm.moref, "snapshot": snapshot_name}):
            await close_predecessor(before, ours=run_id)
            state = await _arrived(vcenter, server, vm, folder, options, snapshot_name)
            return await _landed(vcenter, state, folder, options, snapshot_name)


async def _arrived(
    vcenter: VCenter,
    server: VCenterInfo,
    vm: VirtualMachine,
    folder: Path,
    options: ExportJob,
    snapshot_name: str,
) -> JobState:
    """Return the job's state once every disk lies here as a raw part, copied now or by an earlier run."""
    state = read_state(folder)
    refuse_existing(folder, state)
    if state and state.all_arrived:
        await drop_snapshot(vcenter, vm, snapshot_name)
        return state
    before, give_up = state.snapshot if state else None, partial(discard, folder)
    async with point_in_time(vcenter, vm, options, name=snapshot_name, before=before, give_up=give_up) as snapshot:
        disks = await copyable_disks(vcenter, server, vm, snapshot)
        need_space(folder, sum(_sure_to_take(disk, DiskFiles(folder, disk.index)) for disk in disks))
        await probe(vcenter, vm, disks)
        state = JobState(
            job_id=snapshot_name.removeprefix(NAME_PREFIX),
            flow_run_id=flow_run.get_id() or "",
            vcenter_uuid=server.uuid,
            vm=vm,
            snapshot=snapshot,
            disks=disks,
        )
        write_state(folder, state)
        calls = [partial(transfer, vcenter, state, disk, DiskFiles(folder, disk.index)) for disk in disks]
        arrivals = await side_by_side(calls, at_once=options.parallel_disks)
        await check_snapshot(vcenter, vm, snapshot, disks)
        state = state.model_copy(update={"arrivals": tuple(arrivals)})
        write_state(folder, state)
    return state


def _sure_to_take(disk: VirtualDisk, files: DiskFiles) -> int:
    """Return how many more bytes a disk is sure to take here: what a thin one holds is not known beforehand."""
    return 0 if disk.thin else max(0, disk.capacity_bytes - allocated_bytes(files.raw_part))


async def _landed(vcenter: VCenter, state: JobState, folder: Path, options: ExportJob, snapshot_name: str) -> Manifest:
    """Return the manifest of a job whose disks have arrived, once they have their final names."""
    calls = [partial(land, state.vm, each, DiskFiles(folder, each.disk.index), options) for each in state.arrivals]
    images = await side_by_side(calls, at_once=options.parallel_disks)
    manifest = manifest_of(vcenter, state, tuple(images), options)
    await commit(manifest, folder)
    return manifest
