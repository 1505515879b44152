"""What a wave costs beside its transfers: 50 and 200 small VMs, with Prefect on PostgreSQL, and how that grows.

The VMs' runs share the wave's own process, as they do from the command line (`--vs-action wave`): a worker's process a
run takes 5 to 10 s of two cores to start, 200 of which would measure Python's start and nothing of the wave. What is
told is wall time from the first run's start to the last one's end, less what their disks took, a VM. Between the sizes
the server is the same, so that what the first wave left in its database is there in the second. `HYPER2KVM_BENCH_VMS`
(`50,200`) makes the waves smaller.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from socket import socket
from typing import Any

import httpx

from tests.benchmarks.measure import Row, row, write
from tests.labs import ROOT, running_lab
from tests.runs import command
from tests.waves import fleet

SIZES = tuple(map(int, os.environ.get("HYPER2KVM_BENCH_VMS", "50,200").split(",")))
AT_ONCE = 4
GOAL = 1.2  # what a VM costs in the larger wave, against the smaller
START_TIMEOUT_S = 120.0


def main() -> None:
    """Run a wave of each size; print and leave the rows."""
    costs: dict[int, float] = {}
    with tempfile.TemporaryDirectory(dir=ROOT / "build") as folder, postgres(Path(folder)) as database:
        with prefect_server(Path(folder), database) as api:
            for size in SIZES:
                costs[size] = cost_of(api, Path(folder), size)
                print(f"fleet: {size} VMs: {costs[size]:.3f} s a VM beside its transfer", flush=True)
    small, large = costs[min(SIZES)], costs[max(SIZES)]
    rows: list[Row] = [row(f"wave of {max(SIZES)}", f"of {min(SIZES)}", "s a VM", large, small, GOAL, at_least=False)]
    write("fleet", rows)


def cost_of(api: str, folder: Path, size: int) -> float:
    """Carry out a wave of so many VMs; return the seconds that each took beside its transfer."""
    out, since = folder / f"wave-{size}", datetime.now().astimezone().isoformat()
    file = folder / f"wave-{size}.json.yaml"
    wave = {"output_dir": str(out), "select": ["app-*"], "options": {"format": "raw"}, "limits": {"runs": AT_ONCE}}
    file.write_text(json.dumps(wave))
    with running_lab(scenario=fleet(vms=size)) as lab:
        env = os.environ | lab.environment() | {"PREFECT_API_URL": api}
        argv = command(lab, "wave", "--wave", str(file))
        subprocess.run(argv, cwd=ROOT, env=env, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    runs = list(runs_since(api, since))
    assert len(runs) == size, f"{len(runs)} runs of {size} VMs"
    begun = min(datetime.fromisoformat(run["start_time"]) for run in runs)
    ended = max(datetime.fromisoformat(run["end_time"]) for run in runs)
    moved = sum(
        image["seconds"] for path in out.glob("*/manifest.json") for image in json.loads(path.read_text())["disks"]
    )
    return ((ended - begun).total_seconds() - moved / AT_ONCE) / size


def runs_since(api: str, since: str) -> Iterator[dict[str, Any]]:
    """Yield the runs of VMs that began after a moment."""
    wanted = {"start_time": {"after_": since}, "state": {"type": {"any_": ["COMPLETED"]}}, "name": {"like_": "export "}}
    offset = 0
    while True:
        body = {"flow_runs": wanted, "limit": 200, "offset": offset, "sort": "ID_DESC"}
        page = httpx.post(f"{api}/flow_runs/filter", json=body, timeout=60, trust_env=False).raise_for_status().json()
        yield from page
        offset += len(page)
        if len(page) < 200:
            return


@contextmanager
def postgres(folder: Path) -> Iterator[str]:
    """A PostgreSQL of our own on loopback, for the block; yields Prefect's address of its database."""
    data, port = folder / "postgres", free_port()
    tools = max(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    as_user = ["setpriv", "--reuid", "postgres", "--regid", "postgres", "--clear-groups"] if os.geteuid() == 0 else []
    data.mkdir()
    if as_user:
        folder.chmod(0o755)
        subprocess.run(["chown", "postgres:postgres", str(data)], check=True)
    initdb = [str(tools / "initdb"), "-D", str(data), "-U", "prefect", "-A", "trust", "--no-sync"]
    subprocess.run([*as_user, *initdb], check=True, stdout=subprocess.DEVNULL, cwd="/")
    words = ["-h", "127.0.0.1", "-p", str(port), "-k", str(data), "-c", "max_connections=200"]
    argv = [*as_user, str(tools / "postgres"), "-D", str(data), *words]
    with (folder / "postgres.log").open("w") as log:
        process = subprocess.Popen(["setpriv", "--pdeathsig", "INT", *argv], stdout=log, stderr=log, cwd="/")
    try:
        ready = [str(tools / "pg_isready"), "-h", "127.0.0.1", "-p", str(port), "-q"]
        await_that(lambda: subprocess.run(ready).returncode == 0, folder / "postgres.log")
        yield f"postgresql+asyncpg://prefect@127.0.0.1:{port}/postgres"
    finally:
        process.terminate()
        process.wait(60)


@contextmanager
def prefect_server(folder: Path, database: str) -> Iterator[str]:
    """A Prefect server on that database, for the block; yields its API's address."""
    port = free_port()
    env = os.environ | {
        "PREFECT_HOME": str(folder / "prefect"),
        "PREFECT_API_DATABASE_CONNECTION_URL": database,
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
    }
    env.pop("PREFECT_API_URL", None)
    words = f"--no-prompt server start --host 127.0.0.1 --port {port}"
    with (folder / "server.log").open("w") as log:
        argv = ["setpriv", "--pdeathsig", "TERM", sys.executable, "-m", "prefect", *words.split()]
        process = subprocess.Popen(argv, env=env, stdout=log, stderr=log)
    try:
        await_that(lambda: healthy(port), folder / "server.log")
        yield f"http://127.0.0.1:{port}/api"
    finally:
        process.terminate()
        process.wait(60)


def healthy(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/api/health", timeout=5, trust_env=False).is_success
    except httpx.HTTPError:
        return False


def free_port() -> int:
    with socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def await_that(holds: Any, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(log.read_text()[-2000:])
        time.sleep(0.3)
