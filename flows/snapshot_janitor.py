"""The `janitor`: what dead runs left on vCenters, in folders and among Prefect's limits, found, told, and removed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prefect import flow
from prefect.logging import get_run_logger

from blocks import VCenter
from tasks.connect import connected
from tasks.errors import ConnectionFailed, JanitorUnfinished, VsphereFault
from tasks.images.leftovers import LeftJob, left_jobs
from tasks.janitor import (
    judged,
    look,
    read_by_vddk,
    saved_vcenters,
    tell,
    tidy_folder,
    tidy_limits,
    tidy_snapshot,
    tidy_vddk,
    unconsolidated,
)
from tasks.job import place_that_stays
from tasks.models import JanitorJob, JanitorReport, Leftover

UNREACHABLE = (ConnectionFailed, VsphereFault)


@flow(name="snapshot-janitor", flow_run_name="janitor")
async def snapshot_janitor(options: JanitorJob, vcenter: VCenter | None = None) -> JanitorReport:
    """Find what dead runs left, and remove what may go.

    That is: snapshots of ours whose job is dead and whose time is over, on every saved vCenter; VMs that VDDK keeps
    from moving for a run that died; in folders here, names of dead runs in locks, and journals and parts that nobody
    went on with; slots of our limits that nobody holds. VMs that need consolidation are told. A snapshot that is not
    ours, a job that is at work and a complete copy are never touched. The run fails at its end if anything could not
    be looked at.

    Args:
        options: Whether to remove, which folders to look through, and how long things are kept.
        vcenter: Only this vCenter, instead of all that are saved.
    """
    folders = [place_that_stays(folder) for folder in options.folders]
    jobs = {job.folder: job for folder in folders for job in left_jobs(folder)}
    looked_at, troubles, found = [str(folder) for folder in folders], [], []
    seen: set[str] = set()
    for each in [vcenter] if vcenter else await saved_vcenters():
        try:
            words, there = await _on_vcenter(each, options, jobs, seen)
        except UNREACHABLE as error:
            get_run_logger().error("not looked at host=%s error=%s", each.host, error)
            troubles.append(f"{each.host}: {error.cause}")
            continue
        looked_at.append(words)
        found += there
    for job in jobs.values():
        found += await tidy_folder(job, options)
    found += await tidy_limits(jobs.values(), options)
    report = JanitorReport(
        removed=options.remove, looked_at=tuple(looked_at), troubles=tuple(troubles), leftovers=tuple(found)
    )
    await tell(report)
    _refuse_unfinished(report)
    return report


async def _on_vcenter(
    vcenter: VCenter, options: JanitorJob, jobs: dict[Path, LeftJob], seen: set[str]
) -> tuple[str, list[Leftover]]:
    """Return what was looked at on a vCenter, and found; the jobs of snapshots found are put among `jobs`."""
    async with connected(vcenter) as server:
        if server.uuid in seen:
            return f"{vcenter.host} (saved twice)", []
        seen.add(server.uuid)
        there = await look(vcenter)
        found = list(unconsolidated(vcenter, there))
        for left, judgement in judged(there, server.uuid):
            if judgement.folder and judgement.folder not in jobs:
                jobs |= {job.folder: job for job in _here(judgement.folder)}
            found.append(await tidy_snapshot(vcenter, left, judgement, remove=options.remove))
        for job in read_by_vddk(list(jobs.values()), server.uuid):
            found.append(await tidy_vddk(vcenter, job, remove=options.remove))
    return f"{vcenter.host} ({there.vms} VMs)", found


def _here(folder: Path) -> Sequence[LeftJob]:
    return [job for job in left_jobs(folder) if job.folder == folder]


def _refuse_unfinished(report: JanitorReport) -> None:
    """Raise JanitorUnfinished, with the report as its field `found`, where something failed."""
    failed = [f"{each.what}: {each.why}" for each in report.leftovers if each.done == "failed"]
    if trouble := (*report.troubles, *failed):
        raise JanitorUnfinished(count=len(trouble), first=trouble[0], found=report)
