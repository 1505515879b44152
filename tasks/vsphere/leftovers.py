"""What runs of ours may have left on a vCenter: one paged look at its VMs, one at the datastores of those found."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from pyVmomi import vim

from tasks.models import Value
from tasks.vsphere import names
from tasks.vsphere.properties import pages_of, retrieve
from tasks.vsphere.session import Session
from tasks.vsphere.snapshots import NAME_PREFIX, nodes_of

VM_PROPERTIES = ("name", "config.instanceUuid", "snapshot", "runtime.consolidationNeeded", "datastore")


class Room(Value):
    """A datastore's room in bytes."""

    name: str
    free_bytes: int
    capacity_bytes: int


class LeftSnapshot(Value):
    """A snapshot that is named like ours: whose it is, is not known here."""

    vm_moref: str
    vm_name: str
    instance_uuid: str
    moref: str
    name: str
    description: str
    created: datetime
    room: tuple[Room, ...] = ()


class LeftDelta(Value):
    """A VM that needs consolidation: deltas that no snapshot explains."""

    vm_moref: str
    vm_name: str
    room: tuple[Room, ...] = ()


class Survey(Value):
    """What was found on a vCenter, and of how many VMs."""

    vms: int
    snapshots: tuple[LeftSnapshot, ...]
    unconsolidated: tuple[LeftDelta, ...]


def survey(session: Session) -> Survey:
    """Look at every VM's snapshots, 500 VMs a round trip.

    Source: VirtualMachine.snapshot, VirtualMachine.runtime.consolidationNeeded.
    """
    vms, found = 0, []
    for page in pages_of(session, vim.VirtualMachine, VM_PROPERTIES):
        vms += len(page)
        for vm, values in page:
            nodes = [node for node in nodes_of(values.get("snapshot")) if node.name.startswith(NAME_PREFIX)]
            if nodes or values.get("runtime.consolidationNeeded"):
                found.append((vm, values, nodes))
    rooms = _rooms(session, {store for _, values, _ in found for store in values.get("datastore") or ()})
    snapshots, unconsolidated = [], []
    for vm, values, nodes in found:
        room = tuple(rooms[store] for store in values.get("datastore") or () if store in rooms)
        about = {"vm_moref": vm._moId, "vm_name": names.shown(values["name"]), "room": room}
        snapshots += [_snapshot(node, about, values.get("config.instanceUuid", "")) for node in nodes]
        if values.get("runtime.consolidationNeeded"):
            unconsolidated.append(LeftDelta(**about))
    return Survey(vms=vms, snapshots=tuple(snapshots), unconsolidated=tuple(unconsolidated))


def _snapshot(node: Any, about: dict[str, Any], instance_uuid: str) -> LeftSnapshot:
    return LeftSnapshot(
        **about,
        instance_uuid=instance_uuid,
        moref=node.snapshot._moId,
        name=node.name,
        description=node.description or "",
        created=node.createTime,
    )


def _rooms(session: Session, stores: set[Any]) -> dict[Any, Room]:
    """Return the datastores' room. Source: DatastoreSummary."""
    wanted = ("name", "summary.freeSpace", "summary.capacity")
    return {
        store: Room(
            name=names.shown(values["name"]),
            free_bytes=values.get("summary.freeSpace", 0),
            capacity_bytes=values.get("summary.capacity", 0),
        )
        for store, values in retrieve(session, list(stores), wanted).items()
    }
