"""Fixtures of every test: a lab, and Prefect without a server of the operator's."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from typing import Any

import hypothesis
import pytest

HOME = tempfile.TemporaryDirectory(prefix="hyper2kvm-prefect-", ignore_cleanup_errors=True)  # goes with the process
os.environ.update(
    PREFECT_LOGGING_TO_API_ENABLED="false",
    PREFECT_SERVER_ANALYTICS_ENABLED="false",
    PREFECT_HOME=HOME.name,
    DO_NOT_TRACK="1",
)
for name in ("VCENTER_PASSWORD", "VCENTER_CA_FILE", "VCENTER_THUMBPRINT", "PREFECT_API_URL"):
    os.environ.pop(name, None)

hypothesis.settings.register_profile("unhurried", deadline=None)  # no test fails for being slow
hypothesis.settings.load_profile("unhurried")

from tests.labs import BINARY, Lab, running_lab  # noqa: E402 - the environment first


def _need_lab() -> None:
    if not BINARY.exists():
        pytest.fail("build/lab is missing: run `make setup`")


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """One lab for the session, with the inventory that its flags make: tests leave no snapshot and no fault in it."""
    _need_lab()
    with running_lab("-disks", "2", "-disk-size", "16MiB", "-folder", "production/web servers") as lab:
        yield lab


@pytest.fixture
def new_lab() -> Iterator[Callable[..., Lab]]:
    """Start labs of one's own: `new_lab(*flags, scenario=None)`; they end with the test."""
    _need_lab()
    with ExitStack() as stack:

        def start(*flags: str, scenario: dict[str, Any] | None = None) -> Lab:
            return stack.enter_context(running_lab(*flags, scenario=scenario))

        yield start


@pytest.fixture(scope="session")
def prefect_api() -> Iterator[None]:
    """A temporary Prefect server and database for the session."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=90):
        yield


@pytest.fixture
def api(prefect_api: None) -> dict[str, str]:
    """The environment that makes a command use the tests' server: to start one takes seconds."""
    from prefect.settings import PREFECT_API_URL

    return {"PREFECT_API_URL": PREFECT_API_URL.value() or ""}


@pytest.fixture
def govc(lab: Lab) -> Callable[..., str]:
    """Run govc against the session's lab: an outside judge, and the hand of somebody else."""
    return lab.govc


@pytest.fixture
def anyio_backend() -> str:
    """Coroutine tests, marked `anyio`, run on asyncio."""
    return "asyncio"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Have a skipped test fail in CI: what cannot run there has not been shown."""
    report = yield
    if report.skipped and os.environ.get("CI"):
        report.outcome, report.longrepr = "failed", f"skipped in CI: {report.longrepr}"
    return report
