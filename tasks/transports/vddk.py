"""Reading a disk through VMware's VDDK, which runs in a process of its own (`tasks.transports.vddk_worker`).

Bytes come through shared memory; a crash of the library is an error here. How to talk to that process is not known
here (`vddk_process`), nor where the library lies (`vddk_library`).
"""

from __future__ import annotations

import logging
import mmap
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn, Self, TypeVar

from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    sleep_using_event,
    stop_after_attempt,
    wait_random_exponential,
)

from tasks import tls
from tasks.errors import (
    FileLocked,
    TransferInterrupted,
    VddkFailed,
    VddkOutOfMemory,
    VddkReadsZeros,
    VddkUnavailable,
)
from tasks.models import SECTOR_BYTES, Connection, Extent, Value, VddkSettings
from tasks.process import Stopped
from tasks.reader import TransientFault, cut, joined
from tasks.transports import vixdisklib_abi as abi
from tasks.transports.vddk_library import find_library
from tasks.transports.vddk_process import Lane, Refused, Worker, worker_of

LEAF_BYTES = 256 * 1024  # requests and chunks are of whole ones: what the copy loop works in
REQUEST_BYTES = 2 * 1024 * 1024  # the most that is asked of the library at once
SLOT_BYTES = 2 * REQUEST_BYTES  # what comes at once: half the words between the processes
DEPTH = 4
AHEAD = 2  # slots of a thread under way: more than it takes, so that the library never waits for us
SLOTS = AHEAD * DEPTH
EXTENT_BYTES = 32 * 1024 * 1024  # at the end of each there is less under way; but small disks have few
BATCH = EXTENT_BYTES // LEAF_BYTES  # extents in one go, the smallest ones: none is waited for by itself
OPEN_TIMEOUT_S = 180.0  # the library's own attempts to reach a host take a minute each
READ_TIMEOUT_S = 120.0
MEMORY_ATTEMPTS, MEMORY_WAIT_S = 5, 2.0  # of opening, where the host has no memory for one more session
SAMPLES = 32
LARGE_BUFFERS = "vixDiskLib.nfcAio.Session.BufSizeIn64KB=16\nvixDiskLib.nfcAio.Session.BufCount=4\n"
ALLOCATED = "only what is allocated"
SHA1_DIGITS = "0" * 40
UNLOCK = (
    "A running VM's disk is read from a snapshot: run without --vs-snapshot-moref, or with one that exists; and see "
    "that the account may read the VM's files"
)

POLL_S = 0.2

T = TypeVar("T")

