"""The libvirt domain that starts an exported VM as it is: its own controllers and network cards, its own identity.

Pure: from what vSphere said and where the images lie to XML; nothing is read, written or started here. What libvirt has
no twin of is replaced by what most guests have a driver for, and said. Source: libvirt's docs/formatdomain.rst.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from blake3 import blake3

from tasks.images.files import safe_name
from tasks.images.slots import Slot, key_of, slots_of
from tasks.models import Device, DiskImage, Domain, Nic, VirtualMachine
from tasks.text import for_xml, one_line

DOMAIN = "domain.xml"
DEFAULT_NETWORK = "default"  # libvirt's own, there on most hosts
UNKNOWN_FORMATS = ("vhdx",)  # that libvirt has no disks of
VIDEO_KIB = 16 * 1024

_NICS = {
    "VirtualVmxnet3": "vmxnet3",
    "VirtualE1000e": "e1000e",
    "VirtualE1000": "e1000",
    "VirtualPCNet32": "pcnet",
}
_NIC_STAND_INS = {"VirtualVmxnet": "e1000", "VirtualVmxnet2": "e1000"}  # guests so old know no e1000e
_CONTROLLERS_WITHOUT_TWIN = {
    "VirtualLsiLogicController": "LSI Logic Parallel",
    "VirtualBusLogicController": "BusLogic",
    "VirtualNVMEController": "NVMe",
    "VirtualIDEController": "IDE beside secure boot",
}
_CDROMS = ("VirtualCdrom", "VirtualRemoteCdrom")
_CARRIED = (*_CDROMS, "VirtualSerialPort", "VirtualTPM", "VirtualUSBController", "VirtualUSBXHCIController")


class _Plan(NamedTuple):
    """One VM as libvirt is to build it. `booting`: the place in the boot order by key."""

    vm: VirtualMachine
    images: Sequence[DiskImage]
    folder: Path
    name: str
    machine: Literal["pc", "q35"]
    networks: dict[str, str]
    cdroms: Sequence[Device]
    slots: Mapping[int, Slot]
    booting: Mapping[int, int]


def describe(
    vm: VirtualMachine, images: Sequence[DiskImage], folder: Path, networks: Mapping[str, str]
) -> tuple[Domain, str]:
    """Return what the domain of `vm` is, how it differs from the source, and its XML.

    images: its disks, their paths relative to `folder`. networks: libvirt's by vSphere's; what is not named there
    becomes `default`.
    """
    plan = _planned(vm, images, folder, networks)
    domain = Domain(
        path=DOMAIN,
        name=plan.name,
        uuid=vm.bios_uuid,
        machine=plan.machine,
        networks=plan.networks,
        changed=tuple(_changes(plan)),
        not_carried=tuple(_left_behind(vm)),
    )
    return domain, _xml(plan)


def domain_name(name: str) -> str:
    """Return a VM's name as libvirt and XML take it: no slash, no control character. See `safe_name`."""
    return for_xml(safe_name(name))


def _planned(vm: VirtualMachine, images: Sequence[DiskImage], folder: Path, networks: Mapping[str, str]) -> _Plan:
    machine = _machine(vm, images)
    cdroms = [each for each in vm.devices if each.model in _CDROMS]
    return _Plan(
        vm=vm,
        images=sorted(images, key=key_of),
        folder=folder,
        name=domain_name(vm.name),
        machine=machine,
        networks={nic.network or "": networks.get(nic.network or "", DEFAULT_NETWORK) for nic in vm.nics},
        cdroms=cdroms,
        slots=slots_of(vm, [*images, *cdroms], ide=machine == "pc"),
        booting={key: place for place, key in enumerate(_boot_order(vm, images), start=1)},
    )


def _machine(vm: VirtualMachine, images: Sequence[DiskImage]) -> Literal["pc", "q35"]:
    """Return the board: the one nearest to VMware's 440BX, which alone has IDE; q35 for UEFI, and what that needs."""
    on_ide = {each.key for each in vm.controllers if each.model == "VirtualIDEController"}
    ide_disks = any(image.controller_key in on_ide for image in images)
    return "pc" if vm.firmware == "bios" or (ide_disks and not vm.secure_boot) else "q35"


