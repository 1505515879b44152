"""Reading a disk through VMware's VDDK, which runs in a process of its own (`tasks.transports.vddk_worker`).

glibc reads LD_LIBRARY_PATH when a program starts, and only then; the library needs it to find the libcrypto and
libstdc++ that it comes with, which clash with Python's. So it is set for the worker, and never for us. Bytes come
through shared memory; a crash of the library is an error here.
"""

from __future__ import annotations

import contextlib
import json
import logging
import mmap
import os
import queue
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn, Self

from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from tasks import tls
from tasks.errors import (
    FileLocked,
    TransferInterrupted,
    VddkCrashed,
    VddkFailed,
    VddkOutOfMemory,
    VddkReadsZeros,
    VddkUnavailable,
)
from tasks.models import SECTOR_BYTES, Connection, Extent, Value, VddkSettings
from tasks.process import LAST_LINES, child, end_group
from tasks.reader import TransientFault
from tasks.transports import vixdisklib_abi as abi

LEAF_BYTES = 256 * 1024  # requests and chunks are of whole ones: what the copy loop works in
REQUEST_BYTES = 2 * 1024 * 1024  # the most that is asked for at once
DEPTH = 4
SLOTS = 2 * DEPTH  # one fills while the one before it is written
EXTENT_BYTES = 32 * 1024 * 1024
OPEN_TIMEOUT_S = 180.0  # the library's own attempts to reach a host take a minute each
READ_TIMEOUT_S = 120.0
LEAVE_TIMEOUT_S = 20.0
MEMORY_ATTEMPTS, MEMORY_WAIT_S = 5, 2.0  # of opening, where the host has no memory for one more session
SAMPLES = 32
LARGE_BUFFERS = "vixDiskLib.nfcAio.Session.BufSizeIn64KB=16\nvixDiskLib.nfcAio.Session.BufCount=4\n"
LEFT_WELL = "exit status 0"
ALLOCATED = "only what is allocated"
USUAL_FOLDERS = (Path("/usr/lib/vmware-vix-disklib"), Path("/opt/vmware-vix-disklib-distrib"))
ROOT = Path(__file__).resolve().parents[2]
NOT_THE_WORKERS = ("PYTHON", "PREFECT_", "VCENTER_")  # of our environment: secrets, and what would change its Python
SHA1_DIGITS = "0" * 40
UNLOCK = (
    "A running VM's disk is read from a snapshot: run without --vs-snapshot-moref, or with one that exists; and see "
    "that the account may read the VM's files"
)

_log = logging.getLogger(__name__)


class VddkLibrary(Value):
    """A library found. `folder` is what the worker's LD_LIBRARY_PATH begins with, `root` what InitEx is told."""

    file: Path
    folder: Path
    root: Path
    version: str

    @property
    def words(self) -> str:
        """Version, and the vSphere versions that it reads from."""
        return f"VDDK {self.version} (for vSphere {abi.SERVES[int(self.version.partition('.')[0])]} and newer)"


def find_library(libdir: Path | None) -> VddkLibrary:
    """Return the newest library in `libdir` or its `lib64`; None: where it usually is. Raises VddkUnavailable."""
    roots = (libdir.expanduser().absolute(),) if libdir else USUAL_FOLDERS
    folders = [folder for root in roots for folder in (root / "lib64", root)]
    for folder in folders:
        for version in abi.VERSIONS:
            if (file := folder / f"libvixDiskLib.so.{version}").is_file():
                whole = file.resolve().name.partition(".so.")[2] or str(version)
                root = folder.parent if folder.name == "lib64" else folder
                return VddkLibrary(file=file, folder=folder, root=root, version=whole)
    others = sorted({path.name for folder in folders for path in folder.glob("libvixDiskLib.so*")})
    has_only = f" (only {', '.join(others)})" if others else ""
    wanted = ", ".join(f".{version}" for version in reversed(abi.VERSIONS))
    looked_in = ", ".join(f"{folder}{'' if folder.is_dir() else ' (not there)'}" for folder in folders)
    raise VddkUnavailable(missing=f"there is no libvixDiskLib.so{wanted}{has_only}", looked_in=looked_in)


