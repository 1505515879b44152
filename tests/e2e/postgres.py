"""A PostgreSQL of the test's own: in a folder of its own, on loopback only, and gone when the block ends."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.e2e.processes import free_port

DEBIAN = Path("/usr/lib/postgresql")
USER = "prefect"
UNPRIVILEGED = "postgres"  # who PostgreSQL runs as where we are root, whom it refuses; Debian's package makes it
START_TIMEOUT_S = 60.0


@contextmanager
def postgres(*settings: str) -> Iterator[str]:
    """Run a PostgreSQL for the block; yields the URL that Prefect takes, password and all.

    settings: `name=value` as in postgresql.conf. Nothing is synced to disk unless `fsync=on` is among them.
    """
    folder, password, port = Path(tempfile.mkdtemp(prefix="hyper2kvm-postgres-")), secrets.token_hex(16), free_port()
    process: subprocess.Popen[bytes] | None = None
    try:
        _make(folder, password)
        process = _start(folder, port, settings)
        _await(folder, port, process)
        yield f"postgresql+asyncpg://{USER}:{password}@127.0.0.1:{port}/postgres"
    finally:
        if process:
            process.send_signal(signal.SIGINT)  # a fast shutdown: who is connected is not waited for
            process.wait(30)
        shutil.rmtree(folder)


def _make(folder: Path, password: str) -> None:
    secret = folder / "password"
    secret.write_text(password)
    if os.geteuid() == 0:
        for path in (folder, secret):
            shutil.chown(path, UNPRIVILEGED)
    words = ["-D", str(folder / "data"), "-U", USER, "--auth=scram-sha-256", f"--pwfile={secret}", "--no-sync"]
    done = subprocess.run([*_as_nobody(), _tool("initdb"), *words], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    secret.unlink()


def _start(folder: Path, port: int, settings: tuple[str, ...]) -> subprocess.Popen[bytes]:
    usual = ("listen_addresses=127.0.0.1", f"port={port}", "unix_socket_directories=", "fsync=off")
    options = [word for setting in (*usual, *settings) for word in ("-c", setting)]
    with (folder / "log").open("w") as log:
        return subprocess.Popen(
            [*_as_nobody(), _tool("postgres"), "-D", str(folder / "data"), *options],
            cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )  # fmt: skip


def _await(folder: Path, port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while subprocess.run([_tool("pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(port)]).returncode:
        assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
        time.sleep(0.1)


def _as_nobody() -> list[str]:
    """Return the words before a command of PostgreSQL: it dies with us, and is not root."""
    drop = ["--reuid", UNPRIVILEGED, "--regid", UNPRIVILEGED, "--clear-groups"] if os.geteuid() == 0 else []
    return ["setpriv", *drop, "setpriv", "--pdeathsig", "QUIT"]  # in two: a change of user forgets the signal


def _tool(name: str) -> str:
    """Return a program of the newest PostgreSQL here; Debian keeps them out of the PATH."""
    found = sorted(DEBIAN.glob(f"*/bin/{name}"), key=lambda path: float(path.parts[-3]))
    return str(found[-1]) if found else name
