"""Running a program: what it says, how far it is, and why it failed. Nothing it prints can stall it."""

from __future__ import annotations

import os
import re
import selectors
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import IO

from tasks.errors import ToolFailed

LAST_LINES = 50
CHUNK_BYTES = 64 * 1024
LINE_BYTES = 4096  # a line without end is cut here, so that memory stays bounded
POLL_S = 0.2
GRACE_S = 5.0  # between SIGTERM and SIGKILL
MISSING = 127  # a shell's exit status where there is no such program


class Stopped(Exception):
    """The caller asked for the end; nothing failed."""


def dying_with_us(argv: Sequence[str], *, by: str = "KILL") -> list[str]:
    """Return `argv` such that the child gets a signal, from the kernel, when the thread that started it ends.

    Rests on util-linux' `setpriv`. The shell between them goes on only if we are still its parent: if we died before
    that was set, nobody would kill it.
    """
    still_ours = 'test "$PPID" = "$0" && exec "$@"'
    return ["setpriv", "--pdeathsig", by, "sh", "-c", still_ours, str(os.getpid()), *argv]


@contextmanager
def child(
    argv: Sequence[str],
    *,
    stdin: int = subprocess.DEVNULL,
    stdout: int = subprocess.PIPE,
    env: Mapping[str, str] | None = None,
    pass_fds: Sequence[int] = (),
    by: str = "KILL",
) -> Iterator[subprocess.Popen[bytes]]:
    """Run `argv` in its own process group, stderr piped; at the end of the block the whole group is gone.

    stdout: piped where nothing else is said. env: its environment; None: ours. pass_fds: files that it inherits.
    It dies with the *thread* that enters the block, by the signal `by`, so enter it in one that lives as long.
    Raises ToolFailed (status 127) where there is no such program.
    """
    try:
        process = subprocess.Popen(
            dying_with_us(argv, by=by),
            stdin=stdin,
            stdout=stdout,
            stderr=subprocess.PIPE,
            start_new_session=True,
            env=env,
            pass_fds=pass_fds,
        )
    except FileNotFoundError as error:
        raise ToolFailed(
            argv=tuple(argv), status=MISSING, last_lines=(str(error),), remedy="Install util-linux (make setup does)"
        ) from error
    try:
        yield process
    finally:
        end_group(process)


