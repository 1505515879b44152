"""Ten VMs of the lab that are not alike, and libvirt's own judgement of the domains made of them."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from tasks.images import domain
from tasks.models import DiskImage, Domain, ImageFormat, VirtualDisk, VirtualMachine

HOSTILE = "a%2fb\nc\t<&>\"'`, --x \N{RIGHT-TO-LEFT OVERRIDE}ü"


def _disks(*controllers: str) -> list[dict[str, Any]]:
    """Return tiny disks, each on `kind` or `kind:bus`."""
    split = [each.partition(":") for each in controllers]
    return [{"size": "1MiB", "controller": kind, "bus": int(bus or 0)} for kind, _, bus in split]


TEN: dict[str, dict[str, Any]] = {
    "plain": {"disks": _disks("pvscsi", "pvscsi")},
    "uefi": {"firmware": "efi", "nics": ["e1000e"], "devices": ["cdrom"], "disks": _disks("pvscsi", "ahci")},
    "secure": {
        "firmware": "efi",
        "secure_boot": True,
        "guest_id": "windows2019srv_64Guest",
        "cpus": 4,
        "cores_per_socket": 2,
        "memory_mib": 1024,
        "devices": ["tpm"],
        "disks": _disks("ahci"),
    },
    "many disks": {"disks": _disks(*["pvscsi"] * 9, *["pvscsi:2"] * 2, *["ahci"] * 8, "ide", "ide", "ide:1")},
    "ten of sas": {"firmware": "efi", "disks": _disks(*["lsisas1068"] * 10)},
    "no twin": {"disks": _disks("lsilogic", "lsilogic:1", "buslogic:2", "nvme", "nvme")},
    "many cards": {
        "nics": [
            *({"model": model, "network": "lan"} for model in ("vmxnet3", "e1000e", "e1000", "pcnet")),
            {"model": "sriov", "network": "storage"},
            {"model": "vmxnet2", "network": "old <lan>", "mac": "00:50:56:00:00:07"},
            {"model": "vmxnet3", "network": "dv lan", "disconnected": True},
            {"model": "vmxnet3", "network": "dv%2flan"},
        ],
        "disks": _disks("pvscsi"),
    },
    HOSTILE: {"dir": "hostile", "disks": [{"size": "1MiB", "file": "hostile"}]},
    "ide beside uefi": {
        "firmware": "efi",
        "cpus": 6,
        "cores_per_socket": 3,
        "boot": [4000, 2001],
        "disks": _disks("pvscsi", "pvscsi", "ide"),
    },
    "devices": {
        "nics": [],
        "devices": ["cdrom", "floppy", "passthrough", "serial", "serial", "sound", "usb", "usb-device"],
        "disks": _disks("lsisas1068", "ide"),
    },
}

SCENARIO = {
    "api_version": "8.0.2.0",
    "datacenters": [
        {
            "name": "DC",
            "clusters": [{"name": "cluster", "hosts": ["esx1"]}],
            "portgroups": ["dv lan", "dv%2flan"],
            "vms": [{"name": name, "power": "off", **vm} for name, vm in TEN.items()],
        }
    ],
}


def image_of(disk: VirtualDisk, format: ImageFormat = "qcow2") -> DiskImage:
    """Return what a disk is once it has landed."""
    return DiskImage(
        index=disk.index,
        disk_key=disk.key,
        controller_key=disk.controller_key,
        unit_number=disk.unit_number,
        uuid=disk.uuid,
        change_id=None,
        source=disk.datastore_path,
        path=f"disk-{disk.index}.{format}",
        format=format,
        virtual_size=disk.capacity_bytes,
        digest="blake3:00",
        bytes_transferred=0,
        road="folder",
        verified="direct",
    )


def described(
    vm: VirtualMachine, disks: tuple[VirtualDisk, ...], folder: Path, networks: Mapping[str, str]
) -> tuple[Domain, ElementTree.Element]:
    """Return the domain of a VM and its XML, parsed; that it validates has been seen."""
    made, xml = domain.describe(vm, [image_of(disk) for disk in disks], folder, networks)
    (path := folder / "domain.xml").write_text(xml)
    assert_valid(path)
    return made, ElementTree.fromstring(xml)


def assert_valid(path: Path) -> None:
    """Have libvirt's schema judge a domain."""
    done = subprocess.run(["virt-xml-validate", str(path), "domain"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
