"""Which road the disks of a job take: those that may be tried, and the first of them that reads every disk."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from pathlib import Path

from prefect.logging import get_run_logger

from blocks import VCenter, VddkToolkit
from tasks.disks import check_flat
from tasks.errors import ConnectionFailed, Hyper2KvmError, NoRoad, TransferInterrupted, VddkUnavailable
from tasks.images.state import JobState
from tasks.models import ExportJob, FolderSettings, Roads, RoadSettings, SkippedRoad, VddkSettings
from tasks.probe import probe
from tasks.road import ROADS, road_of
from tasks.steps import connection_of, in_thread
from tasks.transports.vddk_library import find_library

INTERRUPTIONS = (TransferInterrupted, ConnectionFailed)  # after which a run is gone on with


def roads_for(options: ExportJob, *, toolkit: VddkToolkit | None = None) -> Roads:
    """Return the roads that the options allow, before anything is connected.

    Of one that they name, what is missing is raised (VddkUnavailable, InvalidInput); of those that `auto` may choose
    among, it is why they are skipped.
    """
    ways = {"vddk": _vddk, "folder": _folder}
    if options.transport != "auto":
        return Roads(candidates=(ways[options.transport](options, toolkit),))
    candidates, skipped = [], []
    for name, settings_of in ways.items():
        try:
            candidates.append(settings_of(options, toolkit))
        except VddkUnavailable as error:
            skipped.append(SkippedRoad(road=name, why=error.cause))
    return Roads(candidates=tuple(candidates), skipped=tuple(skipped))


def _folder(options: ExportJob, toolkit: VddkToolkit | None) -> RoadSettings:
    return FolderSettings()


def _vddk(options: ExportJob, toolkit: VddkToolkit | None) -> RoadSettings:
    libdir = Path(options.vddk_libdir) if options.vddk_libdir else None
    return usable(toolkit.settings() if toolkit else VddkSettings(libdir=libdir))


def usable(settings: VddkSettings) -> VddkSettings:
    """Return `settings` if there is a library where they say. Raises VddkUnavailable."""
    find_library(settings.libdir)
    return settings


def chains(roads: Roads) -> bool:
    """Tell whether any of the roads reads what lies in chains of redo logs."""
    return any(ROADS[each.road].chains for each in roads.candidates)


@asynccontextmanager
async def on_a_road(vcenter: VCenter, job: JobState, roads: Roads) -> AsyncIterator[JobState]:
    """Yield the job with the first of `roads` by which each of its disks can be read, and hold what they share.

    Where there is but one, its own error is raised. Of several, each one's is why it is skipped; NoRoad is raised where
    none is left, or the error of one that the next run may find mended.
    """
    skipped, failures = list(roads.skipped), []
    async with AsyncExitStack() as held:
        for settings in roads.candidates:
            trial = job.model_copy(update={"road": settings, "skipped_roads": tuple(skipped)})
            try:
                await _try(vcenter, trial, held)
            except Hyper2KvmError as error:
                failures.append(error)
                skipped.append(SkippedRoad(road=settings.road, why=error.cause))
            else:
                break
        else:
            raise _none(job, failures, skipped)
        for each in skipped:
            get_run_logger().info("road not taken road=%s reason=%r", each.road, each.why)
        get_run_logger().info("road taken vm=%s road=%s", job.vm.moref, trial.road.road)
        yield trial


async def _try(vcenter: VCenter, job: JobState, held: AsyncExitStack) -> None:
    """See that every disk can be read by the job's road; leave with `held` what it needs for that."""
    road = road_of(job)
    if not road.chains:
        check_flat(job.disks, job.snapshot, road=job.road.road)
    async with AsyncExitStack() as mine:
        shared = ExitStack()  # its end is sure before its beginning: a cancellation may come in between
        mine.push_async_exit(lambda *error: in_thread(shared.__exit__, None, *error))
        await in_thread(shared.enter_context, None, road.held(job, connection_of(vcenter)))
        await probe(vcenter, job)
        held.push_async_exit(mine.pop_all().__aexit__)


def _none(job: JobState, failures: list[Hyper2KvmError], skipped: list[SkippedRoad]) -> Hyper2KvmError:
    """Return what it means that no road is left."""
    if len(failures) == 1:
        return failures[0]
    passing = next((error for error in failures if isinstance(error, INTERRUPTIONS)), None)
    return passing or NoRoad(vm=job.vm.name, reasons="; ".join(f"{each.road}: {each.why}" for each in skipped))
