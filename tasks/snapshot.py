"""Step: a point in time to copy from, and its removal whatever happens."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger
from prefect.runtime import flow_run

from blocks import VCenter
from tasks.errors import Hyper2KvmError
from tasks.models import ExportJob, Snapshot, VirtualDisk, VirtualMachine
from tasks.steps import on_vcenter, to_the_end
from tasks.vsphere import snapshots
from tasks.vsphere.disks import check_unchanged

KEPT_FOR = timedelta(hours=24)


@asynccontextmanager
async def point_in_time(
    vcenter: VCenter, vm: VirtualMachine, options: ExportJob, *, job_id: str
) -> AsyncIterator[Snapshot]:
    """Yield a snapshot for the block: the one that the options name, left alone, or one of ours, removed at its end.

    It is removed by its name, so that one whose making was cancelled half-way goes too. A failure to remove it
    never hides what ended the block. Raises FenceClosed, SnapshotFailed, PermissionMissing, LicenceForbids.
    """
    if options.snapshot_moref:
        yield await use_snapshot(vcenter, vm, options.snapshot_moref)
        return
    name = f"hyper2kvm-{job_id}"
    try:
        yield await take_snapshot(
            vcenter, vm, name, quiesce=options.quiesce, or_crash_consistent=options.allow_crash_consistent
        )
    except BaseException:
        try:  # not as a task run: what ended the block may be the loss of Prefect's own server
            await to_the_end(on_vcenter(vcenter, snapshots.drop_snapshot, vm, name=name))
        except Hyper2KvmError as error:
            get_run_logger().error("snapshot left behind vm=%s snapshot=%s error=%s", vm.moref, name, error)
        raise
    await to_the_end(drop_snapshot(vcenter, vm, name))


@task(name="use-snapshot", task_run_name="use {moref} of {vm.name}", cache_policy=NO_CACHE)
async def use_snapshot(vcenter: VCenter, vm: VirtualMachine, moref: str) -> Snapshot:
    """Return a snapshot that exists, which is read and left alone. Raises InvalidInput."""
    return await on_vcenter(vcenter, snapshots.existing_snapshot, vm, moref)


@task(name="snapshot", task_run_name="snapshot {vm.name}", cache_policy=NO_CACHE)
async def take_snapshot(
    vcenter: VCenter, vm: VirtualMachine, name: str, *, quiesce: bool, or_crash_consistent: bool
) -> Snapshot:
    """Check the fence, then make a snapshot; crash-consistent instead of quiesced only where that is allowed."""
    snapshot = await on_vcenter(
        vcenter,
        snapshots.take_snapshot,
        vm,
        name=name,
        description=_description(),
        quiesce=quiesce,
        or_crash_consistent=or_crash_consistent,
    )
    get_run_logger().info("snapshot taken vm=%s snapshot=%s quiesced=%s", vm.moref, snapshot.moref, snapshot.quiesced)
    return snapshot


@task(name="remove-snapshot", task_run_name="remove snapshot of {vm.name}", cache_policy=NO_CACHE)
async def drop_snapshot(vcenter: VCenter, vm: VirtualMachine, name: str) -> None:
    """Remove the VM's snapshot of that name, if there is one, and wait for its consolidation."""
    await on_vcenter(vcenter, snapshots.drop_snapshot, vm, name=name)


@task(name="check-snapshot", task_run_name="check snapshot of {vm.name}", cache_policy=NO_CACHE)
async def check_snapshot(
    vcenter: VCenter, vm: VirtualMachine, snapshot: Snapshot, disks: tuple[VirtualDisk, ...]
) -> None:
    """Raise SnapshotChanged unless, after the last byte, the snapshot is what it was before the first."""
    await on_vcenter(vcenter, check_unchanged, vm, snapshot, disks)


def _description() -> str:
    """Return what a snapshot says of itself, for people in vSphere and for the janitor."""
    return json.dumps(
        {
            "tool": "hyper2kvm",
            "purpose": "export",
            "flow_run": flow_run.get_id(),
            "expires": (datetime.now(UTC) + KEPT_FOR).isoformat(timespec="seconds"),
        }
    )
