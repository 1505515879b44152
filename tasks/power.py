"""Steps that touch the source VM: shut down and put aside for a cutover, and put back. Each only where it was said."""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from blocks import VCenter
from tasks.errors import GuestStaysOn, NotRolledBack
from tasks.images.cutover import write_aside
from tasks.models import Aside, Value, VCenterInfo, VirtualMachine, WarmJob
from tasks.steps import connection_of, in_thread, on_vcenter
from tasks.vsphere import power
from tasks.vsphere.session import borrow

NO_TOOLS = {
    "absent": "it has no VMware Tools, which are what shuts a guest down",
    "stopped": "its VMware Tools do not run, and they are what shuts a guest down",
}


class Source(Value):
    """How a source goes off: by its guest, or `hard`; and how many seconds that took in the past, oldest first."""

    hard: bool
    shutdowns_s: tuple[float, ...] = ()


@task(name="check-shutdown", task_run_name="check shutdown of {vm.name}", cache_policy=NO_CACHE)
async def check_shutdown(vcenter: VCenter, vm: VirtualMachine, options: WarmJob) -> Source:
    """Return how the VM will go off, before anything is copied. Raises GuestStaysOn where nothing allowed can do it."""
    tools = await on_vcenter(vcenter, power.tools_of, vm.moref)
    if tools == "running" or vm.power_state == "poweredOff":
        return Source(hard=False, shutdowns_s=await on_vcenter(vcenter, power.shutdown_times, vm.moref))
    if options.shut_down_source and not options.power_off_source:
        remedy = (
            "Start them in the guest, or allow it to be powered off as if its plug were pulled (--power-off-source)"
        )
        raise GuestStaysOn(vm=vm.name, why=NO_TOOLS[tools], remedy=remedy)
    get_run_logger().warning("the guest will not be asked vm=%s: %s", vm.moref, NO_TOOLS[tools])
    return Source(hard=True)


async def begin_aside(vcenter: VCenter, server: VCenterInfo, vm: VirtualMachine, folder: Path) -> Aside:
    """Write durably what the source is before anything is done to it, and return that."""
    aside = Aside(
        vcenter_uuid=server.uuid,
        moref=vm.moref,
        instance_uuid=vm.instance_uuid,
        name=await on_vcenter(vcenter, power.stored_name, vm.moref),
        shown_name=vm.name,
        was_on=vm.power_state != "poweredOff",
        nics=await on_vcenter(vcenter, power.nic_states, vm.moref),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    write_aside(folder, aside)
    return aside


@task(name="shut-down", task_run_name="shut down {vm.name}", cache_policy=NO_CACHE)
async def go_off(vcenter: VCenter, vm: VirtualMachine, source: Source, options: WarmJob) -> str:
    """See the VM off, confirmed; return how, in words. Cancelled, it waits no longer.

    Raises GuestStaysOn where its guest does not shut down in time, and more is not allowed.
    """
    started, stop = time.monotonic(), threading.Event()
    timeout_s = 0.0 if source.hard else options.shutdown_timeout.total_seconds()
    how = await in_thread(_go_off, stop, vcenter, vm, timeout_s, options, stop)
    get_run_logger().info("off vm=%s how=%r seconds=%.1f", vm.moref, how, time.monotonic() - started)
    return how


def _go_off(vcenter: VCenter, vm: VirtualMachine, timeout_s: float, options: WarmJob, stop: threading.Event) -> str:
    with borrow(connection_of(vcenter)) as session:
        if power.is_off(session, vm.moref):
            return "it was off"
        if timeout_s and power.shut_down(session, vm, timeout_s=timeout_s, stop=stop.is_set):
            return "its guest shut down"
        if stop.is_set() or not options.power_off_source:
            why = f"its guest did not shut down within {timeout_s:g} s"
            remedy = "Give it more time (--shutdown-timeout), or allow it to be powered off (--power-off-source)"
            raise GuestStaysOn(vm=vm.name, why=why, remedy=remedy)
        power.power_off(session, vm)
        return f"powered off, its guest having had {timeout_s:g} s" if timeout_s else "powered off"


@task(name="put-aside", task_run_name="put {vm.name} aside", cache_policy=NO_CACHE)
async def put_aside(vcenter: VCenter, vm: VirtualMachine, aside: Aside, options: WarmJob, folder: Path) -> Aside:
    """Rename the source and disconnect its network cards, what of it was asked for; each is written down before."""
    if options.disconnect_source:
        aside = aside.model_copy(update={"disconnected": True})
        write_aside(folder, aside)
        off = tuple(state.model_copy(update={"connected": False, "start_connected": False}) for state in aside.nics)
        await on_vcenter(vcenter, power.connect_nics, vm, off)
    if options.rename_source:
        aside = aside.model_copy(update={"renamed_to": aside.name + options.rename_source})
        write_aside(folder, aside)
        await on_vcenter(vcenter, power.rename, vm, aside.renamed_to)
    get_run_logger().info("put aside vm=%s renamed=%r disconnected=%s", vm.moref, aside.renamed_to, aside.disconnected)
    return aside


@task(name="put-back", task_run_name="put {vm.name} back", cache_policy=NO_CACHE)
async def put_back(vcenter: VCenter, vm: VirtualMachine, aside: Aside) -> tuple[str, ...]:
    """Undo what a cutover did to its source, the last thing first; return that in words. What is undone stays undone.

    Raises NotRolledBack where somebody else has renamed it since.
    """
    done = []
    if aside.renamed_to:
        name = await on_vcenter(vcenter, power.stored_name, vm.moref)
        if name not in (aside.name, aside.renamed_to):
            why = f"its name is neither {aside.renamed_to!r} nor {aside.name!r}"
            raise NotRolledBack(vm=vm.name, why=why, remedy=f"Name it {aside.renamed_to!r}, then run again")
        if name == aside.renamed_to:
            await on_vcenter(vcenter, power.rename, vm, aside.name)
        done.append(f"named {aside.shown_name}")
    if aside.disconnected:
        # Of a VM that is off no card is connected: which are, once it is on, is what its start says.
        states = tuple(state.model_copy(update={"connected": False}) for state in aside.nics)
        await on_vcenter(vcenter, power.connect_nics, vm, states)
        done.append(f"{len(aside.nics)} network cards as they were")
    if aside.was_on:
        await on_vcenter(vcenter, power.power_on, vm)
        if aside.disconnected and any(state.connected != state.start_connected for state in aside.nics):
            await on_vcenter(vcenter, power.connect_nics, vm, aside.nics)
        done.append("powered on")
    get_run_logger().info("put back vm=%s done=%s", vm.moref, "; ".join(done))
    return tuple(done)
