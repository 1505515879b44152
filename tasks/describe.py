"""Step: the libvirt domain that starts what was exported, and what of the VM is not in it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from tasks.images import domain as libvirt
from tasks.images.state import JobState
from tasks.models import DiskImage, Domain, ExportJob

UNKNOWN_TO_LIBVIRT = "vhdx"


@task(name="describe", task_run_name="describe {state.vm.name}", cache_policy=NO_CACHE)
async def describe_domain(
    state: JobState, images: Sequence[DiskImage], folder: Path, options: ExportJob
) -> tuple[Domain | None, str]:
    """Return what the domain is and its XML; (None, "") where libvirt has no disks of the images' format."""
    if options.format == UNKNOWN_TO_LIBVIRT:
        return None, ""
    domain, xml = libvirt.describe(state.vm, images, folder, options.networks)
    if state.snapshot and not state.snapshot.ours:
        others = f"The VM's snapshots: the disks are those of {state.snapshot.name}"
        domain = domain.model_copy(update={"not_carried": (*domain.not_carried, others)})
    get_run_logger().info("described vm=%s domain=%r machine=%s", state.vm.moref, domain.name, domain.machine)
    return domain, xml
