"""`make up` and `make down`: a Prefect server, its workers and a lab vCenter on this machine, on loopback only.

Every process that `up` starts carries a mark in its environment, which its children inherit; `down` ends what
carries it and nothing else. State, logs and Prefect's database lie in `.lab/`; an operator's own `~/.prefect` is
neither read nor written.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from deployments import POOL

ROOT = Path(__file__).resolve().parents[1]
HOME = Path(os.environ.get("HYPER2KVM_STATE_DIR") or ROOT / ".lab").resolve()
STATE = HOME / "state.json"
MARK = "HYPER2KVM_STARTED_BY"
WORKERS = {"approvals": "approvals", "waves": "waves", "worker": "default"}  # and the work queue of each
ROLES = (*WORKERS, "server", "lab")  # in the order in which they end: a run's last words need the other two
BLOCK, VM = "lab", "production-web"
DEFAULT_PORT = 4200  # Prefect's own; the next free one where it is taken
WORKER_LIMIT = 2  # runs at once: about 100 MB each, and SQLite is not made for more
START_TIMEOUT_S = 120.0  # a first start migrates the database
END_TIMEOUT_S = 20.0


class Trouble(Exception):
    """What an operator must hear, in a line or two."""


def main(words: list[str]) -> int:
    commands = {"up": up, "down": down}
    if len(words) != 1 or words[0] not in commands:
        print(f"usage: local.py {'|'.join(commands)}", file=sys.stderr)
        return 2
    try:
        with _alone():
            commands[words[0]]()
    except Trouble as trouble:
        print(trouble, file=sys.stderr)
        return 1
    return 0


def up() -> None:
    """Start what does not run, deploy, and say where to click; done twice, nothing is there twice."""
    state = _read_state()
    if all(_runs(role, state) for role in ROLES):
        say("already up; deploying again")
    if not (_runs("server", state) and _healthy(state)):
        for role in WORKERS:
            _end(role, state)  # it talks to the server that is gone
        _start_server(state)
    os.environ.update(_environment(state))  # before Prefect is imported, which reads it then
    if not _runs("lab", state):
        _start_lab(state)
    _deploy()
    _start_workers([role for role in WORKERS if not _runs(role, state)], state)
    say(f"Deployments, export, Run: vCenter {BLOCK!r}, VM {VM!r}, output folder {str(ROOT / 'exports')!r}")
    print(f"UI: {_address(state)}", flush=True)


def down() -> None:
    """End what `up` started, and what that started in turn. Prefect's database stays: it is the runs' history."""
    state, running = _read_state(), [role for role in ROLES if _marked(role)]
    for role in ROLES:
        _end(role, state)
    STATE.unlink(missing_ok=True)
    shutil.rmtree(HOME / "datastores", ignore_errors=True)
    say(f"ended {', '.join(running)}" if running else "nothing was up")


# ── what there is, and what Prefect must know ────────────────────────────────────────────────────────


def _start_server(state: dict[str, Any]) -> None:
    _end("server", state)
    state["port"] = _free_port(state.get("port"))
    say("starting the Prefect server" + ("" if (HOME / "prefect").exists() else "; the first time takes longer"))
    words = f"--no-prompt server start --host 127.0.0.1 --port {state['port']}"
    _spawn("server", [sys.executable, "-m", "prefect", *words.split()], state)
    _await(lambda: _healthy(state), "server")


def _start_lab(state: dict[str, Any]) -> None:
    """Start a lab and save how to log in there as a block: its password is in no file but Prefect's, encrypted."""
    from blocks import VCenter, VddkToolkit

    _end("lab", state)
    say("starting a lab vCenter")
    flags = ["-disks", "2", "-disk-size", "256MiB", "-folder", "production", "-vm", VM]
    argv = [str(ROOT / "build" / "lab"), *flags, "-state", str(HOME / "datastores")]
    process = _spawn("lab", argv, state, stdout=subprocess.PIPE)
    stdout = process.stdout
    assert stdout
    _await(lambda: bool(select.select([stdout], [], [], 0)[0]), "lab")
    ready = json.loads(stdout.readline() or "{}")
    if not ready:
        raise Trouble(f"lab ended before it was ready\n{_tail('lab')}")
    vcenter = VCenter(
        **{field: ready[field] for field in ("host", "port", "username", "password")}, ca_bundle=ready["ca_pem"]
    )
    vcenter.save(BLOCK, overwrite=True)
    VddkToolkit(libdir=str(ROOT / "build" / "vixdisklib")).save(BLOCK, overwrite=True)  # a stand-in for VMware's
    state["lab"] = {field: ready[field] for field in ("url", "admin_url", "username", "vms")}
    _remember(state)


def _deploy() -> None:
    """Do what `make deploy` does, its words in a log."""
    say("registering blocks, deploying")
    with _log("deploy").open("w") as log:
        argv = [sys.executable, "-m", "deployments.deploy"]
        if subprocess.run(argv, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT).returncode:
            raise Trouble(f"{' '.join(argv)} failed\n{_tail('deploy')}")