_log = logging.getLogger(__name__)


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
    """A disk behind VDDK, asked in batches. See `tasks.reader.Reader`; `allocated` says what of it is worth asking for.

    when_full: called each time that the host has no memory for one more session, before it is asked again.
    Enter it in a thread that lives as long: the worker dies with that one. Entering raises VddkUnavailable,
    VddkFailed, VddkCrashed, FileLocked, VddkReadsZeros, or what `tasks.tls` raises; Stopped, where `stop` is set.
    """

    depth = DEPTH
    preferred_extent_bytes = EXTENT_BYTES
    batch = BATCH
    road = "vddk"

    def __init__(
        self,
        disk: VddkDisk,
        *,
        stop: threading.Event | None = None,
        read_timeout_s: float = READ_TIMEOUT_S,
        when_full: Callable[[], object] = lambda: None,
    ) -> None:
        self.size, self.source = disk.capacity_bytes, disk.datastore_path
        self.road_reason = ""
        self._disk, self._read_timeout_s, self._when_full = disk, read_timeout_s, when_full
        self._stop = stop or threading.Event()
        self._own = ExitStack()
        self._lanes: queue.SimpleQueue[Lane] = queue.SimpleQueue()  # those that no thread has
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
                before_sleep=self._say_full,
                sleep=sleep_using_event(self._stop),
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
        """Yield the bytes of `extent` as they come, the next requests under way. See `tasks.reader.Reader`."""
        return self.stream_scattered([extent])

    def stream_scattered(self, extents: Sequence[Extent]) -> Generator[tuple[int, memoryview], None, None]:
        """Yield what `stream` yields of each, the requests of the next ones under way too."""
        self._mend()
        wanted = deque(request for extent in extents for request in cut(extent, SLOT_BYTES))
        first, under_way = extents[0], dict[int, Extent]()
        lane = self._lane(first)
        try:
            while wanted or under_way:
                while lane.free and wanted:
                    slot = lane.free.pop()
                    under_way[slot] = wanted.popleft()
                    self._worker.read(under_way[slot], slot)
                slot, refused = self._ended(lane, first)
                lane.free.append(slot)
                request = under_way.pop(slot, None)
                if not request:  # it was asked for by one who did not wait for it
                    continue
                if refused:
                    raise self._fault(refused) from refused
                start = slot * SLOT_BYTES
                yield request.start, self._memory[start : start + request.length]
        finally:
            self._lanes.put(lane)

    def interrupt(self) -> None:
        """Wake every thread that waits for the worker, with TransientFault."""
        self._worker.give_up(TransientFault("interrupted"))

    def end_access(self) -> bool:
        """Have the server allow again what it forbade for a run that died while it read the disk.

        Not for a reader that is entered. Returns whether VDDK said that it did. Raises VddkUnavailable, or what
        `tasks.tls` raises.
        """
        self._library = find_library(self._disk.settings.libdir)
        with ExitStack() as stack:
            fd, _ = stack.enter_context(_ring(SLOTS * SLOT_BYTES))
            return self._released(self._wishes(fd, stack))

    # ── opening ──────────────────────────────────────────────────────────────────────────────────────

    def _open(self, stack: ExitStack) -> None:
        """Start a worker and have it open the disk; both stay with `stack`."""
        with ExitStack() as mine:
            fd, self._memory = mine.enter_context(_ring(SLOTS * SLOT_BYTES))
            lanes = [mine.enter_context(Lane(range(n * AHEAD, (n + 1) * AHEAD))) for n in range(DEPTH)]
            wishes = self._wishes(fd, mine)
            wishes["answer_fds"] = [lane.theirs.fileno() for lane in lanes for _ in lane.slots]
            self._worker = mine.enter_context(self._at_work(wishes, lanes))
            opened = self._opened(self._worker.open(wishes))
            self._allocated, mapped = self._ask_what_is_allocated()
            self._generation = opened["generation"]
            self.road_reason = f"{self._library.words}, transport {opened['mode']}, {mapped}"
            stack.push(mine.pop_all())
        for lane in lanes:
            self._lanes.put(lane)

    def _say_full(self, _: RetryCallState) -> None:
        _log.warning("the host has no memory for one more session source=%r", self.source)
        self._when_full()

    def _start(self, ring_fd: int, lanes: Sequence[Lane] = ()) -> AbstractContextManager[Worker]:
        return worker_of(self._library.folder, ring_fd=ring_fd, lanes=lanes, source=self.source)

    @contextmanager
    def _at_work(self, wishes: dict[str, Any], lanes: Sequence[Lane]) -> Iterator[Worker]:
        """Have a worker for the block, and another one after it to release the VM, where that did not end well."""
        with ExitStack() as after, self._start(wishes["ring_fd"], lanes) as worker:
            after.callback(self._release, worker, wishes)
            yield worker

    def _release(self, worker: Worker, wishes: dict[str, Any]) -> None:
        if worker.left_well:
            return
        released = self._released(wishes)
        _log.warning("VDDK did not end well source=%r VM released=%s", self.source, released)

    def _released(self, wishes: dict[str, Any]) -> bool:
        with self._start(wishes["ring_fd"]) as another:
            asked = another.open(wishes | {"open": False})
        return another.left_well and not isinstance(asked.exception(), Refused)

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
            "slot_bytes": SLOT_BYTES,
            "request_bytes": REQUEST_BYTES,
        }

    def _opened(self, opening: Future[dict[str, Any]]) -> dict[str, Any]:
        """Wait until the disk is open; return what the worker says of it."""
        try:
            opened = self._result(opening, OPEN_TIMEOUT_S)
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
            runs = self._result(self._worker.allocated(self.size, chunk_bytes=LEAF_BYTES), OPEN_TIMEOUT_S)
        except Refused as refused:
            why = self._words(refused)
            _log.warning("everything counts as allocated source=%r reason=%r", self.source, why)
            return (Extent(start=0, length=self.size),), f"all of it: what is allocated is not known: {why}"
        except TimeoutError as error:
            raise self._failed("QueryAllocatedBlocks", f"no answer within {OPEN_TIMEOUT_S:.0f} s") from error
        return tuple(_extents([(first, count) for first, count in runs], self.size)), ALLOCATED

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

    def _lane(self, extent: Extent) -> Lane:
        """Take a lane that no other thread has. Raises TransferInterrupted where there is none for long."""
        try:
            return self._lanes.get(timeout=self._read_timeout_s)
        except queue.Empty:
            raise self._no_answer(extent) from None

    def _no_answer(self, extent: Extent) -> TransferInterrupted:
        why = f"VDDK does not answer for {self._read_timeout_s:.0f} s"
        return TransferInterrupted(source=self.source, resumable_at=extent.start, why=why)

    def _ended(self, lane: Lane, extent: Extent) -> tuple[int, Refused | None]:
        """Wait until a read has ended; return its slot, and what was wrong."""
        try:
            return self._waited(lambda _: self._worker.ended(lane), self._read_timeout_s)
        except TimeoutError as error:
            raise self._no_answer(extent) from error

    def _fault(self, refused: Refused) -> TransientFault | VddkFailed:
        """Return what is to be raised. Where the connection was lost, the next stream opens the disk anew."""
        if refused.code not in abi.LOST:
            return self._failed(refused.call, self._words(refused))
        self._lost = max(self._lost, refused.generation)
        wait_s = MEMORY_WAIT_S if refused.code == abi.OUT_OF_MEMORY else 0.0
        return TransientFault(self._words(refused), wait_s=wait_s)

    def _result(self, future: Future[T], timeout_s: float) -> T:
        """Wait for an answer. Raises TimeoutError, Stopped, and what the answer is."""
        return self._waited(future.result, timeout_s)

    def _waited(self, wait: Callable[[float], T], timeout_s: float) -> T:
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                return wait(min(POLL_S, max(0.0, deadline - time.monotonic())))
            except TimeoutError:
                if self._stop.is_set():
                    raise Stopped from None
                if time.monotonic() >= deadline:
                    raise

    def _mend(self) -> None:
        """Open the disk anew where its connection was lost, once for all threads. Raises TransientFault."""
        with self._mending:
            if self._lost < self._generation:
                return
            try:
                self._generation = self._result(self._worker.reopen(self._generation), OPEN_TIMEOUT_S)
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


@contextmanager
def _ring(length: int) -> Iterator[tuple[int, memoryview]]:
    """Yield shared memory, as a file to inherit and as a buffer; it begins on a page, for writing with O_DIRECT.

    It is there at once, here and in the worker: page by page threads would hold each other up.
    """
    fd = os.memfd_create("vddk-ring")
    try:
        os.ftruncate(fd, length)
        yield fd, memoryview(mmap.mmap(fd, length, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE))
    finally:
        os.close(fd)


def _config_file(stack: ExitStack) -> str:
    folder = stack.enter_context(TemporaryDirectory(prefix="hyper2kvm-vddk-"))
    path = Path(folder) / "vddk.conf"
    path.write_text(LARGE_BUFFERS)
    return str(path)


def _extents(runs: Sequence[tuple[int, int]], size: int) -> Iterator[Extent]:
    """Yield runs of sectors as extents of bytes, sorted, those that touch made one, none past the end of the disk."""
    return joined(((first * SECTOR_BYTES, count * SECTOR_BYTES) for first, count in sorted(runs)), size=size)


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
