"""Step: the libvirt domain that starts what was exported, and what of the VM is not in it."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from tasks.errors import ToolFailed
from tasks.images import domain as libvirt
from tasks.images.esp import LOADER, has_fallback_loader
from tasks.images.output import DiskFiles
from tasks.images.state import JobState
from tasks.models import DiskImage, DiskJob, Domain
from tasks.steps import in_thread


@task(name="describe", task_run_name="describe {state.vm.name}", cache_policy=NO_CACHE)
async def describe_domain(
    state: JobState, images: Sequence[DiskImage], folder: Path, options: DiskJob
) -> tuple[Domain | None, str]:
    """Return what the domain is and its XML; (None, "") for a format unknown to libvirt, or for some disks only."""
    if options.image_format in libvirt.UNKNOWN_FORMATS or state.left_out:
        return None, ""
    domain, xml = libvirt.describe(state.vm, images, folder, options.networks)
    more = [line async for line in _left_behind(state, images, folder)]
    domain = domain.model_copy(update={"not_carried": (*domain.not_carried, *more)})
    get_run_logger().info("described vm=%s domain=%r machine=%s", state.vm.moref, domain.name, domain.machine)
    return domain, xml


async def _left_behind(state: JobState, images: Sequence[DiskImage], folder: Path) -> AsyncIterator[str]:
    """Yield what the VM's own description does not show to be missing."""
    if state.snapshot and not state.snapshot.ours:
        yield f"The VM's snapshots: the disks are those of {state.snapshot.name}"
    if state.vm.firmware == "efi":
        try:
            if not await _starts_by_itself(images, folder):
                yield f"A boot entry: no EFI system partition has {LOADER}, so choose a loader in the firmware's menu"
        except ToolFailed as error:
            yield f"A boot entry, perhaps: {LOADER} was not looked for ({error.cause})"


async def _starts_by_itself(images: Sequence[DiskImage], folder: Path) -> bool:
    """Tell whether the firmware finds a loader on some disk without VMware's NVRAM."""
    for image in images:
        stop, path = threading.Event(), DiskFiles(folder, image.index).image(image.format, converted=image.converted)
        size = image.virtual_size
        if await in_thread(has_fallback_loader, stop, path, format=image.format, virtual_size=size, stop=stop):
            return True
    return False
