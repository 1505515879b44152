"""Step: which VM is meant, where it lies, what it is made of."""

from __future__ import annotations

from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.context import TaskRunContext
from prefect.logging import get_run_logger

from blocks import VCenter
from tasks.models import VirtualMachine
from tasks.steps import on_vcenter
from tasks.vsphere.lookup import find_vm
from tasks.vsphere.machine import describe_vm


async def resolve(vcenter: VCenter, wanted: str) -> VirtualMachine:
    """Return the VM that `wanted` names, as it is now.

    The lookup is cached within the run; the description never is: a VM moves between hosts (vMotion).
    Raises VmNotFound, AmbiguousVmName, InvalidInput, VsphereFault.
    """
    return await describe(vcenter, await locate(vcenter, wanted))


def _within_the_run(context: TaskRunContext, parameters: dict[str, Any]) -> str:
    return f"locate-{context.task_run.flow_run_id}-{parameters['vcenter'].host}-{parameters['wanted']}"


@task(name="locate", task_run_name="locate {wanted}", cache_key_fn=_within_the_run, persist_result=True)
async def locate(vcenter: VCenter, wanted: str) -> str:
    """Return the moref of the VM that an inventory path, moref, UUID or name names."""
    return await on_vcenter(vcenter, find_vm, wanted)


@task(name="resolve", task_run_name="resolve {moref}", cache_policy=NO_CACHE)
async def describe(vcenter: VCenter, moref: str) -> VirtualMachine:
    """Return what there is to know of a VM: host-system path, vpx URI, hardware."""
    vm = await on_vcenter(vcenter, describe_vm, moref)
    get_run_logger().info("resolved vm=%r path=%r host=%r uri=%s", vm.name, vm.inventory_path, vm.host_path, vm.vpx_uri)
    return vm
