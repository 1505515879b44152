"""Running a flow with or without a Prefect server: the one that PREFECT_API_URL names, else a temporary one of ours.

Starting a temporary one is the slow part of a short run, so it is said what is waited for.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TypeVar

from prefect.server.api.server import SubprocessASGIServer
from prefect.settings import PREFECT_API_URL, temporary_settings

START_TIMEOUT_S = 90  # Prefect's own default of 20 s is too short for a first run, which migrates the database

T = TypeVar("T")


async def run_flow(flow: Callable[..., Awaitable[T]], *, say: Callable[[str], None], **parameters: Any) -> T:
    """Run a flow to its end and return its result; raise what it raises. `say` is told what is waited for."""
    with prefect_api(say):
        return await flow(**parameters)


@contextlib.contextmanager
def prefect_api(say: Callable[[str], None]) -> Iterator[None]:
    """Have a Prefect API for the block; the temporary one ends with this process, however that ends."""
    if PREFECT_API_URL.value():
        yield
        return
    say(f"Starting a temporary Prefect server (up to {START_TIMEOUT_S} s; set PREFECT_API_URL to use a running one)")
    logging.getLogger("prefect.server.api.server").setLevel(logging.WARNING)
    server = _GuardedServer()
    with _sigint_blocked():
        server.start(timeout=START_TIMEOUT_S)
    with temporary_settings({PREFECT_API_URL: server.api_url}):
        yield


class _GuardedServer(SubprocessASGIServer):
    """Prefect's server as a child process that is ended, by a guard, when ours dies by whatever cause."""

    def _run_uvicorn_command(self) -> subprocess.Popen[Any]:
        server = super()._run_uvicorn_command()
        # The guard waits for the end of a pipe whose other end only we hold: it comes even after SIGKILL.
        guard = ["sh", "-c", 'read _; kill "$0" 2>/dev/null', str(server.pid)]
        self._guard = subprocess.Popen(guard, stdin=subprocess.PIPE, start_new_session=True)
        return server


@contextlib.contextmanager
def _sigint_blocked() -> Iterator[None]:
    """Start children that Ctrl-C does not reach: else the server is gone before the run can record its end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
