"""A VM's power, name and network connections: asked, changed, and seen to be changed. Who may is decided elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

from pyVmomi import vim

from tasks.errors import GuestStaysOn, VsphereFault
from tasks.models import NicState, VirtualMachine
from tasks.vsphere.properties import retrieve
from tasks.vsphere.session import Session
from tasks.vsphere.tasks import run_task

TASK_TIMEOUT_S = 5 * 60.0
POLL_S = 0.25
SHUTDOWNS_SEEN = 5
LONGEST_SHUTDOWN_S = 3600.0  # from the asking to the end: more is another story

log = logging.getLogger(__name__)

Tools = Literal["running", "stopped", "absent"]


def tools_of(session: Session, moref: str) -> Tools:
    """Tell whether VMware Tools run in the guest. Source: GuestInfo.toolsRunningStatus, toolsStatus."""
    found = _ask(session, moref, "guest.toolsRunningStatus", "guest.toolsStatus")
    if found.get("guest.toolsRunningStatus") == "guestToolsRunning":
        return "running"
    return "absent" if found.get("guest.toolsStatus") in (None, "toolsNotInstalled") else "stopped"


def shutdown_times(session: Session, moref: str) -> tuple[float, ...]:
    """Return how many seconds the guest took to shut down, the last few times, oldest first, by the vCenter's events.

    Empty where there are none, or the server does not tell. Source: EventManager.QueryEvents.
    """
    entity = session.entity(vim.VirtualMachine, moref)
    kind = vim.event.EventFilterSpec
    spec = kind(
        entity=kind.ByEntity(entity=entity, recursion="self"),
        eventTypeId=["VmGuestShutdownEvent", "VmPoweredOffEvent"],
    )
    try:
        events = session.call("to list its events", lambda: session.content.eventManager.QueryEvents(spec))
    except VsphereFault as error:
        log.info("no events are told vm=%s fault=%s", moref, error.cause)
        return ()
    return tuple(_pairs(sorted(events or (), key=lambda event: event.key)))[-SHUTDOWNS_SEEN:]


def _pairs(events: Sequence[Any]) -> Iterator[float]:
    asked: Any = None
    for event in events:
        if isinstance(event, vim.event.VmGuestShutdownEvent):
            asked = event
        elif asked is not None:
            took_s = (event.createdTime - asked.createdTime).total_seconds()
            if 0 < took_s <= LONGEST_SHUTDOWN_S:
                yield took_s
            asked = None


def is_off(session: Session, moref: str) -> bool:
    """Tell whether the VM is powered off for certain: the last that is known of a lost host's VM is no proof."""
    found = _ask(session, moref, "runtime.powerState", "runtime.connectionState")
    return (found.get("runtime.powerState"), found.get("runtime.connectionState")) == ("poweredOff", "connected")


def shut_down(session: Session, vm: VirtualMachine, *, timeout_s: float, stop: Callable[[], bool]) -> bool:
    """Ask the guest to shut down, and wait; tell whether it is off. stop: whether to wait no longer.

    Source: VirtualMachine.ShutdownGuest, which returns at once. Asked again, a guest on its way down does no more.
    """
    entity = session.entity(vim.VirtualMachine, vm.moref)
    try:
        session.call(f"a shutdown of {vm.name}", entity.ShutdownGuest)
    except VsphereFault as error:
        if not isinstance(error.__cause__, vim.fault.InvalidPowerState | vim.fault.ToolsUnavailable):
            raise
        log.info("not asked to shut down vm=%s fault=%s", vm.moref, error.cause)
        return is_off(session, vm.moref)
    deadline = time.monotonic() + timeout_s
    while not (off := is_off(session, vm.moref)) and time.monotonic() < deadline and not stop():
        time.sleep(POLL_S)
    return off


def power_off(session: Session, vm: VirtualMachine) -> None:
    """Power the VM off as if its plug were pulled. Raises GuestStaysOn unless it is seen to be off afterwards."""
    entity = session.entity(vim.VirtualMachine, vm.moref)
    _change(session, f"the power-off of {vm.name}", entity.PowerOffVM_Task, unless=vim.fault.InvalidPowerState)
    if not is_off(session, vm.moref):
        why = "vSphere powered it off, and does not say that it is off"
        raise GuestStaysOn(vm=vm.name, why=why, remedy="Look at the VM and its host in vSphere")


def power_on(session: Session, vm: VirtualMachine) -> None:
    """Power the VM on; one that is on stays so."""
    entity = session.entity(vim.VirtualMachine, vm.moref)
    _change(session, f"the power-on of {vm.name}", entity.PowerOnVM_Task, unless=vim.fault.InvalidPowerState)


def stored_name(session: Session, moref: str) -> str:
    """Return the VM's name as vSphere stores it."""
    return str(_ask(session, moref, "name")["name"])


def rename(session: Session, vm: VirtualMachine, name: str) -> None:
    """Give the VM another name, as vSphere stores names. Source: ManagedEntity.Rename_Task."""
    entity = session.entity(vim.VirtualMachine, vm.moref)
    _change(session, f"another name for {vm.name}", lambda: entity.Rename_Task(name))


def nic_states(session: Session, moref: str) -> tuple[NicState, ...]:
    """Return how the VM's network cards are connected, and will be."""
    return tuple(
        NicState(key=card.key, connected=card.connectable.connected, start_connected=card.connectable.startConnected)
        for card in _cards(session, moref)
        if card.connectable
    )


def connect_nics(session: Session, vm: VirtualMachine, states: Sequence[NicState]) -> None:
    """Have network cards connected, now and when powered on, as `states` say. Source: VirtualDevice.connectable."""
    wanted, changes = {state.key: state for state in states}, []
    for card in _cards(session, vm.moref):
        if (state := wanted.get(card.key)) and card.connectable:
            card.connectable.connected, card.connectable.startConnected = state.connected, state.start_connected
            changes.append(vim.vm.device.VirtualDeviceSpec(operation="edit", device=card))
    if changes:
        entity, spec = session.entity(vim.VirtualMachine, vm.moref), vim.vm.ConfigSpec(deviceChange=changes)
        _change(session, f"other connections for {vm.name}", lambda: entity.ReconfigVM_Task(spec))


def _cards(session: Session, moref: str) -> list[Any]:
    devices = _ask(session, moref, "config.hardware.device").get("config.hardware.device", ())
    return [each for each in devices if isinstance(each, vim.vm.device.VirtualEthernetCard)]


def _ask(session: Session, moref: str, *names: str) -> dict[str, Any]:
    entity = session.entity(vim.VirtualMachine, moref)
    return retrieve(session, [entity], names).get(entity, {})


def _change(session: Session, action: str, start: Callable[[], Any], *, unless: type[Exception] | None = None) -> None:
    """Run a task of vSphere's; a fault of the class `unless` says that there was nothing to change."""
    try:
        run_task(session, action, start, timeout_s=TASK_TIMEOUT_S)
    except VsphereFault as error:
        if unless is None or not isinstance(error.__cause__, unless):
            raise
