"""Step: one disk, by the road chosen, into a raw image; read back."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from blocks import VCenter
from tasks.images.copy import CopyResult, copy
from tasks.images.digests import Digests
from tasks.images.extents import whole_disk
from tasks.images.files import part_of
from tasks.images.raw import RawWriter
from tasks.models import Arrival, Connection, VirtualDisk, VirtualMachine
from tasks.steps import Meter, connection_of, in_thread, metered
from tasks.transports.folder import FolderDisk, FolderReader
from tasks.vsphere.session import borrow


@task(name="transfer", task_run_name="transfer {vm.name} disk {disk.index}", cache_policy=NO_CACHE)
async def transfer(vcenter: VCenter, vm: VirtualMachine, disk: VirtualDisk, folder: Path) -> Arrival:
    """Copy one disk of a snapshot to `disk-<n>.raw.part`, with the digests of what passed through memory.

    Cancelled, it returns only when no thread of it reads or writes any more.
    Raises FileLocked, UnsupportedDisk, TransferInterrupted, DiskFull, IntegrityMismatch, SessionExpired, ….
    """
    stop, started = threading.Event(), time.monotonic()
    raw, digests = part_of(folder / f"disk-{disk.index}.raw"), part_of(folder / f"disk-{disk.index}.digests")
    label = f"transfer {vm.name} disk {disk.index}"
    async with metered(label, disk.capacity_bytes, key=f"transfer-{vm.moref}-disk-{disk.index}") as meter:
        result = await in_thread(_copy, stop, connection_of(vcenter), vm, disk, raw, digests, meter, stop)
    seconds = time.monotonic() - started
    get_run_logger().info(
        "transferred vm=%s disk=%d bytes=%d seconds=%.1f", vm.moref, disk.index, result.bytes_transferred, seconds
    )
    return Arrival(
        disk=disk,
        raw_part=raw,
        digests_part=digests,
        digest=result.digest,
        bytes_transferred=result.bytes_transferred,
        road="folder",
        seconds=seconds,
    )


def _copy(
    connection: Connection,
    vm: VirtualMachine,
    disk: VirtualDisk,
    raw: Path,
    sidecar: Path,
    meter: Meter,
    stop: threading.Event,
) -> CopyResult:
    source = FolderDisk(
        connection=connection,
        datacenter_path=vm.datacenter_path,
        datastore_path=disk.datastore_path,
        capacity_bytes=disk.capacity_bytes,
    )
    with (
        borrow(connection) as session,
        FolderReader(source, cookie=lambda: session.cookie, renew=session.renew) as reader,
        RawWriter.create(raw, size=reader.size) as writer,
        Digests.create(sidecar, size=reader.size) as digests,
    ):
        return copy(reader, whole_disk(reader.size), writer, digests=digests, progress=meter.add, stop=stop)
