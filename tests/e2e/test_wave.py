"""Waves under `make up`: 40 VMs, killed and retried, one failing; a wave cancelled and tidied up after; a gate."""

from __future__ import annotations

import json
import os
import re
import signal
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from pyVmomi import vim

from deployments.local import WORKER_LIMIT
from tasks.images.state import resumable
from tasks.vsphere.leftovers import LeftSnapshot, survey
from tasks.vsphere.session import borrow
from tests.e2e.screenshot import browser
from tests.e2e.test_up import MIB, PICTURES, artifacts_of
from tests.e2e.wave_fleet import (
    REFUSED,
    VICTIM,
    VMS,
    WAVE_TIMEOUT_S,
    Fleet,
    assert_equal_to_the_source,
    kill_run,
    vm_of,
)
from tests.labs import Lab
from tests.waits import await_that

pytestmark = pytest.mark.e2e

GATED = ("app-01", "app-02", "app-03")


def test_a_wave_that_was_killed_is_gone_on_with_and_nothing_runs_twice(wave_fleet: Fleet, tmp_path: Path) -> None:
    product, lab, out = wave_fleet.product, wave_fleet.lab, tmp_path / "exports"
    lab.post("/stats/reset")
    lab.post("/faults", throttle_bytes_per_s=8 * MIB)
    wave = wave_fleet.start(
        name="forty",
        output_dir=str(out),
        select=["*"],
        canary=["app-01"],
        groups=[
            {"name": "db", "select": ["folder:/DC/vm/prod/db"]},
            {"name": "web", "select": ["folder:/DC/vm/prod/web"], "after": ["db"]},
        ],
        limits={"runs": 5, "host": 1},
        options={"format": "raw"},
        exclude=[],
    )
    victim = out / VICTIM / ".hyper2kvm.lock"
    await_that(lambda: victim.exists() and victim.read_text(), WAVE_TIMEOUT_S, lambda: "no victim" + product.logs())
    os.kill(int(json.loads(victim.read_text())["pid"]), signal.SIGKILL)

    await_that(lambda: wave_fleet.ended(wave) >= 6, WAVE_TIMEOUT_S, lambda: "no progress" + product.logs())
    place = kill_run(wave)
    wave_fleet.await_end(wave, "Crashed")
    # The worker's own report comes after its runner's, and calls a run crashed that was retried meanwhile.
    await_that(lambda: not place.exists(), 90, product.logs)
    wave_fleet.retry(wave)
    failed = wave_fleet.await_end(wave, "Failed")
    assert "37 of 40 VMs are done; 1 failed, 2 refused" in failed["state"]["message"], failed["state"]["message"]

    runs = wave_fleet.children(wave)
    assert Counter(map(vm_of, runs)) == {f"app-{number:02}": 1 for number in range(VMS - REFUSED)}
    assert {vm_of(run): run["state_type"] for run in runs if run["state_type"] != "COMPLETED"} == {VICTIM: "CRASHED"}
    check_order(runs)
    peaks = lab.stats()["peak_transfers"]
    assert peaks and max(peaks.values()) == 1, peaks

    wave_fleet.retry(wave)
    await_that(lambda: len(wave_fleet.children(wave)) == VMS - REFUSED + 1, WAVE_TIMEOUT_S, product.logs)
    again = wave_fleet.await_end(wave, "Failed")
    assert "38 of 40 VMs are done; 2 refused" in again["state"]["message"]
    lab.post("/faults", clear=True)
    lab.post("/faults", expire_sessions=True)  # the killed run's own, which is the server's to time out
    assert lab.stats()["open_snapshots"] == 0
    check_contents(wave_fleet, out)
    reports = [each for each in artifacts_of(product, wave) if each["type"] == "markdown"]
    plan = next(each["data"] for each in reports if each["key"] == "plan-forty")
    assert "data:image/svg+xml;base64," in plan and "no snapshot holds it" in plan
    with browser() as page:
        shown = next(each for each in reports if each["key"] == "plan-forty")
        page.open(f"{product.address}/v2/artifacts/artifact/{shown['id']}")
        page.wait_for("Plan of wave forty", "Not migrated", "Expected course")
        drawn = "[...document.images].some(i => i.src.startsWith('data:image/svg') && i.naturalWidth > 100)"
        await_that(lambda: page.evaluate(drawn), 30, page.text)
        page.picture(PICTURES / "wave-plan.png")


