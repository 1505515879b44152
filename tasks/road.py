"""The road that the disks of a job take out of vSphere: `folder`, or `vddk` where the job has settings for that."""

from __future__ import annotations

from pathlib import Path

from prefect.logging import get_run_logger

from tasks.images.state import JobState
from tasks.models import Connection, ExportJob, VddkSettings, VirtualDisk
from tasks.transports.folder import FolderDisk
from tasks.transports.vddk import VddkDisk
from tasks.transports.vddk_library import find_library


def vddk_of(options: ExportJob) -> VddkSettings | None:
    """Return settings of VDDK where the options ask for it; None for `folder`, which is what `auto` takes.

    Raises VddkUnavailable, before anything is connected.
    """
    if options.transport != "vddk":
        if options.transport == "auto":
            get_run_logger().info("transport auto takes road=folder reason='vddk only where it is asked for'")
        return None
    return usable(VddkSettings(libdir=Path(options.vddk_libdir) if options.vddk_libdir else None))


def usable(settings: VddkSettings) -> VddkSettings:
    """Return `settings` if there is a library where they say. Raises VddkUnavailable."""
    find_library(settings.libdir)
    return settings


def source_of(disk: VirtualDisk, job: JobState, connection: Connection) -> FolderDisk | VddkDisk:
    """Return where the bytes of a disk of a job are read from."""
    if job.vddk is None:
        return FolderDisk.of(disk, vm=job.vm, connection=connection)
    return VddkDisk(
        connection=connection,
        settings=job.vddk,
        host_name=job.vm.host_name,
        vm_moref=job.vm.moref,
        snapshot_moref=job.snapshot.moref if job.snapshot else "",
        datastore_path=disk.datastore_path,
        capacity_bytes=disk.capacity_bytes,
        identity=f"hyper2kvm-{job.job_id}-disk-{disk.index}",
    )
