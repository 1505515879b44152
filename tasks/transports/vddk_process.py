"""The worker's process as its parent sees it: started, asked, told to leave; its answers are futures.

glibc reads LD_LIBRARY_PATH when a program starts, and only then; the library needs it to find the libcrypto and
libstdc++ that it comes with, which clash with Python's. So it is set for the worker, and never for us.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from tasks.errors import VddkCrashed
from tasks.models import SECTOR_BYTES, Extent
from tasks.nbd import whole_replies
from tasks.process import LAST_LINES, child, end_group, outcome_of

LEAVE_TIMEOUT_S = 8.0  # twice that, and a Prefect worker would still not kill the run
POLL_S = 0.2
ANSWER_BYTES = 4096  # of one read; an error comes with its text
LEFT_WELL = "exit status 0"
ROOT = Path(__file__).resolve().parents[2]
NOT_THE_WORKERS = ("PYTHON", "PREFECT_", "VCENTER_")  # of our environment: secrets, and what would change its Python

_log = logging.getLogger(__name__)


class Refused(Exception):
    """The worker says that a call failed."""

    def __init__(self, error: dict[str, Any], generation: int) -> None:
        super().__init__(error)
        self.call, self.code, self.text = error["call"], error["code"], error["text"]
        self.generation = generation


class Lane:
    """One thread's way back from the worker: the socket on which it says which read ended, and slots of the ring.

    free: those that nothing is read into; who asks takes one out, and puts back what has ended.
    """

    def __init__(self, slots: Iterable[int]) -> None:
        self.slots = tuple(slots)
        self.free = list(self.slots)
        self.answers, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.answers.settimeout(POLL_S)
        whole_replies(self.answers)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.answers.close()
        self.theirs.close()

    def wake(self) -> None:
        """Have who waits find no answer."""
        with contextlib.suppress(OSError):  # the worker has ended
            self.answers.shutdown(socket.SHUT_RD)


class Worker:
    """Commands to the worker, and its answers as futures, which raise Refused, or VddkCrashed where it ended."""

    def __init__(self, process: subprocess.Popen[bytes], lanes: Sequence[Lane], *, source: str) -> None:
        self._process, self._source = process, source
        self.lanes = lanes
        self._waiting: dict[int, Future[Any]] = {}
        self._runs: list[tuple[int, int]] = []
        self._number = -1  # of the last command
        self._lock = threading.Lock()
        self._gave_up: BaseException | None = None
        self.left_well = False  # known when it has ended
        self._said: deque[str] = deque(maxlen=LAST_LINES)
        self._threads = [threading.Thread(target=each, daemon=True) for each in (self._hear, self._listen)]
        for thread in self._threads:
            thread.start()

    def open(self, wishes: dict[str, Any]) -> Future[dict[str, Any]]:
        """Say what to open; the answer says what it is."""
        return self._ask(wishes)

    def read(self, request: Extent, slot: int) -> None:
        """Have the bytes of `request` put into a slot of the ring."""
        start, count = request.start // SECTOR_BYTES, -(-request.length // SECTOR_BYTES)
        self._write(b"%d %d %d\n" % (slot, start, count))

    def ended(self, lane: Lane) -> tuple[int, Refused | None]:
        """Return the slot of a read that ended, and what was wrong. Raises TimeoutError, after `POLL_S`."""
        try:
            answer = lane.answers.recv(ANSWER_BYTES)
        except BlockingIOError:
            raise TimeoutError from None
        if not answer:
            raise self._why()
        if len(answer) == 1:
            return answer[0], None
        told = json.loads(answer)
        return told["slot"], Refused(told["error"], told["generation"])

    def allocated(self, size: int, *, chunk_bytes: int) -> Future[list[tuple[int, int]]]:
        """Ask for the runs of allocated sectors; what is left of a chunk at the end of the disk counts as one."""
        self._runs = []
        return self._ask({"op": "allocated", "chunk": chunk_bytes // SECTOR_BYTES, "sectors": size // SECTOR_BYTES})

    def reopen(self, generation: int) -> Future[int]:
        """Have the disk opened anew, unless its generation is a later one already; the answer is the one it has."""
        return self._ask({"op": "reopen", "generation": generation})

    def give_up(self, error: BaseException) -> None:
        """Have all that wait, and will, raise `error`."""
        with self._lock:
            self._gave_up = self._gave_up or error
            waiting, self._waiting = self._waiting, {}
        for future in waiting.values():
            future.set_exception(error)
        for lane in self.lanes:
            lane.wake()

    def leave(self) -> None:
        """Have the worker close the disk and end; by force, if it does not."""
        self._write(_line({"op": "close", "id": -1}))
        self._threads[-1].join(LEAVE_TIMEOUT_S)
        end_group(self._process, close=False)
        for thread in self._threads:
            thread.join()

    def last_lines(self) -> tuple[str, ...]:
        """Return what the library said last."""
        return tuple(self._said)

    def _why(self) -> BaseException:
        """Return why there are no more answers."""
        if not self._gave_up:
            self._threads[-1].join(LEAVE_TIMEOUT_S)
        assert self._gave_up
        return self._gave_up

    def _ask(self, command: dict[str, Any]) -> Future[Any]:
        future: Future[Any] = Future()
        with self._lock:
            if self._gave_up:
                future.set_exception(self._gave_up)
                return future
            self._number += 1
            self._waiting[self._number] = future
            self._write(_line({"id": self._number, **command}))
        return future

    def _write(self, line: bytes) -> None:
        """Write a command, whole; several threads may."""
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):  # it has ended; who listens to it tells
            self._process.stdin.write(line)
            self._process.stdin.flush()

    def _listen(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            self._take(json.loads(line))
        outcome = outcome_of(self._process)
        self.left_well = outcome == LEFT_WELL
        self._threads[0].join(LEAVE_TIMEOUT_S)  # for its last words
        self.give_up(VddkCrashed(source=self._source, outcome=outcome, last_lines=self.last_lines()))

    def _take(self, answer: dict[str, Any]) -> None:
        if "blocks" in answer:
            self._runs += answer["blocks"]
            return
        with self._lock:
            future = self._waiting.pop(answer["id"], None)
        if future is None:
            return  # nobody waits any more
        if "error" in answer:
            future.set_exception(Refused(answer["error"], answer.get("generation", 0)))
        elif "rest" in answer:
            future.set_result([*self._runs, answer["rest"]])
        else:
            future.set_result(answer if "sectors" in answer else answer.get("generation"))

    def _hear(self) -> None:
        assert self._process.stderr
        for line in self._process.stderr:
            text = line.decode(errors="replace").strip()
            self._said.append(text)
            _log.debug("vddk: %s", text)


def _line(command: dict[str, Any]) -> bytes:
    return json.dumps(command).encode() + b"\n"


@contextmanager
def worker_of(library_folder: Path, *, ring_fd: int, lanes: Sequence[Lane], source: str) -> Iterator[Worker]:
    """Have a worker for the block, which inherits the shared memory; it dies with the thread that enters.

    source: what it is to read, for messages.
    """
    argv = [sys.executable, "-S", "-P", "-m", f"{__package__}.vddk_worker"]
    inherited = [ring_fd, *(lane.theirs.fileno() for lane in lanes)]
    with child(argv, stdin=subprocess.PIPE, env=environment_for(library_folder), pass_fds=inherited) as process:
        for lane in lanes:
            lane.theirs.close()
        worker = Worker(process, lanes, source=source)
        try:
            yield worker
        finally:
            worker.leave()


def environment_for(folder: Path) -> dict[str, str]:
    """Return the worker's environment."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(NOT_THE_WORKERS)}
    paths = [str(folder), *filter(None, [ours.get("LD_LIBRARY_PATH")])]
    return ours | {"LD_LIBRARY_PATH": ":".join(paths), "PYTHONPATH": str(ROOT)}
