"""Work in a child that is killed (SIGKILL) at a chosen system call, or when the parent sees fit."""

from __future__ import annotations

import mmap
import os
import signal
import struct
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

CALLS = ("pwrite", "fdatasync", "fsync", "unlink", "replace", "truncate", "ftruncate")


class Counter:
    """A number that survives the child that adds to it."""

    def __init__(self) -> None:
        self._shared = mmap.mmap(-1, 8)

    @property
    def value(self) -> int:
        return int(struct.unpack("<q", self._shared[:])[0])

    def add(self, count: int) -> None:
        self._shared[:] = struct.pack("<q", self.value + count)


def killed(action: Callable[[], object], *, before: int = 0, calls: tuple[str, ...] = CALLS) -> bool:
    """Run `action` in a child that dies before its call number `before` of `calls`; tell whether it came to that.

    The rest of what a step does (renameat2 through ctypes) lies between two of these.
    """
    return _code_of(_child(action, before, calls)) == -signal.SIGKILL


def killed_when(true: Callable[[], bool], action: Callable[[], object]) -> bool:
    """Run `action` in a child that is killed from here once `true()`; tell whether it lived so long."""
    pid = _child(action, 0, ())
    deadline = time.monotonic() + 30
    while not true() and not _ended(pid):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    return _code_of(pid) == -signal.SIGKILL


def every_death(
    action: Callable[[], object], *, prepare: Callable[[], object] = int, calls: tuple[str, ...] = CALLS
) -> Iterator[int]:
    """Have `action` die before each of its calls in turn, each time after `prepare`; yield their number.

    At the end of the iteration `action` has come to its own.
    """
    number = 1
    prepare()
    while killed(action, before=number, calls=calls):
        yield number
        number += 1
        prepare()


def _child(action: Callable[[], object], before: int, calls: tuple[str, ...]) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        left = [before]
        for name in calls:
            setattr(os, name, _deadly(getattr(os, name), left))
        action()
    except BaseException:  # noqa: BLE001 - the edge of a process
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _deadly(call: Callable[..., Any], left: list[int]) -> Callable[..., Any]:
    def counted(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **kwargs)

    return counted


def _ended(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None


def _code_of(pid: int) -> int:
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, -signal.SIGKILL), "the child failed in another way: see above"
    return code