def check_order(runs: list[dict[str, Any]]) -> None:
    """The canary ran before all others, and the group db before the group web."""

    def at(run: dict[str, Any], which: str) -> datetime:
        return datetime.fromisoformat(run[which])

    canary = next(run for run in runs if vm_of(run) == "app-01")
    others = [run for run in runs if run is not canary]
    assert all(at(run, "start_time") >= at(canary, "end_time") for run in others)
    db = [run for run in others if int(vm_of(run)[4:]) % 5 == 0]
    web = [run for run in others if int(vm_of(run)[4:]) % 5]
    assert len(db) == 8 and len(web) == 29

    assert min(at(run, "start_time") for run in web) >= max(at(run, "end_time") for run in db)


def check_contents(wave_fleet: Fleet, out: Path) -> None:
    """Every image equals what qemu-img reads of the source's own files."""
    for number in range(VMS - REFUSED):
        name = f"app-{number:02}"
        assert_equal_to_the_source(wave_fleet, name, out / name / "disk-0.raw")


def test_the_api_refuses_a_wave_that_the_form_would_refuse(wave_fleet: Fleet) -> None:
    """Parameters are held to the deployment's schema where the run is created, not first where it runs."""
    found = wave_fleet.product.deployment("migration-wave")
    assert found["enforce_parameter_schema"] is True
    path, block = f"deployments/{found['id']}/create_flow_run", {"$ref": {"block_document_id": wave_fleet.block()}}
    for wave in ({"limits": {"runs": 0}}, {"mode": "teleport"}, {"selct": ["*"]}, {"name": "no/slash"}):
        answer = wave_fleet.product.ask("POST", path, parameters={"vcenter": block, "wave": wave})
        assert answer.status_code in (409, 422), f"{wave}: {answer.text}"


def test_cancelling_a_wave_cancels_its_runs_and_the_janitor_removes_what_a_killed_one_left(
    wave_fleet: Fleet, tmp_path: Path
) -> None:
    product, lab = wave_fleet.product, wave_fleet.lab
    wave = wave_fleet.start(
        name="cancelled", output_dir=str(tmp_path / "exports"), select=["app-*"], exclude=[VICTIM], limits={"runs": 4}
    )
    await_that(lambda: wave_fleet.ended(wave) >= 4, WAVE_TIMEOUT_S, lambda: "no progress" + product.logs())
    lab.post("/faults", throttle_bytes_per_s=8 << 10)  # what runs now would go on for minutes
    await_that(lambda: lab.stats()["open_snapshots"] > 1, WAVE_TIMEOUT_S, lambda: "none runs" + product.logs())
    killed = snapshots_of_ours(lab)[0]
    job = tmp_path / "exports" / killed.vm_name
    # without a job to go on with, or cancelled before it is known to have crashed, its snapshot would go at once
    await_that(lambda: resumable(job), 60, product.logs)
    os.kill(int(json.loads((job / ".hyper2kvm.lock").read_text())["pid"]), 9)
    await_that(lambda: wave_fleet.outcomes(wave)[killed.vm_name] == ["CRASHED"], 120, product.logs)
    wave_fleet.cancel(wave)
    wave_fleet.await_end(wave, "Cancelled")
    await_that(
        lambda: wave_fleet.ended(wave) == len(wave_fleet.children(wave)), 120, lambda: "left running" + product.logs()
    )
    assert {"CANCELLED", "CRASHED"} <= {run["state_type"] for run in wave_fleet.children(wave)}
    assert len(wave_fleet.children(wave)) < VMS - REFUSED - 1
    await_that(lambda: lab.stats()["open_snapshots"] == 1, 60, lambda: f"{lab.stats()}")
    assert [each.moref for each in snapshots_of_ours(lab)] == [killed.moref]
    await_that(lambda: not wave_fleet.processes_of(wave_fleet.children(wave)), 60, product.logs)
    lab.post("/faults", clear=True)
    check_janitor(wave_fleet, killed)


def snapshots_of_ours(lab: Lab) -> tuple[LeftSnapshot, ...]:
    with borrow(lab.connection()) as session:
        return survey(session).snapshots


