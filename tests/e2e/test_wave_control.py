"""A wave under way, steered from Prefect's UI: paused, resumed, thinned out, stopped; by the clock, and by failures."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.screenshot import browser
from tests.e2e.test_up import PICTURES
from tests.e2e.wave_fleet import WAVE_TIMEOUT_S, Fleet
from tests.waits import await_that

pytestmark = pytest.mark.e2e

QUEUE = "work_pools/hyper2kvm/queues/default"
LIMIT = "hyper2kvm-wave-steered"
SLOW = 128 << 10  # bytes a second: 8 s of a VM's 1 MiB


@pytest.fixture
def slow_fleet(wave_fleet: Fleet) -> Iterator[Fleet]:
    """The fleet with a VM's run long enough to be seen, and its queue and lab as they were after it."""
    wave_fleet.lab.post("/faults", throttle_bytes_per_s=SLOW)
    yield wave_fleet
    wave_fleet.lab.post("/faults", clear=True)
    wave_fleet.change(QUEUE, concurrency_limit=None, is_paused=False)


class Steered:
    """A wave of seven VMs, two at once, of which the queue lets one run."""

    def __init__(self, fleet: Fleet, output: Path) -> None:
        self.fleet = fleet
        names = [f"app-{number:02}" for number in (1, 2, 3, 4, 6, 7, 8)]
        self.id = fleet.start(name="steered", output_dir=str(output), select=names, limits={"runs": 2})

    def runs(self, *states: str) -> list[str]:
        found = self.fleet.children(self.id)
        return [run["id"] for run in found if not states or run["state_type"] in states]

    def state(self, run: str) -> str:
        return str(self.fleet.product.api(f"flow_runs/{run}")["state_type"])

    def wait(self, what: str, holds: Any) -> None:
        await_that(holds, WAVE_TIMEOUT_S, lambda: f"not {what}: {self.told()}{self.fleet.product.logs()}")

    def told(self) -> str:
        return self.fleet.table("steered")


def test_a_wave_is_paused_resumed_thinned_out_and_stopped_from_the_ui(slow_fleet: Fleet, tmp_path: Path) -> None:
    """By what the UI's pages do, twice by the mouse: the switch of the work queue, and that of the wave's own limit."""
    slow_fleet.change(QUEUE, concurrency_limit=1)
    wave = Steered(slow_fleet, tmp_path)
    wave.wait("one runs, one waits", lambda: len(wave.runs()) == 2 and len(wave.runs("RUNNING")) == 1)
    (first,), (skipped,) = wave.runs("RUNNING"), wave.runs("SCHEDULED")
    slow_fleet.cancel(skipped)
    wave.wait("another instead of the skipped", lambda: len(wave.runs()) == 3)
    assert wave.state(skipped) == "CANCELLED"
    (third,) = set(wave.runs()) - {first, skipped}
    pause_queue(slow_fleet)

    wave.wait("paused", lambda: "Paused: the work queue default is paused" in wave.told())
    wave.wait("the first done", lambda: wave.state(first) == "COMPLETED")
    wave.wait("looked at since", lambda: "1 done" in wave.told())
    assert len(wave.runs()) == 3 and wave.state(third) == "SCHEDULED"
    assert slow_fleet.processes_of([{"id": third}, {"id": skipped}]) == []
    slow_fleet.change(QUEUE, is_paused=False)
    wave.wait("resumed", lambda: wave.state(third) == "RUNNING" and len(wave.runs()) >= 4)

    slow_fleet.change(f"v2/concurrency_limits/{LIMIT}", limit=0)
    wave.wait("paused", lambda: f"Paused: the limit {LIMIT} is 0" in wave.told())
    created = wave.runs()
    wave.wait("all that were created done", lambda: wave.runs("SCHEDULED", "PENDING", "RUNNING") == [])
    assert sorted(wave.runs()) == sorted(created) and len(created) <= 5
    slow_fleet.change(f"v2/concurrency_limits/{LIMIT}", limit=1)
    wave.wait("resumed", lambda: len(wave.runs("RUNNING")) == 1)
    (last,) = wave.runs("RUNNING")
    assert last not in created
    switch_off(slow_fleet)

    ended = slow_fleet.await_end(wave.id, "Failed")
    done = len(created)  # and one more, less the skipped
    words = f"{done} of 7 VMs are done; 1 skipped, {6 - done} unstarted (the limit {LIMIT} was switched off)"
    assert words in ended["state"]["message"]
    assert wave.state(last) == "COMPLETED" and sorted(wave.runs()) == sorted([*created, last])
    there = {each["name"] for each in slow_fleet.product.api("v2/concurrency_limits/filter", limit=200)}
    assert LIMIT not in there


