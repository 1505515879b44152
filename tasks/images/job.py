"""Which job a run belongs to, and that only one run is at work on it."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from blake3 import blake3

from tasks.errors import JobLocked
from tasks.images.files import BLOCK_BYTES, naming_full_disk

OURS = ".hyper2kvm"  # begins the name of whatever a run leaves beside what it makes
LOCK = f"{OURS}.lock"
NAMELESS = "it has not written its name yet, or only reads (verify)"
MACHINE_ID = Path("/etc/machine-id")  # systemd: machine-id(5)
HEARTBEAT_S = 30.0
LOOK_S = 0.2  # much longer than anybody's look takes
POLL_S = 0.02

_log = logging.getLogger(__name__)


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
def job_lock(folder: Path, holder: Mapping[str, str], *, heartbeat_s: float = HEARTBEAT_S) -> Iterator[Path]:
    """Hold the job of `folder` (made if missing) for the block; yield the lock file, which names the holder.

    The kernel holds the lock (flock), so it ends with the process. The file is touched every `heartbeat_s`, for people
    and for file systems whose locks outlive a host; it is emptied at the end, so that a name in a file which
    nobody holds is that of a dead one.
    holder: flow run and whatever else tells an operator who it is. Raises JobLocked, naming the holder; DiskFull.
    """
    path = folder / LOCK
    with naming_full_disk(path, need=BLOCK_BYTES):
        folder.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        _take(fd, path)
        with naming_full_disk(path, need=BLOCK_BYTES):
            _name_holder(fd, holder)
        try:
            with _beating(fd, heartbeat_s):
                yield path
        finally:
            os.ftruncate(fd, 0)
    finally:
        os.close(fd)


def lock_holder(folder: Path) -> dict[str, str] | None:
    """Return who holds the job of `folder` now, None where nobody does; empty where it has not written its name yet."""
    who, held = holder_and_whether_held(folder)
    return who if held else None


def last_holder(folder: Path) -> dict[str, str] | None:
    """Return who held the job of `folder` and died of it; None where somebody holds it now, or ended it properly."""
    who, held = holder_and_whether_held(folder)
    return None if held else who or None


def holder_and_whether_held(folder: Path) -> tuple[dict[str, str], bool]:
    """Return the name in the lock file, and whether it is held, found out by taking it for a moment."""
    try:
        fd = os.open(folder / LOCK, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return {}, False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return _holder_in(fd), False
    except BlockingIOError:
        return _holder_in(fd), True
    finally:
        os.close(fd)


@contextmanager
def nobody_at_work(folder: Path) -> Iterator[None]:
    """Keep runs off the job of `folder` for the block, and write nothing there; others may read at the same time.

    Where no job was ever held, as in a copy of such a folder, nothing is kept off. Raises JobLocked, naming the holder.
    """
    try:
        fd = os.open(folder / LOCK, os.O_RDONLY | os.O_NOFOLLOW)
    except (FileNotFoundError, NotADirectoryError):
        yield
        return
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise _locked(fd, folder) from error
        yield
    finally:
        os.close(fd)


def _locked(fd: int, folder: Path) -> JobLocked:
    who = ", ".join(f"{key} {value}" for key, value in _holder_in(fd).items())
    return JobLocked(path=str(folder), holder=who or NAMELESS)


def _take(fd: int, path: Path) -> None:
    """Take the lock, with a little patience: somebody may be looking who holds it."""
    deadline = time.monotonic() + LOOK_S
    while True:
        try:
            return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                raise _locked(fd, path.parent) from error
        time.sleep(POLL_S)


def _name_holder(fd: int, holder: Mapping[str, str]) -> None:
    since = datetime.now(UTC).isoformat(timespec="seconds")
    who = {**holder, "pid": str(os.getpid()), "host": socket.gethostname(), "since": since}
    os.ftruncate(fd, 0)
    os.pwrite(fd, json.dumps(who).encode(), 0)


def _holder_in(fd: int) -> dict[str, str]:
    try:
        who = json.loads(os.pread(fd, 4096, 0))
        return {str(key): str(value) for key, value in who.items()}
    except (ValueError, AttributeError):
        return {}


@contextmanager
def _beating(fd: int, every_s: float) -> Iterator[None]:
    """Touch the file of `fd` every so often, in a thread, for the block."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(every_s):
            try:
                os.utime(fd)
            except OSError as error:  # a full or lost file system: the copy itself will say so
                _log.warning("heartbeat missed error=%s", error)

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
