"""Waves under `make up`: 40 VMs, killed and retried, one failing; a wave cancelled; a gate let through in the UI."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.processes import marked_processes
from tests.e2e.screenshot import browser
from tests.e2e.test_up import MIB, PICTURES, Product, artifacts_of, await_that, fill_in
from tests.labs import ROOT, Lab, running_lab
from tests.waves import fleet

pytestmark = pytest.mark.e2e

VMS, REFUSED = 40, 2
VICTIM = "app-21"  # large enough to be met in its middle
WAVE_TIMEOUT_S = 420
ENDS = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}
SAVE = """
import json, os
from blocks import VCenter
VCenter(**json.loads(os.environ["FLEET_BLOCK"])).save("fleet", overwrite=True)
"""


class Fleet:
    """The product, a lab of many VMs that it knows as the block `fleet`, and one more worker."""

    def __init__(self, product: Product, lab: Lab, state: Path) -> None:
        self.product, self.lab, self.datastores = product, lab, state

    def start(self, **wave: Any) -> str:
        """Create a wave's run as the form does; return its id."""
        found = self.product.deployment("migration-wave")
        schema = found["parameter_openapi_schema"]
        block = next(each for each in self.product.api("block_documents/filter", limit=50) if each["name"] == "fleet")
        parameters = fill_in(schema, schema["definitions"], {}, block=block["id"])
        parameters["wave"] |= wave
        return str(self.product.api(f"deployments/{found['id']}/create_flow_run", parameters=parameters)["id"])

    def children(self, wave: str, kind: str = "vm") -> list[dict[str, Any]]:
        """Return the runs that a wave created, of VMs or gates."""
        runs = self.product.api("flow_runs/filter", flow_runs={"tags": {"all_": [f"wave:{wave}"]}}, limit=200)
        return [run for run in runs if any(tag.startswith(f"{kind}:") for tag in run["tags"])]

    def ended(self, wave: str) -> int:
        return sum(run["state_type"] in ENDS for run in self.children(wave))

    def retry(self, run: str) -> None:
        state = {"type": "SCHEDULED", "name": "AwaitingRetry"}
        self.product.api(f"flow_runs/{run}/set_state", state=state, force=True)

    def await_end(self, wave: str, *wanted: str) -> dict[str, Any]:
        return self.product.await_state(wave, *wanted, timeout_s=WAVE_TIMEOUT_S)


@pytest.fixture(scope="module")
def wave_fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    product = Product(tmp_path_factory.mktemp("wave") / "state")
    state = tmp_path_factory.mktemp("datastores")
    scenario = fleet(vms=VMS, refused=REFUSED, sizes={VICTIM: "96MiB"})
    try:
        product.make("up")
        env = _environment(product)
        with running_lab("-state", str(state), scenario=scenario) as lab:
            fields = {each: lab.ready[each] for each in ("host", "port", "username", "password")}
            block = fields | {"ca_bundle": lab.ca_pem, "connections": 1}
            subprocess.run(
                [sys.executable, "-c", SAVE], cwd=ROOT, env=env | {"FLEET_BLOCK": json.dumps(block)}, check=True
            )
            with _worker(env, product):
                yield Fleet(product, lab, state)
    finally:
        product.make("down")


def _environment(product: Product) -> dict[str, str]:
    return os.environ | {
        "PREFECT_HOME": str(product.folder / "prefect"),
        "PREFECT_API_URL": f"{product.address}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "HYPER2KVM_STARTED_BY": f"{product.folder}:worker",  # so that `make down` ends what is left of it
    }


class _worker:
    """One more worker for the block: the one of `make up` takes two runs, of which the wave is one."""

    def __init__(self, env: dict[str, str], product: Product) -> None:
        words = "worker start --pool hyper2kvm --type process --name second --limit 4"
        self._argv, self._env = [sys.executable, "-m", "prefect", "--no-prompt", *words.split()], env
        self._log = (product.folder / "second.log").open("w")

    def __enter__(self) -> None:
        self._process = subprocess.Popen(self._argv, cwd=ROOT, env=self._env, stdout=self._log, stderr=self._log)

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._log.close()


