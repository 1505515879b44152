"""Which job a run belongs to, and that only one run is at work on it."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from blake3 import blake3

from tasks.errors import JobLocked

LOCK = ".hyper2kvm.lock"
MACHINE_ID = Path("/etc/machine-id")  # systemd: machine-id(5)


def machine_id(source: Path = MACHINE_ID) -> str:
    """Return what tells this machine from others: its machine id, or its host name where it has none."""
    try:
        return source.read_text(encoding="ascii").strip() or socket.gethostname()
    except OSError:
        return socket.gethostname()


def job_id(*, vcenter_uuid: str, instance_uuid: str, folder: Path, machine: str | None = None) -> str:
    """Return the 32 hex digits that a job has for good: this VM, from this vCenter, to this folder of this machine."""
    parts = [vcenter_uuid.lower(), instance_uuid.lower(), machine or machine_id(), os.fspath(folder.absolute())]
    return blake3(json.dumps(parts).encode()).hexdigest(length=16)


@contextmanager
def job_lock(folder: Path, holder: Mapping[str, str]) -> Iterator[Path]:
    """Hold the job of `folder` (made if missing) for the block; yield the lock file, which names the holder.

    The kernel holds the lock (flock), so it ends with the process: what a dead holder left in the file means nothing.
    holder: flow run and whatever else tells an operator who it is. Raises JobLocked, naming the holder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        _take(fd, path)
        _name_holder(fd, holder)
        yield path
    finally:
        os.close(fd)


def _take(fd: int, path: Path) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise JobLocked(path=str(path.parent), holder=_holder_in(fd)) from error


def _name_holder(fd: int, holder: Mapping[str, str]) -> None:
    since = datetime.now(UTC).isoformat(timespec="seconds")
    who = {**holder, "pid": str(os.getpid()), "host": socket.gethostname(), "since": since}
    os.ftruncate(fd, 0)
    os.pwrite(fd, json.dumps(who).encode(), 0)


def _holder_in(fd: int) -> str:
    try:
        who = json.loads(os.pread(fd, 4096, 0))
        return ", ".join(f"{key} {value}" for key, value in who.items())
    except (ValueError, AttributeError):
        return "it has not written its name yet"
