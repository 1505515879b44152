"""Step: a point in time to copy from; removed at the end, or kept for the run that goes on with the job."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Protocol

import httpx
from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.exceptions import PrefectException
from prefect.logging import get_run_logger
from prefect.runtime import flow_run

from blocks import VCenter
from tasks.errors import ConnectionFailed, Hyper2KvmError, LicenceForbids, TransferInterrupted
from tasks.images.claim import Claim
from tasks.images.job import machine_id
from tasks.models import Snapshot, VirtualDisk, VirtualMachine
from tasks.steps import on_vcenter, to_the_end
from tasks.vsphere import snapshots
from tasks.vsphere.disks import check_unchanged
from tasks.vsphere.session import Session

KEPT_FOR = timedelta(hours=24)
PATIENCE_S = 15.0  # with a removal on the way out: a worker kills a run 30 s after it asked it to end
# What says nothing against the copy so far: the source or Prefect's own server went away.
INTERRUPTIONS = (TransferInterrupted, ConnectionFailed, PrefectException, httpx.HTTPError)

_JOB_FOLDER: ContextVar[Path | None] = ContextVar("JOB_FOLDER", default=None)


class Wishes(Protocol):
    """What a mode's options say of the snapshot."""

    @property
    def snapshot_moref(self) -> str: ...

    @property
    def quiesce(self) -> bool: ...

    @property
    def allow_crash_consistent(self) -> bool: ...


@asynccontextmanager
async def point_in_time(
    vcenter: VCenter,
    vm: VirtualMachine,
    options: Wishes,
    *,
    name: str,
    before: Snapshot | None,
    give_up: Callable[[], None],
    going_on: Callable[[], bool],
    chains: bool = False,
) -> AsyncIterator[Snapshot | None]:
    """Yield a snapshot for the block: the one that the options name, left alone; else the job's own, of that name.

    chains: whether the disks may lie in chains of redo logs, not in flat files alone (`check_fence`).
    `before` is the one that the job's state speaks of: it is gone on with, if it is still there. None is yielded for
    a VM that is off, where the licence allows no snapshots. At the end ours is removed; after an interruption it is
    kept, where `going_on` says that the next run will go on with the job; after anything else `give_up` is called, and
    it is removed. It is found by its name, so that one whose making was cancelled half-way goes too; a failure to
    remove it never hides what ended the block. Raises FenceClosed, SnapshotFailed, PermissionMissing, LicenceForbids.
    """
    try:
        if options.snapshot_moref:
            yield await use_snapshot(vcenter, vm, options.snapshot_moref)
        else:
            yield await hold_snapshot(vcenter, vm, options, name=name, before=before, chains=chains)
    except BaseException as error:
        if isinstance(error, INTERRUPTIONS) and going_on():
            get_run_logger().warning("kept for the next run vm=%s snapshot=%s for=%s", vm.moref, name, KEPT_FOR)
        else:
            give_up()
            await to_the_end(_drop_on_the_way_out(vcenter, vm, name))
        raise
    await to_the_end(drop_snapshot(vcenter, vm, name))


@contextmanager
def kept_if_interrupted(give_up: Callable[[], None]) -> Iterator[None]:
    """Call `give_up` where the block ends in anything but an interruption, after which the next run goes on."""
    try:
        yield
    except INTERRUPTIONS:
        raise
    except BaseException:
        give_up()
        raise


async def _drop_on_the_way_out(vcenter: VCenter, vm: VirtualMachine, name: str) -> None:
    """Remove the snapshot, or see its removal started; no task run, since Prefect's server may be what is lost."""
    try:
        await on_vcenter(vcenter, snapshots.drop_snapshot, vm.moref, name=name, timeout_s=PATIENCE_S)
    except Hyper2KvmError as error:
        get_run_logger().error("snapshot not seen removed vm=%s snapshot=%s error=%s", vm.moref, name, error)


@task(name="use-snapshot", task_run_name="use {moref} of {vm.name}", cache_policy=NO_CACHE)
async def use_snapshot(vcenter: VCenter, vm: VirtualMachine, moref: str) -> Snapshot:
    """Return a snapshot that exists, which is read and left alone. Raises InvalidInput."""
    return await on_vcenter(vcenter, snapshots.existing_snapshot, vm, moref)


@task(name="snapshot", task_run_name="snapshot {vm.name}", cache_policy=NO_CACHE)
async def hold_snapshot(
    vcenter: VCenter, vm: VirtualMachine, options: Wishes, *, name: str, before: Snapshot | None, chains: bool = False
) -> Snapshot | None:
    """Return the job's own snapshot: the one it had `before`, else a new one; None where a VM that is off has none."""
    log = get_run_logger()
    try:
        take = partial(_hold, name=name, description=description(), before=before, chains=chains)
        held = await on_vcenter(vcenter, take, vm, options)
    except LicenceForbids as error:
        if vm.power_state != "poweredOff":
            raise
        log.warning("no snapshot vm=%s: %s; it is off, and copied as it is", vm.moref, error.cause)
        return None
    words = "gone on with" if held == before else "taken"
    log.info("snapshot %s vm=%s snapshot=%s quiesced=%s", words, vm.moref, held.moref, held.quiesced)
    return held


def _hold(
    session: Session,
    vm: VirtualMachine,
    options: Wishes,
    *,
    name: str,
    description: str,
    before: Snapshot | None,
    chains: bool,
) -> Snapshot:
    there = snapshots.find_snapshot(session, vm.moref, name=name)
    if there and there == before:
        return there
    if there:  # of a run that ended before it could say what it holds
        snapshots.drop_snapshot(session, vm.moref, name=name)
    return snapshots.take_snapshot(
        session,
        vm,
        name=name,
        description=description,
        quiesce=options.quiesce,
        or_crash_consistent=options.allow_crash_consistent,
        chains=chains,
    )


@task(name="remove-snapshot", task_run_name="remove snapshot of {vm.name}", cache_policy=NO_CACHE)
async def drop_snapshot(vcenter: VCenter, vm: VirtualMachine, name: str) -> None:
    """Remove the VM's snapshot of that name, if there is one, and wait for its consolidation."""
    await on_vcenter(vcenter, snapshots.drop_snapshot, vm.moref, name=name)


@task(name="check-snapshot", task_run_name="check snapshot of {vm.name}", cache_policy=NO_CACHE)
async def check_snapshot(
    vcenter: VCenter, vm: VirtualMachine, snapshot: Snapshot | None, disks: tuple[VirtualDisk, ...]
) -> None:
    """Raise SnapshotChanged unless, after the last byte, the disks are frozen as they were before the first."""
    await on_vcenter(vcenter, check_unchanged, vm, snapshot, disks)


@contextmanager
def spoken_of(folder: Path) -> Iterator[None]:
    """Have the snapshots that the block takes say that their job is at work in `folder` of this machine."""
    token = _JOB_FOLDER.set(folder)
    try:
        yield
    finally:
        _JOB_FOLDER.reset(token)


def description() -> str:
    """Return what a snapshot says of itself, for people in vSphere and for the janitor."""
    return Claim(
        purpose=flow_run.get_flow_name() or "export",
        flow_run=flow_run.get_id(),
        expires=(datetime.now(UTC) + KEPT_FOR).replace(microsecond=0),
        machine=machine_id(),
        folder=str(_JOB_FOLDER.get() or ""),
    ).model_dump_json()