def check_janitor(wave_fleet: Fleet, killed: LeftSnapshot) -> None:
    """Nothing goes before its time; then ours goes, and not somebody else's on the same VM and on another."""
    lab = wave_fleet.lab
    for vm in (killed.vm_name, "app-01"):
        lab.govc("snapshot.create", "-vm", vm, "-m=false", "-d", "before the upgrade", f"of-somebody-{vm}")
    assert tidied(wave_fleet) == {killed.vm_name: "left"}
    a_day_later(lab, killed)
    assert tidied(wave_fleet) == {killed.vm_name: "removed"}
    assert snapshots_of_ours(lab) == () and lab.stats()["open_snapshots"] == 2
    for vm in (killed.vm_name, "app-01"):
        assert [word for word in lab.govc("snapshot.tree", "-vm", vm).split() if word != "."] == [f"of-somebody-{vm}"]
        lab.govc("snapshot.remove", "-vm", vm, "*")


def tidied(wave_fleet: Fleet) -> dict[str, str]:
    """Have the janitor's deployment run as its schedule does; return what became of snapshots, by VM."""
    product = wave_fleet.product
    run = wave_fleet.deployed("snapshot-janitor", options={"remove": True})
    product.await_state(run, "Completed")
    (report,) = (each["data"] for each in artifacts_of(product, run) if each["type"] == "markdown")
    rows = [[cell.strip() for cell in row.strip("| ").split(" | ")] for row in report.splitlines()]
    return {re.findall(r" of ([\w-]+)", row[2])[0]: row[4] for row in rows if row[1:] and row[0] == "snapshot"}


def a_day_later(lab: Lab, snapshot: LeftSnapshot) -> None:
    """Bring a snapshot's end of time, which its description says, into the past."""
    claim = json.loads(snapshot.description)
    assert datetime.fromisoformat(claim["expires"]) > datetime.now(UTC)
    claim["expires"] = (datetime.now(UTC) - timedelta(hours=1)).isoformat()
    with borrow(lab.connection()) as session:
        node = session.entity(vim.vm.Snapshot, snapshot.moref)
        node.RenameSnapshot(name=snapshot.name, description=json.dumps(claim))


def test_as_many_waves_as_their_worker_takes_ask_at_once_and_one_is_let_through_in_the_browser(
    wave_fleet: Fleet, tmp_path: Path
) -> None:
    product = wave_fleet.product
    waves = [
        wave_fleet.start(name=vm, output_dir=str(tmp_path / vm), select=[vm], approve_plan=True)
        for vm in GATED[:WORKER_LIMIT]
    ]
    assert len(waves) == WORKER_LIMIT
    gates = [asked(wave_fleet, wave) for wave in waves]
    assert all(wave_fleet.children(wave) == [] for wave in waves)
    let_through_in_the_browser(wave_fleet, gates[0])
    for gate in gates[1:]:
        answer = {"run_input": {"decision": "let through"}}
        product.api(f"flow_runs/{gate}/resume", **answer)
    for vm, wave in zip(GATED, waves, strict=False):
        wave_fleet.await_end(wave, "Completed")
        assert [vm_of(run) for run in wave_fleet.children(wave)] == [vm]


def asked(wave_fleet: Fleet, wave: str) -> str:
    """Return the run in which a wave asks, once it waits for a word."""
    product = wave_fleet.product
    await_that(lambda: bool(wave_fleet.children(wave, "gate")), WAVE_TIMEOUT_S, lambda: "no question" + product.logs())
    (gate,) = (run["id"] for run in wave_fleet.children(wave, "gate"))
    product.await_state(gate, "Suspended", timeout_s=WAVE_TIMEOUT_S)
    return str(gate)


def let_through_in_the_browser(wave_fleet: Fleet, gate: str) -> None:
    product = wave_fleet.product
    with browser() as page:
        page.open(f"{product.address}/runs/flow-run/{gate}")
        page.wait_for("Suspended", "Resume")
        page.click("Resume")
        page.wait_for("1 of 1 VMs go", "Decision", "Note")
        page.fill("Note (Optional)", "seen by the test")
        page.picture(PICTURES / "wave-approval.png")
        page.click("Submit")
        product.await_state(gate, "Completed", timeout_s=WAVE_TIMEOUT_S)  # a browser that is gone sends nothing
