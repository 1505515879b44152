"""A Redis of the test's own: on loopback only, in memory, and gone when the block ends."""

from __future__ import annotations

import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.e2e.processes import free_port

START_TIMEOUT_S = 30.0


@contextmanager
def redis() -> Iterator[str]:
    """Run a Redis for the block; yields its URL without a database's number, password and all."""
    folder, password, port = Path(tempfile.mkdtemp(prefix="hyper2kvm-redis-")), secrets.token_hex(16), free_port()
    process = subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", "redis-server", "-"],
        cwd=folder, stdin=subprocess.PIPE, stdout=(folder / "log").open("w"), stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert process.stdin
    try:
        with process.stdin as config:  # not in argv, which all may read
            config.write(f'bind 127.0.0.1\nport {port}\nrequirepass {password}\nsave ""\ndir {folder}\n')
        _await(port, process, folder)
        yield f"redis://:{password}@127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)
        shutil.rmtree(folder)


def _await(port: int, process: subprocess.Popen[str], folder: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
        time.sleep(0.1)
