"""Snapshots: made under a name that says whose they are, found again by it, described, and removed.

Only snapshots of ours are removed, and never with their children.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from pyVmomi import vim, vmodl

from tasks.errors import ConnectionFailed, FenceClosed, InvalidInput, SnapshotChanged, SnapshotFailed, VsphereFault
from tasks.models import Snapshot, VirtualMachine
from tasks.vsphere.faults import caused_by, describe
from tasks.vsphere.machine import check_fence
from tasks.vsphere.properties import retrieve
from tasks.vsphere.session import Session
from tasks.vsphere.tasks import run_task

CREATE_TIMEOUT_S = 15 * 60.0  # quiescing may wait for VSS writers
REMOVE_TIMEOUT_S = 4 * 3600.0  # merging a large delta

NAME_PREFIX = "hyper2kvm-"  # a job's id follows
QUIESCE_FAULTS = (vim.fault.ApplicationQuiesceFault, vim.fault.FilesystemQuiesceFault, vim.fault.ToolsUnavailable)

log = logging.getLogger(__name__)


def take_snapshot(
    session: Session,
    vm: VirtualMachine,
    *,
    name: str,
    description: str,
    quiesce: bool,
    or_crash_consistent: bool,
    chains: bool = False,
) -> Snapshot:
    """Check the fence, then make a snapshot; where quiescing fails, a crash-consistent one if that is allowed.

    chains: see `check_fence`.
    Raises FenceClosed, SnapshotFailed, PermissionMissing, LicenceForbids.
    """
    _refuse_another_jobs(session, vm)
    check_fence(session, vm, chains=chains)
    try:
        return create_snapshot(session, vm, name=name, description=description, quiesce=quiesce)
    except SnapshotFailed as error:
        if not (error.quiescing and or_crash_consistent):
            raise
        log.warning("quiescing failed vm=%s fault=%s; taking a crash-consistent snapshot", vm.moref, error.fault)
    return create_snapshot(session, vm, name=name, description=description, quiesce=False)


def _refuse_another_jobs(session: Session, vm: VirtualMachine) -> None:
    for node in _tree(session, vm.moref):
        if node.name.startswith(NAME_PREFIX):
            raise FenceClosed(
                vm=vm.name,
                reason=f"another job of ours is at work on it, or left its snapshot {node.name} ({node.description})",
                remedy="Run that job again, to the same output folder, to its end; or remove the snapshot in vSphere",
            )


def create_snapshot(session: Session, vm: VirtualMachine, *, name: str, description: str, quiesce: bool) -> Snapshot:
    """Make a snapshot without memory; one that a lost answer left behind is found by its name, not made twice.

    Raises SnapshotFailed (its `quiescing` says whether that was what failed), PermissionMissing, LicenceForbids.
    Source: VirtualMachine.CreateSnapshot_Task.
    """
    entity = session.entity(vim.VirtualMachine, vm.moref)
    lost: ConnectionFailed | None = None
    try:
        run_task(
            session,
            f"a snapshot of {vm.name}",
            lambda: entity.CreateSnapshot_Task(name, description, False, quiesce),
            timeout_s=CREATE_TIMEOUT_S,
            repeatable=False,
        )
    except VsphereFault as error:
        raise _snapshot_error(vm, error, quiesce=quiesce) from error.__cause__
    except ConnectionFailed as error:
        log.warning("answer lost action=create-snapshot vm=%s; looking whether it arrived", vm.moref)
        lost = error
    made = find_snapshot(session, vm.moref, name=name)
    if made is None:
        raise lost or SnapshotChanged(snapshot=name, vm=vm.name, reason="it was gone as soon as it was made")
    return made


def find_snapshot(session: Session, vm_moref: str, *, name: str) -> Snapshot | None:
    """Return the VM's snapshot of that name, as ours, or None. One round trip."""
    return next((_value(node, ours=True) for node in _tree(session, vm_moref) if node.name == name), None)


def existing_snapshot(session: Session, vm: VirtualMachine, moref: str) -> Snapshot:
    """Return a snapshot that exists, to be read and left alone. Raises InvalidInput with what there is instead."""
    there = list(_tree(session, vm.moref))
    for node in there:
        if node.snapshot._moId == moref:
            return _value(node, ours=False)
    choice = ", ".join(f"{node.snapshot._moId} ({node.name})" for node in there)
    raise InvalidInput(
        what=f"snapshot {moref}", why=f"{vm.name} has no such snapshot", remedy=f"It has: {choice or 'none'}"
    )


def drop_snapshot(session: Session, vm_moref: str, *, name: str, timeout_s: float = REMOVE_TIMEOUT_S) -> None:
    """Remove the VM's snapshot of that name and wait for its consolidation; one that is gone is what was wanted.

    Past `timeout_s` VsphereFault is raised, and the consolidation goes on.
    Source: VirtualMachineSnapshot.RemoveSnapshot_Task.
    """
    snapshot = find_snapshot(session, vm_moref, name=name)
    if snapshot:
        remove_snapshot(session, vm_moref, snapshot.moref, name=name, timeout_s=timeout_s)


def remove_snapshot(
    session: Session, vm_moref: str, moref: str, *, name: str, timeout_s: float = REMOVE_TIMEOUT_S
) -> None:
    """Remove one snapshot, without its children; see `drop_snapshot`. `name`: for messages."""
    entity = session.entity(vim.vm.Snapshot, moref)
    action = f"the removal of snapshot {name}"
    try:
        run_task(session, action, lambda: entity.RemoveSnapshot_Task(False, True), timeout_s=timeout_s)
    except VsphereFault as error:
        if not caused_by(error, vmodl.fault.ManagedObjectNotFound):
            raise
    log.info("snapshot removed vm=%s snapshot=%s", vm_moref, moref)


def _tree(session: Session, vm_moref: str) -> Iterator[Any]:
    """Yield the nodes of the VM's snapshot tree, parents first."""
    entity = session.entity(vim.VirtualMachine, vm_moref)
    yield from nodes_of(retrieve(session, [entity], ("snapshot",)).get(entity, {}).get("snapshot"))


def nodes_of(info: Any) -> Iterator[Any]:
    """Yield the nodes of a snapshot tree (VirtualMachine.snapshot, None: there is none), parents first."""
    waiting = list(info.rootSnapshotList) if info else []
    while waiting:
        node = waiting.pop(0)
        yield node
        waiting.extend(node.childSnapshotList or ())


def _value(node: Any, *, ours: bool) -> Snapshot:
    return Snapshot(
        moref=node.snapshot._moId,
        name=node.name,
        created=node.createTime.isoformat(),
        quiesced=bool(node.quiesced),
        ours=ours,
    )


def _snapshot_error(vm: VirtualMachine, error: VsphereFault, *, quiesce: bool) -> VsphereFault:
    """Return SnapshotFailed for a fault that has no class of its own; the others as they are."""
    fault = error.__cause__
    if type(error) is not VsphereFault or fault is None:
        return error
    quiescing = quiesce and isinstance(fault, QUIESCE_FAULTS)
    remedy = (
        "Repair VMware Tools in the guest, or allow a crash-consistent copy (--allow-crash-consistent)"
        if quiescing
        else "See the VM's tasks and events in vSphere"
    )
    return SnapshotFailed(vm=vm.name, fault=describe(fault), remedy=remedy, quiescing=quiescing)
