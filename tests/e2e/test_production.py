"""Prefect as deployments/production has it, for real: PostgreSQL, Redis, server apart from services, two workers."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import httpx
import pytest
from cryptography.fernet import Fernet, InvalidToken
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

from blocks import VCenter
from deployments import automations
from tasks.models import Manifest
from tests.e2e.fleet import PRODUCTION, Fleet, fleet
from tests.labs import Lab, running_lab
from tests.runs import assert_equal_to_the_guests_disks
from tests.waits import await_that

pytestmark = [pytest.mark.e2e, pytest.mark.live]

WORKERS = ("worker-0", "worker-1")
VMS = ("alpha", "beta", "gamma")
DISK = {"size": "32MiB"}
SITE = {
    "datacenters": [
        {
            "name": "DC",
            "clusters": [{"name": "cluster", "hosts": ["esx1"]}],
            "vms": [{"name": name, "disks": [DISK]} for name in VMS],
        }
    ]
}
RUN_TIMEOUT_S = 120
SLOW = 1 << 20  # bytes a second of a reply, and of those under way to their end: 32 s at most with these disks
ENDED = {"Completed", "Failed", "Crashed", "Cancelled"}


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with running_lab(scenario=SITE) as lab:
        yield lab


@pytest.fixture(scope="module")
def production(tmp_path_factory: pytest.TempPathFactory, lab: Lab) -> Iterator[Fleet]:
    """The fleet of this file's tests, which knows the lab as the block "lab"."""
    with fleet(tmp_path_factory.mktemp("fleet"), workers=WORKERS) as it:
        with spoken_to(it):
            VCenter(
                host=lab.host, port=lab.port, username=lab.username, password=lab.password, ca_bundle=lab.ca_pem
            ).save("lab")
        yield it


def spoken_to(it: Fleet) -> Any:
    """Make Prefect in this process a client of the fleet, for the block."""
    return temporary_settings({PREFECT_API_URL: it.api_url, PREFECT_API_AUTH_STRING: it.auth})


def begin(it: Fleet, vm: str, output: Path) -> str:
    """Create a run of the deployment export; return its id."""
    (block,) = it.api("block_documents/filter", block_types={"slug": {"any_": ["vcenter"]}})
    parameters = {
        "vcenter": {"$ref": {"block_document_id": block["id"]}},
        "options": {"vm_name": vm, "output_dir": str(output)},
    }
    deployment = it.api("deployments/name/export/export")["id"]
    return str(it.api(f"deployments/{deployment}/create_flow_run", parameters=parameters)["id"])


def state(it: Fleet, run: str) -> str:
    return str(it.api(f"flow_runs/{run}")["state_name"])


def await_completed(it: Fleet, *runs: str) -> None:
    for run in runs:
        await_that(lambda run=run: state(it, run) in ENDED, RUN_TIMEOUT_S, lambda: "no end" + it.tails())
        assert state(it, run) == "Completed", it.api(f"flow_runs/{run}")["state"]["message"] + it.tails()


def taken_by(it: Fleet, run: str) -> list[str]:
    """Return the workers among whose words are those of a run: that they submit it two may say, and one is refused."""
    return [worker for worker in WORKERS if f"/runs/flow-run/{run}" in it.log(worker)]


def check_exported(lab: Lab, folder: Path, vm: str, scratch: Path) -> None:
    manifest = Manifest.model_validate_json((folder / vm / "manifest.json").read_text())
    assert_equal_to_the_guests_disks(lab, manifest, folder / vm, scratch)


def test_runs_go_on_while_server_and_services_are_killed(production: Fleet, lab: Lab, tmp_path: Path) -> None:
    """Two workers, a run each; their results lie where both can read them, and not in their own homes."""
    lab.post("/faults", throttle_bytes_per_s=SLOW)
    runs = {vm: begin(production, vm, tmp_path) for vm in VMS[:2]}
    await_that(lambda: lab.stats()["open_snapshots"] == 2, RUN_TIMEOUT_S, lambda: "no runs" + production.tails())
    before = lab.stats()["bytes_served"]
    for name in ("server", "services"):
        production.kill(name)
    await_that(lambda: lab.stats()["bytes_served"] > before + SLOW, 30, lambda: "nothing moves" + production.tails())
    production.start_services()
    production.start_server()
    lab.post("/faults", clear=True)
    await_completed(production, *runs.values())
    assert sorted(worker for run in runs.values() for worker in taken_by(production, run)) == [*WORKERS]
    for vm in runs:
        check_exported(lab, tmp_path, vm, tmp_path)
    assert len([*production.results.iterdir()]) >= len(runs)
    assert [*production.folder.glob("worker-*/storage/*")] == []


