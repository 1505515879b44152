"""Step: the exported domain put into libvirt, unless that would have one machine run twice."""

from __future__ import annotations

from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from blocks import VCenter
from tasks.errors import NotDefined, ToolFailed
from tasks.images import libvirt
from tasks.images.domain import domain_name
from tasks.models import Manifest, StartableJob, VirtualMachine
from tasks.resolve import describe
from tasks.steps import in_thread


async def check_definable(vm: VirtualMachine, folder: Path, options: StartableJob) -> None:
    """Raise NotDefined, before anything is copied, where the domain could not be defined or should not be.

    Raises ToolFailed where libvirt does not answer. Nothing is asked where nobody wants the domain defined.
    """
    if options.define:
        _refuse_twins(vm, options)
        uri, name = options.libvirt_uri, domain_name(vm.name)
        await in_thread(libvirt.refuse_others, None, uri, name=name, uuid=vm.bios_uuid, folder=folder)


def _refuse_twins(vm: VirtualMachine, options: StartableJob) -> None:
    if vm.power_state == "poweredOn" and not options.define_while_source_runs:
        raise NotDefined(
            name=vm.name,
            uri=options.libvirt_uri,
            reason="the source VM is powered on, and two machines of one identity would be a start apart",
            remedy="Power it off first, leave --define out, or allow it with --define-while-source-runs",
        )


@task(name="define", task_run_name="define {manifest.vm.name}", cache_policy=NO_CACHE)
async def define(vcenter: VCenter, manifest: Manifest, folder: Path, options: StartableJob) -> None:
    """Define the domain of an export that counts, once more looking whether its source runs.

    Raises NotDefined; the export is complete all the same.
    """
    if not manifest.domain:
        return
    path = folder / manifest.domain.path
    try:
        _refuse_twins(await describe(vcenter, manifest.vm.moref), options)
        await in_thread(libvirt.define, None, options.libvirt_uri, path)
    except (NotDefined, ToolFailed) as error:
        reason = error.reason if isinstance(error, NotDefined) else error.cause
        raise NotDefined(
            name=manifest.domain.name,
            uri=options.libvirt_uri,
            reason=f"{reason}; the export itself is complete, in {folder}",
            remedy=f"Once that is settled: virsh -c {options.libvirt_uri} define {path}",
            last_lines=error.detail,
        ) from error
    get_run_logger().info("defined domain=%r uri=%s", manifest.domain.name, options.libvirt_uri)
