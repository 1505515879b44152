"""Step: whether the road can read every disk, asked of the data-plane before the first transfer."""

from __future__ import annotations

import threading

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from blocks import VCenter
from tasks.images.state import JobState
from tasks.models import Connection
from tasks.road import opened
from tasks.steps import connection_of, in_thread
from tasks.vsphere.session import borrow


@task(name="probe", task_run_name="probe {job.vm.name}", cache_policy=NO_CACHE)
async def probe(vcenter: VCenter, job: JobState) -> None:
    """Open each disk of a job and read a little, so that nothing is copied of a VM of which one disk cannot be.

    Raises FileLocked, UnsupportedDisk, PermissionMissing, ConnectionFailed, VddkFailed, … for the first that cannot
    be read.
    """
    stop = threading.Event()
    await in_thread(_probe, stop, connection_of(vcenter), job, stop)
    get_run_logger().info("probed vm=%s disks=%d", job.vm.moref, len(job.disks))


def _probe(connection: Connection, job: JobState, stop: threading.Event) -> None:
    with borrow(connection):
        for disk in job.disks:
            if stop.is_set():
                return
            with opened(disk, job, connection, stop=stop, probing=True):
                pass  # entering reads
