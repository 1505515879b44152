"""Step: the disks of a snapshot; refused by name, before the first byte, where one cannot be copied."""

from __future__ import annotations

from typing import Any

from prefect import task
from prefect.context import TaskRunContext
from prefect.logging import get_run_logger

from blocks import VCenter
from tasks.errors import UnsupportedDisk
from tasks.models import Snapshot, VCenterInfo, VirtualDisk
from tasks.steps import on_vcenter
from tasks.vsphere.disks import snapshot_disks


async def copyable_disks(vcenter: VCenter, server: VCenterInfo, snapshot: Snapshot) -> tuple[VirtualDisk, ...]:
    """Return every disk of a snapshot, in the device list's order.

    Raises UnsupportedDisk for the first that cannot be copied.
    """
    disks = await enumerate_disks(vcenter, server, snapshot)
    for disk in disks:
        check_copyable(disk)
    if not disks:
        raise UnsupportedDisk(disk="The VM", reason="it has no disk", remedy="There is nothing to export")
    return disks


def check_copyable(disk: VirtualDisk) -> None:
    """Raise UnsupportedDisk, with the remedy, for a disk that the road `folder` cannot copy."""
    name = f"{disk.label} ({disk.datastore_path or disk.backing})"
    if disk.problem:
        raise UnsupportedDisk(disk=name, reason=disk.problem, remedy=disk.remedy)
    if disk.parents:
        raise UnsupportedDisk(
            disk=name,
            reason="its snapshot is a chain of redo logs, and the road folder reads flat files only",
            remedy="Remove the VM's older snapshots in vSphere (without quiescing, where a Windows guest makes them)",
        )
    if disk.backing != "FlatVer2BackingInfo":
        raise UnsupportedDisk(
            disk=name,
            reason=f"its backing {disk.backing} has no flat file, which is what the road folder reads",
            remedy="Move it to a VMFS or NFS datastore (Storage vMotion) first",
        )


def _of_the_snapshot(_: TaskRunContext, parameters: dict[str, Any]) -> str:
    snapshot: Snapshot = parameters["snapshot"]
    return f"disks-{parameters['server'].uuid}-{snapshot.moref}-{snapshot.created}"


@task(name="disks", task_run_name="disks of {snapshot.moref}", cache_key_fn=_of_the_snapshot, persist_result=True)
async def enumerate_disks(vcenter: VCenter, server: VCenterInfo, snapshot: Snapshot) -> tuple[VirtualDisk, ...]:
    """Return the disks as the snapshot has them; cached by vCenter, snapshot and the time of its making."""
    disks = await on_vcenter(vcenter, snapshot_disks, snapshot)
    for disk in disks:
        get_run_logger().info(
            "disk %d label=%r path=%r bytes=%d", disk.index, disk.label, disk.datastore_path, disk.capacity_bytes
        )
    return disks
