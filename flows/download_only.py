"""The `download_only` mode: the files of a VM's folder, byte for byte."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial

from prefect import flow

from blocks import VCenter
from tasks.browse import Plan, browse
from tasks.download import Place, Wanted, download
from tasks.images.files import allocated_bytes
from tasks.images.mirror import begin, forget, known_files, parts_of
from tasks.images.state import read_state, resumable, write_state
from tasks.job import Job, job_at_work
from tasks.mirror import commit_download, download_warnings, now
from tasks.models import DatastoreFile, DownloadedFile, DownloadJob, DownloadManifest, Snapshot, SnapshotWishes
from tasks.snapshot import check_snapshot, drop_snapshot, kept_if_interrupted, point_in_time
from tasks.steps import check_room, side_by_side
from tasks.succession import clean_up

MAY_BE_ZEROS = (".vmdk", ".vmem", ".vmss", ".vmsn", ".vswp")  # endings of files of disks and of memory


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
            place = Place(vcenter_uuid=job.server.uuid, vm=vm, snapshot=snapshot, folder=folder, digest=options.digest)
            plan = await browse(vcenter, vm, options, snapshot)
            write_state(folder, job.state(snapshot))
            files = await _arrived(vcenter, place, plan, known, options)
        manifest = _manifest(vcenter, place, plan, files, known)
        await commit_download(manifest, folder, known)
        return manifest


@asynccontextmanager
async def _held_still(vcenter: VCenter, job: Job, options: DownloadJob) -> AsyncIterator[Snapshot | None]:
    """Yield a snapshot for the block where one is asked for and the VM is not off; else None.

    One that a run before left, which was killed, is gone on with, or removed where none is needed any more. What
    arrived is dropped where the block ends in anything but an interruption.
    """
    state, vm, name = read_state(job.folder), job.vm, job.snapshot_name
    before, give_up = state.snapshot if state else None, partial(forget, job.folder)
    if vm.power_state == "poweredOff" or not options.snapshot:
        if before:
            await drop_snapshot(vcenter, vm, name)
        with kept_if_interrupted(give_up):
            yield None
        return
    wishes, going_on = SnapshotWishes(), partial(resumable, job.folder)
    point = point_in_time(vcenter, vm, wishes, name=name, before=before, give_up=give_up, going_on=going_on)
    async with point as snapshot:
        yield snapshot


async def _arrived(
    vcenter: VCenter, place: Place, plan: Plan, known: dict[str, DownloadedFile], options: DownloadJob
) -> list[DownloadedFile | None]:
    """Return every file of the plan once it lies here, in its part or from before, all of one point in time.

    None stands for one that has gone from the source meanwhile.
    """
    begin(place.folder)
    new = [file for file in plan.files if file.path not in known]
    solid = () if options.overcommit else plan.thick
    sure = [file for file in new if file.path in solid or not file.path.endswith(MAY_BE_ZEROS)]
    check_room(place.folder, sure_bytes=_missing_bytes(place, sure), most_bytes=_missing_bytes(place, new))
    wanted = [
        Wanted(
            file=file,
            number=number,
            known=known.get(file.path),
            needed=options.fail_on_missing or file.path in plan.own,
        )
        for number, file in enumerate(plan.files)
    ]
    calls = [partial(download, vcenter, place, each) for each in wanted]
    files = await side_by_side(calls, at_once=options.concurrency)
    if plan.frozen:
        await check_snapshot(vcenter, place.vm, place.snapshot, plan.frozen)
    return files


def _missing_bytes(place: Place, files: Sequence[DatastoreFile]) -> int:
    """Return how many more bytes files take here, if there are no zeros in them."""
    return sum(max(0, file.size_bytes - allocated_bytes(parts_of(place.folder, file).raw_part)) for file in files)


def _manifest(
    vcenter: VCenter, place: Place, plan: Plan, arrived: list[DownloadedFile | None], known: dict[str, DownloadedFile]
) -> DownloadManifest:
    """Return the manifest of a download whose files are all here, or gone from the source."""
    files = tuple(file for file in arrived if file)
    gone = (file.datastore_path for file, here in zip(plan.files, arrived, strict=True) if not here)
    missing = (*plan.missing, *gone)
    here, running = {file.path for file in files}, place.vm.power_state != "poweredOff"
    return DownloadManifest(
        vcenter_uuid=place.vcenter_uuid,
        vm=place.vm,
        snapshot=place.snapshot,
        files=files,
        left_out=plan.left_out,
        missing=missing,
        earlier=tuple(file for path, file in known.items() if path not in here and (place.folder / path).exists()),
        consistent=not running or place.snapshot is not None,
        created=now(),
        warnings=download_warnings(
            vcenter,
            left_out=plan.left_out,
            missing=missing,
            running=running,
            frozen=place.snapshot is not None,
        ),
    )
