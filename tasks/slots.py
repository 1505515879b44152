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

LOOK_AGAIN_S = 0.5  # at random from half of it to one and a half
SAY_S = 60.0

_log = logging.getLogger(__name__)


@contextmanager
def one_of(most: int, what: str, *, stop: threading.Event | None = None, folder: Path | None = None) -> Iterator[None]:
    """Hold one of `most` slots of that name for the block; wait for one as long as it takes. Raises Stopped.

    folder: where the locks are (flock(2)); None: one of this user's own.
    """
    stop, said_at = stop or threading.Event(), time.monotonic()
    where = folder or Path(tempfile.gettempdir()) / f"hyper2kvm-{os.getuid()}"
    where.mkdir(mode=0o700, exist_ok=True)
    stem = re.sub(r"[^\w.-]", "_", what)
    with ExitStack() as held:
        while not any(_taken(where / f"{stem}-{number}.slot", held) for number in range(most)):
            if stop.wait(LOOK_AGAIN_S * (0.5 + random.random())):
                raise Stopped
            if time.monotonic() - said_at > SAY_S:
                _log.info("waiting for one of %d slots what=%s", most, what)
                said_at = time.monotonic()
        yield


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
