"""Which road the disks of a job take: those that may be tried, and the first of them that reads every disk."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from pathlib import Path

from prefect.logging import get_run_logger

from blocks import ESXiHost, NbdSource, VCenter, VddkToolkit
from tasks.disks import check_flat
from tasks.errors import ConnectionFailed, Hyper2KvmError, InvalidInput, NoRoad, TransferInterrupted, VddkUnavailable
from tasks.images.state import JobState, write_state
from tasks.models import (
    ExportTransport,
    FolderSettings,
    LeaseSettings,
    Roads,
    RoadSettings,
    RoutedJob,
    SkippedRoad,
    Value,
    VddkSettings,
)
from tasks.probe import probe
from tasks.road import ROADS, road_of
from tasks.steps import connection_of, in_thread
from tasks.transports.vddk_library import find_library

INTERRUPTIONS = (TransferInterrupted, ConnectionFailed)  # after which a run is gone on with


class Means(Value):
    """What an operator configured for roads that need something."""

    toolkit: VddkToolkit | None = None
    nbd_source: NbdSource | None = None
    esxi_host: ESXiHost | None = None


def roads_for(options: RoutedJob, means: Means) -> Roads:
    """Return the roads that the options allow, before anything is connected.

    Of one that they name, what is missing is raised (VddkUnavailable, InvalidInput); of those that `auto` may choose
    among, it is why they are skipped.
    """
    if options.transport != "auto":
        return Roads(candidates=(WAYS[options.transport](options, means),))
    candidates, skipped = [], []
    for name in ROADS:
        if options.seeking and not ExportTransport(name).seeks:
            skipped.append(SkippedRoad(road=name, why="it reads a disk only from its beginning to its end"))
            continue
        try:
            candidates.append(WAYS[name](options, means))
        except (VddkUnavailable, InvalidInput) as error:
            skipped.append(SkippedRoad(road=name, why=error.cause))
    return Roads(candidates=tuple(candidates), skipped=tuple(skipped))


def _vddk(options: RoutedJob, means: Means) -> RoadSettings:
    libdir = Path(options.vddk_libdir) if options.vddk_libdir else None
    return usable(means.toolkit.settings() if means.toolkit else VddkSettings(libdir=libdir))


def _nbd(options: RoutedJob, means: Means) -> RoadSettings:
    if means.nbd_source:
        return means.nbd_source.settings()
    remedy = "Give --nbd-uri or --nbd-command, or choose a saved NBD Source (--nbd-source)"
    raise InvalidInput(what="transport nbd", why="no NBD source is given", remedy=remedy)


def _folder(options: RoutedJob, means: Means) -> RoadSettings:
    return FolderSettings()


def _ssh(options: RoutedJob, means: Means) -> RoadSettings:
    if means.esxi_host:
        return means.esxi_host.settings()
    remedy = "Give --esxi-host and --esxi-host-key, or choose a saved ESXi Host (--esxi-block)"
    raise InvalidInput(what="transport ssh", why="no ESXi host is given", remedy=remedy)


def _nfc_lease(options: RoutedJob, means: Means) -> RoadSettings:
    return LeaseSettings()


WAYS: dict[str, Callable[[RoutedJob, Means], RoadSettings]] = {
    "vddk": _vddk,
    "nbd": _nbd,
    "folder": _folder,
    "ssh": _ssh,
    "nfc_lease": _nfc_lease,
}
"""What tells a road's settings, or raises what it lacks, by the road's name."""


def usable(settings: VddkSettings) -> VddkSettings:
    """Return `settings` if there is a library where they say. Raises VddkUnavailable."""
    find_library(settings.libdir)
    return settings


def chains(roads: Roads) -> bool:
    """Tell whether any of the roads reads what lies in chains of redo logs."""
    return any(ROADS[each.road].chains for each in roads.candidates)


@asynccontextmanager
async def on_a_road(vcenter: VCenter, job: JobState, roads: Roads, folder: Path) -> AsyncIterator[JobState]:
    """Yield the job with the first of `roads` by which each of its disks can be read, and hold what they share.

    The state in `folder` says which one is tried, before it is: so a run that is killed meanwhile leaves word of what
    VDDK had the server forbid. Where there is but one, its own error is raised. Of several, each one's is why it is
    skipped; NoRoad is raised where none is left, or the error of one that the next run may find mended.
    """
    skipped, failures = list(roads.skipped), []
    async with AsyncExitStack() as held:
        for settings in roads.candidates:
            trial = job.model_copy(update={"road": settings, "skipped_roads": tuple(skipped)})
            write_state(folder, trial)
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