def vm_of(run: dict[str, Any]) -> str:
    return str(run["parameters"]["options"]["vm_name"]).rpartition("/")[2]


def kill_run(run: str) -> Path:
    """End every process of a flow run, as a lost machine would; return the folder that its worker gave it."""
    pids = marked_processes(f"PREFECT__FLOW_RUN_ID={run}")
    assert pids
    place = Path(f"/proc/{min(pids)}/cwd").resolve()
    assert place.name.endswith("prefect")
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return place


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
        assert page.evaluate(
            "[...document.images].some(i => i.src.startsWith('data:image/svg') && i.naturalWidth > 100)"
        )
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
        disk = wave_fleet.lab.vm(name)["disks"][0]["datastore_path"]
        store, _, path = disk.removeprefix("[").partition("] ")
        source = wave_fleet.datastores / store / path
        argv = ["qemu-img", "compare", "-f", "raw", "-F", "vmdk", str(out / name / "disk-0.raw"), str(source)]
        assert subprocess.run(argv, capture_output=True).returncode == 0, name


def test_cancelling_a_wave_cancels_its_runs(wave_fleet: Fleet, tmp_path: Path) -> None:
    product, lab = wave_fleet.product, wave_fleet.lab
    wave = wave_fleet.start(
        name="cancelled", output_dir=str(tmp_path / "exports"), select=["app-*"], exclude=[VICTIM], limits={"runs": 4}
    )
    await_that(lambda: wave_fleet.ended(wave) >= 4, WAVE_TIMEOUT_S, lambda: "no progress" + product.logs())
    lab.post("/faults", throttle_bytes_per_s=8 << 10)  # what runs now would go on for minutes
    await_that(lambda: lab.stats()["open_snapshots"] > 1, WAVE_TIMEOUT_S, lambda: "none runs" + product.logs())
    product.api(f"flow_runs/{wave}/set_state", state={"type": "CANCELLING", "name": "Cancelling"})
    wave_fleet.await_end(wave, "Cancelled")
    await_that(
        lambda: wave_fleet.ended(wave) == len(wave_fleet.children(wave)), 120, lambda: "left running" + product.logs()
    )
    assert "CANCELLED" in {run["state_type"] for run in wave_fleet.children(wave)}
    assert len(wave_fleet.children(wave)) < VMS - REFUSED - 1
    await_that(lambda: lab.stats()["open_snapshots"] == 0, 60, lambda: f"{lab.stats()}")
    lab.post("/faults", clear=True)


def test_a_gate_is_let_through_in_the_browser(wave_fleet: Fleet, tmp_path: Path) -> None:
    product = wave_fleet.product
    wave = wave_fleet.start(name="gated", output_dir=str(tmp_path / "exports"), select=["app-01"], approve_plan=True)
    await_that(lambda: bool(wave_fleet.children(wave, "gate")), WAVE_TIMEOUT_S, lambda: "no question" + product.logs())
    (gate,) = (run["id"] for run in wave_fleet.children(wave, "gate"))
    product.await_state(gate, "Suspended", timeout_s=WAVE_TIMEOUT_S)
    assert wave_fleet.children(wave) == []
    with browser() as page:
        page.open(f"{product.address}/runs/flow-run/{gate}")
        page.wait_for("Suspended", "Resume")
        page.click("Resume")
        page.wait_for("1 VMs go", "Decision", "Note")
        page.fill("Note (Optional)", "seen by the test")
        page.picture(PICTURES / "wave-approval.png")
        page.click("Submit")
        product.await_state(gate, "Completed", timeout_s=WAVE_TIMEOUT_S)  # a browser that is gone sends nothing
    wave_fleet.await_end(wave, "Completed")
    assert [vm_of(run) for run in wave_fleet.children(wave)] == ["app-01"]
