"""Hosts that run short while a wave is at work: given less, then more again, an operator's word before the governor's.

The waves run in this process, with a Prefect server; minutes, since a host is left in peace for one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.variables import Variable

from tasks.limits import change, current, remove
from tasks.plan import RATES
from tasks.transports import vddk
from tests.integration.test_wave import carry_out
from tests.labs import VDDK, Lab, running_lab
from tests.runs import assert_nothing_left
from tests.waves import STORES, fleet, nfc_port

pytestmark = [pytest.mark.e2e, pytest.mark.anyio, pytest.mark.usefixtures("prefect_api")]

HOSTS = ("localhost", "esx-b.lab")
HOST = f"hyper2kvm-host-{HOSTS[0]}"  # of app-00 and app-02
OUT_OF_MEMORY = "2"  # VIX_E_OUT_OF_MEMORY: what Open answers where the host has no memory for one more NFC session
WITHIN_S = 180


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Lab]:
    with nfc_port(), running_lab(scenario=fleet(vms=3, size="4MiB", hosts=HOSTS)) as lab:
        yield lab


@pytest.fixture(autouse=True)
async def no_limits_before() -> None:
    """The session's server may know limits of other tests: those of a wave are found as they are, and left so."""
    for name in (*(f"hyper2kvm-host-{host}" for host in HOSTS), *(f"hyper2kvm-datastore-{each}" for each in STORES)):
        await remove(name)


async def slots() -> int | None:
    found = (await current([HOST])).get(HOST)
    return found and found.slots


async def seen(wanted: int, wave: asyncio.Task[Any]) -> None:
    """Wait until Prefect's API says that the host has so many slots, while the wave is at work."""
    async with asyncio.timeout(WITHIN_S):
        while await slots() != wanted:
            assert not wave.done(), f"the wave ended with {await slots()} slots: {wave}"
            await asyncio.sleep(0.3)
    assert not wave.done()


async def test_a_host_short_of_memory_is_given_half_then_one_more_and_then_what_an_operator_says(
    hosts: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vddk, "MEMORY_ATTEMPTS", 2)
    monkeypatch.setenv("VIXLAB_FAIL_OPEN", OUT_OF_MEMORY)
    hosts.post("/faults", throttle_bytes_per_s=24 << 10)  # longer than a host is left in peace
    wave = asyncio.ensure_future(
        carry_out(
            hosts,
            tmp_path,
            select=["app-00", "app-02"],
            mode="vddk_download",
            options={"vddk_libdir": str(VDDK)},
            limits={"runs": 1, "host": 8},
            failure={"retry_failed": 1},
        )
    )
    await seen(8, wave)
    await seen(4, wave)
    monkeypatch.delenv("VIXLAB_FAIL_OPEN")
    await seen(5, wave)
    await change(HOST, 2)
    hosts.post("/faults", clear=True)
    report = await wave
    assert {vm.outcome for vm in report.vms} == {"done"}
    assert sorted(vm.attempts for vm in report.vms) == [1, 2]
    assert await slots() == 2, "an operator's word outlives the wave"
    assert_nothing_left(hosts)


async def test_a_host_whose_bytes_take_longer_is_given_half_and_all_again_at_the_end(
    hosts: Lab, tmp_path: Path
) -> None:
    await Variable.aset(RATES, {"start_s": 0.05}, overwrite=True)  # so that runs as short as these tell anything
    wave = asyncio.ensure_future(
        carry_out(
            hosts,
            tmp_path,
            select=[],
            groups=[
                {"name": "before", "select": ["app-00"]},
                {"name": "then", "select": ["app-02"], "after": ["before"]},
                {"name": "meanwhile", "select": ["app-01"], "after": ["then"]},
            ],
            limits={"runs": 1, "host": 6},
        )
    )
    await seen(6, wave)
    while not (tmp_path / "app-00" / "manifest.json").exists():
        assert not wave.done()
        await asyncio.sleep(0.1)
    hosts.post("/faults", throttle_bytes_per_s=256 << 10)
    await seen(3, wave)
    report = await wave
    assert [vm.outcome for vm in report.vms] == ["done"] * 3
    assert await slots() == 6
    hosts.post("/faults", clear=True)
    async with get_client() as client:
        await client.delete_variable_by_name(RATES)
