"""Reading a flat extent at an ESXi host itself, by SSH: ranges of `/vmfs/volumes/<datastore>/<path>-flat.vmdk`.

A range is a `dd` of the host's busybox. What is allocated is not known. How the host is reached is not known here
(`ssh_client`).
"""

from __future__ import annotations

import errno
import logging
import math
import os
import re
import shlex
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from queue import SimpleQueue
from typing import Self

from tasks.errors import FileLocked, Hyper2KvmError, SshFailed, UnsupportedDisk
from tasks.models import Extent, SshSettings, Value
from tasks.nbd import whole_replies
from tasks.process import LastWords, outcome_of, wait_for_end
from tasks.reader import TransientFault, aligned_buffer
from tasks.transports.ssh_client import SshClient

DEPTH = 1  # all share one connection, and the core at either end that ciphers it: a second one costs a tenth
BUFFER_BYTES = 1024 * 1024
BUFFERS = 4  # filled ahead, while the last one is hashed and written
BLOCK_BYTES = 128 * 1024  # of dd: what stays in a core's cache on its way to the pipe
EXTENT_BYTES = 4 * 1024**3  # each costs a session and processes at the host, some 75 ms
READ_TIMEOUT_S = 30.0
PROBE_TIMEOUT_S = 60.0
ENDING_S = 5.0
VOLUMES = "/vmfs/volumes"
MISSING, UNREADABLE, LOST = 66, 74, 255  # sysexits.h EX_NOINPUT, EX_IOERR, which our command ends with; ssh's own
BUSY = os.strerror(errno.EBUSY)  # dd ends with status 1 whatever is wrong, so that only its words tell

OTHER_ROADS = "Take another road (--transport vddk, nbd or folder)"
UNLOCK = (
    "A host keeps a running VM's disks to itself: copy from a snapshot; where the base under it is locked too, power "
    "the VM off, or take another road (--transport vddk or nbd)"
)

_log = logging.getLogger(__name__)
_DATASTORE_PATH = re.compile(r"\[(?P<datastore>.+?)\] ?(?P<path>.+)\.vmdk", re.DOTALL)


class SshDisk(Value):
    """A disk whose bytes lie in one flat file, and the host that has it. datastore_path: `[ds] dir/x.vmdk`."""

    settings: SshSettings
    datastore_path: str
    capacity_bytes: int

    def path(self) -> str:
        """Return where its bytes lie at the host. Raises UnsupportedDisk for a path that is of no disk."""
        match = _DATASTORE_PATH.fullmatch(self.datastore_path)
        if not match:
            reason = "that is no datastore path of a .vmdk"
            raise UnsupportedDisk(disk=self.datastore_path, reason=reason, remedy=OTHER_ROADS)
        return f"{VOLUMES}/{match['datastore']}/{match['path']}-flat.vmdk"


