"""A saved wave on two machines: PostgreSQL, Redis, a worker with a home of its own each, results in a shared folder."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

from blocks import MigrationWave, VCenter
from tasks.models import Manifest
from tasks.wave.models import Limits, Wave
from tests.e2e.fleet import Fleet, fleet
from tests.e2e.processes import marked_processes
from tests.e2e.wave_fleet import children_of, kill_run, vm_of
from tests.labs import Lab, running_lab
from tests.runs import assert_equal_to_the_guests_disks
from tests.waits import await_that
from tests.waves import fleet as vms

pytestmark = pytest.mark.e2e

MACHINES = ("machine-0", "machine-1")
VMS = [f"app-{number:02}" for number in range(5)]
SLOW = 64 << 10  # bytes a second: 16 s of a VM's 1 MiB
WITHIN_S = 180


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with running_lab(scenario=vms(vms=len(VMS))) as lab:
        yield lab


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with fleet(tmp_path_factory.mktemp("machines"), workers=MACHINES, limit=3) as it:
        yield it


def saved_wave_run(it: Fleet, lab: Lab, output: Path) -> str:
    """Save vCenter and wave as blocks, and create the run of `saved-wave` with a reference to them; return its id."""
    with temporary_settings({PREFECT_API_URL: it.api_url, PREFECT_API_AUTH_STRING: it.auth}):
        fields = {"host": lab.host, "port": lab.port, "username": lab.username, "password": lab.password}
        VCenter(**fields, ca_bundle=lab.ca_pem, connections=1).save("lab")
        wave = Wave(name="kept", output_dir=str(output), select=VMS, options={"format": "raw"}, limits=Limits(runs=2))
        block = MigrationWave(vcenter=VCenter.load("lab"), wave=wave).save("kept")
    deployment = it.api("deployments/name/saved-wave/saved-wave")["id"]
    parameters = {"wave": {"$ref": {"block_document_id": str(block)}}}
    return str(it.api(f"deployments/{deployment}/create_flow_run", parameters=parameters)["id"])


def await_state(it: Fleet, run: str, wanted: str) -> None:
    def state() -> str:
        return str(it.api(f"flow_runs/{run}")["state_name"])

    await_that(lambda: state() == wanted, WITHIN_S, lambda: f"{state()}, not {wanted}{it.tails()}")


def processes_of(run: str) -> list[int]:
    return marked_processes(f"PREFECT__FLOW_RUN_ID={run}")


def machine_of(run: str) -> str:
    """Return the worker that a run is at, by the home that its process has."""
    pid = processes_of(run)[0]
    entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    (home,) = (each.partition(b"=")[2].decode() for each in entries if each.startswith(b"PREFECT_HOME="))
    return Path(home).name


def test_a_wave_killed_on_one_machine_is_gone_on_with_on_another_and_starts_nothing_twice(
    machines: Fleet, lab: Lab, tmp_path: Path
) -> None:
    it = machines
    lab.post("/faults", throttle_bytes_per_s=SLOW)
    wave = saved_wave_run(it, lab, tmp_path)

    def states() -> list[str]:
        return [run["state_type"] for run in children_of(it.api, wave)]

    await_that(lambda: {"COMPLETED", "RUNNING"} <= {*states()}, WITHIN_S, lambda: f"{states()}{it.tails()}")
    lost = machine_of(wave)
    place = kill_run(wave)
    before = {run["id"] for run in children_of(it.api, wave)}
    await_state(it, wave, "Crashed")
    await_that(lambda: not place.exists(), WITHIN_S, it.tails)  # the worker has said all it will
    it.processes[lost].send_signal(signal.SIGTERM)
    await_that(lambda: "takes no more runs" in it.log(lost), 30, lambda: it.tail(lost))
    it.api(f"flow_runs/{wave}/set_state", state={"type": "SCHEDULED", "name": "AwaitingRetry"}, force=True)
    await_that(lambda: bool(processes_of(wave)), WITHIN_S, it.tails)
    (other,) = {*MACHINES} - {lost}
    assert machine_of(wave) == other
    await_state(it, wave, "Completed")

    runs = children_of(it.api, wave)
    assert sorted(map(vm_of, runs)) == VMS
    assert {run["state_type"] for run in runs} == {"COMPLETED"} and before < {run["id"] for run in runs}
    calls = lab.stats()["soap_calls"]
    assert calls.get("CreateSnapshot_Task", 0) + calls.get("CreateSnapshotEx_Task", 0) == len(VMS)
    plans = it.api("task_runs/filter", flow_runs={"id": {"any_": [wave]}}, task_runs={"name": {"like_": "plan"}})
    assert "Cached" in {each["state_name"] for each in plans}, "the plan of the first machine was not found"
    assert [*it.folder.glob("machine-*/storage/*")] == [] and len([*it.results.iterdir()]) > len(VMS)
    for vm in VMS:
        manifest = Manifest.model_validate_json((tmp_path / vm / "manifest.json").read_text())
        assert_equal_to_the_guests_disks(lab, manifest, tmp_path / vm, tmp_path)
    assert lab.stats()["open_snapshots"] == 0
