"""Step: whether the road can read every disk, asked of the data-plane before the first transfer."""

from __future__ import annotations

import threading

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from blocks import VCenter
from tasks.fetch import reader_of
from tasks.models import Connection, VirtualDisk, VirtualMachine
from tasks.steps import connection_of, in_thread
from tasks.transports.folder import FolderDisk
from tasks.vsphere.session import borrow


@task(name="probe", task_run_name="probe {vm.name}", cache_policy=NO_CACHE)
async def probe(vcenter: VCenter, vm: VirtualMachine, disks: tuple[VirtualDisk, ...]) -> None:
    """Read one sector of each disk, in order, so that nothing is copied of a VM of which one disk cannot be.

    Raises FileLocked, UnsupportedDisk, PermissionMissing, ConnectionFailed for the first that cannot be read.
    """
    stop = threading.Event()
    await in_thread(_probe, stop, connection_of(vcenter), vm, disks, stop)
    get_run_logger().info("probed vm=%s disks=%d", vm.moref, len(disks))


def _probe(connection: Connection, vm: VirtualMachine, disks: tuple[VirtualDisk, ...], stop: threading.Event) -> None:
    with borrow(connection) as session:
        for disk in disks:
            if stop.is_set():
                return
            source = FolderDisk.of(disk, vm=vm, connection=connection)
            with reader_of(source, session, depth=1, by_ticket=False):
                pass  # entering reads the sector
