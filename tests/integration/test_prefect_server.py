"""Prefect's server goes away in mid-run: the copy does not care, and the run is recorded when it is back."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest

from tests.labs import ROOT, running_lab
from tests.runs import assert_nothing_left, command, faults, raw_sha256

pytestmark = [pytest.mark.live]

MIB = 1024 * 1024


@contextmanager
def server(home: str, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """A Prefect server of one's own, for the block."""
    argv = [
        sys.executable,
        "-m",
        "prefect",
        "--no-prompt",
        "server",
        "start",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    env = os.environ | {"PREFECT_HOME": home}
    process = subprocess.Popen(argv, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 90
        while not healthy(port):
            assert process.poll() is None and time.monotonic() < deadline, "the server does not start"
            time.sleep(0.2)
        yield process
    finally:
        process.terminate()
        process.wait(30)


def healthy(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/api/health", timeout=2).is_success
    except httpx.HTTPError:
        return False


@pytest.fixture
def address(tmp_path) -> tuple[str, int]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return str(tmp_path / "home"), free.getsockname()[1]


def export_begun(lab, output_dir, port) -> subprocess.Popen[str]:
    """Start an export recorded by the server at `port`; return once bytes flow."""
    process = subprocess.Popen(
        command(lab, "export-vm", "--vs-vm-name", "demo", "--output-dir", str(output_dir)),
        cwd=ROOT,
        env=os.environ | lab.environment() | {"PREFECT_API_URL": f"http://127.0.0.1:{port}/api"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while lab.stats()["bytes_served"] < 2 * MIB:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "no bytes flow"
        time.sleep(0.05)
    return process


def test_a_server_restarted_mid_run_costs_nothing(address, tmp_path):
    home, port = address
    with running_lab("-disks", "1", "-disk-size", "64MiB") as lab, faults(lab, throttle_bytes_per_s=6 * MIB):
        with server(home, port):
            process = export_begun(lab, tmp_path, port)
        with server(home, port):
            _, err = process.communicate(timeout=180)
            assert process.returncode == 0, err
            (run,) = httpx.post(f"http://127.0.0.1:{port}/api/flow_runs/filter", json={}).json()
        assert run["state_type"] == "COMPLETED"
        assert raw_sha256(tmp_path / "demo" / "disk-0.qcow2", tmp_path) == lab.sha256(lab.vm("demo")["moref"], 0)
        assert_nothing_left(lab)


@pytest.mark.soak
def test_a_server_that_is_gone_for_good_leaves_no_process_waiting_for_it(address, tmp_path):
    home, port = address
    with running_lab("-disks", "1", "-disk-size", "16MiB") as lab, faults(lab, throttle_bytes_per_s=2 * MIB):
        with server(home, port):
            process = export_begun(lab, tmp_path, port)
        lab.post("/faults", clear=True)
        _, err = process.communicate(timeout=240)
        assert process.returncode == 1
        lines = [line for line in err.splitlines() if not line.startswith(("Loading", "transfer", "convert", "verify"))]
        assert lines[0].startswith("Error: No Prefect server answers at ")
        assert len(lines) == 2
        assert (tmp_path / "demo" / "manifest.json").exists()
        assert_nothing_left(lab)
