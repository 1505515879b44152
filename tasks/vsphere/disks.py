"""The disks of a snapshot, as `snapshot.config` has them, and why one cannot be copied."""

from __future__ import annotations

from typing import Any

from pyVmomi import vim, vmodl

from tasks.errors import SnapshotChanged, VsphereFault
from tasks.models import Snapshot, VirtualDisk, VirtualMachine
from tasks.vsphere.faults import caused_by
from tasks.vsphere.names import label_of, type_name
from tasks.vsphere.properties import retrieve
from tasks.vsphere.session import Session

_Disk = vim.vm.device.VirtualDisk
_Scsi = vim.vm.device.VirtualSCSIController


def snapshot_disks(session: Session, snapshot: Snapshot) -> tuple[VirtualDisk, ...]:
    """Return every disk of a snapshot, in the order of the device list. One round trip.

    Paths are those of the frozen backings, never the live VM's. Source: VirtualMachineSnapshot.config.
    Raises VsphereFault (ManagedObjectNotFound as its cause) where the snapshot is gone.
    """
    entity = session.entity(vim.vm.Snapshot, snapshot.moref)
    devices = retrieve(session, [entity], ("config.hardware.device",)).get(entity, {}).get("config.hardware.device")
    if devices is None:
        raise SnapshotChanged(snapshot=snapshot.name, vm="its VM", reason="it says nothing of its disks")
    return disks_among(devices)


def powered_off_disks(session: Session, vm: VirtualMachine) -> tuple[VirtualDisk, ...]:
    """Return the disks of a VM that is off, as they are now: what can be copied without a snapshot. One round trip.

    Raises SnapshotChanged where it is on, or was reconfigured since it was described. Source: config.changeVersion.
    """
    entity = session.entity(vim.VirtualMachine, vm.moref)
    wanted = ("runtime.powerState", "config.changeVersion", "config.hardware.device")
    found = retrieve(session, [entity], wanted).get(entity, {})
    if str(found.get("runtime.powerState")) != "poweredOff":
        raise SnapshotChanged(snapshot="powered-off state", vm=vm.name, reason="the VM was powered on")
    if found.get("config.changeVersion", "") != vm.change_version:
        raise SnapshotChanged(snapshot="powered-off state", vm=vm.name, reason="the VM was started or reconfigured")
    return disks_among(found["config.hardware.device"])


def live_disks(session: Session, vm: VirtualMachine) -> tuple[VirtualDisk, ...]:
    """Return the disks of a VM as it has them now, whatever its power state. One round trip."""
    entity = session.entity(vim.VirtualMachine, vm.moref)
    found = retrieve(session, [entity], ("config.hardware.device",)).get(entity, {})
    return disks_among(found.get("config.hardware.device", ()))


def disks_among(devices: Any) -> tuple[VirtualDisk, ...]:
    """Return the disks in a device list, described, in its order. Source: VirtualHardware.device."""
    shared = {each.key for each in devices if isinstance(each, _Scsi) and each.sharedBus != "noSharing"}
    disks = (device for device in devices if isinstance(device, _Disk))
    return tuple(_described(index, device, shared) for index, device in enumerate(disks))


def _described(index: int, device: Any, shared: set[int]) -> VirtualDisk:
    backing = device.backing
    kind, problem, remedy = _problem(device, shared)
    return VirtualDisk(
        index=index,
        key=device.key,
        label=label_of(device),
        controller_key=device.controllerKey,
        unit_number=device.unitNumber,
        datastore_path=getattr(backing, "fileName", "") or "",
        capacity_bytes=device.capacityInBytes or device.capacityInKB * 1024,
        backing=type_name(backing),
        object_id=getattr(backing, "backingObjectId", None) or None,
        thin=bool(getattr(backing, "thinProvisioned", False)),
        uuid=getattr(backing, "uuid", None),
        change_id=getattr(backing, "changeId", None),
        parents=_parents(backing),
        problem_kind=kind,
        problem=problem,
        remedy=remedy,
    )


def _parents(backing: Any) -> tuple[str, ...]:
    paths = []
    while (backing := getattr(backing, "parent", None)) is not None:
        paths.append(backing.fileName)
    return tuple(paths)


def _problem(device: Any, shared: set[int]) -> tuple[str | None, str | None, str | None]:
    """Return why no road of ours can copy a disk, in a word and in words, and what to do; Nones if one can."""
    backing = device.backing
    if isinstance(backing, _Disk.RawDiskMappingVer1BackingInfo):
        return "rdm", "it is a raw device mapping", "Map the LUN on the KVM side, or migrate it to a VMDK first"
    if (mode := getattr(backing, "diskMode", None) or "persistent") != "persistent":
        remedy = "Make it dependent while the VM is off, or detach it"
        return "independent-disk", f"its mode is {mode}, so no snapshot holds it", remedy
    if getattr(backing, "keyId", None):
        return "encrypted", "it is encrypted by vSphere", "Decrypt the VM (storage policy) first"
    if device.controllerKey in shared or getattr(backing, "sharing", None) == "sharingMultiWriter":
        remedy = "Stop the cluster, make the disk unshared, then run again"
        return "shared-disk", "it is shared with other VMs", remedy
    return None, None, None


def check_unchanged(
    session: Session, vm: VirtualMachine, snapshot: Snapshot | None, disks: tuple[VirtualDisk, ...]
) -> None:
    """Raise SnapshotChanged unless the disks are still frozen with the same backings as when `disks` were listed."""
    try:
        there = snapshot_disks(session, snapshot) if snapshot else powered_off_disks(session, vm)
    except VsphereFault as error:
        if snapshot and caused_by(error, vmodl.fault.ManagedObjectNotFound):
            raise SnapshotChanged(snapshot=snapshot.name, vm=vm.name, reason="it is gone") from error
        raise
    now = {disk.key: disk.datastore_path for disk in there}
    for disk in disks:
        if now.get(disk.key) != disk.datastore_path:
            reason = f"{disk.label} lay at {disk.datastore_path} and is now at {now.get(disk.key)}"
            name = snapshot.name if snapshot else "powered-off state"
            raise SnapshotChanged(snapshot=name, vm=vm.name, reason=reason)
