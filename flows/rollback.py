"""The `rollback` mode: the source of a warm migration put back as it was before its cutover."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from prefect import flow

from blocks import VCenter
from tasks.connect import connected
from tasks.errors import NotRolledBack
from tasks.images.cutover import ASIDE, put_away, read_aside
from tasks.images.files import sync
from tasks.images.job import job_id, job_lock
from tasks.images.libvirt import undefine_stopped
from tasks.job import place_that_stays
from tasks.models import Aside, RollbackJob, VCenterInfo
from tasks.power import put_back
from tasks.resolve import describe
from tasks.snapshot import drop_snapshot
from tasks.steps import in_thread
from tasks.vsphere.snapshots import NAME_PREFIX


@flow(name="rollback", flow_run_name="roll back {options.folder}")
async def rollback(vcenter: VCenter, options: RollbackJob) -> tuple[str, ...]:
    """Put the source of a warm migration back: its name, its network cards, its power, of which `rollback.json` tells.

    What the cutover did to it is undone, and nothing else; the domain that it defined is undefined, and must not run.
    The copy stays, and a later migration goes on from it. Returns what was done, in words.

    Args:
        vcenter: Where the source is.
        options: Which migration to undo.
    """
    folder = place_that_stays(options.folder)
    with job_lock(folder, {"purpose": "rollback"}):
        aside = read_aside(folder)
        if aside is None:
            why = f"there is no {ASIDE} in {folder}: no cutover was made from there, or it was undone"
            raise NotRolledBack(vm="The source", why=why, remedy="Name the folder of the VM's copy")
        async with connected(vcenter) as server:
            return await _undone(vcenter, server, aside, folder)


async def _undone(vcenter: VCenter, server: VCenterInfo, aside: Aside, folder: Path) -> tuple[str, ...]:
    name = aside.shown_name
    vm = await describe(vcenter, aside.moref)
    if (server.uuid, vm.instance_uuid) != (aside.vcenter_uuid, aside.instance_uuid):
        raise NotRolledBack(vm=name, why=f"{aside.moref} at {vcenter.host} is another VM", remedy="Name its vCenter")
    if aside.domain:
        state = await in_thread(undefine_stopped, None, aside.libvirt_uri, aside.domain)
        if state not in ("", "shut off"):
            why = f"its copy runs: the domain {aside.domain} is {state}"
            remedy = "Shut the copy down first; what was written to it stays there, and is not in the source"
            raise NotRolledBack(vm=name, why=why, remedy=remedy)
    job = job_id(vcenter_uuid=server.uuid, instance_uuid=vm.instance_uuid, folder=folder)
    await drop_snapshot(vcenter, vm, f"{NAME_PREFIX}{job}")
    done = await put_back(vcenter, vm, aside)
    put_away(folder, when=datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ"))
    (folder / ASIDE).unlink()
    sync(folder)
    return done
