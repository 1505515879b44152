"""Step: the disks of a snapshot; refused by name, before the first byte, where one cannot be copied."""

from __future__ import annotations

from typing import Any

from prefect import task
from prefect.context import TaskRunContext
from prefect.logging import get_run_logger

from blocks import VCenter
from tasks.errors import InvalidInput, UnsupportedDisk
from tasks.models import Snapshot, Value, VCenterInfo, VirtualDisk, VirtualMachine
from tasks.steps import on_vcenter
from tasks.vsphere.disks import powered_off_disks, snapshot_disks

FLAT = "FlatVer2BackingInfo"
OTHER_ROADS = "The road vddk reads it (--transport vddk, with VMware's VDDK)"


async def copyable_disks(
    vcenter: VCenter, server: VCenterInfo, vm: VirtualMachine, snapshot: Snapshot | None, choice: Choice
) -> tuple[VirtualDisk, ...]:
    """Return every disk of a snapshot (None: of a VM that is off), in the device list's order.

    Raises UnsupportedDisk for the first chosen one that no road can copy, InvalidInput where there is none to choose.
    """
    if snapshot:
        disks = await enumerate_disks(vcenter, server, snapshot)
    else:
        disks = await on_vcenter(vcenter, powered_off_disks, vm)
    if not disks:
        raise UnsupportedDisk(disk="The VM", reason="it has no disk", remedy="There is nothing to export")
    for disk in choice.of(disks):
        if disk.problem:
            raise UnsupportedDisk(disk=disk.title, reason=disk.problem, remedy=disk.remedy)
    return disks


class Choice(Value):
    """Which of a VM's disks are copied. wanted: key, label or number; "": the first."""

    wanted: str = ""
    all: bool = True

    @property
    def words(self) -> str:
        """What a job's state says of it; "" for all."""
        return "" if self.all else f"disk {self.wanted}" if self.wanted else "the first disk"

    def of(self, disks: tuple[VirtualDisk, ...]) -> tuple[VirtualDisk, ...]:
        """Return those of `disks` that are meant. Raises InvalidInput, saying what there is instead."""
        if self.all:
            return disks
        if not self.wanted:
            return disks[:1]
        for names in (lambda disk: str(disk.key), lambda disk: disk.label.casefold(), lambda disk: str(disk.index)):
            if found := tuple(disk for disk in disks if names(disk) == self.wanted.casefold()):
                return found
        there = "; ".join(f"{disk.index}: {disk.label}, key {disk.key}" for disk in disks)
        raise InvalidInput(
            what=f"disk {self.wanted!r}",
            why="the VM has no disk of that key, label or number",
            remedy=f"It has {there}",
        )


def check_flat(disks: tuple[VirtualDisk, ...], snapshot: Snapshot | None, *, road: str = "folder") -> None:
    """Raise UnsupportedDisk, with the remedy, for the first disk that does not lie in one flat file.

    road: one that reads nothing else. A quiesced snapshot has, on Windows (VSS), a second redo log above the frozen
    disk.
    """
    quiesced = bool(snapshot and snapshot.quiesced)
    for disk in disks:
        if disk.parents and quiesced:
            reason = "quiescing the guest left a second redo log in its snapshot (VSS)"
            remedy = "Run again without --quiesce, for a crash-consistent copy"
        elif disk.parents:
            reason = "its snapshot is a chain of redo logs"
            remedy = "Copy from the VM's oldest snapshot (--vs-snapshot-moref), or remove its snapshots in vSphere"
        elif disk.object_id or disk.backing != FLAT:
            kind = f"a vSAN or vVol object ({disk.object_id})" if disk.object_id else f"a {disk.backing}"
            reason = f"it is {kind} without a flat file"
            remedy = "Move it to a VMFS or NFS datastore as a flat disk (Storage vMotion), then run again"
        else:
            continue
        reason = f"{reason}, and the road {road} reads flat files only. {OTHER_ROADS}"
        raise UnsupportedDisk(disk=disk.title, reason=reason, remedy=remedy)


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
