"""A run's job: which VM goes into which folder. One run at a time is at work on it, and closes one that died of it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from prefect.runtime import deployment, flow_run

from blocks import VCenter
from tasks.connect import connected
from tasks.errors import InvalidInput
from tasks.images.files import safe_name
from tasks.images.job import job_id, job_lock, last_holder
from tasks.images.state import JobState, read_state
from tasks.models import JobOptions, Snapshot, Value, VCenterInfo, VirtualDisk, VirtualMachine
from tasks.rate import limited_to
from tasks.resolve import resolve
from tasks.snapshot import spoken_of
from tasks.succession import close_predecessor, release
from tasks.vsphere.snapshots import NAME_PREFIX


class Job(Value):
    """What a run works on: a VM as it is now, the folder that its copy goes to, the id that both have for good."""

    id: str
    flow_run_id: str
    server: VCenterInfo
    vm: VirtualMachine
    folder: Path

    @property
    def snapshot_name(self) -> str:
        """What the job's own snapshot is called."""
        return f"{NAME_PREFIX}{self.id}"

    def state(self, snapshot: Snapshot | None, disks: tuple[VirtualDisk, ...] = ()) -> JobState:
        """Return what the next run must know if this one is killed from now on."""
        return JobState(
            job_id=self.id,
            flow_run_id=self.flow_run_id,
            vcenter_uuid=self.server.uuid,
            vm=self.vm,
            snapshot=snapshot,
            disks=disks,
        )


@asynccontextmanager
async def job_at_work(vcenter: VCenter, options: JobOptions) -> AsyncIterator[Job]:
    """Hold one session and the lock of the job that the options mean, for the block; yield the job.

    In the block, bytes come no faster than the options say.
    Raises what `connected` and `resolve` raise; JobLocked, naming who is at work on it; InvalidInput.
    """
    output_dir, run_id = place_that_stays(options.output_dir), flow_run.get_id() or ""
    async with connected(vcenter) as server:
        vm = await resolve(vcenter, options.vm_name)
        folder = output_dir / safe_name(vm.name)
        known = job_id(vcenter_uuid=server.uuid, instance_uuid=vm.instance_uuid, folder=folder)
        job = Job(id=known, flow_run_id=run_id, server=server, vm=vm, folder=folder)
        before, run = last_holder(folder), {"flow_run": flow_run.get_name() or "", "flow_run_id": run_id}
        with job_lock(folder, run | {"vm": vm.moref, "snapshot": job.snapshot_name}):
            await close_predecessor(before, ours=run_id)
            if left := read_state(folder):
                await release(vcenter, left)
            with limited_to(options.bytes_per_s), spoken_of(folder):
                yield job


def place_that_stays(folder: Path) -> Path:
    """Return `folder` made absolute. A worker runs flows in a temporary folder, and deletes that with all in it.

    Raises InvalidInput for a relative one there.
    """
    if deployment.get_id() and not folder.expanduser().is_absolute():
        raise InvalidInput(
            what="folder",
            why=f"{str(folder)!r} is relative, and the worker deletes the folder that it runs in",
            remedy="Give the whole path, such as /data/exports",
        )
    return folder.expanduser().absolute()
