"""Steps on this side: convert what one pass could not, and verify by reading back."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Literal, get_args

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from tasks.errors import IntegrityMismatch, InvalidInput
from tasks.images import qemu
from tasks.images.digests import Digests
from tasks.images.output import DiskFiles
from tasks.images.verify import verify
from tasks.models import Arrival, DiskImage, ExportJob, ImageFormat, ReadBack, VirtualMachine
from tasks.steps import Meter, in_thread, metered


async def land(vm: VirtualMachine, arrived: Arrival, files: DiskFiles, options: ExportJob) -> DiskImage:
    """Turn an arrived disk into an image of the format asked for, verified, still under its `.part` name.

    An image that a killed run had given its final name already is adopted, if it is what arrived.
    Raises IntegrityMismatch, ToolFailed, DiskFull, InvalidInput.
    """
    _refuse_another_format(files, options.format)
    image = files.final(options.format)
    verified: ReadBack = "skipped"
    adopted = image.exists()
    if not adopted:
        image = files.part(options.format)
        if options.format == "qcow2":
            await convert(vm, arrived, files.raw_part, image)
    if adopted or not options.skip_readback:
        verified = await read_back(vm, arrived, image, files.sidecar, options.format)
    return _image(arrived, options.format, verified)


def _refuse_another_format(files: DiskFiles, wanted: ImageFormat) -> None:
    for other in get_args(ImageFormat):
        if other != wanted and files.final(other).exists():
            raise InvalidInput(
                what=f"format {wanted}",
                why=f"the run before was killed while it gave {files.final(other).name} its name",
                remedy=f"Run again with --format {other}",
            )


@task(name="convert", task_run_name="convert {vm.name} disk {arrived.disk.index}", cache_policy=NO_CACHE)
async def convert(vm: VirtualMachine, arrived: Arrival, raw: Path, part: Path) -> None:
    """Make a qcow2 of the raw part, sparse where that is."""
    stop, disk = threading.Event(), arrived.disk
    label, key = f"convert {vm.name} disk {disk.index}", f"convert-{vm.moref}-disk-{disk.index}"
    async with metered(label, disk.capacity_bytes, key=key) as meter:
        await in_thread(_convert, stop, raw, part, meter, stop)


def _convert(source: Path, part: Path, meter: Meter, stop: threading.Event) -> None:
    qemu.convert(source, part, source_format="raw", target_format="qcow2", progress=meter.percent, stop=stop)
    qemu.check(part, stop=stop)


@task(name="verify", task_run_name="verify {vm.name} disk {arrived.disk.index}", cache_policy=NO_CACHE)
async def read_back(
    vm: VirtualMachine, arrived: Arrival, image: Path, sidecar: Path, image_format: ImageFormat
) -> ReadBack:
    """Read an image back through its own format and compare it leaf by leaf with what passed through memory."""
    stop, disk = threading.Event(), arrived.disk
    label, key = f"verify {vm.name} disk {disk.index}", f"verify-{vm.moref}-disk-{disk.index}"
    async with metered(label, disk.capacity_bytes, key=key) as meter:
        verified = await in_thread(_verify, stop, arrived, image, sidecar, image_format, meter, stop)
    get_run_logger().info("verified vm=%s disk=%d path=%s readback=%s", vm.moref, disk.index, image, verified)
    return verified


def _verify(
    arrived: Arrival, image: Path, sidecar: Path, image_format: ImageFormat, meter: Meter, stop: threading.Event
) -> Literal["direct", "cached"]:
    with Digests.open(sidecar) as digests:
        if digests.image_digest() != arrived.digest:
            raise IntegrityMismatch(path=sidecar, where="the digests themselves changed on disk")
        return verify(image, format=image_format, digests=digests, progress=meter.add, stop=stop)


def _image(arrived: Arrival, image_format: ImageFormat, verified: ReadBack) -> DiskImage:
    disk = arrived.disk
    return DiskImage(
        index=disk.index,
        disk_key=disk.key,
        uuid=disk.uuid,
        change_id=disk.change_id,
        source=disk.datastore_path,
        path=f"disk-{disk.index}.{image_format}",
        format=image_format,
        virtual_size=disk.capacity_bytes,
        digest=arrived.digest,
        bytes_transferred=arrived.bytes_transferred,
        road=arrived.road,
        verified=verified,
        seconds=arrived.seconds,
    )
