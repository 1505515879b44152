"""Everything that preflight asks of vSphere, of many VMs at once: as many round trips for a hundred as for one."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from pyVmomi import vim

from tasks.errors import VsphereFault
from tasks.facts import DatastoreFacts, HostFacts, VmFacts
from tasks.vsphere import names
from tasks.vsphere.disks import disks_among
from tasks.vsphere.machine import describe_vms, needs_consolidation
from tasks.vsphere.properties import PAGE_OBJECTS, ancestors, pages_of, retrieve
from tasks.vsphere.session import Session

_MORE = (
    "config.template",
    "datastore",
    "disabledMethod",
    "guest.toolsRunningStatus",
    "runtime.connectionState",
    "runtime.consolidationNeeded",
    "runtime.faultToleranceState",
    "snapshot",
    "summary.storage.committed",
)
_OF_A_HOST = ("name", "config.product.version", "runtime.connectionState")
_OF_A_DATASTORE = ("name", "summary.type", "summary.freeSpace", "summary.accessible")
_TOOLS_RUN = "guestToolsRunning"


def survey(
    session: Session, morefs: Sequence[str], *, on_vms: Collection[str] = (), on_datastores: Collection[str] = ()
) -> tuple[VmFacts, ...]:
    """Return what there is to know of VMs before a run, in the order asked for.

    on_vms, on_datastores: privileges to ask the account's for. Source: PropertyCollector.RetrievePropertiesEx,
    AuthorizationManager.HasPrivilegeOnEntities. Nine round trips a page of 500 at most, and one a level of vApps.
    """
    vms = [session.entity(vim.VirtualMachine, moref) for moref in morefs]
    described = list(describe_vms(session, vms, _MORE))
    hosts = retrieve(session, _each(described, lambda found: [found.get("runtime.host")]), _OF_A_HOST)
    stores = retrieve(session, _each(described, lambda found: found.get("datastore") or ()), _OF_A_DATASTORE)
    lacking = dict(_lacking(session, vms, on_vms)) | dict(_lacking(session, list(stores), on_datastores))
    return tuple(_facts(vm, made, found, hosts, stores, lacking) for vm, made, found in described)


_UUIDS = ("config.instanceUuid", "config.uuid")
_NAMES = ("name", "parent", "parentVApp", *_UUIDS)
Told = tuple[str, str, str, str, str]
"""Of a VM: moref, name as shown, inventory path as stored, instance and BIOS UUID ("" where vSphere knows none)."""


def listing(session: Session) -> Iterator[Told]:
    """Yield every VM. One round trip a page of 500, and one for the folders of each."""
    known: dict[Any, dict[str, Any]] = {}
    for page in pages_of(session, vim.VirtualMachine, _NAMES):
        yield from _told(session, page, known)


def listing_of(session: Session, morefs: Sequence[str]) -> tuple[Told, ...]:
    """Return these VMs, in the server's order. Two round trips a page of 500."""
    entities = [session.entity(vim.VirtualMachine, moref) for moref in morefs]
    return tuple(_told(session, list(retrieve(session, entities, _NAMES).items()), {}))


def _told(session: Session, page: Sequence[tuple[Any, Mapping[str, Any]]], known: dict[Any, Any]) -> Iterator[Told]:
    homes = dict.fromkeys(names.home(found) for _, found in page)
    known |= ancestors(session, [each for each in homes if each is not None and each not in known])
    for vm, found in page:
        path = f"{names.inventory_path(names.home(found), known)}/{found['name']}"
        instance, bios = (str(found.get(each) or "") for each in _UUIDS)
        yield vm._moId, names.shown(found["name"]), path, instance, bios


def _each(described: Iterable[tuple[Any, Any, Mapping[str, Any]]], of: Any) -> list[Any]:
    return list({each for _, _, found in described for each in of(found) if each is not None})


def _lacking(session: Session, entities: Sequence[Any], privileges: Collection[str]) -> Iterator[tuple[Any, list[str]]]:
    """Yield entities with the privileges that the account lacks on them; nothing where the server cannot say."""
    if not entities or not privileges:
        return
    manager, wanted = session.content.authorizationManager, list(privileges)
    sessions = session.content.sessionManager
    own = retrieve(session, [sessions], ("currentSession.key",)).get(sessions, {}).get("currentSession.key")
    for start in range(0, len(entities) if own else 0, PAGE_OBJECTS):
        some = list(entities[start : start + PAGE_OBJECTS])
        answer = session.call("a look at privileges", lambda: manager.HasPrivilegeOnEntities(some, own, wanted))  # noqa: B023
        for each in answer or ():
            yield each.entity, [one.privId for one in each.privAvailability or () if not one.isGranted]


def _facts(
    vm: Any,
    described: Any,
    found: Mapping[str, Any],
    hosts: Mapping[Any, Mapping[str, Any]],
    stores: Mapping[Any, Mapping[str, Any]],
    lacking: Mapping[Any, list[str]],
) -> VmFacts:
    unreadable = isinstance(described, VsphereFault)
    mine = [each for each in found.get("datastore") or () if each in stores]
    objects = [(vm, names.shown(str(found.get("name", vm._moId)))), *((each, stores[each]["name"]) for each in mine)]
    return VmFacts(
        moref=vm._moId,
        vm=None if unreadable else described,
        unreadable=described.fault if unreadable else "",
        disks=disks_among(found.get("config.hardware.device", ())),
        host=_host(found.get("runtime.host"), hosts),
        datastores=tuple(_datastore(each, stores[each]) for each in mine),
        committed_bytes=found.get("summary.storage.committed") or 0,
        snapshots=tuple(_snapshot_names(found.get("snapshot"))),
        consolidation=needs_consolidation(found),
        connected=str(found.get("runtime.connectionState", "connected")) == "connected",
        template=bool(found.get("config.template")),
        fault_tolerant=str(found.get("runtime.faultToleranceState", "notConfigured")) != "notConfigured",
        tools_run=found.get("guest.toolsRunningStatus") == _TOOLS_RUN,
        disabled=tuple(found.get("disabledMethod") or ()),
        lacks=tuple((privilege, name) for each, name in objects for privilege in lacking.get(each, ())),
    )


def _host(host: Any, hosts: Mapping[Any, Mapping[str, Any]]) -> HostFacts | None:
    if host is None or host not in hosts:
        return None
    found = hosts[host]
    return HostFacts(
        moref=host._moId,
        name=names.shown(found["name"]),
        version=found.get("config.product.version", ""),
        connected=str(found.get("runtime.connectionState", "connected")) == "connected",
    )


def _datastore(store: Any, found: Mapping[str, Any]) -> DatastoreFacts:
    return DatastoreFacts(
        moref=store._moId,
        name=names.shown(found["name"]),
        kind=found.get("summary.type", ""),
        free_bytes=found.get("summary.freeSpace", 0),
        accessible=bool(found.get("summary.accessible", True)),
    )


def _snapshot_names(info: Any) -> Iterator[str]:
    waiting = list(info.rootSnapshotList) if info else []
    while waiting:
        node = waiting.pop(0)
        yield names.shown(node.name)
        waiting.extend(node.childSnapshotList or ())
