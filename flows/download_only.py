"""The `download_only` mode: the files of a VM's folder, byte for byte."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from prefect import flow

from blocks import VCenter
from tasks.browse import Plan, browse
from tasks.download import Place, download
from tasks.errors import SnapshotChanged
from tasks.images.files import allocated_bytes, need_space
from tasks.images.mirror import PARTS, forget, known_files, parts_of
from tasks.images.state import read_state, write_state
from tasks.job import Job, job_at_work
from tasks.mirror import commit_download, download_warnings, now
from tasks.models import DownloadedFile, DownloadJob, DownloadManifest, Snapshot, SnapshotWishes
from tasks.snapshot import check_snapshot, drop_snapshot, point_in_time
from tasks.steps import side_by_side
from tasks.succession import clean_up


@flow(
    name="download-only",
    flow_run_name="download {options.vm_name}",
    on_cancellation=[clean_up],
    on_crashed=[clean_up],
    on_failure=[clean_up],
)
async def download_only(vcenter: VCenter, options: DownloadJob) -> DownloadManifest:
    """Download the files of a VM's folder as they are: nothing is changed, renamed or converted.

    They land in `<output folder>/<VM>/` as they lie in the datastore, read back and compared, with `manifest.json`
    beside them: size, time and digest of each. A second run downloads what is missing or changed; a run that was killed
    is gone on with, inside a file too. The VM should be powered off; one that runs needs a snapshot.

    Args:
        vcenter: Where the VM is now: a saved vCenter, or a new one through Add.
        options: Whose files to download, which of them, and where to.
    """
    async with job_at_work(vcenter, options) as job:
        vm, folder = job.vm, job.folder
        known = known_files(folder, vcenter_uuid=job.server.uuid, vm=vm)
        await browse(vcenter, vm, options, None)  # what is refused, is refused before a snapshot is taken
        async with _held_still(vcenter, job, options) as snapshot:
            place = Place(vcenter_uuid=job.server.uuid, vm=vm, snapshot=snapshot, folder=folder)
            plan = await browse(vcenter, vm, options, snapshot)
            if snapshot:
                write_state(folder, job.state(snapshot))
            files = await _arrived(vcenter, place, plan, known, options.concurrency)
        manifest = _manifest(vcenter, place, plan, files, known)
        await commit_download(manifest, folder, known)
        return manifest


@asynccontextmanager
async def _held_still(vcenter: VCenter, job: Job, options: DownloadJob) -> AsyncIterator[Snapshot | None]:
    """Yield a snapshot for the block where one is asked for and the VM is not off; else None.

    One that a run before left, which was killed, is gone on with, or removed where none is needed any more.
    """
    state, vm, name = read_state(job.folder), job.vm, job.snapshot_name
    if vm.power_state == "poweredOff" or not options.snapshot:
        if state:
            await drop_snapshot(vcenter, vm, name)
        yield None
        return
    before, give_up = state.snapshot if state else None, partial(forget, job.folder)
    wishes = SnapshotWishes()
    async with point_in_time(vcenter, vm, wishes, name=name, before=before, give_up=give_up) as snapshot:
        yield snapshot


async def _arrived(
    vcenter: VCenter, place: Place, plan: Plan, known: dict[str, DownloadedFile], at_once: int
) -> tuple[DownloadedFile, ...]:
    """Return every file of the plan once it lies here, in its part or from before, all of one point in time."""
    parts = place.folder / PARTS
    parts.mkdir(exist_ok=True)
    need_space(place.folder, _sure_to_take(place, plan, known))
    calls = [
        partial(download, vcenter, place, file, number, known.get(file.path)) for number, file in enumerate(plan.files)
    ]
    files = await side_by_side(calls, at_once=at_once)
    if plan.frozen:
        try:
            await check_snapshot(vcenter, place.vm, place.snapshot, plan.frozen)
        except SnapshotChanged:
            forget(place.folder)
            raise
    return tuple(files)


def _sure_to_take(place: Place, plan: Plan, known: dict[str, DownloadedFile]) -> int:
    """Return how many more bytes the files take here at least: what a thin disk holds is not known beforehand."""
    thin = [disk.datastore_path.removesuffix(".vmdk") for disk in plan.frozen if disk.thin]
    flats = {f"{stem}-flat.vmdk" for stem in thin}
    new = [file for file in plan.files if file.path not in known and file.datastore_path not in flats]
    here = {file.path: allocated_bytes(parts_of(place.folder, file).raw_part) for file in new}
    return sum(max(0, file.size_bytes - here[file.path]) for file in new)


def _manifest(
    vcenter: VCenter, place: Place, plan: Plan, files: tuple[DownloadedFile, ...], known: dict[str, DownloadedFile]
) -> DownloadManifest:
    """Return the manifest of a download whose files are all here."""
    here, running = {file.path for file in files}, place.vm.power_state != "poweredOff"
    return DownloadManifest(
        vcenter_uuid=place.vcenter_uuid,
        vm=place.vm,
        snapshot=place.snapshot,
        files=files,
        left_out=plan.left_out,
        missing=plan.missing,
        earlier=tuple(file for path, file in known.items() if path not in here and (place.folder / path).exists()),
        consistent=not running or place.snapshot is not None,
        created=now(),
        warnings=download_warnings(
            vcenter,
            left_out=plan.left_out,
            missing=plan.missing,
            running=running,
            frozen=place.snapshot is not None,
        ),
    )
