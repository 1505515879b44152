"""Step: the disks of a snapshot; refused by name, before the first byte, where one cannot be copied."""

from __future__ import annotations

from typing import Any

from prefect import task
from prefect.context import TaskRunContext
from prefect.logging import get_run_logger

from blocks import VCenter
from tasks.errors import UnsupportedDisk
from tasks.models import Snapshot, VCenterInfo, VirtualDisk, VirtualMachine
from tasks.steps import on_vcenter
from tasks.vsphere.disks import powered_off_disks, snapshot_disks

FLAT = "FlatVer2BackingInfo"
REDO_LOG_ROADS = "The roads vddk, nfc_block and nfc_lease, not built yet, will read it"
OTHER_ROADS = "The roads vddk and nfc_lease, not built yet, will read it"


async def copyable_disks(
    vcenter: VCenter, server: VCenterInfo, vm: VirtualMachine, snapshot: Snapshot | None
) -> tuple[VirtualDisk, ...]:
    """Return every disk of a snapshot (None: of a VM that is off), in the device list's order.

    Raises UnsupportedDisk for the first that cannot be copied.
    """
    if snapshot:
        disks = await enumerate_disks(vcenter, server, snapshot)
    else:
        disks = await on_vcenter(vcenter, powered_off_disks, vm)
    quiesced = bool(snapshot and snapshot.quiesced)
    for disk in disks:
        check_copyable(disk, quiesced=quiesced)
    if not disks:
        raise UnsupportedDisk(disk="The VM", reason="it has no disk", remedy="There is nothing to export")
    return disks


def check_copyable(disk: VirtualDisk, *, quiesced: bool = False) -> None:
    """Raise UnsupportedDisk, with the remedy, for a disk that the road `folder` cannot copy.

    quiesced: whether its snapshot is, which on Windows (VSS) puts a second redo log above the frozen disk.
    """
    if disk.problem:
        raise UnsupportedDisk(disk=disk.title, reason=disk.problem, remedy=disk.remedy)
    if disk.parents and quiesced:
        raise UnsupportedDisk(
            disk=disk.title,
            reason="quiescing the guest left a second redo log in its snapshot (VSS), and the road folder reads flat "
            f"files only. {REDO_LOG_ROADS}",
            remedy="Run again without --quiesce, for a crash-consistent copy",
        )
    if disk.parents:
        raise UnsupportedDisk(
            disk=disk.title,
            reason=f"its snapshot is a chain of redo logs, and the road folder reads flat files only. {REDO_LOG_ROADS}",
            remedy="Copy from the VM's oldest snapshot (--vs-snapshot-moref), or remove its snapshots in vSphere",
        )
    if disk.object_id or disk.backing != FLAT:
        kind = f"a vSAN or vVol object ({disk.object_id})" if disk.object_id else f"a {disk.backing}"
        raise UnsupportedDisk(
            disk=disk.title,
            reason=f"it is {kind} without a flat file, which is what the road folder reads. {OTHER_ROADS}",
            remedy="Move it to a VMFS or NFS datastore as a flat disk (Storage vMotion), then run again",
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
