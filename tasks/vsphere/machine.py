"""Describing one VM: where it lies, what it is made of, and whether a snapshot of it may be taken now."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyVmomi import vim

from tasks.errors import FenceClosed, UnsupportedDisk, VsphereFault
from tasks.models import Controller, Nic, VirtualMachine
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
    "config.firmware",
    "config.guestId",
    "config.hardware.numCPU",
    "config.hardware.memoryMB",
    "config.changeTrackingEnabled",
    "config.changeVersion",
    "guest.net",
    "guest.ipAddress",
)


def describe_vm(session: Session, moref: str) -> VirtualMachine:
    """Return what there is to know of a VM: two round trips, whatever the inventory's size.

    Raises VsphereFault for a VM that vSphere itself cannot read (orphaned, inaccessible).
    """
    vm = session.entity(vim.VirtualMachine, moref)
    found = retrieve(session, [vm], _PROPERTIES).get(vm, {})
    missing = [name for name in _NEEDED if name not in found]
    if missing:
        raise VsphereFault(
            action=f"a description of VM {found.get('name', moref)}",
            fault=f"it does not know its {', '.join(missing)} (an orphaned or inaccessible VM)",
            remedy="Look at the VM's state in vSphere; register it again if it is orphaned",
        )
    host, home = found["runtime.host"], names.home(found)
    known = ancestors(session, [each for each in (host, home) if each is not None])
    known[vm] = {"name": found["name"], "parent": home}
    return VirtualMachine(**_identity(vm, found), **_place(session, vm, host, known), **_hardware(found))


def check_fence(session: Session, vm: VirtualMachine, *, chains: bool = False) -> None:
    """Refuse a VM of which a snapshot would be of no use, before it is taken.

    A pending consolidation, or live disks with parents (somebody's snapshots), would put the bytes into files
    that are not the ones we read: FenceClosed. A disk that no snapshot holds, or no road reads: UnsupportedDisk.
    chains: the road reads chains, of the disks that are wanted; those are looked at in the snapshot.
    """
    entity = session.entity(vim.VirtualMachine, vm.moref)
    found = retrieve(session, [entity], ("runtime.consolidationNeeded", "config.hardware.device")).get(entity, {})
    if found.get("runtime.consolidationNeeded"):
        raise FenceClosed(
            vm=vm.name,
            reason="vSphere says that its disks need consolidation",
            remedy="Consolidate it in vSphere first (Snapshots > Consolidate)",
        )
    for disk in () if chains else disks_among(found.get("config.hardware.device", ())):
        if disk.problem:
            raise UnsupportedDisk(disk=disk.title, reason=disk.problem, remedy=disk.remedy)
        if disk.parents:
            raise FenceClosed(
                vm=vm.name,
                reason=f"{disk.label} runs on a snapshot already ({disk.datastore_path})",
                remedy="Remove the VM's snapshots in vSphere, or copy from one of them (--vs-snapshot-moref)",
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


def _hardware(found: Mapping[str, Any]) -> dict[str, Any]:
    devices = found["config.hardware.device"]
    return {
        "firmware": found.get("config.firmware") or "bios",
        "cpus": found["config.hardware.numCPU"],
        "memory_mib": found["config.hardware.memoryMB"],
        "controllers": tuple(_controller(each) for each in devices if isinstance(each, _CONTROLLERS)),
        "nics": tuple(_nic(each) for each in devices if isinstance(each, vim.vm.device.VirtualEthernetCard)),
    }


_CONTROLLERS = (
    vim.vm.device.VirtualSCSIController,
    vim.vm.device.VirtualSATAController,
    vim.vm.device.VirtualIDEController,
    vim.vm.device.VirtualNVMEController,
)


def _controller(device: Any) -> Controller:
    return Controller(key=device.key, model=type_name(device), bus=device.busNumber)


def _nic(device: Any) -> Nic:
    network = device.deviceInfo.summary if device.deviceInfo else None
    return Nic(key=device.key, label=label_of(device), model=type_name(device), mac=device.macAddress, network=network)