def _boot_order(vm: VirtualMachine, images: Sequence[DiskImage]) -> list[int]:
    """Return keys: what the VM was told to boot from, then its disks as VMware's BIOS takes them."""
    disks = sorted(image.disk_key for image in images)
    there = {*disks, *(nic.key for nic in vm.nics)}
    return list(dict.fromkeys([key for key in vm.boot_keys if key in there] + disks))


# ── what is not as it was ────────────────────────────────────────────────────────────────────────────


def _changes(plan: _Plan) -> Iterator[str]:
    if plan.name != plan.vm.name:
        yield f"The domain is named {plan.name}: libvirt does not take {one_line(plan.vm.name)}"
    for image in plan.images:
        if model := plan.slots[image.disk_key].stands_in_for:
            what = _CONTROLLERS_WITHOUT_TWIN.get(model, model)
            yield f"{image.path} is on SATA: libvirt has no twin of {what}, and the guest may need conversion to boot"
    for nic in plan.vm.nics:
        if nic.model not in _NICS:
            yield f"{nic.label} is an {_nic_model(nic)}: libvirt has no twin of {nic.model}"
    for port in _devices_of(plan.vm, "VirtualSerialPort"):
        if port.backing:
            yield f"{port.label} is a pty: it was {one_line(port.backing)}"


def _left_behind(vm: VirtualMachine) -> Iterator[str]:
    for each in vm.devices:
        if each.model not in _CARRIED:
            yield f"{each.label} ({each.model}{f', {one_line(each.backing)}' if each.backing else ''})"
        elif each.model in _CDROMS and each.backing:
            yield f"The medium of {each.label} ({one_line(each.backing)}): the drive is empty"
    if _devices_of(vm, "VirtualTPM"):
        yield "The secrets in the virtual TPM: it starts empty, and BitLocker asks for its recovery key"
    if vm.firmware == "efi":
        yield "UEFI variables, such as boot entries: VMware's NVRAM is not portable"


def _devices_of(vm: VirtualMachine, *models: str) -> list[Device]:
    return [each for each in vm.devices if each.model in models]


# ── XML ──────────────────────────────────────────────────────────────────────────────────────────────


def _xml(plan: _Plan) -> str:
    vm, root = plan.vm, Element("domain", type="kvm")
    _add(root, "name", plan.name)
    _add(root, "uuid", vm.bios_uuid)
    _add(root, "title", for_xml(one_line(vm.name)))
    _add(root, "memory", str(vm.memory_mib), unit="MiB")
    _processors(root, vm)
    _firmware(root, plan)
    _add(root, "clock", offset="localtime" if vm.guest_id.startswith("win") else "utc")  # as VMware sets the RTC
    devices = _add(root, "devices")
    _drives(devices, plan)
    for nic in vm.nics:
        _nic(devices, nic, plan)
    _consoles(devices, vm)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def _processors(root: Element, vm: VirtualMachine) -> None:
    _add(root, "vcpu", str(vm.cpus))
    cpu = _add(root, "cpu", mode="host-model")
    if vm.cores_per_socket and vm.cpus % vm.cores_per_socket == 0:
        sockets = vm.cpus // vm.cores_per_socket
        _add(cpu, "topology", sockets=str(sockets), cores=str(vm.cores_per_socket), threads="1")


def _firmware(root: Element, plan: _Plan) -> None:
    """Have libvirt choose the firmware: where a host keeps its files is the host's business."""
    secure = plan.vm.secure_boot
    features = _add(root, "features")
    for each in ("acpi", "apic"):
        _add(features, each)
    os = _add(root, "os")
    _add(os, "type", "hvm", arch="x86_64", machine=plan.machine)
    if plan.vm.firmware == "efi":
        os.set("firmware", "efi")
        firmware = _add(os, "firmware")
        for feature in ("secure-boot", "enrolled-keys") if secure else ("secure-boot",):
            _add(firmware, "feature", enabled="yes" if secure else "no", name=feature)
        if secure:
            _add(features, "smm", state="on")


