"""Steps on this side: convert what one pass could not, verify by reading back, give the final names."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Literal

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from tasks.errors import IntegrityMismatch
from tasks.images import qemu
from tasks.images.digests import Digests
from tasks.images.files import part_of
from tasks.images.verify import verify
from tasks.models import Arrival, DiskFormat, DiskImage, ExportJob, ReadBack, VirtualMachine
from tasks.steps import Meter, in_thread, metered


async def land(vm: VirtualMachine, arrived: Arrival, folder: Path, options: ExportJob) -> DiskImage:
    """Turn an arrived disk into an image of the format asked for, verified, still under its `.part` name.

    Raises IntegrityMismatch, ToolFailed, DiskFull.
    """
    part = arrived.raw_part
    if options.format is DiskFormat.qcow2:
        part = await convert(vm, arrived, folder)
    verified: ReadBack = "skipped" if options.skip_readback else await read_back(vm, arrived, part, options.format)
    return _image(arrived, options.format, verified)


@task(name="convert", task_run_name="convert {vm.name} disk {arrived.disk.index}", cache_policy=NO_CACHE)
async def convert(vm: VirtualMachine, arrived: Arrival, folder: Path) -> Path:
    """Make `disk-<n>.qcow2.part` of the raw part, sparse where that is; return its path."""
    stop, disk = threading.Event(), arrived.disk
    part = part_of(folder / f"disk-{disk.index}.qcow2")
    label = f"convert {vm.name} disk {disk.index}"
    async with metered(label, disk.capacity_bytes, key=f"convert-{vm.moref}-disk-{disk.index}") as meter:
        await in_thread(_convert, stop, arrived.raw_part, part, meter, stop)
    return part


def _convert(source: Path, part: Path, meter: Meter, stop: threading.Event) -> None:
    qemu.convert(source, part, source_format="raw", target_format="qcow2", progress=meter.percent, stop=stop)
    qemu.check(part, stop=stop)


@task(name="verify", task_run_name="verify {vm.name} disk {arrived.disk.index}", cache_policy=NO_CACHE)
async def read_back(vm: VirtualMachine, arrived: Arrival, part: Path, image_format: DiskFormat) -> ReadBack:
    """Read an image back through its own format and compare it leaf by leaf with what passed through memory."""
    stop, disk = threading.Event(), arrived.disk
    label = f"verify {vm.name} disk {disk.index}"
    async with metered(label, disk.capacity_bytes, key=f"verify-{vm.moref}-disk-{disk.index}") as meter:
        verified = await in_thread(_verify, stop, part, image_format, arrived, meter, stop)
    get_run_logger().info("verified vm=%s disk=%d path=%s readback=%s", vm.moref, disk.index, part, verified)
    return verified


def _verify(
    part: Path, image_format: DiskFormat, arrived: Arrival, meter: Meter, stop: threading.Event
) -> Literal["direct", "cached"]:
    with Digests.open(arrived.digests_part) as digests:
        if digests.image_digest() != arrived.digest:
            raise IntegrityMismatch(path=arrived.digests_part, where="the digests themselves changed on disk")
        return verify(part, format=image_format.value, digests=digests, progress=meter.add, stop=stop)


def _image(arrived: Arrival, image_format: DiskFormat, verified: ReadBack) -> DiskImage:
    disk = arrived.disk
    return DiskImage(
        index=disk.index,
        disk_key=disk.key,
        uuid=disk.uuid,
        change_id=disk.change_id,
        source=disk.datastore_path,
        path=f"disk-{disk.index}.{image_format}",
        format=image_format.value,
        virtual_size=disk.capacity_bytes,
        digest=arrived.digest,
        bytes_transferred=arrived.bytes_transferred,
        road=arrived.road,
        verified=verified,
        seconds=arrived.seconds,
    )
