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
from tasks.models import Arrival, DiskImage, DiskJob, ImageFormat, ReadBack, VirtualMachine
from tasks.steps import Meter, in_thread, metered


async def land(vm: VirtualMachine, arrived: Arrival, files: DiskFiles, options: DiskJob) -> DiskImage:
    """See that an arrived disk is an image of the format asked for, and verified; it stays under its `.part` name.

    An image that a killed run had given its final name already is adopted, if it is what arrived.
    Raises IntegrityMismatch, ToolFailed, DiskFull, InvalidInput.
    """
    _refuse_another_format(files, options.image_format)
    converted = (arrived.format, "none") != (options.image_format, options.image_compression)
    adopted = files.final(options.image_format).exists()
    if not adopted and converted:
        await convert(vm, arrived, files, options)
    elif not adopted:
        _say_skipped(arrived)
    image = files.image(options.image_format, converted=converted)
    skip = options.skip_readback and not adopted
    verified = await read_back(vm, arrived, image, files.sidecar, options.image_format, skip=skip)
    return _image(arrived, options.image_format, verified, converted=converted)


def _refuse_another_format(files: DiskFiles, wanted: ImageFormat) -> None:
    for other in get_args(ImageFormat):
        if other != wanted and files.final(other).exists():
            raise InvalidInput(
                what=f"format {wanted}",
                why=f"the run before was killed while it gave {files.final(other).name} its name",
                remedy=f"Run again with --format {other}",
            )


def _say_skipped(arrived: Arrival) -> None:
    index, what = arrived.disk.index, arrived.format
    get_run_logger().info("convert skipped disk=%d: %s was written as the bytes arrived", index, what)


@task(name="convert", task_run_name="convert {vm.name} disk {arrived.disk.index}", cache_policy=NO_CACHE)
async def convert(vm: VirtualMachine, arrived: Arrival, files: DiskFiles, options: DiskJob) -> None:
    """Make the image asked for of the part that arrived, sparse where that is."""
    stop, disk = threading.Event(), arrived.disk
    label, key = f"convert {vm.name} disk {disk.index}", f"convert-{vm.moref}-disk-{disk.index}"
    async with metered(label, disk.capacity_bytes, key=key) as meter:
        await in_thread(
            qemu.convert,
            stop,
            files.part(arrived.format),
            files.converted,
            source_format=arrived.format,
            target_format=options.image_format,
            compression=options.image_compression,
            progress=meter.percent,
            stop=stop,
        )


@task(name="verify", task_run_name="verify {vm.name} disk {arrived.disk.index}", cache_policy=NO_CACHE)
async def read_back(
    vm: VirtualMachine, arrived: Arrival, image: Path, sidecar: Path, image_format: ImageFormat, *, skip: bool = False
) -> ReadBack:
    """Check an image, read it back through its own format, compare leaf by leaf with what passed through memory.

    skip: its metadata is checked, no more.
    """
    stop, disk = threading.Event(), arrived.disk
    label, key = f"verify {vm.name} disk {disk.index}", f"verify-{vm.moref}-disk-{disk.index}"
    if skip:
        await in_thread(qemu.check, stop, image, format=image_format, stop=stop)
        return "skipped"
    async with metered(label, disk.capacity_bytes, key=key) as meter:
        verified = await in_thread(_verify, stop, arrived, image, sidecar, image_format, meter, stop)
    get_run_logger().info("verified vm=%s disk=%d path=%s readback=%s", vm.moref, disk.index, image, verified)
    return verified


def _verify(
    arrived: Arrival, image: Path, sidecar: Path, image_format: ImageFormat, meter: Meter, stop: threading.Event
) -> Literal["direct", "cached"]:
    qemu.check(image, format=image_format, stop=stop)
    with Digests.open(sidecar) as digests:
        if digests.image_digest() != arrived.digest:
            raise IntegrityMismatch(path=sidecar, where="the digests themselves changed on disk")
        return verify(image, format=image_format, digests=digests, progress=meter.add, stop=stop)


def _image(arrived: Arrival, image_format: ImageFormat, verified: ReadBack, *, converted: bool) -> DiskImage:
    disk = arrived.disk
    return DiskImage(
        index=disk.index,
        disk_key=disk.key,
        controller_key=disk.controller_key,
        unit_number=disk.unit_number,
        uuid=disk.uuid,
        change_id=disk.change_id,
        source=disk.datastore_path,
        path=f"disk-{disk.index}.{image_format}",
        format=image_format,
        virtual_size=disk.capacity_bytes,
        digest=arrived.digest,
        bytes_transferred=arrived.bytes_transferred,
        road=arrived.road,
        road_reason=arrived.road_reason,
        converted=converted,
        verified=verified,
        seconds=arrived.seconds,
    )
