"""Waves in this process against a live lab: planned, carried out within limits, and what of them cannot be."""

from __future__ import annotations

import asyncio
import csv
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate

from flows.migration_wave import migration_wave
from tasks.errors import InvalidInput, WaveIncomplete
from tasks.limits import current, remove
from tasks.models import Manifest
from tasks.wave.models import Wave
from tasks.wave.outcome import WaveReport
from tests.labs import Lab, running_lab
from tests.runs import assert_equal_to_the_guests_disks, assert_nothing_left, faults, run_command, vcenter_of
from tests.waves import HOSTS, fleet

pytestmark = [pytest.mark.live, pytest.mark.anyio, pytest.mark.usefixtures("prefect_api")]

VMS, REFUSED = 7, 1
LIMITS = [f"hyper2kvm-host-{host}" for host in HOSTS]


@pytest.fixture(scope="module")
def small_fleet() -> Iterator[Lab]:
    with running_lab(scenario=fleet(vms=VMS, refused=REFUSED, size="4MiB")) as lab:
        yield lab


async def carry_out(lab: Lab, folder: Path, **wave: Any) -> WaveReport:
    """Run a wave; return its report, whether all is done or not."""
    job = Wave(**{"output_dir": str(folder), "select": ["*"], "options": {"format": "raw"}, **wave})
    try:
        report: WaveReport = await migration_wave(vcenter=vcenter_of(lab, connections=1), wave=job)
    except WaveIncomplete as error:
        report = error.found
    return report


def rows_of(file: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(file.read_text().splitlines()))


def names_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


async def test_a_dry_run_plans_every_vm_and_starts_nothing(small_fleet: Lab, tmp_path: Path) -> None:
    small_fleet.post("/stats/reset")
    report = await carry_out(small_fleet, tmp_path, dry_run=True)
    assert report.dry_run and [vm.outcome for vm in report.vms].count("refused") == REFUSED
    stats = small_fleet.stats()
    assert (stats["bytes_served"], stats["soap_calls"].get("CreateSnapshot_Task", 0)) == (0, 0)
    rows = rows_of(report.plan_csv)
    assert [row["go"] for row in rows].count("no-go") == REFUSED and float(rows[0]["end_s"]) > 0
    assert names_in(tmp_path) == [report.plan_csv.name]


async def test_groups_go_in_order_and_limits_of_prefect_hold(small_fleet: Lab, tmp_path: Path) -> None:
    """The limit that is there already counts, whatever the wave says."""
    async with get_client() as client:
        for name in LIMITS:
            await client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=1, active=True))
    small_fleet.post("/stats/reset")
    groups = [
        {"name": "db", "select": [{"folder": "/DC/vm/prod/db"}]},
        {"name": "web", "select": ["app-01", "app-02"], "after": ["db"]},
    ]
    with faults(small_fleet, throttle_bytes_per_s=4 << 20):
        report = await carry_out(small_fleet, tmp_path, groups=groups, limits={"runs": 6, "host": 4})
    assert {vm.name: vm.outcome for vm in report.vms} == {
        **{f"app-{number:02}": "done" for number in range(VMS - REFUSED)},
        "bad-0": "refused",
    }
    manifests = {vm.name: tmp_path / vm.name / "manifest.json" for vm in report.vms if vm.outcome == "done"}
    for name, path in manifests.items():
        manifest = Manifest.model_validate_json(path.read_text())
        assert_equal_to_the_guests_disks(small_fleet, manifest, tmp_path / name, tmp_path)
    written = {name: path.stat().st_mtime for name, path in manifests.items()}
    assert max(written["app-00"], written["app-05"]) < min(written["app-01"], written["app-02"])
    assert set(small_fleet.stats()["peak_transfers"].values()) == {1}
    assert_nothing_left(small_fleet)
    assert {name: limit.slots for name, limit in (await current(LIMITS)).items()} == dict.fromkeys(LIMITS, 1)
    assert "hyper2kvm-wave-wave" not in await current(["hyper2kvm-wave-wave"])
    for name in LIMITS:
        await remove(name)


async def test_a_wave_that_is_paused_ends_at_its_hard_stop(small_fleet: Lab, tmp_path: Path) -> None:
    name = "hyper2kvm-wave-late"
    async with get_client() as client:
        await client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=0, active=True))
    stop = datetime.now(UTC) + timedelta(seconds=8)
    async with asyncio.timeout(60):
        report = await carry_out(
            small_fleet, tmp_path, name="late", select=["app-00"], window={"stop": stop.isoformat()}
        )
    assert [(vm.outcome, vm.attempts) for vm in report.vms] == [("unstarted", 0)]
    assert datetime.now(UTC) >= stop


async def test_what_fails_is_told_and_blocks_what_waits_for_it(small_fleet: Lab, tmp_path: Path) -> None:
    (tmp_path / "app-00").mkdir()
    (tmp_path / "app-00" / "disk-0.raw").write_bytes(b"somebody's")
    groups = [
        {"name": "db", "select": ["app-00"]},
        {"name": "web", "select": ["app-01"], "after": ["db"]},
    ]
    report = await carry_out(small_fleet, tmp_path, select=[], groups=groups, failure={"retry_failed": 1})
    assert [(vm.name, vm.outcome, vm.attempts) for vm in report.vms] == [
        ("app-00", "failed", 2),
        ("app-01", "blocked", 0),
    ]
    assert "OutputExists" in report.vms[0].message
    assert (tmp_path / "app-00" / "disk-0.raw").read_bytes() == b"somebody's"


@pytest.mark.e2e  # as long as two other tests here
async def test_a_share_of_failures_stops_a_wave_once_ten_have_ended(
    new_lab: Callable[..., Lab], tmp_path: Path
) -> None:
    lab = new_lab(scenario=fleet(vms=15))
    for vm in lab.vms:
        (tmp_path / vm["name"]).mkdir()
        (tmp_path / vm["name"] / "disk-0.raw").write_bytes(b"somebody's")
    report = await carry_out(lab, tmp_path, limits={"runs": 5}, failure={"stop_share": 0.5})
    failed, unstarted = report.count("failed"), report.count("unstarted")
    assert failed + unstarted == 15 and 10 <= failed < 15
    assert report.stopped.endswith("VMs failed, and a share of 0.5 is the limit")


async def test_a_toolkit_that_nobody_saved_is_refused(small_fleet: Lab, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"(?s)toolkit 'nowhere'.*no such block"):
        await carry_out(small_fleet, tmp_path, select=["app-00"], options={"toolkit": "nowhere"})


async def test_nobody_can_be_asked_without_workers(small_fleet: Lab, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="does not run on workers"):
        await carry_out(small_fleet, tmp_path, approve_plan=True)


def test_the_command_line_simulates_a_fleet_without_a_vcenter(small_fleet: Lab) -> None:
    done = run_command(small_fleet, "wave", "--simulate")
    assert done.returncode == 0 and "10,000 VMs" in done.stdout and "over it" in done.stdout, done.stderr
    assert "bound:" in done.stdout