def pause_queue(fleet: Fleet) -> None:
    with browser() as page:
        page.open(f"{fleet.product.address}/v2/work-pools/work-pool/hyper2kvm?tab=Work%20Queues")
        page.wait_for("waves", "default", "Ready")
        page.press("Pause work pool queue", row="default")
        page.wait_for("Paused")
        page.picture(PICTURES / "wave-queue-paused.png")
        await_that(lambda: fleet.product.api(QUEUE)["is_paused"], 30, lambda: "the queue is not paused")


def switch_off(fleet: Fleet) -> None:
    with browser() as page:
        page.open(f"{fleet.product.address}/v2/concurrency-limits?tab=global")
        page.wait_for(LIMIT)
        page.press("toggle active", row=LIMIT)
        limit = f"v2/concurrency_limits/{LIMIT}"
        await_that(lambda: not fleet.product.api(limit)["active"], 30, lambda: "the limit is not switched off")
        page.picture(PICTURES / "wave-switched-off.png")


def test_nothing_starts_before_the_window_nor_after_its_hard_stop_and_what_runs_is_finished(
    slow_fleet: Fleet, tmp_path: Path
) -> None:
    slow_fleet.lab.post("/faults", throttle_bytes_per_s=SLOW // 4)  # longer than the window is open
    now = datetime.now(UTC)
    start, stop = now + timedelta(seconds=30), now + timedelta(seconds=50)
    wave = slow_fleet.start(
        name="night",
        output_dir=str(tmp_path),
        select=[f"app-0{number}" for number in range(1, 7)],
        limits={"runs": 2},
        window={"start": start.isoformat(), "stop": stop.isoformat()},
    )
    ended = slow_fleet.await_end(wave, "Failed")
    assert "2 of 6 VMs are done; 4 unstarted (the hard stop, " in ended["state"]["message"]
    runs = slow_fleet.children(wave)
    assert [run["state_type"] for run in runs] == ["COMPLETED"] * 2
    assert all(start <= moment(run, "created") <= stop + timedelta(seconds=5) for run in runs)
    assert all(moment(run, "end_time") > stop for run in runs)


def moment(run: dict[str, Any], which: str) -> datetime:
    return datetime.fromisoformat(run[which])


def test_so_many_failures_stop_a_wave_and_a_retry_does_what_failed_and_nothing_else(
    slow_fleet: Fleet, tmp_path: Path
) -> None:
    slow_fleet.lab.post("/faults", clear=True)
    good, bad = ["app-01", "app-02"], ["app-03", "app-04", "app-06"]
    foreign = [tmp_path / name / "disk-0.raw" for name in bad]
    for path in foreign:
        path.parent.mkdir()
        path.write_bytes(b"somebody's")
    wave = slow_fleet.start(
        name="stopped",
        output_dir=str(tmp_path),
        groups=[{"name": "good", "select": good}, {"name": "bad", "select": bad, "after": ["good"]}],
        options={"format": "raw"},
        limits={"runs": 1},
        failure={"stop_after": 2},
    )
    ended = slow_fleet.await_end(wave, "Failed")
    words = "2 of 5 VMs are done; 2 failed, 1 unstarted (2 VMs failed, and 2 are the limit)"
    assert words in ended["state"]["message"]
    first = slow_fleet.outcomes(wave)
    assert sorted(first.values()) == [["COMPLETED"]] * 2 + [["FAILED"]] * 2 and first.keys() >= {*good}
    for path in foreign:
        path.unlink()
    slow_fleet.retry(wave)
    slow_fleet.await_end(wave, "Completed")
    again = {vm: [*states, "COMPLETED"] for vm, states in first.items() if vm in bad}
    assert slow_fleet.outcomes(wave) == {vm: ["COMPLETED"] for vm in (*good, *bad)} | again