def end_group(process: subprocess.Popen[bytes], *, close: bool = True) -> None:
    """End a process group, leftovers of a child that has ended included: SIGTERM, and SIGKILL after a grace.

    Returns once the child is reaped; its pipes are closed unless `close` is false.
    """
    if process.returncode is None:  # not reaped, so the number of the group is still ours
        _signal_group(process, signal.SIGTERM)
        wait_for_end(process, GRACE_S)
        _signal_group(process, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe and close:
            with suppress(BrokenPipeError):
                pipe.close()


def wait_for_end(process: subprocess.Popen[bytes], timeout_s: float) -> bool:
    """Wait until a child has ended, without reaping it; tell whether it has."""
    ended = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
    deadline = time.monotonic() + timeout_s
    while ended is None and time.monotonic() < deadline:
        time.sleep(0.01)
        ended = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
    return ended is not None


def outcome_of(process: subprocess.Popen[bytes]) -> str:
    """Wait for the end of a child, which somebody else reaps, and say how it ended."""
    try:
        ended = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    except ChildProcessError:
        return "an end that we brought about"
    assert ended
    return f"exit status {ended.si_status}" if ended.si_code == os.CLD_EXITED else f"signal {ended.si_status}"


def environment_without_secrets() -> dict[str, str]:
    """Return our environment for a program that is not ours: without what logs in at vCenters and Prefect."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "VCENTER_"))}


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def run(
    argv: Sequence[str],
    *,
    progress: Callable[[float], None] | None = None,
    stop: threading.Event | None = None,
    timeout_s: float | None = None,
    package: str = "",
    keep_lines: int = LAST_LINES,
) -> str:
    """Run `argv` to its end and return its stdout, the last `keep_lines` of it.

    progress: called with 0..100 for each line `(12.34/100%)` that it prints, which is how qemu-img -p reports.
    stop: when set, the program is ended and Stopped is raised. package: where the program comes from, for the remedy
    where it is missing. Raises ToolFailed (TimeoutError past `timeout_s`).
    """
    deadline = time.monotonic() + timeout_s if timeout_s else None
    out, err = _Lines(progress, keep_lines), _Lines(progress)
    with child(argv) as process:
        for _ in _pump(process, out, err):
            if stop and stop.is_set():
                raise Stopped
            if deadline and time.monotonic() > deadline:
                raise TimeoutError(f"{argv[0]} did not end within {timeout_s} s")
    if process.returncode:
        lines = (*out.lines(), *err.lines())[-LAST_LINES:]
        remedy = f"Install {package or argv[0]} (make setup does)" if process.returncode == MISSING else ""
        raise ToolFailed(argv=tuple(argv), status=process.returncode, last_lines=lines, remedy=remedy)
    return "\n".join(out.lines())


def _pump(process: subprocess.Popen[bytes], out: _Lines, err: _Lines) -> Iterator[None]:
    """Feed what `process` says to `out` and `err` until it has ended; yield after every step, which never waits long.

    A grandchild that keeps the pipes open does not keep us.
    """
    assert process.stdout and process.stderr
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ, out)
        selector.register(process.stderr, selectors.EVENT_READ, err)
        ended = False
        while not ended or selector.get_map():
            ready = selector.select(POLL_S) if selector.get_map() else []
            for key, _ in ready:
                pipe: IO[bytes] = key.fileobj  # type: ignore[assignment]
                if not key.data.feed(os.read(pipe.fileno(), CHUNK_BYTES)):
                    selector.unregister(pipe)
            if ended and not ready:
                break
            ended = wait_for_end(process, 0 if selector.get_map() else POLL_S)
            yield
    out.feed(b"")
    err.feed(b"")


class LastWords:
    """What a child says last on its stderr, heard by a thread of its own until that is closed."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stderr
        self._lines, self._lock = _Lines(None), threading.Lock()
        fd = os.dup(process.stderr.fileno())  # whoever ends the child closes the pipe, at any time
        self._thread = threading.Thread(target=self._hear, args=[fd], name="last-words", daemon=True)
        self._thread.start()

    def lines(self, timeout_s: float = 0.0) -> tuple[str, ...]:
        """Return the last lines; wait so long for the end of them."""
        self._thread.join(timeout_s)
        with self._lock:
            return self._lines.lines()

    def _hear(self, fd: int) -> None:
        heard = True
        while heard:
            chunk = os.read(fd, CHUNK_BYTES)
            with self._lock:
                heard = self._lines.feed(chunk)
        os.close(fd)


class _Lines:
    """The last lines of a stream of bytes; `\\r` ends a line as `\\n` does, a line without end is cut."""

    _PERCENT = re.compile(rb"\((\d{1,3}(?:\.\d+)?)/100%\)")

    def __init__(self, progress: Callable[[float], None] | None, keep: int = LAST_LINES) -> None:
        self._progress = progress or (lambda _: None)
        self._kept: deque[bytes] = deque(maxlen=keep)
        self._rest = b""

    def feed(self, chunk: bytes) -> bool:
        """Take a chunk; return False at the end of the stream."""
        *whole, self._rest = re.split(rb"[\r\n]", self._rest + chunk)
        self._rest = self._rest[-LINE_BYTES:]
        if not chunk:
            whole, self._rest = [*whole, self._rest], b""
        for line in whole:
            self._take(line.strip())
        return bool(chunk)

    def _take(self, line: bytes) -> None:
        match = self._PERCENT.fullmatch(line)
        if match:
            self._progress(float(match[1]))
        elif line:
            self._kept.append(line[-LINE_BYTES:])

    def lines(self) -> tuple[str, ...]:
        return tuple(line.decode(errors="replace") for line in self._kept)