class SshReader:
    """A flat extent behind SSH. See `tasks.reader.Reader`; its ranges come one after the other.

    Enter it in a thread that lives as long: the connection ends with that one. Entering reads the first sector, and
    raises HostKeyChanged, SshFailed, FileLocked, UnsupportedDisk, ToolFailed.
    """

    depth = DEPTH
    preferred_extent_bytes = EXTENT_BYTES
    road = "ssh"

    def __init__(self, disk: SshDisk, *, read_timeout_s: float = READ_TIMEOUT_S) -> None:
        self.size, self.source = disk.capacity_bytes, disk.datastore_path
        self.road_reason = f"{disk.settings.user}@{disk.settings.host}"
        self._path, self._timeout_s = shlex.quote(disk.path()), read_timeout_s
        self._client, self._own = SshClient(disk.settings), ExitStack()
        self._live: set[subprocess.Popen[bytes]] = set()
        self._lock, self._interrupted = threading.Lock(), False

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(self._client)
            self._probe()
            self._own = stack.pop_all()
        _log.info("opened source=%r by=%s", self.source, self.road_reason)
        return self

    def __exit__(self, *exc: object) -> None:
        self._own.close()

    def stream(self, extent: Extent) -> Generator[tuple[int, memoryview], None, None]:
        """Yield the bytes of `extent` in order, by one command, read ahead. See `tasks.reader.Reader`."""
        offset = extent.start
        with self._streaming(self._dd(extent)) as (process, output):
            words = LastWords(process)
            with closing(_Ahead(output, partial(self._fill, output), extent)) as ahead:
                for piece in ahead:
                    yield offset, piece
                    offset += len(piece)
            if offset < extent.end:
                raise self._ended(process, words, offset)

    def interrupt(self) -> None:
        """End every command: what waits for one fails at once, with TransientFault."""
        with self._lock:
            self._interrupted = True
            for process in self._live:
                os.killpg(process.pid, signal.SIGTERM)

    def _dd(self, extent: Extent) -> str:
        """Return the command for a range, in blocks as large as its start and length let them be."""
        length = 0 if extent.end == self.size else extent.length  # past the end there is nothing
        block = math.gcd(extent.start, length, BLOCK_BYTES)
        return f"dd if={self._path} bs={block} skip={extent.start // block} count={-(-extent.length // block)}"

    def _probe(self) -> None:
        """Ask for size and first sector; a file that cannot be read is named."""
        path = self._path
        command = f"stat -c %s {path} || exit {MISSING}; dd if={path} of=/dev/null bs=512 count=1 || exit {UNREADABLE}"
        with self._running(command) as process:
            try:
                said, complaint = process.communicate(timeout=PROBE_TIMEOUT_S)
            except subprocess.TimeoutExpired as error:
                why = f"it does not answer for {PROBE_TIMEOUT_S:.0f} s"
                raise SshFailed(host=self._client.address, why=why) from error
        lines = tuple(complaint.decode(errors="replace").splitlines())
        if process.returncode:
            raise self._refused(process.returncode, lines)
        if (size := int(said or 0)) != self.size:
            raise self._unfit(f"its file has {size} bytes, not the {self.size} expected")

    def _refused(self, status: int, lines: tuple[str, ...]) -> Hyper2KvmError:
        """Return what a command's exit status means before the first byte."""
        last = lines[-1] if lines else f"exit status {status}"
        if status == MISSING:
            return self._unfit(
                f"{self._client.address} has no such file: the datastore is not one of its own, the disk has no flat "
                f"file (as on vSAN and vVol), or it was moved ({last})"
            )
        if status == UNREADABLE:
            return self._locked(lines) or self._unfit(last)
        return SshFailed(host=self._client.address, why=last, last_lines=lines)

    def _locked(self, lines: tuple[str, ...]) -> FileLocked | None:
        if any(BUSY in line for line in lines):
            return FileLocked(path=f"{self.source} (its flat file)", remedy=UNLOCK)
        return None

    def _unfit(self, reason: str) -> UnsupportedDisk:
        return UnsupportedDisk(disk=self.source, reason=reason, remedy=OTHER_ROADS)

    def _fill(self, output: socket.socket, view: memoryview) -> int:
        """Fill `view` from a command's output; return how much came before its end. Raises TransientFault."""
        filled = 0
        while filled < len(view):
            try:
                count = output.recv_into(view[filled:], 0, socket.MSG_WAITALL)
            except BlockingIOError as error:
                raise TransientFault(f"no byte for {self._timeout_s} s") from error
            if not count:
                break
            filled += count
        return filled

    def _ended(
        self, process: subprocess.Popen[bytes], words: LastWords, offset: int
    ) -> Hyper2KvmError | TransientFault:
        """Return what it means that a command's output ended early."""
        if self._interrupted:
            return TransientFault("interrupted")
        lines = words.lines(ENDING_S)
        how = outcome_of(process) if wait_for_end(process, ENDING_S) else "no end"
        said = next((line for line in lines if line.startswith("dd:")), lines[-1] if lines else "no words")
        return self._locked(lines) or TransientFault(f"dd ended at byte {offset}, with {how}: {said}")

    @contextmanager
    def _streaming(self, command: str) -> Iterator[tuple[subprocess.Popen[bytes], socket.socket]]:
        """Run a command for the block; yield its process and its output, whose reads wait in the kernel."""
        ours, theirs = socket.socketpair()
        with closing(ours), ExitStack() as stack:
            ours.settimeout(self._timeout_s)
            whole_replies(ours)
            with closing(theirs):
                process = stack.enter_context(self._running(command, stdout=theirs.fileno()))
            yield process, ours

    @contextmanager
    def _running(self, command: str, *, stdout: int = subprocess.PIPE) -> Iterator[subprocess.Popen[bytes]]:
        with self._client.running(command, stdout=stdout) as process:
            with self._lock:
                if self._interrupted:
                    raise TransientFault("interrupted")
                self._live.add(process)
            try:
                yield process
            finally:
                with self._lock:
                    self._live.discard(process)


class _Ahead:
    """The bytes of an extent as they come from a socket, in a few buffers that a thread fills ahead.

    fill: fills a buffer from it, and returns how far: 0 at its end. What that raises is raised in its piece's place.
    """

    def __init__(self, output: socket.socket, fill: Callable[[memoryview], int], extent: Extent) -> None:
        self._output, self._fill, self._extent = output, fill, extent
        self._free: SimpleQueue[memoryview | None] = SimpleQueue()
        self._full: SimpleQueue[tuple[memoryview, int] | Exception] = SimpleQueue()
        for _ in range(BUFFERS):
            self._free.put(aligned_buffer(BUFFER_BYTES))
        self._thread = threading.Thread(target=self._run, name="ssh-ahead", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[memoryview]:
        """Yield pieces, up to the end of the extent or of what comes; each is good until the next is asked for."""
        left = self._extent.length
        while left:
            found = self._full.get()
            if isinstance(found, Exception):
                raise found
            buffer, count = found
            if not count:
                return
            yield buffer[:count]
            left -= count
            self._free.put(buffer)

    def close(self) -> None:
        """Read no more, and return once nobody does."""
        self._free.put(None)
        with suppress(OSError):  # the other end is gone
            self._output.shutdown(socket.SHUT_RDWR)
        self._thread.join()

    def _run(self) -> None:
        offset, end, count = self._extent.start, self._extent.end, 1
        try:
            while count and offset < end and (buffer := self._free.get()) is not None:
                # up to the next multiple of the buffer's length, so that whole leaves come whole
                count = self._fill(buffer[: min(BUFFER_BYTES - offset % BUFFER_BYTES, end - offset)])
                self._full.put((buffer, count))
                offset += count
        except (TransientFault, OSError) as error:
            self._full.put(error)
        finally:
            self._full.put((memoryview(b""), 0))
