"""Steps of the janitor: what dead runs left on a vCenter, in folders here, and among Prefect's limits; and the report.

Nothing here takes Prefect's word that a run crashed for its death: locks and heartbeats say (`tasks.images.claim`).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

from prefect import task
from prefect.artifacts import acreate_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitUpdate
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterEndTime,
    FlowRunFilterId,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import StateType
from prefect.client.schemas.responses import GlobalConcurrencyLimitResponse
from prefect.exceptions import ObjectNotFound
from prefect.logging import get_run_logger
from prefect.runtime import flow_run

from blocks import VCenter
from tasks.errors import Hyper2KvmError, JobLocked
from tasks.images.claim import Judgement, judge
from tasks.images.job import nobody_at_work
from tasks.images.leftovers import LeftJob, clear_lock, drop_parts
from tasks.models import Connection, JanitorJob, JanitorReport, Leftover, VddkSettings
from tasks.road import end_access
from tasks.steps import connection_of, in_thread, on_vcenter, quietly
from tasks.succession import close_predecessor
from tasks.text import cell, one_line
from tasks.vsphere.leftovers import LeftSnapshot, Room, Survey, survey
from tasks.vsphere.session import Session
from tasks.vsphere.snapshots import remove_snapshot

GIB = 1 << 30
LIMITS = "hyper2kvm-"  # begins the names of our limits
PAGE = 200
AT_WORK = [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]


async def saved_vcenters() -> list[VCenter]:
    """Return the vCenters that are saved as blocks."""
    async with get_client() as client:
        try:
            documents = await client.read_block_documents_by_type(VCenter.get_block_type_slug(), include_secrets=True)
        except ObjectNotFound:  # no block of that kind was ever registered there
            return []
    return [VCenter._from_block_document(document) for document in documents]


# ── a vCenter ────────────────────────────────────────────────────────────────────────────────────────


@task(name="survey", task_run_name="survey {vcenter.host}", cache_policy=NO_CACHE)
async def look(vcenter: VCenter) -> Survey:
    """Return what runs of ours may have left on a vCenter."""
    found = await on_vcenter(vcenter, survey)
    get_run_logger().info("surveyed host=%s vms=%d snapshots=%d", vcenter.host, found.vms, len(found.snapshots))
    return found


def judged(found: Survey, vcenter_uuid: str) -> list[tuple[LeftSnapshot, Judgement]]:
    """Return the snapshots found, each with what is to become of it."""
    return [
        (
            left,
            judge(
                name=left.name,
                description=left.description,
                vcenter_uuid=vcenter_uuid,
                instance_uuid=left.instance_uuid,
            ),
        )
        for left in found.snapshots
    ]


@task(name="tidy-snapshot", task_run_name="{left.name} of {left.vm_name}", cache_policy=NO_CACHE)
async def tidy_snapshot(vcenter: VCenter, left: LeftSnapshot, judgement: Judgement, *, remove: bool) -> Leftover:
    """Remove a snapshot that may go; no run of its job begins meanwhile."""
    about = Leftover(
        kind="snapshot",
        where=vcenter.host,
        what=f"{left.name} of {left.vm_name} ({left.vm_moref})",
        done="left",
        why=judgement.why,
        age_s=(datetime.now(UTC) - left.created).total_seconds(),
        room=in_words(left.room),
    )
    if not judgement.may_go or judgement.folder is None:
        return about
    return await _tidied(about, partial(on_vcenter, vcenter, _remove, left, judgement.folder), remove=remove)


def _remove(session: Session, left: LeftSnapshot, folder: Path) -> None:
    with nobody_at_work(folder):
        remove_snapshot(session, left.vm_moref, left.moref, name=left.name)


def unconsolidated(vcenter: VCenter, found: Survey) -> Iterator[Leftover]:
    """Yield the VMs that need consolidation: told, and never done, since nothing says whose deltas they are."""
    for left in found.unconsolidated:
        yield Leftover(
            kind="consolidation",
            where=vcenter.host,
            what=f"{left.vm_name} ({left.vm_moref})",
            done="left",
            why="it needs consolidation: do that in vSphere (Snapshots, Consolidate)",
            room=in_words(left.room),
        )


def in_words(room: Iterable[Room]) -> str:
    """Return how much of each datastore is free."""
    return "; ".join(
        f"{each.name}: {each.free_bytes / GIB:,.0f} of {each.capacity_bytes / GIB:,.0f} GiB free" for each in room
    )


@task(name="end-access", task_run_name="end VDDK's access of {job.folder}", cache_policy=NO_CACHE)
async def tidy_vddk(vcenter: VCenter, job: LeftJob, *, remove: bool) -> Leftover:
    """Have the server allow again what VDDK had it forbid (Storage vMotion) for a run that died."""
    assert job.state
    vm = job.state.vm
    about = Leftover(
        kind="vddk",
        where=vcenter.host,
        what=f"{vm.name} ({vm.moref})",
        done="left",
        why="a run that read it through VDDK did not bring its job to an end",
        age_s=job.silent_s,
    )
    return await _tidied(about, partial(in_thread, _end_access, None, connection_of(vcenter), job), remove=remove)


def _end_access(connection: Connection, job: LeftJob) -> None:
    assert job.state
    with nobody_at_work(job.folder):
        end_access(job.state, connection)


# ── folders here ─────────────────────────────────────────────────────────────────────────────────────


def read_by_vddk(jobs: Sequence[LeftJob], vcenter_uuid: str) -> list[LeftJob]:
    """Return the dead jobs that read disks of that vCenter through VDDK."""
    return [
        job
        for job in jobs
        if job.state
        and not job.held
        and job.state.vcenter_uuid == vcenter_uuid
        and isinstance(job.state.road, VddkSettings)
    ]


@task(name="tidy-folder", task_run_name="tidy {job.folder}", cache_policy=NO_CACHE)
async def tidy_folder(job: LeftJob, options: JanitorJob) -> list[Leftover]:
    """Drop what a dead job left here longer ago than the options say."""
    found = []
    if job.idle_s is not None:
        found.append(await _parts(job, options))
    if job.holder and not job.held:
        found.append(await _lock(job, options))
    return found


async def _parts(job: LeftJob, options: JanitorJob) -> Leftover:
    idle_s, limit_s = job.idle_s or 0.0, options.journals_after_days * 86400
    about = _of(job, "journal", age_s=idle_s)
    if job.held:
        return about.model_copy(update={"why": "its job is at work"})
    if job.finished:
        return about.model_copy(update={"why": job.finished})
    if idle_s < limit_s:
        return about.model_copy(update={"why": f"kept for {options.journals_after_days:g} days"})
    return await _tidied(about, partial(in_thread, drop_parts, None, job.folder, job.holder), remove=options.remove)


async def _lock(job: LeftJob, options: JanitorJob) -> Leftover:
    about = _of(job, "lock", age_s=job.silent_s)
    if job.silent_s < options.locks_after_h * 3600:
        return about.model_copy(update={"why": f"kept for {options.locks_after_h:g} hours"})
    return await _tidied(about, partial(_closed, job), remove=options.remove)


async def _closed(job: LeftJob) -> None:
    await close_predecessor(job.holder, ours="")
    await in_thread(clear_lock, None, job.folder, job.holder)


def _of(job: LeftJob, kind: str, *, age_s: float) -> Leftover:
    who = job.holder.get("flow_run") or "a run"
    fields = {"kind": kind, "where": str(job.folder), "what": f"of {who}", "done": "left", "age_s": age_s}
    return Leftover.model_validate(fields | {"why": "its time is over and its job is dead"})


# ── Prefect's limits ─────────────────────────────────────────────────────────────────────────────────


@task(name="tidy-limits", cache_policy=NO_CACHE)
async def tidy_limits(jobs: Iterable[LeftJob], options: JanitorJob) -> list[Leftover]:
    """Free the slots of our limits that nobody can hold: none but we are at work. Leases that are lost leave such.

    Who holds a lease the server does not tell; while anybody is at work, they are left. Prefect's word for that is not
    enough: a run that it calls crashed may go on, whether or not its job is among those that were found.
    """
    async with get_client() as client:
        at_work = any(job.held for job in jobs) or await _others_at_work(options)
        found = []
        for limit in await _our_limits():
            about = Leftover(
                kind="slots",
                where="Prefect",
                what=f"{limit.active_slots} of {limit.limit} slots of {limit.name}",
                done="left",
                why="a run is at work, and may hold them" if at_work else "no run is at work that could hold them",
            )
            free = partial(
                client.update_global_concurrency_limit, limit.name, GlobalConcurrencyLimitUpdate(active_slots=0)
            )
            found.append(about if at_work else await _tidied(about, free, remove=options.remove))
    return found


async def _others_at_work(options: JanitorJob) -> bool:
    """Tell whether a run but ours is at work, or was called crashed so lately that it may be."""
    lately = datetime.now(UTC) - timedelta(hours=options.locks_after_h)
    others = FlowRunFilterId(not_any_=[flow_run.get_id()])
    at_work = FlowRunFilter(id=others, state=FlowRunFilterState(type=FlowRunFilterStateType(any_=AT_WORK)))
    crashed = FlowRunFilter(
        id=others,
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.CRASHED])),
        end_time=FlowRunFilterEndTime(after_=lately),
    )
    async with get_client() as client:
        return any([await client.read_flow_runs(flow_run_filter=each, limit=1) for each in (at_work, crashed)])


async def _our_limits() -> list[GlobalConcurrencyLimitResponse]:
    """Return those of our limits of which slots are taken."""
    ours, at = [], 0
    async with get_client() as client:
        while page := await client.read_global_concurrency_limits(limit=PAGE, offset=at):
            ours += [each for each in page if each.name.startswith(LIMITS) and each.active_slots]
            at += len(page)
    return ours


# ── all of it ────────────────────────────────────────────────────────────────────────────────────────


async def _tidied(about: Leftover, work: Callable[[], Awaitable[object]], *, remove: bool) -> Leftover:
    """Do what is to be done about something, and say what came of it; one failure keeps nobody from the rest."""
    if not remove:
        return about.model_copy(update={"done": "would be removed"})
    try:
        await work()
    except JobLocked:
        return about.model_copy(update={"why": "its job has begun to work again"})
    except Hyper2KvmError as error:
        get_run_logger().error("not removed kind=%s what=%r error=%s", about.kind, about.what, error)
        return about.model_copy(update={"done": "failed", "why": error.cause})
    get_run_logger().info("removed kind=%s where=%s what=%r", about.kind, about.where, about.what)
    return about.model_copy(update={"done": "removed"})


async def tell(report: JanitorReport) -> None:
    """Leave the report among the run's artifacts."""
    description = f"Janitor: {len(report.leftovers)} found"
    await quietly(acreate_markdown_artifact(markdown(report), key="janitor", description=description))


def markdown(report: JanitorReport) -> str:
    """Return the report as GitHub markdown."""
    lines = [
        "# Janitor",
        "",
        *(f"> **Not looked at:** {cell(trouble)}\n" for trouble in report.troubles),
        f"Looked at {cell(', '.join(report.looked_at)) or 'nothing'}; "
        f"{'what may go was removed' if report.removed else 'nothing was removed'}.",
        "",
        "| | Where | What | Age | Done | Why | Room |",
        "| --- | --- | --- | ---: | --- | --- | --- |",
        *(_row(each) for each in report.leftovers),
    ]
    return "\n".join(lines)


def _row(left: Leftover) -> str:
    words = (left.kind, left.where, left.what, age(left.age_s), left.done, left.why, left.room)
    return f"| {' | '.join(cell(one_line(word)) for word in words)} |"


def age(seconds: float) -> str:
    """Return an age in the unit that a person would use."""
    if seconds <= 0:
        return ""
    return f"{seconds / 86400:.0f} d" if seconds >= 2 * 86400 else f"{seconds / 3600:.1f} h"
