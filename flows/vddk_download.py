"""The `vddk_download` mode: one disk of a VM, or all, through VMware's VDDK, as raw images."""

from __future__ import annotations

from prefect import flow

from blocks import VCenter, VddkToolkit
from flows.export import copy_whole
from tasks.disks import Choice
from tasks.job import job_at_work
from tasks.models import Manifest, Roads, VddkJob
from tasks.route import usable
from tasks.succession import clean_up


@flow(
    name="vddk-download",
    flow_run_name="vddk {options.vm_name}",
    on_cancellation=[clean_up],
    on_crashed=[clean_up],
    on_failure=[clean_up],
)
async def vddk_download(vcenter: VCenter, toolkit: VddkToolkit, options: VddkJob) -> Manifest:
    """Read one disk of a VM through VDDK to a sparse raw file; nothing is converted.

    A snapshot freezes the VM; what the host says is allocated is read, and nothing else; the file is read back and
    compared, and only then gets its name: `<output folder>/<VM>/disk-<n>.raw`, with `manifest.json` beside it. A run
    that was killed is gone on with by the next one.

    Args:
        vcenter: Where the VM is now: a saved vCenter, or a new one through Add.
        toolkit: Where VMware's VDDK lies on the worker's machine: a saved one, or a new one through Add.
        options: Which disk of which VM, and where to.
    """
    roads = Roads(candidates=(usable(toolkit.settings()),))
    choice = Choice(wanted=options.disk, all=options.all_disks)
    async with job_at_work(vcenter, options) as job:
        return await copy_whole(vcenter, job, options, roads, choice)