class VddkDisk(Value):
    """A disk as VDDK finds it: by VM, snapshot ("": none, the VM is off) and the path in the snapshot's config.

    identity: who prepares the VM for access; whoever comes after a kill ends that under the same name. host_name: of
    the ESXi host behind, "" where that is not known.
    """

    connection: Connection
    settings: VddkSettings
    vm_moref: str
    snapshot_moref: str
    datastore_path: str
    capacity_bytes: int
    identity: str
    host_name: str = ""


class VddkReader:
    """A disk behind VDDK. See `tasks.reader.Reader`; `allocated` says what of it is worth asking for.

    Enter it in a thread that lives as long: the worker dies with that one. Entering raises VddkUnavailable,
    VddkFailed, VddkCrashed, FileLocked, VddkReadsZeros, or what `tasks.tls` raises.
    """

    depth = DEPTH
    preferred_extent_bytes = EXTENT_BYTES
    road = "vddk"

    def __init__(self, disk: VddkDisk, *, read_timeout_s: float = READ_TIMEOUT_S) -> None:
        self.size, self.source = disk.capacity_bytes, disk.datastore_path
        self.road_reason = ""
        self._disk, self._read_timeout_s = disk, read_timeout_s
        self._own = ExitStack()
        self._free: queue.SimpleQueue[int] = queue.SimpleQueue()  # slots of the ring
        self._allocated: tuple[Extent, ...] = ()
        self._mending = threading.Lock()
        self._generation = 0  # of the open disk
        self._lost = 0  # the latest one whose connection was lost

    def __enter__(self) -> Self:
        self._library = find_library(self._disk.settings.libdir)
        with ExitStack() as stack:
            patience = Retrying(
                retry=retry_if_exception_type(VddkOutOfMemory),
                stop=stop_after_attempt(MEMORY_ATTEMPTS),
                wait=wait_random_exponential(MEMORY_WAIT_S, 30.0),
                reraise=True,
            )
            patience(self._open, stack)
            self._check_sample()
            self._own = stack.pop_all()
        _log.info("opened source=%r reason=%r", self.source, self.road_reason)
        return self

    def __exit__(self, *exc: object) -> None:
        self._own.close()

    def allocated(self) -> tuple[Extent, ...]:
        """Return the parts that may hold something; the others read as zeros."""
        return self._allocated

    def stream(self, extent: Extent) -> Generator[tuple[int, memoryview], None, None]:
        """Yield the bytes of `extent` in order, the next request under way. See `tasks.reader.Reader`."""
        self._mend()
        wanted = deque(_requests(extent))
        slots = [self._free.get(), self._free.get()]
        under_way: deque[tuple[Extent, int, Future[Any]]] = deque()
        try:
            while wanted or under_way:
                while slots and wanted:
                    request, slot = wanted.popleft(), slots.pop()
                    under_way.append((request, slot, self._worker.read(request, slot)))
                request, slot, reply = under_way[0]
                self._settle(request, reply)
                under_way.popleft()
                slots.append(slot)
                start = slot * REQUEST_BYTES
                yield request.start, self._memory[start : start + request.length]
        finally:
            for slot in slots:
                self._free.put(slot)
            for _, slot, reply in under_way:  # the library may be writing there still
                reply.add_done_callback(lambda _, slot=slot: self._free.put(slot))  # type: ignore[misc]

    def interrupt(self) -> None:
        """Wake every thread that waits for the worker, with TransientFault."""
        self._worker.give_up(TransientFault("interrupted"))

    # ── opening ──────────────────────────────────────────────────────────────────────────────────────

    def _open(self, stack: ExitStack) -> None:
        """Start a worker and have it open the disk; both stay with `stack`."""
        with ExitStack() as mine:
            fd, self._memory = mine.enter_context(_ring(SLOTS * REQUEST_BYTES))
            wishes = self._wishes(fd, mine)
            self._worker = mine.enter_context(self._at_work(wishes))
            opened = self._opened(self._worker.open(wishes))
            self._allocated, mapped = self._ask_what_is_allocated()
            self._generation = opened["generation"]
            self.road_reason = f"{self._library.words}, transport {opened['mode']}, {mapped}"
            stack.push(mine.pop_all())
        for slot in range(SLOTS):
            self._free.put(slot)

    @contextmanager
    def _started(self, ring_fd: int) -> Iterator[_Worker]:
        """Have a worker for the block."""
        argv = [sys.executable, "-S", "-P", "-m", f"{__package__}.vddk_worker"]
        environment = _environment(self._library.folder)
        with child(argv, stdin=subprocess.PIPE, env=environment, pass_fds=[ring_fd]) as process:
            worker = _Worker(process, source=self.source)
            try:
                yield worker
            finally:
                worker.leave()

    @contextmanager
    def _at_work(self, wishes: dict[str, Any]) -> Iterator[_Worker]:
        """Have a worker for the block, and another one after it to release the VM, where that did not end well."""
        with ExitStack() as after, self._started(wishes["ring_fd"]) as worker:
            after.callback(self._release, worker, wishes)
            yield worker

    def _release(self, worker: _Worker, wishes: dict[str, Any]) -> None:
        if worker.left_well:
            return
        with self._started(wishes["ring_fd"]) as another:
            another.open(wishes | {"open": False})
        _log.warning("VDDK did not end well source=%r VM released=%s", self.source, another.left_well)

    def _wishes(self, ring_fd: int, stack: ExitStack) -> dict[str, Any]:
        """Return what the worker is told. The password is in it: it goes through a pipe, and nowhere else."""
        disk, settings, connection = self._disk, self._disk.settings, self._disk.connection
        certificate = tls.believed_certificate(connection)
        return {
            "open": True,
            "library": str(self._library.file),
            "library_dir": str(self._library.root),
            "config": _config_file(stack) if settings.large_buffers else None,
            "server": connection.host,
            "port": connection.port,
            "thumbprint": tls.colons(tls.thumbprint_of(certificate, like=SHA1_DIGITS)),
            "user": connection.username,
            "password": connection.password.get_secret_value(),
            "vm": disk.vm_moref,
            "snapshot": disk.snapshot_moref,
            "path": disk.datastore_path,
            "modes": settings.transport_modes,
            "compression": settings.compression,
            "identity": disk.identity,
            "ring_fd": ring_fd,
            "slots": SLOTS,
            "slot_bytes": REQUEST_BYTES,
        }

    def _opened(self, opening: Future[dict[str, Any]]) -> dict[str, Any]:
        """Wait until the disk is open; return what the worker says of it."""
        try:
            opened = opening.result(OPEN_TIMEOUT_S)
        except Refused as refused:
            self._refuse_to_open(refused)
        except TimeoutError as error:
            raise self._failed("Open", f"no answer within {OPEN_TIMEOUT_S:.0f} s") from error
        if (size := opened["sectors"] * SECTOR_BYTES) != self.size:
            raise self._failed("GetInfo", f"it says {size} bytes, where the server says {self.size}")
        if opened["unprepared"]:
            _log.warning("VM not prepared source=%r reason=%r", self.source, opened["unprepared"])
        return opened

    def _refuse_to_open(self, refused: Refused) -> NoReturn:
        """Raise what a refusal means."""
        if refused.call in ("load", "InitEx"):
            missing = f"{self._library.words} does not start: {refused.text or f'InitEx answers {refused.code}'}"
            raise VddkUnavailable(
                missing=missing, looked_in=str(self._library.folder), last_lines=self._worker.last_lines()
            )
        failure = self._failed(refused.call, self._words(refused))
        if refused.code == abi.OUT_OF_MEMORY:
            raise VddkOutOfMemory(**failure.fields)
        if refused.code in abi.LOCKED:
            raise FileLocked(path=self.source, remedy=UNLOCK) from failure
        raise failure

    def _ask_what_is_allocated(self) -> tuple[tuple[Extent, ...], str]:
        """Return what is allocated, and in words whether that is known."""
        try:
            runs = self._worker.allocated(self.size).result(OPEN_TIMEOUT_S)
        except Refused as refused:
            why = self._words(refused)
            _log.warning("everything counts as allocated source=%r reason=%r", self.source, why)
            return (Extent(start=0, length=self.size),), f"all of it: what is allocated is not known: {why}"
        except TimeoutError as error:
            raise self._failed("QueryAllocatedBlocks", f"no answer within {OPEN_TIMEOUT_S:.0f} s") from error
        return tuple(_extents(runs, self.size)), ALLOCATED

    def _check_sample(self) -> None:
        """Raise VddkReadsZeros where nothing but zeros is read at places that are allocated."""
        if not self.road_reason.endswith(ALLOCATED):
            return
        places = _sample(self._allocated)
        for place in places:
            try:
                if any(bytes(buffer).strip(b"\0") for _, buffer in self.stream(place)):
                    return
            except TransientFault as fault:
                raise TransferInterrupted(source=self.source, resumable_at=0, why=str(fault)) from fault
        if places:
            raise VddkReadsZeros(version=self._library.version, source=self.source, count=len(places))

    # ── reading ──────────────────────────────────────────────────────────────────────────────────────

    def _settle(self, request: Extent, reply: Future[Any]) -> None:
        """Wait for a read. Raises TransientFault where the connection was lost: the next one opens the disk anew."""
        try:
            reply.result(self._read_timeout_s)
        except TimeoutError as error:
            why = f"VDDK does not answer for {self._read_timeout_s:.0f} s"
            raise TransferInterrupted(source=self.source, resumable_at=request.start, why=why) from error
        except Refused as refused:
            if refused.code not in abi.LOST:
                raise self._failed(refused.call, self._words(refused)) from refused
            self._lost = max(self._lost, refused.generation)
            wait_s = MEMORY_WAIT_S if refused.code == abi.OUT_OF_MEMORY else 0.0
            raise TransientFault(self._words(refused), wait_s=wait_s) from refused

    def _mend(self) -> None:
        """Open the disk anew where its connection was lost, once for all threads. Raises TransientFault."""
        with self._mending:
            if self._lost < self._generation:
                return
            try:
                self._generation = self._worker.reopen(self._generation).result(OPEN_TIMEOUT_S)
            except TimeoutError as error:
                why = f"VDDK does not open it again within {OPEN_TIMEOUT_S:.0f} s"
                raise TransferInterrupted(source=self.source, resumable_at=0, why=why) from error
            except Refused as refused:
                raise TransientFault(self._words(refused)) from refused
        _log.info("opened again source=%r", self.source)

    def _words(self, refused: Refused) -> str:
        return abi.in_words(refused.code, host=self._disk.connection.address, text=refused.text)

    def _failed(self, call: str, words: str) -> VddkFailed:
        return VddkFailed(call=call, source=self.source, words=words, last_lines=self._worker.last_lines())