def test_a_saved_password_is_unreadable_in_the_database_without_the_key(production: Fleet, lab: Lab) -> None:
    tables = asyncio.run(everything_in(production.database))
    assert "export alpha" in tables["flow_run"], "the search does not find what is there"
    assert [name for name, text in tables.items() if lab.password in text] == []
    assert "fernet" not in tables["configuration"], "the key lies beside what it locks"
    (stored,) = (json.loads(row) for row in tables["block_document"].splitlines())
    key = production.of_server["PREFECT_SERVER_ENCRYPTION_KEY"]
    assert lab.password in Fernet(key).decrypt(stored["data"]).decode()
    with pytest.raises(InvalidToken):
        Fernet(Fernet.generate_key()).decrypt(stored["data"])


async def everything_in(url: str) -> dict[str, str]:
    """Return each table of a database, a row as JSON a line."""
    connection = await asyncpg.connect(url.replace("+asyncpg", ""))
    try:
        names = [
            row[0] for row in await connection.fetch("select tablename from pg_tables where schemaname = 'public'")
        ]
        return {
            name: "\n".join(row[0] for row in await connection.fetch(f'select to_jsonb(t)::text from "{name}" t'))
            for name in names
        }
    finally:
        await connection.close()


@pytest.mark.parametrize("auth", [None, ("hyper2kvm", "wrong"), ("", "")], ids=["none", "wrong", "empty"])
def test_the_api_is_refused_without_its_password(production: Fleet, auth: tuple[str, str] | None) -> None:
    for path in ("flow_runs/filter", "block_documents/filter"):
        answer = httpx.post(f"{production.api_url}/{path}", json={}, auth=auth, trust_env=False)
        assert answer.status_code == 401 and "lab" not in answer.text, path
    assert production.api("flow_runs/filter", limit=1)


@pytest.fixture
def hasty(production: Fleet) -> Iterator[timedelta]:
    """The shipped automation with a window that is not waited for, real runs' beats being farther apart."""
    window = timedelta(seconds=10)
    with spoken_to(production), get_client(sync_client=True) as client:
        automations.upsert(automations.zombie(window), client=client)
        yield window
        automations.upsert(automations.zombie(), client=client)


def test_a_run_whose_heartbeats_stop_is_crashed_and_one_that_is_suspended_is_not(
    production: Fleet, hasty: timedelta
) -> None:
    dead, suspended = running(production), running(production)
    for run in (dead, suspended):
        beat(production, run)
    production.api(f"flow_runs/{suspended}/set_state", state={"type": "PAUSED", "name": "Suspended"}, force=True)
    await_that(lambda: state(production, dead) == "Crashed", 60, lambda: "not crashed" + production.tails())
    message = production.api(f"flow_runs/{dead}")["state"]["message"]
    assert f"No heartbeat for {hasty.seconds} s" in message
    assert state(production, suspended) == "Suspended"


def running(it: Fleet) -> str:
    """Return a run that Prefect takes for running: nobody carries it out."""
    (flow,) = it.api("flows/filter", flows={"name": {"any_": ["export"]}})
    return str(it.api("flow_runs/", flow_id=flow["id"], state={"type": "RUNNING"})["id"])


def beat(it: Fleet, run: str) -> None:
    """Send what a run sends while it lives."""
    event = {
        "id": str(uuid4()),
        "occurred": datetime.now(UTC).isoformat(),
        "event": "prefect.flow-run.heartbeat",
        "resource": {"prefect.resource.id": f"prefect.flow-run.{run}"},
    }
    it.post("events", [event])


def test_a_worker_that_is_ended_lets_its_run_finish_and_takes_no_other(
    production: Fleet, lab: Lab, tmp_path: Path
) -> None:
    lab.post("/faults", throttle_bytes_per_s=SLOW)
    first = begin(production, "alpha", tmp_path)
    await_that(lambda: lab.stats()["open_snapshots"] == 1, RUN_TIMEOUT_S, lambda: "no run" + production.tails())
    (drained,) = taken_by(production, first)
    worker = production.processes[drained]
    worker.send_signal(signal.SIGTERM)
    await_that(lambda: "takes no more runs" in production.log(drained), 30, lambda: production.tail(drained))
    second, third = (begin(production, vm, tmp_path) for vm in VMS[1:])
    await_that(
        lambda: taken_by(production, second) + taken_by(production, third) != [],
        RUN_TIMEOUT_S,
        lambda: "nobody takes another" + production.tails(),
    )
    assert worker.poll() is None and state(production, first) == "Running"
    lab.post("/faults", clear=True)
    assert worker.wait(RUN_TIMEOUT_S) == 0, production.tail(drained)
    await_completed(production, first, second, third)
    assert drained not in taken_by(production, second) + taken_by(production, third)
    for vm in VMS:
        check_exported(lab, tmp_path, vm, tmp_path)
    del production.processes[drained]


def test_systemd_finds_nothing_wrong_with_the_units(tmp_path: Path) -> None:
    units = sorted((PRODUCTION / "systemd").iterdir())
    assert len(units) == 3
    for unit in units:
        text = unit.read_text()
        assert "/opt/hyper2kvm/.venv/bin/python" in text
        (tmp_path / unit.name).write_text(text.replace("/opt/hyper2kvm/.venv/bin/python", sys.executable))
    argv = ["systemd-analyze", "verify", *(str(tmp_path / unit.name) for unit in units)]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
