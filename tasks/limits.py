"""Prefect's global concurrency limits: one a host, datastore and vCenter; a lease a disk, for its whole transfer.

They are a ceiling, and visible and changeable in the UI; who goes next is not theirs to say.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager

from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate, GlobalConcurrencyLimitUpdate
from prefect.client.schemas.responses import GlobalConcurrencyLimitResponse
from prefect.concurrency.asyncio import concurrency
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.logging import get_run_logger

from tasks.models import Value, VirtualDisk, VirtualMachine

PREFIX = "hyper2kvm"
LEASE_S = 60.0  # of a slot: of a run that was killed it is free again after that
PAGE = 200


class Limit(Value):
    """A limit as it is now: slots, how many are taken, whether it counts at all."""

    slots: int
    taken: int
    active: bool


def limit_name(resource: str, *, vcenter: str) -> str:
    """Return the name of the limit of a resource: `host:esx1` is `hyper2kvm-host-esx1`, `vcenter` has its address."""
    kind, _, name = resource.partition(":")
    return re.sub(r"[^A-Za-z0-9._-]", "-", "-".join(filter(None, (PREFIX, kind, name or vcenter))))


def wave_limit_name(wave: str) -> str:
    """Return the name of the limit of how many VMs of a wave run at once."""
    return f"{PREFIX}-wave-{wave}"


def resources_of(vm: VirtualMachine, disks: Iterable[VirtualDisk]) -> tuple[str, ...]:
    """Return the resources that disks of a VM take slots of: its ESXi host, their datastores, the vCenter."""
    stores = {disk.datastore_path[1:].partition("]")[0] for disk in disks if disk.datastore_path.startswith("[")}
    return (f"host:{vm.host_name}", *(f"datastore:{each}" for each in sorted(stores)), "vcenter")


async def ensure(limits: Mapping[str, int]) -> None:
    """Create the limits that are not there; those that are, an operator may have changed, and they are left."""
    async with get_client() as client:
        there = await _all(client)
        for name in limits.keys() - there.keys():
            try:
                await client.create_global_concurrency_limit(
                    GlobalConcurrencyLimitCreate(name=name, limit=limits[name], active=True)
                )
            except ObjectAlreadyExists:
                continue  # another wave was quicker


async def current(names: Iterable[str]) -> dict[str, Limit]:
    """Return the limits of these names as they are now; one that is gone is not among them. A query a page of 200."""
    wanted = set(names)
    async with get_client() as client:
        found = await _all(client)
    return {name: limit for name, limit in found.items() if name in wanted}


async def _all(client: PrefectClient) -> dict[str, Limit]:
    found: dict[str, Limit] = {}
    while True:
        page: list[GlobalConcurrencyLimitResponse] = await client.read_global_concurrency_limits(
            limit=PAGE, offset=len(found)
        )
        found |= {each.name: Limit(slots=each.limit, taken=each.active_slots, active=each.active) for each in page}
        if len(page) < PAGE:
            return found


async def change(name: str, slots: int) -> None:
    """Set how many slots a limit has; who holds one keeps it."""
    async with get_client() as client:
        await client.update_global_concurrency_limit(name, GlobalConcurrencyLimitUpdate(limit=slots))


async def remove(name: str) -> None:
    """Delete a limit; one that is gone is what was wanted."""
    async with get_client() as client:
        try:
            await client.delete_global_concurrency_limit_by_name(name)
        except ObjectNotFound:
            return


@asynccontextmanager
async def lease(resources: Iterable[str], *, vcenter: str) -> AsyncIterator[None]:
    """Hold one slot of each resource's limit for the block; of one that has no limit, none.

    Not strict: a transfer under way outlives a Prefect server that goes away, and the lease with it.
    """
    names = await _there([limit_name(each, vcenter=vcenter) for each in resources])
    if not names:
        yield
        return
    get_run_logger().debug("waiting for slots limits=%s", ", ".join(names))
    async with concurrency(names, occupy=1, lease_duration=LEASE_S, strict=False):
        yield


async def _there(names: Iterable[str]) -> list[str]:
    async with get_client() as client:

        async def known(name: str) -> str | None:
            try:
                await client.read_global_concurrency_limit_by_name(name)
            except ObjectNotFound:
                return None
            return name

        found = await asyncio.gather(*(known(name) for name in dict.fromkeys(names)))
    return sorted(name for name in found if name)
