"""Step: one disk, by the road chosen, into a part; what an earlier run left of it is gone on with."""

from __future__ import annotations

import logging
import threading
import time
from functools import partial

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from blocks import VCenter
from tasks.errors import ChangeIdInvalid
from tasks.fetch import fetch
from tasks.images.output import DiskFiles
from tasks.images.state import JobState
from tasks.limits import lease, resources_of
from tasks.models import Arrival, ArrivalFormat, Connection, Extent, VirtualDisk
from tasks.road import opened
from tasks.steps import connection_of, in_thread, metered
from tasks.vsphere.changes import ALLOCATED, changed_extents
from tasks.vsphere.session import borrow

log = logging.getLogger(__name__)


@task(name="transfer", task_run_name="transfer {job.vm.name} disk {disk.index}", cache_policy=NO_CACHE)
async def transfer(
    vcenter: VCenter, job: JobState, disk: VirtualDisk, files: DiskFiles, arrival_format: ArrivalFormat
) -> Arrival:
    """Copy one disk of a job to its part, with the digests of what passed through memory, and a journal.

    Cancelled, it returns only when no thread of it reads or writes any more.
    Raises FileLocked, UnsupportedDisk, TransferInterrupted, DiskFull, IntegrityMismatch, SessionExpired, ….
    """
    stop, started = threading.Event(), time.monotonic()
    label, key = f"transfer {job.vm.name} disk {disk.index}", f"transfer-{job.vm.moref}-disk-{disk.index}"
    async with (
        lease(resources_of(job.vm, [disk]), vcenter=vcenter.host),
        metered(label, disk.capacity_bytes, key=key) as meter,
    ):
        source = opened(disk, job, connection_of(vcenter), stop=stop)
        result = await in_thread(
            fetch,
            stop,
            source,
            files,
            binding=_binding(job, disk),
            format=arrival_format,
            algorithm=job.digest,
            allocated=partial(_allocated, connection_of(vcenter), job, disk),
            meter=meter,
            stop=stop,
        )
    seconds = time.monotonic() - started
    get_run_logger().info(
        "transferred vm=%s disk=%d bytes=%d seconds=%.1f road=%s reason=%r",
        *(job.vm.moref, disk.index, result.bytes_transferred, seconds, result.road, result.road_reason),
    )
    return Arrival(
        disk=disk,
        format=arrival_format,
        digest=result.digest,
        bytes_transferred=result.bytes_transferred,
        road=result.road,
        road_reason=result.road_reason,
        seconds=seconds,
    )


def _allocated(connection: Connection, job: JobState, disk: VirtualDisk) -> tuple[Extent, ...] | None:
    """Return what vSphere says is allocated of a tracked disk; None where all of it is to be read."""
    if not (job.tracked and job.snapshot and disk.change_id):
        return None
    try:
        with borrow(connection) as session:
            return changed_extents(session, job.vm, job.snapshot, disk, since=ALLOCATED)
    except ChangeIdInvalid as error:
        log.warning("all is read, since what is allocated cannot be told disk=%d why=%r", disk.index, error.reason)
        return None


def _binding(job: JobState, disk: VirtualDisk) -> dict[str, str | int]:
    """Return what a journal must be of, to be gone on with: this disk of this VM at this point in time."""
    point = f"{job.snapshot.moref} of {job.snapshot.created}" if job.snapshot else f"off, {job.vm.change_version}"
    return {
        "vcenter": job.vcenter_uuid,
        "vm": job.vm.instance_uuid,
        "disk": disk.uuid or disk.datastore_path,
        "point": point,
        "bytes": disk.capacity_bytes,
    }
