"""Waiting for a vSphere task, within a bound."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from tasks.errors import VsphereFault
from tasks.vsphere.faults import translated
from tasks.vsphere.properties import retrieve
from tasks.vsphere.session import Session

FIRST_POLL_S, LAST_POLL_S = 0.1, 2.0


def run_task(
    session: Session, action: str, start: Callable[[], Any], *, timeout_s: float, repeatable: bool = True
) -> Any:
    """Start a vSphere task, wait for its end and return its result.

    repeatable: whether `start` may be called again where its answer was lost.
    `action` completes "vSphere refused …". Raises classes of `tasks.errors`, from the fault that ended the task.
    """
    task = session.call(action, start, repeatable=repeatable)
    with translated(session.connection, action):
        return _result(session, task, action, timeout_s)


def _result(session: Session, task: Any, action: str, timeout_s: float) -> Any:
    deadline, pause_s = time.monotonic() + timeout_s, FIRST_POLL_S
    while time.monotonic() < deadline:
        info = retrieve(session, [task], ("info.state", "info.result", "info.error")).get(task, {})
        if info.get("info.state") == "success":
            return info.get("info.result")
        if info.get("info.state") == "error":
            raise info["info.error"]
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, LAST_POLL_S)
    raise VsphereFault(action=action, fault=f"no end within {timeout_s:.0f} s", remedy="Look at the task in vSphere")
