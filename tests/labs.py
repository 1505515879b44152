"""Starting a lab (`build/lab`: a simulated vCenter) and asking it what it saw."""

from __future__ import annotations

import json
import os
import select
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from pydantic import SecretStr

from tasks.models import Connection, Trust

ROOT = Path(__file__).resolve().parents[1]
BINARY = ROOT / "build" / "lab"
GOVC = ROOT / "build" / "govc"
VDDK = ROOT / "build" / "vixdisklib"
PLAIN = ROOT / "build" / "plain"
START_TIMEOUT_S = 60.0


@dataclass
class Lab:
    """A running lab: what its ready line says, its admin API, its process."""

    ready: dict[str, Any]
    process: subprocess.Popen[str]
    ca_file: Path

    def __getattr__(self, name: str) -> Any:
        """Return a field of the ready line: url, host, port, username, password, thumbprint_sha256, vms, …."""
        try:
            return self.__dict__["ready"][name]
        except KeyError:
            raise AttributeError(name) from None

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    def vm(self, name: str) -> dict[str, Any]:
        """Return the first VM of that name as the ready line lists it."""
        return next(vm for vm in self.vms if vm["name"] == name)

    def get(self, path: str, **query: Any) -> Any:
        return self._answer(httpx.get(f"{self.admin_url.rstrip('/')}{path}", params=query, timeout=120))

    def post(self, path: str, **body: Any) -> Any:
        return self._answer(httpx.post(f"{self.admin_url.rstrip('/')}{path}", json=body, timeout=120))

    def stats(self) -> dict[str, Any]:
        return dict(self.get("/stats"))

    def sha256(self, vm: str, disk: int, snapshot: str | None = None) -> str:
        query = {"vm": vm, "disk": disk} | ({"snapshot": snapshot} if snapshot else {})
        return str(self.get("/sha256", **query)["sha256"])

    def environment(self) -> dict[str, str]:
        """Return what the command line takes from the environment to log in here."""
        return {"VCENTER_PASSWORD": self.password, "VCENTER_CA_FILE": str(self.ca_file)}

    def connection(self, **changes: Any) -> Connection:
        """Return what logs in here, as the rooms below the steps take it."""
        fields = {
            "host": self.host,
            "port": self.port,
            "username": self.username,
            "password": SecretStr(self.password),
            "trust": Trust(ca_pem=self.ca_pem),
        }
        return Connection(**(fields | changes))

    def govc_environment(self) -> dict[str, str]:
        """Return what govc takes from the environment to log in here."""
        return os.environ | {
            "GOVC_URL": self.url,
            "GOVC_USERNAME": self.username,
            "GOVC_PASSWORD": self.password,
            "GOVC_TLS_CA_CERTS": str(self.ca_file),
            "GOVC_PERSIST_SESSION": "false",
        }

    def govc(self, *words: str) -> str:
        """Run govc, a client that nobody here wrote, and return what it prints."""
        done = subprocess.run(
            [str(GOVC), *words], env=self.govc_environment(), capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    @staticmethod
    def _answer(response: httpx.Response) -> Any:
        assert response.is_success, response.text
        return response.json() if response.content else None


@contextmanager
def plain_simulator() -> Iterator[dict[str, Any]]:
    """govmomi's simulator as it comes, for the block; yields its ready line."""
    argv = ["setpriv", "--pdeathsig", "KILL", str(PLAIN)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout
    try:
        yield json.loads(process.stdout.readline())
    finally:
        process.terminate()
        process.wait(20)


@contextmanager
def running_lab(*flags: str, scenario: dict[str, Any] | None = None) -> Iterator[Lab]:
    """A lab on free ports for the block, from its ready line on; it dies with this thread's process."""
    argv = ["setpriv", "--pdeathsig", "KILL", str(BINARY), *flags]
    with tempfile.TemporaryDirectory(prefix="hyper2kvm-lab-") as name:
        folder = Path(name)
        if scenario is not None:
            (folder / "scenario.json").write_text(json.dumps(scenario))
            argv += ["-scenario", str(folder / "scenario.json")]
        with (folder / "lab.log").open("w") as log:
            process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            ready = _ready_line(process, folder / "lab.log")
            (folder / "ca.pem").write_text(ready["ca_pem"])
            yield Lab(ready, process, folder / "ca.pem")
        finally:
            _stop(process)


def _ready_line(process: subprocess.Popen[str], log: Path) -> dict[str, Any]:
    assert process.stdout
    deadline = time.monotonic() + START_TIMEOUT_S
    while not select.select([process.stdout], [], [], 0.5)[0]:
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
    line = process.stdout.readline()
    assert line, log.read_text()
    return dict(json.loads(line))


def _stop(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