def _start_workers(roles: list[str], state: dict[str, Any]) -> None:
    """Start a worker of each queue. What waits for other runs has one of its own, or it could take all their slots."""
    started = time.time()
    for role in roles:
        _end(role, state)
        say(f"starting a worker for the queue {WORKERS[role]}")
        words = f"--pool {POOL} --work-queue {WORKERS[role]} --type process --name {role} --limit {WORKER_LIMIT}"
        _spawn(role, [sys.executable, "-m", "prefect", "--no-prompt", "worker", "start", *words.split()], state)
    for role in roles:
        _await(partial(_polls_since, started, role, state), role)


def _polls_since(started: float, role: str, state: dict[str, Any]) -> bool:
    from datetime import datetime

    answer = httpx.post(f"{_address(state)}/api/work_pools/{POOL}/workers/filter", json={}, trust_env=False)
    beats = [
        worker["last_heartbeat_time"]
        for worker in answer.json()
        if worker["name"] == role and worker["last_heartbeat_time"]
    ]
    return any(datetime.fromisoformat(beat).timestamp() > started for beat in beats)


# ── processes ────────────────────────────────────────────────────────────────────────────────────────


def _spawn(role: str, argv: list[str], state: dict[str, Any], *, stdout: int | None = None) -> subprocess.Popen[str]:
    """Start a process that outlives us, marked as of `role`, its words in its log."""
    with _log(role).open("a") as log:
        process = subprocess.Popen(
            argv,
            cwd=ROOT,
            env=_environment(state) | {MARK: _mark(role)},
            stdin=subprocess.DEVNULL,
            stdout=stdout or log,
            stderr=log,
            text=True,
            start_new_session=True,
        )
    state.setdefault("pids", {})[role] = process.pid
    _remember(state)
    return process


def _environment(state: dict[str, Any]) -> dict[str, str]:
    """Ours, without what an operator set for other servers and vCenters."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "VCENTER_"))}
    return kept | {
        "PREFECT_HOME": str(HOME / "prefect"),
        "PREFECT_API_URL": f"{_address(state)}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
    }


def _mark(role: str) -> str:
    return f"{HOME}:{role}"


def _marked(role: str) -> list[int]:
    """Return the live processes that carry the mark of `role`: those that `up` started, and their descendants."""
    line, found = f"{MARK}={_mark(role)}".encode(), []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if line in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


def _runs(role: str, state: dict[str, Any]) -> bool:
    return state.get("pids", {}).get(role) in _marked(role)


def _end(role: str, state: dict[str, Any]) -> None:
    """End the processes of a role, first those that it started: a run that is asked to end removes its snapshot, and a
    worker that is asked kills its runs."""
    first = {state.get("pids", {}).get(role)}
    for number, spared in ((signal.SIGTERM, first), (signal.SIGTERM, set()), (signal.SIGKILL, set())):
        for pid in set(_marked(role)) - spared:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        deadline = time.monotonic() + END_TIMEOUT_S
        while set(_marked(role)) - spared and time.monotonic() < deadline:
            time.sleep(0.1)
    if left := _marked(role):
        raise Trouble(f"{role}: processes {left} do not end")


def _await(ready: Callable[[], bool], role: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not ready():
        if not _marked(role):
            raise Trouble(f"{role} ended before it was ready\n{_tail(role)}")
        if time.monotonic() > deadline:
            raise Trouble(f"{role} is not ready after {START_TIMEOUT_S:.0f} s\n{_tail(role)}")
        time.sleep(0.2)


# ── small things ─────────────────────────────────────────────────────────────────────────────────────


def _healthy(state: dict[str, Any]) -> bool:
    try:
        return httpx.get(f"{_address(state)}/api/health", timeout=5, trust_env=False).is_success
    except httpx.HTTPError:
        return False


def _address(state: dict[str, Any]) -> str:
    return f"http://127.0.0.1:{state['port']}"


def _free_port(before: int | None) -> int:
    """Return HYPER2KVM_PORT, else the port it had `before`, else the first free one from Prefect's own on."""
    wanted = os.environ.get("HYPER2KVM_PORT", "")
    if wanted and not wanted.isdecimal():
        raise Trouble(f"HYPER2KVM_PORT is {wanted!r}: give a port, or 0 for any free one")
    usual = dict.fromkeys([before or DEFAULT_PORT, *range(DEFAULT_PORT, DEFAULT_PORT + 100)])
    for port in [int(wanted)] if wanted else usual:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return int(probe.getsockname()[1])
        say(f"port {port} is taken")
    raise Trouble("set HYPER2KVM_PORT to a free port, or 0 for any")


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Hold the state folder: one `up` or `down` at a time."""
    HOME.mkdir(parents=True, exist_ok=True)
    with (HOME / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Trouble(f"another `make up` or `make down` is at work in {HOME}") from None
        yield


def _read_state() -> dict[str, Any]:
    return dict(json.loads(STATE.read_text())) if STATE.exists() else {}


def _remember(state: dict[str, Any]) -> None:
    fresh = STATE.with_suffix(".new")
    fresh.write_text(json.dumps(state, indent=2))
    fresh.replace(STATE)


def _log(role: str) -> Path:
    return HOME / f"{role}.log"


def _tail(role: str) -> str:
    return "\n".join([f"last lines of {_log(role)}:", *_log(role).read_text(errors="replace").splitlines()[-15:]])


def say(text: str) -> None:
    print(f"up: {text}" if sys.argv[1:] == ["up"] else f"down: {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
