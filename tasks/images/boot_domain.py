"""A generated domain, changed so that it can be started aside: same board, controllers and cards, nothing to lose.

Its disks are overlays, its network leads nowhere, its first serial port is a file. Pure: from XML to XML; nothing is
started here. Source: libvirt's docs/formatdomain.rst, and docs/drvqemu.rst for `qemu:commandline`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from tasks.errors import InvalidInput
from tasks.images.domain import DOMAIN

NAME = "boot-check"  # the domain's own may be anything, and becomes a part of paths
QEMU = "http://libvirt.org/schemas/domain/qemu/1.0"

# Everything else is about the host that the domain was made for, or is a way out of the guest.
_KEPT = ("uuid", "memory", "vcpu", "os", "features", "cpu", "clock", "devices")
_KEPT_DEVICES = ("controller", "disk", "interface", "input", "video")
_KEPT_OF_DISK = ("target", "address", "boot", "serial", "wwn", "vendor", "product")
_KEPT_OF_INTERFACE = ("mac", "model", "address", "boot")
_SAID_WHEN_LEFT_OUT = ("tpm", "hostdev", "filesystem", "rng", "sound", "watchdog", "redirdev", "shmem", "vsock")

ElementTree.register_namespace("qemu", QEMU)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where and how a domain is started aside. `memory_kib`: more than that it does not get."""

    accelerator: Literal["kvm", "tcg"]
    overlays: Mapping[Path, Path]
    serial: Path
    monitor: Path
    memory_kib: int


def read_domain(folder: Path) -> Element:
    """Return the domain that lies in `folder`. Raises InvalidInput where there is none, or none that can be read."""
    path = folder / DOMAIN
    try:
        root = ElementTree.fromstring(path.read_bytes())
    except OSError as error:
        raise _unusable(path, error.strerror or str(error)) from error
    except ElementTree.ParseError as error:
        raise _unusable(path, f"it is no XML: {error}") from error
    if root.tag != "domain" or root.find("devices") is None or root.find("os") is None:
        raise _unusable(path, "it is not a libvirt domain")
    return root


def images_of(domain: Element) -> dict[Path, str]:
    """Return the image of every disk, with its format. Raises InvalidInput for one that is not in a file."""
    return dict(_image(disk) for disk in domain.iterfind("devices/disk") if _is_disk(disk))


def boots_by_uefi(domain: Element) -> bool:
    """Tell whether the firmware is UEFI: chosen by libvirt, or named by the domain."""
    return domain.find("os[@firmware='efi']") is not None or domain.find("os/loader[@type='pflash']") is not None


def set_aside(domain: Element, setting: Setting) -> tuple[str, tuple[str, ...]]:
    """Return the XML of a domain to be started aside, and what of the guest's machine is not as in `domain`."""
    root = Element("domain", type="kvm" if setting.accelerator == "kvm" else "qemu")
    SubElement(root, "name").text = NAME
    root.extend(ElementTree.fromstring(ElementTree.tostring(each)) for each in domain if each.tag in _KEPT)
    notes = [*_memory(root, setting), *_processor(root, setting), *_devices(root, setting)]
    _firmware(root)
    for tag, action in (("on_poweroff", "destroy"), ("on_reboot", "restart"), ("on_crash", "destroy")):
        SubElement(root, tag).text = action
    arguments = SubElement(root, f"{{{QEMU}}}commandline")
    for word in ("-qmp", f"unix:{setting.monitor},server=on,wait=off"):
        SubElement(arguments, f"{{{QEMU}}}arg", value=word)
    return ElementTree.tostring(root, encoding="unicode"), tuple(notes)


def _memory(root: Element, setting: Setting) -> list[str]:
    memory = root.find("memory")
    if memory is None or _kib(memory) <= setting.memory_kib:
        return []
    memory.attrib = {"unit": "KiB"}
    memory.text = str(setting.memory_kib)
    return [f"It had {setting.memory_kib // 1024} MiB of memory: this machine has no more to spare"]


def _kib(memory: Element) -> int:
    units = {"b": 1 / 1024, "bytes": 1 / 1024, "k": 1, "KiB": 1, "M": 1024, "MiB": 1024, "G": 1 << 20, "GiB": 1 << 20}
    try:
        return int(int(memory.text or "") * units[memory.get("unit", "KiB")])
    except (KeyError, ValueError) as error:
        raise InvalidInput(
            what="memory of the domain", why=f"{memory.text!r} is no size", remedy="Export it again"
        ) from error


def _processor(root: Element, setting: Setting) -> list[str]:
    """Take the best processor that TCG has: it cannot be the host's, and libvirt's default is too old for some."""
    cpu = root.find("cpu")
    if setting.accelerator == "kvm":
        return []
    if cpu is None:
        cpu = SubElement(root, "cpu")
    cpu.attrib = {"mode": "maximum"}
    _keep(cpu, lambda child: child.tag == "topology")
    return []


def _firmware(root: Element) -> None:
    """Have the BIOS say on the serial port what it shows; have UEFI start from fresh variables."""
    os = root.find("os")
    assert os is not None
    if nvram := os.findall("nvram"):
        for each in nvram:
            each.text = None
    if boots_by_uefi(root):
        return
    for each in os.findall("bios"):
        os.remove(each)
    SubElement(os, "bios", useserial="yes")


def _devices(root: Element, setting: Setting) -> list[str]:
    devices = root.find("devices")
    assert devices is not None
    left_out = sorted({each.tag for each in devices} & set(_SAID_WHEN_LEFT_OUT))
    _keep(devices, lambda child: child.tag in _KEPT_DEVICES)
    for disk in devices.findall("disk"):
        _put_aside(disk, setting)
    for interface in devices.findall("interface"):
        _unplug(interface)
    serial = SubElement(devices, "serial", type="file")
    SubElement(serial, "source", path=str(setting.serial))
    SubElement(serial, "target", type="isa-serial", port="0")
    return [f"It had no {each}" for each in left_out]


def _put_aside(disk: Element, setting: Setting) -> None:
    """Have a disk write to its overlay, and a CD or floppy drive be empty."""
    image = _image(disk)[0] if _is_disk(disk) else None
    _keep(disk, lambda child: child.tag in _KEPT_OF_DISK)
    disk.set("type", "file")
    if image:
        SubElement(disk, "driver", name="qemu", type="qcow2", cache="unsafe", discard="unmap")
        SubElement(disk, "source", file=str(setting.overlays[image]))


def _unplug(interface: Element) -> None:
    """Have a network card as it is, on a network that leads nowhere, its cable pulled."""
    _keep(interface, lambda child: child.tag in _KEPT_OF_INTERFACE)
    interface.attrib = {"type": "user"}
    SubElement(interface, "link", state="down")


def _keep(parent: Element, wanted: Callable[[Element], bool]) -> None:
    for child in list(parent):
        if not wanted(child):
            parent.remove(child)


def _is_disk(disk: Element) -> bool:
    return disk.get("device", "disk") == "disk"


def _image(disk: Element) -> tuple[Path, str]:
    source, driver = disk.find("source"), disk.find("driver")
    path = source.get("file") if source is not None else None
    if not path or not Path(path).is_absolute():
        raise InvalidInput(
            what="disk of the domain", why="it is not an image in a file", remedy="Check such a domain by hand"
        )
    return Path(path), (driver.get("type") if driver is not None else None) or "raw"


def _unusable(path: Path, why: str) -> InvalidInput:
    return InvalidInput(what=f"domain {path}", why=why, remedy="Name a folder that a finished export has written")