def _drives(devices: Element, plan: _Plan) -> None:
    for kind, controller in sorted({(slot.kind, slot.controller) for slot in plan.slots.values()}):
        model = {"model": kind.model} if kind.model else {}
        _add(devices, "controller", type=kind.bus, index=str(controller), **model)
    for number, image in enumerate(plan.images):
        disk = _add(devices, "disk", type="file", device="disk")
        _add(disk, "driver", name="qemu", type=image.format, discard="unmap")
        _add(disk, "source", file=str(plan.folder / image.path))
        _attach(disk, plan.slots[image.disk_key], number)
        if plan.slots[image.disk_key].kind.model == "lsisas1068":
            _add(disk, "wwn", _sas_address(image))
        _add(disk, "boot", order=str(plan.booting[image.disk_key]))
    for number, drive in enumerate(plan.cdroms, start=len(plan.images)):
        disk = _add(devices, "disk", type="file", device="cdrom")
        _attach(disk, plan.slots[drive.key], number)
        _add(disk, "readonly")


def _sas_address(image: DiskImage) -> str:
    """Return an address for a disk on SAS: one without is zero in QEMU, and Linux' mptsas does not see such a disk."""
    return "5000c29" + blake3((image.uuid or image.source).encode()).hexdigest()[:9]  # VMware's own prefix


def _attach(disk: Element, slot: Slot, number: int) -> None:
    """Give a drive its name, of which libvirt only wants that no two are the same, and its place."""
    bus, target, unit = 0, 0, slot.unit
    if slot.kind.bus == "ide":
        bus, unit = divmod(slot.unit, 2)
    elif slot.kind.bus == "scsi":
        target, unit = slot.unit, 0
    _add(disk, "target", dev=("hd" if slot.kind.bus == "ide" else "sd") + _letters(number), bus=slot.kind.bus)
    place = {"controller": slot.controller, "bus": bus, "target": target, "unit": unit}
    _add(disk, "address", type="drive", **{name: str(value) for name, value in place.items()})


def _letters(number: int) -> str:
    """Return `a` for 0, `z` for 25, `aa` for 26."""
    rest, last = divmod(number, 26)
    return (_letters(rest - 1) if rest else "") + chr(ord("a") + last)


def _nic(devices: Element, nic: Nic, plan: _Plan) -> None:
    interface = _add(devices, "interface", type="network")
    if nic.mac:
        _add(interface, "mac", address=nic.mac)
    _add(interface, "source", network=plan.networks[nic.network or ""])
    _add(interface, "model", type=_nic_model(nic))
    if not nic.connected:
        _add(interface, "link", state="down")
    if nic.key in plan.booting:
        _add(interface, "boot", order=str(plan.booting[nic.key]))


def _nic_model(nic: Nic) -> str:
    return _NICS.get(nic.model) or _NIC_STAND_INS.get(nic.model, "e1000e")


def _consoles(devices: Element, vm: VirtualMachine) -> None:
    """Add what a person, or a test, sees of the guest: serial ports, one of them in any case, and a screen."""
    for port in range(max(1, len(_devices_of(vm, "VirtualSerialPort")))):
        _add(_add(devices, "serial", type="pty"), "target", port=str(port))
    if _devices_of(vm, "VirtualTPM"):
        _add(_add(devices, "tpm", model="tpm-crb"), "backend", type="emulator", version="2.0")
    _add(devices, "input", type="tablet", bus="usb")
    _add(devices, "graphics", type="vnc", autoport="yes")
    # Not vmvga: Linux' vmwgfx asks it for what only VMware's has.
    _add(_add(devices, "video"), "model", type="vga", vram=str(max(VIDEO_KIB, vm.video_ram_kib)))
    _add(devices, "memballoon", model="none")  # libvirt's default is virtio, which the guest does not know yet


def _add(parent: Element, tag: str, text: str | None = None, **attributes: str) -> Element:
    element = SubElement(parent, tag, attributes)
    element.text = text
    return element