class Refused(Exception):
    """The worker says that a call failed."""

    def __init__(self, error: dict[str, Any], generation: int) -> None:
        super().__init__(error)
        self.call, self.code, self.text = error["call"], error["code"], error["text"]
        self.generation = generation


class _Worker:
    """Commands to the worker, and its answers as futures, which raise Refused, or VddkCrashed where it ended."""

    def __init__(self, process: subprocess.Popen[bytes], *, source: str) -> None:
        self._process, self._source = process, source
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

    def read(self, request: Extent, slot: int) -> Future[Any]:
        """Have the bytes of `request` put into a slot of the ring."""
        start, count = request.start // SECTOR_BYTES, -(-request.length // SECTOR_BYTES)
        return self._ask({"op": "read", "slot": slot, "start": start, "count": count})

    def allocated(self, size: int) -> Future[list[tuple[int, int]]]:
        """Ask for the runs of allocated sectors; what is left of a chunk at the end of the disk counts as one."""
        sectors = size // SECTOR_BYTES
        return self._ask({"op": "allocated", "chunk": LEAF_BYTES // SECTOR_BYTES, "sectors": sectors})

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

    def leave(self) -> None:
        """Have the worker close the disk and end; by force, if it does not."""
        self._write({"op": "close", "id": -1})
        self._threads[-1].join(LEAVE_TIMEOUT_S)
        end_group(self._process, close=False)
        for thread in self._threads:
            thread.join()

    def last_lines(self) -> tuple[str, ...]:
        """Return what the library said last."""
        return tuple(self._said)

    def _ask(self, command: dict[str, Any]) -> Future[Any]:
        future: Future[Any] = Future()
        with self._lock:
            if self._gave_up:
                future.set_exception(self._gave_up)
                return future
            self._number += 1
            self._waiting[self._number] = future
            self._write({"id": self._number, **command})
        return future

    def _write(self, command: dict[str, Any]) -> None:
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):  # it has ended; who listens to it tells
            self._process.stdin.write(json.dumps(command).encode() + b"\n")
            self._process.stdin.flush()

    def _listen(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            self._take(json.loads(line))
        outcome = _outcome(self._process)
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
        elif "end" in answer:
            future.set_result([*self._runs, (answer["end"], LEAF_BYTES // SECTOR_BYTES)])
        else:
            future.set_result(answer if "sectors" in answer else answer.get("generation"))

    def _hear(self) -> None:
        assert self._process.stderr
        for line in self._process.stderr:
            text = line.decode(errors="replace").strip()
            self._said.append(text)
            _log.debug("vddk: %s", text)


def _outcome(process: subprocess.Popen[bytes]) -> str:
    """Wait for the end of a child, which somebody else reaps, and say how it ended."""
    try:
        ended = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    except ChildProcessError:
        return "an end that we brought about"
    assert ended
    return f"exit status {ended.si_status}" if ended.si_code == os.CLD_EXITED else f"signal {ended.si_status}"


def _environment(folder: Path) -> dict[str, str]:
    """Return the worker's environment."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(NOT_THE_WORKERS)}
    paths = [str(folder), *filter(None, [ours.get("LD_LIBRARY_PATH")])]
    return ours | {"LD_LIBRARY_PATH": ":".join(paths), "PYTHONPATH": str(ROOT)}


@contextmanager
def _ring(length: int) -> Iterator[tuple[int, memoryview]]:
    """Yield shared memory, as a file to inherit and as a buffer; it begins on a page, for writing with O_DIRECT."""
    fd = os.memfd_create("vddk-ring")
    try:
        os.ftruncate(fd, length)
        yield fd, memoryview(mmap.mmap(fd, length))
    finally:
        os.close(fd)


def _config_file(stack: ExitStack) -> str:
    folder = stack.enter_context(TemporaryDirectory(prefix="hyper2kvm-vddk-"))
    path = Path(folder) / "vddk.conf"
    path.write_text(LARGE_BUFFERS)
    return str(path)


def _requests(extent: Extent) -> Iterator[Extent]:
    """Cut an extent at multiples of what is asked for at once, so that whole leaves come whole."""
    start = extent.start
    while start < extent.end:
        end = min(extent.end, start // REQUEST_BYTES * REQUEST_BYTES + REQUEST_BYTES)
        yield Extent(start=start, length=end - start)
        start = end


def _extents(runs: Sequence[tuple[int, int]], size: int) -> Iterator[Extent]:
    """Yield runs of sectors as extents of bytes, sorted, those that touch made one, none past the end of the disk."""
    start = end = 0
    for sector, count in sorted(map(tuple, runs)):
        first, last = sector * SECTOR_BYTES, min(size, (sector + count) * SECTOR_BYTES)
        if first > end:
            if end > start:
                yield Extent(start=start, length=end - start)
            start = first
        end = max(end, last)
    if end > start:
        yield Extent(start=start, length=end - start)


def _sample(extents: Sequence[Extent]) -> list[Extent]:
    """Return leaves spread evenly over `extents`."""
    total = sum(extent.length for extent in extents)
    step = max(LEAF_BYTES, total // SAMPLES)
    places: list[Extent] = []
    passed = wanted = 0
    for extent in extents:
        while wanted < passed + extent.length:
            start = extent.start + (wanted - passed) // LEAF_BYTES * LEAF_BYTES
            places.append(Extent(start=start, length=min(LEAF_BYTES, extent.end - start)))
            wanted += step
        passed += extent.length
    return places
