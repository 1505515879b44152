"""Twenty warm migrations of a guest that writes in bursts: what was forecast, and how long it was really down."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from flows.rollback import rollback
from flows.warm_migration import warm_migration
from tasks.models import Migration, RollbackJob, WarmJob
from tests.labs import Lab, running_lab
from tests.runs import chance_of_this_run, faults, vcenter_of

pytestmark = [pytest.mark.anyio, pytest.mark.soak, pytest.mark.live, pytest.mark.usefixtures("prefect_api")]

MIB = 1024 * 1024
RUNS, ENOUGH = 20, 18
VMS = ("one", "two")  # side by side, since most of it is waiting
SHUTDOWN_S, SPREAD_S = 3.0, 0.4
CONSOLIDATION_S = 2.0
THROTTLE_BYTES_PER_S = 10 * MIB  # a connection, of four a disk
BURSTS = {"bytes_per_s": 20_000_000, "burst_s": 0.5, "block": MIB}
BUDGET_S = 30.0


def site() -> dict[str, object]:
    slow = {"shutdown_s": SHUTDOWN_S, "shutdown_spread_s": SPREAD_S}
    vms = [{"name": name, "cbt": True, "disks": [{"size": "512MiB", "data": "16MiB"}], **slow} for name in VMS]
    return {"datacenters": [{"name": "DC", "standalone_hosts": ["esx1"], "vms": vms}]}


async def test_the_real_downtime_is_inside_what_was_forecast(tmp_path):
    """After each a rollback, so that the same VM is migrated again: its copy is there, and is brought up to date."""
    chance = random.Random(chance_of_this_run())
    with running_lab(scenario=site()) as lab:
        slow = {"method": "RemoveSnapshot_Task", "seconds": CONSOLIDATION_S, "count": 0}
        for name in VMS:
            lab.post("/guest-load", vm=lab.vm(name)["moref"], disk=0, seed=chance.getrandbits(32), **BURSTS)
        with faults(lab, task_takes=slow, throttle_bytes_per_s=THROTTLE_BYTES_PER_S):
            both = await asyncio.gather(*(migrations(lab, tmp_path, name) for name in VMS))
    found = [each for one in both for each in one]
    assert len(found) == RUNS
    assert sum(map(inside, found)) >= ENOUGH
    assert all(each.forecast.downtime_s.high <= 2 * each.forecast.downtime_s.low for each in found if each.forecast)


async def migrations(lab: Lab, folder: Path, name: str) -> list[Migration]:
    found: list[Migration] = []
    for number in range(RUNS // len(VMS)):
        expected_s = 0 if number else SHUTDOWN_S  # the first time nobody has seen it shut down
        words = {"cutover": "auto", "shut_down_source": True, "downtime_budget": BUDGET_S, "pause": 0.1, "sample": 16}
        options = WarmJob(vm_name=name, output_dir=folder, expected_shutdown=expected_s, **words)
        found.append(await warm_migration(vcenter=vcenter_of(lab), options=options))
        print(line(f"{name} {number + 1:2}", found[-1]), flush=True)
        await rollback(vcenter=vcenter_of(lab), options=RollbackJob(folder=folder / name))
    return found


def inside(each: Migration) -> bool:
    said, real = each.forecast, each.downtime_s
    assert said and real is not None
    return said.downtime_s.low <= real <= said.downtime_s.high


def line(run: str, each: Migration) -> str:
    said = each.forecast
    assert said
    parts = ", ".join(f"{name} {took:.1f}" for name, took in each.parts.items())
    return (
        f"run {run}: forecast {said.downtime_s.low:4.1f} to {said.downtime_s.high:4.1f} s "
        f"({said.downtime_s.high / said.downtime_s.low:.2f} wide), real {each.downtime_s:4.1f} s "
        f"{'inside' if inside(each) else 'OUTSIDE'}; {len(each.rounds)} rounds, "
        f"pending {said.pending_bytes.low / MIB:.0f} to {said.pending_bytes.high / MIB:.0f} MiB; {parts}; "
        f"snapshot removed beside it in {each.removal_s or 0:.1f} s"
    )
