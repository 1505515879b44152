"""Describing one VM: where it lies, what it is made of, and whether a snapshot of it may be taken now."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from pyVmomi import vim

from tasks.errors import FenceClosed, PermissionMissing, UnsupportedDisk, VsphereFault
from tasks.models import Controller, Device, Nic, VirtualDisk, VirtualMachine
from tasks.vsphere import names
from tasks.vsphere.disks import disks_among
from tasks.vsphere.names import label_of, type_name
from tasks.vsphere.properties import ancestors, retrieve
from tasks.vsphere.session import Session

_NEEDED = ("config.instanceUuid", "config.uuid", "config.hardware.device", "config.files.vmPathName", "runtime.host")
_PROPERTIES = (
    *_NEEDED,
    "name",
    "parent",
    "parentVApp",
    "runtime.powerState",
    "config.bootOptions.bootOrder",
    "config.bootOptions.efiSecureBootEnabled",
    "config.firmware",
    "config.guestId",
    "config.hardware.numCPU",
    "config.hardware.numCoresPerSocket",
    "config.hardware.memoryMB",
    "config.changeTrackingEnabled",
    "config.changeVersion",
    "guest.net",
    "guest.ipAddress",
    "network",
)


def describe_vm(session: Session, moref: str) -> VirtualMachine:
    """Return what there is to know of a VM: two round trips, whatever the inventory's size.

    One more for one on distributed portgroups, whose names its own configuration does not hold.
    Raises VsphereFault for a VM that vSphere itself cannot read (orphaned, inaccessible).
    """
    vm = session.entity(vim.VirtualMachine, moref)
    ((_, described, _),) = describe_vms(session, [vm])
    if isinstance(described, VsphereFault):
        raise described
    return described


def describe_vms(
    session: Session, vms: Sequence[Any], more: Iterable[str] = ()
) -> Iterator[tuple[Any, VirtualMachine | VsphereFault, Mapping[str, Any]]]:
    """Yield each VM with its description, and the properties read, `more` among them. As many round trips as for one.

    In place of a description there is why vSphere has none.
    """
    read = retrieve(session, vms, (*_PROPERTIES, *more))
    unreadable = {vm: fault for vm in vms if (fault := _unreadable(vm, read.get(vm, {})))}
    whole = {vm: read[vm] for vm in vms if vm not in unreadable}
    places = dict.fromkeys(each for found in whole.values() for each in (found["runtime.host"], names.home(found)))
    known = ancestors(session, [each for each in places if each is not None])
    networks = dict.fromkeys(each for found in whole.values() for each in found.get("network") or ())
    portgroups = portgroup_names(session, networks)
    for vm in vms:
        if fault := unreadable.get(vm):
            yield vm, fault, read.get(vm, {})
            continue
        found = read[vm]
        line = known | {vm: {"name": found["name"], "parent": names.home(found)}}
        place = _place(session, vm, found["runtime.host"], line)
        described = VirtualMachine(**_identity(vm, found), **place, **_hardware(found, portgroups))
        yield vm, described, found


def _unreadable(vm: Any, found: Mapping[str, Any]) -> VsphereFault | None:
    missing = [name for name in _NEEDED if name not in found]
    if not missing:
        return None
    return VsphereFault(
        action=f"a description of VM {found.get('name', vm._moId)}",
        fault=f"it does not know its {', '.join(missing)} (an orphaned or inaccessible VM)",
        remedy="Look at the VM's state in vSphere; register it again if it is orphaned",
    )


def check_fence(session: Session, vm: VirtualMachine, *, chains: bool = False) -> None:
    """Refuse a VM of which a snapshot would be of no use, before it is taken.

    A pending consolidation, or live disks with parents (somebody's snapshots), would put the bytes into files
    that are not the ones we read: FenceClosed. A disk that no snapshot holds, or no road reads: UnsupportedDisk.
    chains: the road reads chains, of the disks that are wanted; those are looked at in the snapshot.
    """
    entity = session.entity(vim.VirtualMachine, vm.moref)
    found = retrieve(session, [entity], ("runtime.consolidationNeeded", "config.hardware.device")).get(entity, {})
    disks = () if chains else disks_among(found.get("config.hardware.device", ()))
    for problem in fence_problems(vm.name, needs_consolidation(found), disks):
        raise problem


def needs_consolidation(found: Mapping[str, Any]) -> bool:
    """Whether vSphere says so, in the properties read of a VM."""
    return bool(found.get("runtime.consolidationNeeded"))


def fence_problems(
    name: str, consolidation: bool, disks: Iterable[VirtualDisk]
) -> Iterator[FenceClosed | UnsupportedDisk]:
    """Yield why a snapshot of the VM `name` would be of no use for its live `disks`, the worst first."""
    if consolidation:
        yield FenceClosed(
            vm=name,
            reason="vSphere says that its disks need consolidation",
            remedy="Consolidate it in vSphere first (Snapshots > Consolidate)",
            kind="consolidation",
        )
    for disk in disks:
        if disk.problem:
            yield UnsupportedDisk(
                disk=disk.title, reason=disk.problem, remedy=disk.remedy, kind=disk.problem_kind or "disk"
            )
        elif disk.parents:
            yield FenceClosed(
                vm=name,
                reason=f"{disk.label} runs on a snapshot already ({disk.datastore_path})",
                remedy="Remove the VM's snapshots in vSphere, or copy from one of them (--vs-snapshot-moref)",
                kind="snapshots",
            )


def _identity(vm: Any, found: Mapping[str, Any]) -> dict[str, Any]:
    addresses = [address for nic in found.get("guest.net", ()) for address in nic.ipAddress or ()]
    return {
        "moref": vm._moId,
        "name": names.shown(found["name"]),
        "instance_uuid": found["config.instanceUuid"],
        "bios_uuid": found["config.uuid"],
        "power_state": str(found["runtime.powerState"]),
        "vmx_path": found["config.files.vmPathName"],
        "guest_id": found.get("config.guestId", ""),
        "guest_addresses": tuple(addresses or filter(None, [found.get("guest.ipAddress")])),
        "cbt_enabled": bool(found.get("config.changeTrackingEnabled")),
        "change_version": found.get("config.changeVersion", ""),
    }


def _place(session: Session, vm: Any, host: Any, known: Mapping[Any, Mapping[str, Any]]) -> dict[str, Any]:
    datacenter = names.datacenter_of(host, known)
    return {
        "inventory_path": names.inventory_path(vm, known),
        "datacenter_path": names.inventory_path(datacenter, known),
        "host_path": names.inventory_path(host, known),
        "host_name": names.shown(known[host]["name"]),
        "vpx_uri": names.libvirt_uri(session.connection, host, known, lone_host=not session.info.is_vcenter),
    }


def portgroup_names(session: Session, networks: Iterable[Any]) -> dict[str, str]:
    """Return names of distributed portgroups by moref, which is their key too; none where we may not look at them."""
    portgroups = [each for each in networks if isinstance(each, vim.dvs.DistributedVirtualPortgroup)]
    try:
        found = retrieve(session, portgroups, ("name",))
    except PermissionMissing:
        return {}
    return {each._moId: names.shown(properties["name"]) for each, properties in found.items()}


def _hardware(found: Mapping[str, Any], portgroups: Mapping[str, str]) -> dict[str, Any]:
    devices = found["config.hardware.device"]
    return {
        "firmware": found.get("config.firmware") or "bios",
        "secure_boot": bool(found.get("config.bootOptions.efiSecureBootEnabled")),
        "boot_keys": tuple(_boot_keys(found.get("config.bootOptions.bootOrder") or ())),
        "cpus": found["config.hardware.numCPU"],
        "cores_per_socket": found.get("config.hardware.numCoresPerSocket") or 0,
        "memory_mib": found["config.hardware.memoryMB"],
        "video_ram_kib": sum(each.videoRamSizeInKB or 0 for each in devices if isinstance(each, _VideoCard)),
        "controllers": tuple(_controller(each) for each in devices if isinstance(each, _CONTROLLERS)),
        "nics": tuple(_nic(each, portgroups) for each in devices if isinstance(each, _Card)),
        "devices": tuple(_device(each) for each in devices if not isinstance(each, _OF_EVERY_BOARD)),
    }


_Card = vim.vm.device.VirtualEthernetCard
_VideoCard = vim.vm.device.VirtualVideoCard
_CONTROLLERS = (
    vim.vm.device.VirtualSCSIController,
    vim.vm.device.VirtualSATAController,
    vim.vm.device.VirtualIDEController,
    vim.vm.device.VirtualNVMEController,
)
_OF_EVERY_BOARD = (
    *_CONTROLLERS,
    _Card,
    vim.vm.device.VirtualDisk,
    vim.vm.device.VirtualKeyboard,
    vim.vm.device.VirtualPCIController,
    vim.vm.device.VirtualPointingDevice,
    vim.vm.device.VirtualPS2Controller,
    vim.vm.device.VirtualSIOController,
    _VideoCard,
    vim.vm.device.VirtualVMCIDevice,
)


def _boot_keys(order: Iterable[Any]) -> Iterator[int]:
    """Yield the keys of the disks and network cards in a boot order; a CD drive or a floppy drive has none there."""
    return (each.deviceKey for each in order if hasattr(each, "deviceKey"))


def _controller(device: Any) -> Controller:
    return Controller(key=device.key, model=type_name(device), bus=device.busNumber)


def _device(device: Any) -> Device:
    told = (getattr(device.backing, each, None) for each in ("fileName", "deviceName", "serviceURI", "pipeName"))
    return Device(
        key=device.key,
        label=label_of(device),
        model=type_name(device),
        backing=next(filter(None, told), ""),
        controller_key=device.controllerKey,
        unit_number=device.unitNumber,
    )


def _nic(device: Any, portgroups: Mapping[str, str]) -> Nic:
    return Nic(
        key=device.key,
        label=label_of(device),
        model=type_name(device),
        mac=device.macAddress,
        network=_network_of(device, portgroups),
        connected=not device.connectable or device.connectable.startConnected,
    )


def _network_of(device: Any, portgroups: Mapping[str, str]) -> str | None:
    if isinstance(device.backing, _Card.DistributedVirtualPortBackingInfo):
        key = str(device.backing.port.portgroupKey)
        return portgroups.get(key, key)
    if isinstance(device.backing, _Card.NetworkBackingInfo):
        return str(device.backing.deviceName)
    return device.deviceInfo.summary if device.deviceInfo else None
