"""A Prefect as in deployments/production, for a test: PostgreSQL, Redis, server, services, workers, each a process.

Its settings are the files of deployments/production, with this machine's addresses and secrets in their places.
"""

from __future__ import annotations

import base64
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from dotenv import dotenv_values

from tests.e2e.postgres import postgres
from tests.e2e.processes import free_port
from tests.e2e.redis import redis
from tests.labs import ROOT
from tests.waits import await_that

PRODUCTION = ROOT / "deployments" / "production"
START_TIMEOUT_S = 120.0
END_TIMEOUT_S = 60.0


class Fleet:
    """A fleet's settings and processes, their logs in `folder`."""

    def __init__(self, folder: Path, database: str, redis_url: str) -> None:
        self.folder, self.database, self.port = folder, database, free_port()
        self.auth = f"hyper2kvm:{secrets.token_hex(16)}"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        own = {
            "PREFECT_HOME": str(folder / "server"),
            "PREFECT_SERVER_API_PORT": str(self.port),
            "PREFECT_SERVER_DATABASE_CONNECTION_URL": database,
            "PREFECT_REDIS_MESSAGING_URL": redis_url,
            "PREFECT_REDIS_WORKER_CLEANUP_QUEUE_URL": redis_url,
            "PREFECT_SERVER_DOCKET_URL": redis_url,
            "PREFECT_SERVER_ENCRYPTION_KEY": base64.urlsafe_b64encode(secrets.token_bytes(32)).decode(),
            "PREFECT_SERVER_API_AUTH_STRING": self.auth,
            "PREFECT_API_AUTH_STRING": self.auth,
        }
        self.of_server = settings("server", own)
        self.results = folder / "results"

    @property
    def api_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/api"

    def of_worker(self, name: str = "worker") -> dict[str, str]:
        """Return the environment of a worker on a machine of its own."""
        return settings("worker", {
            "PREFECT_HOME": str(self.folder / name), "PREFECT_API_URL": self.api_url,
            "PREFECT_API_AUTH_STRING": self.auth, "PREFECT_LOCAL_STORAGE_PATH": str(self.results),
        })  # fmt: skip

    def api(self, path: str, **body: Any) -> Any:
        """GET without a body, else POST."""
        return self._ask("POST" if body else "GET", path, body or None)

    def post(self, path: str, body: Any) -> Any:
        return self._ask("POST", path, body)

    def _ask(self, method: str, path: str, body: Any) -> Any:
        user, _, password = self.auth.partition(":")
        answer = httpx.request(
            method, f"{self.api_url}/{path}", json=body, auth=(user, password), timeout=30, trust_env=False
        )
        assert answer.is_success, answer.text
        return answer.json() if answer.content else None

    def prefect(self, words: str, environment: dict[str, str]) -> None:
        self.run(f"-m prefect --no-prompt {words}", environment)

    def run(self, words: str, environment: dict[str, str]) -> None:
        """Run Python with `words`, to its end."""
        done = subprocess.run(
            [sys.executable, *words.split()], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180
        )
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"

    def start(self, name: str, words: str, environment: dict[str, str]) -> subprocess.Popen[bytes]:
        """Start Python with `words`; it dies with us, and so do its children when it is ended."""
        with (self.folder / f"{name}.log").open("a") as log:
            process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", sys.executable, *words.split()],
                cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        self.processes[name] = process
        return process

    def start_server(self) -> None:
        self.start("server", "-m prefect --no-prompt server start --no-services", self.of_server)
        await_that(self.healthy, START_TIMEOUT_S, lambda: "no server" + self.tail("server"))

    def start_services(self) -> None:
        self.start("services", "-m prefect --no-prompt server services start", self.of_server)

    def start_workers(self, *names: str, limit: int) -> None:
        for name in names:
            self.start(name, f"-m deployments.worker --name {name} --limit {limit}", self.of_worker(name))
        for name in names:
            await_that(lambda name=name: "started!" in self.log(name), START_TIMEOUT_S, lambda: self.tails())

    def healthy(self) -> bool:
        try:
            return httpx.get(f"{self.api_url}/health", timeout=5, trust_env=False).is_success
        except httpx.HTTPError:
            return False

    def kill(self, name: str) -> None:
        """End a process and what it started, at once."""
        process = self.processes.pop(name)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def tails(self) -> str:
        return "".join(self.tail(log.stem) for log in sorted(self.folder.glob("*.log")))

    def tail(self, name: str) -> str:
        return f"\n── {name}\n" + "\n".join(self.log(name).splitlines()[-40:])


def settings(kind: str, own: dict[str, str]) -> dict[str, str]:
    """Return the environment that the files of deployments/production make, with what is `own` in its place.

    What the example of the secrets names must be among `own`: it would be an example's value else.
    """
    here = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "VCENTER_"))}
    shipped = dotenv_values(PRODUCTION / f"{kind}.env", interpolate=False)
    asked = dotenv_values(PRODUCTION / f"{kind}.secrets.example", interpolate=False)
    assert asked.keys() <= own.keys(), asked.keys() - own.keys()
    return here | {name: str(value) for name, value in shipped.items()} | own


@contextmanager
def fleet(folder: Path, *, workers: Sequence[str], limit: int = 1) -> Iterator[Fleet]:
    """Run a fleet for the block: server, services and workers of these names, `limit` runs each, deployed to."""
    with postgres() as database, redis() as redis_url:
        it = Fleet(folder, database, redis_url)
        try:
            it.prefect("server database upgrade -y", it.of_server)
            it.start_services()
            it.start_server()
            it.run("-m deployments.deploy", it.of_worker())
            it.start_workers(*workers, limit=limit)
            yield it
        finally:
            for name in list(it.processes):
                it.kill(name)
