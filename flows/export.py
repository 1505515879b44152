"""The `export` mode: a VM's disks, of one point in time, as verified qcow2 or raw images."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from prefect import flow
from prefect.runtime import deployment, flow_run

from blocks import VCenter
from tasks.connect import connected
from tasks.convert import land
from tasks.disks import copyable_disks
from tasks.errors import InvalidInput
from tasks.images.files import need_space, safe_name
from tasks.images.job import job_id, job_lock
from tasks.images.output import refuse_existing
from tasks.models import Arrival, ExportJob, Manifest, Snapshot, VCenterInfo, VirtualMachine
from tasks.report import commit, manifest_of
from tasks.resolve import resolve
from tasks.snapshot import check_snapshot, point_in_time
from tasks.steps import side_by_side
from tasks.transfer import transfer


@flow(name="export", flow_run_name="export {options.vm_name}")
async def export_vm(vcenter: VCenter, options: ExportJob) -> Manifest:
    """Copy a VM's disks out of vSphere and land them, verified, as images that KVM starts from.

    A snapshot freezes the VM, each disk is read by the road chosen, the snapshot is removed whatever happens,
    the images are read back and compared, and only then get their names: `<output folder>/<VM>/disk-<n>.qcow2`,
    with `manifest.json` beside them. The source VM is left as it was.

    Args:
        vcenter: Where the VM is now: a saved vCenter, or a new one through Add.
        options: Which VM to export, where to, and how.
    """
    output_dir = _place_that_stays(options.output_dir)
    async with connected(vcenter) as server:
        vm = await resolve(vcenter, options.vm_name)
        folder = output_dir / safe_name(vm.name)
        with job_lock(folder, {"flow_run": flow_run.get_name() or "", "flow_run_id": flow_run.get_id() or ""}):
            refuse_existing(folder)
            return await _export(vcenter, server, vm, folder, options)


def _place_that_stays(folder: Path) -> Path:
    """Return `folder` made absolute. A worker runs flows in a temporary folder, and deletes that with all in it."""
    if deployment.get_id() and not folder.expanduser().is_absolute():
        raise InvalidInput(
            what="output folder",
            why=f"{str(folder)!r} is relative, and the worker deletes the folder that it runs in",
            remedy="Give the whole path, such as /data/exports",
        )
    return folder.expanduser().absolute()


async def _export(
    vcenter: VCenter, server: VCenterInfo, vm: VirtualMachine, folder: Path, options: ExportJob
) -> Manifest:
    job = job_id(vcenter_uuid=server.uuid, instance_uuid=vm.instance_uuid, folder=folder)
    async with point_in_time(vcenter, vm, options, job_id=job) as snapshot:
        arrived = await _transfer_all(vcenter, server, vm, snapshot, folder, options)
    images = await side_by_side(
        [partial(land, vm, each, folder, options) for each in arrived], at_once=options.parallel_disks
    )
    manifest = manifest_of(vcenter, server, vm, snapshot, tuple(images), options)
    await commit(manifest, folder)
    return manifest


async def _transfer_all(
    vcenter: VCenter,
    server: VCenterInfo,
    vm: VirtualMachine,
    snapshot: Snapshot,
    folder: Path,
    options: ExportJob,
) -> list[Arrival]:
    disks = await copyable_disks(vcenter, server, snapshot)
    need_space(folder, sum(disk.capacity_bytes for disk in disks))
    arrived = await side_by_side(
        [partial(transfer, vcenter, vm, disk, folder) for disk in disks], at_once=options.parallel_disks
    )
    await check_snapshot(vcenter, vm, snapshot, disks)
    return arrived
