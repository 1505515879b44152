"""Where each drive sits in a libvirt domain: on a controller of the source's model, on SATA where libvirt has none.

Every address is given, none left to libvirt: it would put the second disk of a `vmpvscsi` controller on a LUN, and
QEMU's has targets only (hw/scsi/vmw_pvscsi.c: max_lun 0).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

from tasks.models import Controller, Device, DiskImage, VirtualMachine


class Kind(NamedTuple):
    """A controller that libvirt has. `units`: how many drives one takes."""

    bus: Literal["ide", "sata", "scsi"]
    model: str
    units: int


class Slot(NamedTuple):
    """Place of a drive. `unit`: the port of SATA, the target of SCSI, of IDE twice the channel and 1 for the second.

    `stands_in_for`: the vSphere type of the controller that libvirt has no twin of; "" where it is the source's own.
    """

    kind: Kind
    controller: int
    unit: int
    stands_in_for: str = ""


IDE = Kind("ide", "", 4)
SATA = Kind("sata", "", 6)  # ICH9's
TWINS = {
    "ParaVirtualSCSIController": Kind("scsi", "vmpvscsi", 64),
    "VirtualLsiLogicSASController": Kind("scsi", "lsisas1068", 8),  # hw/scsi/mptsas.h: MPTSAS_NUM_PORTS
    "VirtualAHCIController": SATA,
    "VirtualIDEController": IDE,
}


class _Drive(NamedTuple):
    key: int
    own_unit: int | None
    stands_in_for: str


def slots_of(vm: VirtualMachine, drives: Iterable[DiskImage | Device], *, ide: bool) -> dict[int, Slot]:
    """Return the slot of each drive by its key in vSphere, each on its own unit where the controller has that.

    ide: whether the machine has IDE. One controller more is taken where a source's has more drives than QEMU's takes.
    """
    groups: dict[tuple[Kind, int], list[_Drive]] = {}
    controllers = {each.key: each for each in vm.controllers}
    for drive in sorted(drives, key=key_of):
        kind, home, placed = _wish(drive, controllers.get(drive.controller_key or 0), ide=ide)
        groups.setdefault((kind, home), []).append(placed)
    count: Counter[str] = Counter()
    slots: dict[int, Slot] = {}
    for (kind, _), members in groups.items():
        for start in range(0, len(members), kind.units):
            slots.update(_seated(kind, count[kind.bus], members[start : start + kind.units]))
            count[kind.bus] += 1
    return slots


def key_of(drive: DiskImage | Device) -> int:
    """Return a drive's key in vSphere. In its order SCSI comes before IDE, that before SATA, that before NVMe."""
    return drive.disk_key if isinstance(drive, DiskImage) else drive.key


def _wish(drive: DiskImage | Device, controller: Controller | None, *, ide: bool) -> tuple[Kind, int, _Drive]:
    """Return the kind of controller that a drive wants, which one of those, and the drive."""
    twin = TWINS.get(controller.model) if controller else None
    if controller is None or twin is None or (twin is IDE and not ide):
        missing = controller.model if controller else "an unknown controller"
        return SATA, 0, _Drive(key_of(drive), None, missing)
    if twin is IDE:
        return IDE, 0, _Drive(key_of(drive), 2 * controller.bus + (drive.unit_number or 0), "")
    return twin, controller.key, _Drive(key_of(drive), drive.unit_number, "")


def _seated(kind: Kind, controller: int, drives: Sequence[_Drive]) -> Iterator[tuple[int, Slot]]:
    own = {drive.own_unit: drive for drive in drives if drive.own_unit in range(kind.units)}
    free = iter(sorted(set(range(kind.units)) - own.keys()))
    for drive in drives:
        unit = drive.own_unit if own.get(drive.own_unit) is drive else next(free)
        assert unit is not None
        yield drive.key, Slot(kind, controller, unit, drive.stands_in_for)
