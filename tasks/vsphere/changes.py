"""Changed block tracking, asked of vSphere: switching it on, and which areas of a disk were written since a changeId.

What is fetched of it, and what is believed, is not decided here: an answer that cannot be right is an error.
"""

from __future__ import annotations

import logging

from pyVmomi import vim

from tasks.errors import ChangeIdInvalid, FenceClosed, TrackingOff, VsphereFault
from tasks.models import Extent, Snapshot, VirtualDisk, VirtualMachine
from tasks.vsphere.disks import live_disks
from tasks.vsphere.properties import retrieve
from tasks.vsphere.session import Session
from tasks.vsphere.snapshots import drop_snapshot, take_snapshot
from tasks.vsphere.tasks import run_task

RECONFIGURE_TIMEOUT_S = 5 * 60.0
ALLOCATED = "*"  # in place of a changeId: what is allocated at all

log = logging.getLogger(__name__)


def enable_tracking(session: Session, vm: VirtualMachine, *, name: str, description: str) -> None:
    """Have vSphere track the VM's changed blocks; a snapshot `name`, made and removed, lets it begin without a reboot.

    Raises FenceClosed for a VM that has snapshots: below them nothing would be tracked. TrackingOff where vSphere
    takes the wish and does not fulfil it, for the VM or for a disk.
    Source: VirtualMachineConfigSpec.changeTrackingEnabled.
    """
    entity = session.entity(vim.VirtualMachine, vm.moref)
    if retrieve(session, [entity], ("snapshot",)).get(entity, {}).get("snapshot"):
        raise blind_tracking(vm.name)
    spec = vim.vm.ConfigSpec(changeTrackingEnabled=True)
    action = f"changed block tracking of {vm.name}"
    run_task(session, action, lambda: entity.ReconfigVM_Task(spec), timeout_s=RECONFIGURE_TIMEOUT_S)
    if not retrieve(session, [entity], ("config.changeTrackingEnabled",))[entity].get("config.changeTrackingEnabled"):
        raise TrackingOff(
            vm=vm.name,
            why="vSphere took the wish to switch it on, and left it off",
            remedy="See in vSphere what keeps it off",
        )
    take_snapshot(session, vm, name=name, description=description, quiesce=False, or_crash_consistent=True)
    drop_snapshot(session, vm.moref, name=name)
    if deaf := [disk.title for disk in live_disks(session, vm) if not disk.change_id and not disk.problem]:
        raise TrackingOff(
            vm=vm.name,
            why=f"it is on, and after a snapshot {', '.join(deaf)} has no changeId all the same",
            remedy="Power the VM off and switch ctkEnabled, of it and its disks, off and on again in vSphere; or copy "
            "it whole (--vs-action export)",
        )
    log.info("changed block tracking switched on vm=%s", vm.moref)


def blind_tracking(name: str) -> FenceClosed:
    """Return why tracking is not switched on for a VM that has snapshots."""
    return FenceClosed(
        vm=name,
        reason="it has snapshots, below which changed block tracking would see nothing",
        remedy="Remove the VM's snapshots in vSphere, then run again with --enable-cbt",
    )


def changed_extents(
    session: Session, vm: VirtualMachine, snapshot: Snapshot, disk: VirtualDisk, *, since: str
) -> tuple[Extent, ...]:
    """Return, in order, the areas of `disk` that were written between `since` (a changeId, or `*`) and `snapshot`.

    One round trip a page. Raises ChangeIdInvalid where vSphere cannot tell, or tells what cannot be; where other
    snapshots are below this one it is not asked, as nobody says which of the chain's files `*` is of.
    Source: VirtualMachine.QueryChangedDiskAreas.
    """
    if len(disk.parents) > snapshot.quiesced:  # quiescing with VSS leaves a second redo log
        raise ChangeIdInvalid(disk=disk.title, reason=f"the VM has other snapshots below {snapshot.name}")
    entity, at = session.entity(vim.VirtualMachine, vm.moref), session.entity(vim.vm.Snapshot, snapshot.moref)
    action, offset, found = f"to tell what changed on {disk.label}", 0, list[Extent]()
    while offset < disk.capacity_bytes:
        start = offset
        try:
            page = session.call(action, lambda: entity.QueryChangedDiskAreas(at, disk.key, start, since))  # noqa: B023
        except VsphereFault as fault:
            if type(fault) is not VsphereFault:
                raise
            raise ChangeIdInvalid(disk=disk.title, reason=fault.fault) from fault
        for area in page.changedArea or ():
            found.append(_sane(area.start, area.length, disk, after=found[-1].end if found else 0))
        offset = page.startOffset + page.length
        if offset <= start:
            raise ChangeIdInvalid(disk=disk.title, reason=f"an answer for {start} that ends at {offset}")
    return tuple(found)


def _sane(start: int, length: int, disk: VirtualDisk, *, after: int) -> Extent:
    if length <= 0 or start < after or start + length > disk.capacity_bytes:
        reason = f"an area [{start}, +{length}) that lies beyond the disk, or overlaps another"
        raise ChangeIdInvalid(disk=disk.title, reason=reason)
    return Extent(start=start, length=length)
