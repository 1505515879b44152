"""What there is: virtual machines, their disks, snapshots and extents."""

from __future__ import annotations

from typing import Literal

from pydantic import (
    Field,
)

from tasks.models.base import Value


class Nic(Value):
    """A network card as the guest sees it, and the network it is on."""

    key: int
    label: str
    model: str
    mac: str | None
    network: str | None
    connected: bool = True  # when the VM starts


class Controller(Value):
    """A storage controller; `model` is its vSphere type (`ParaVirtualSCSIController`)."""

    key: int
    model: str
    bus: int


class Device(Value):
    """Another device that a VM has by choice; `model`: its vSphere type (`VirtualCdrom`), `backing`: what is in it."""

    key: int
    label: str
    model: str
    backing: str = ""
    controller_key: int | None = None
    unit_number: int | None = None


class VirtualMachine(Value):
    """One VM, where it lies, and what it is made of. Names are shown decoded (`%2f` is `/`).

    `boot_keys`: keys of the disks and network cards that it was told to boot from, first first. `cores_per_socket`: 0
    where vSphere chooses. `devices`: what is neither disk, controller nor network card, and not on every board.
    """

    moref: str
    name: str
    instance_uuid: str
    bios_uuid: str
    inventory_path: str
    datacenter_path: str
    host_path: str
    host_name: str
    vpx_uri: str
    power_state: Literal["poweredOn", "poweredOff", "suspended"]
    firmware: Literal["bios", "efi"]
    secure_boot: bool = False
    boot_keys: tuple[int, ...] = ()
    cpus: int
    cores_per_socket: int = 0
    memory_mib: int
    video_ram_kib: int = 0
    vmx_path: str
    guest_id: str = ""
    guest_addresses: tuple[str, ...] = ()
    controllers: tuple[Controller, ...] = ()
    nics: tuple[Nic, ...] = ()
    devices: tuple[Device, ...] = ()
    cbt_enabled: bool = False
    change_version: str = ""


class VirtualDisk(Value):
    """One disk of a snapshot. `index` is its place in the device list: the `<n>` of every `disk-<n>`.

    `datastore_path` is `[datastore] folder/x.vmdk`; `parents` the same of the backings below it, nearest first.
    `object_id` names the vSAN or vVol object that the disk is; None for one that lies in files.
    `problem` and `remedy` say why no road of ours can copy it, `problem_kind` in a word; None if one can.
    """

    index: int
    key: int
    label: str
    controller_key: int | None
    unit_number: int | None = None
    datastore_path: str
    capacity_bytes: int
    backing: str
    object_id: str | None = None
    thin: bool = False
    uuid: str | None = None
    change_id: str | None = None
    parents: tuple[str, ...] = ()
    problem_kind: str | None = None
    problem: str | None = None
    remedy: str | None = None

    @property
    def title(self) -> str:
        """What errors call it: `Hard disk 1 ([datastore1] web/web.vmdk)`."""
        return f"{self.label} ({self.datastore_path or self.backing})"


class Snapshot(Value):
    """A snapshot by reference; `ours` is false for one that existed and must be left alone."""

    moref: str
    name: str
    created: str
    quiesced: bool
    ours: bool


class Extent(Value):
    """Bytes [start, start + length) of a disk, both multiples of 512 except at the end of an odd-sized image."""

    start: int = Field(ge=0)
    length: int = Field(gt=0)

    @property
    def end(self) -> int:
        return self.start + self.length
