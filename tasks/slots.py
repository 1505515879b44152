"""So many at once of something, on this machine, whichever processes they are in: one that dies leaves its slot free.

Nobody is told whose turn it is: who waits looks again every little while.
"""

from __future__ import annotations

import fcntl
import logging
import os
import random
import re
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tasks.process import Stopped

FEWER_S = 600.0  # for how long a source that was overloaded is spared
LOOK_AGAIN_S = 0.5  # at random from half of it to one and a half
SAY_S = 60.0

_log = logging.getLogger(__name__)


@contextmanager
def one_of(most: int, what: str, *, stop: threading.Event | None = None, folder: Path | None = None) -> Iterator[None]:
    """Hold one of `most` slots of that name for the block; wait for one as long as it takes. Raises Stopped.

    There are fewer where `halve` says so. folder: where the locks are (flock(2)); None: one of this user's own.
    """
    stop, said_at = stop or threading.Event(), time.monotonic()
    stem = _stem(what, folder)
    with ExitStack() as held:
        while not any(_taken(Path(f"{stem}-{number}.slot"), held) for number in range(_limit(stem, most))):
            if stop.wait(LOOK_AGAIN_S * (0.5 + random.random())):
                raise Stopped
            if time.monotonic() - said_at > SAY_S:
                _log.info("waiting for one of %d slots what=%s", most, what)
                said_at = time.monotonic()
        yield


def halve(most: int, what: str, *, folder: Path | None = None) -> int:
    """Have half as many slots of that name as there are now, `most` at first, for ten minutes; return how many.

    Who holds one keeps it. For a source that says that it bears no more.
    """
    stem = _stem(what, folder)
    fewer = max(1, _limit(stem, most) // 2)
    fresh = Path(f"{stem}.{os.getpid()}.new")
    fresh.write_text(f"{fewer} {time.time() + FEWER_S}")
    fresh.replace(f"{stem}.limit")
    return fewer


def _limit(stem: str, most: int) -> int:
    """Return how many slots there are now. Two that write at once leave the word of one: it is advice, not a lock."""
    try:
        fewer, until = Path(f"{stem}.limit").read_text().split()
    except FileNotFoundError:
        return most
    return min(most, int(fewer)) if time.time() < float(until) else most


def _stem(what: str, folder: Path | None) -> str:
    where = folder or Path(tempfile.gettempdir()) / f"hyper2kvm-{os.getuid()}"
    where.mkdir(mode=0o700, exist_ok=True)
    return str(where / re.sub(r"[^\w.-]", "_", what))


def _taken(path: Path, held: ExitStack) -> bool:
    """Take a slot that is free, for as long as `held` is open."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return False
    held.callback(os.close, fd)
    return True
