"""Reading a disk from an NBD server, or from a command that is one: nbdkit's plugins, other vendors' servers.

The protocol is `tasks.nbd`'s, a command's life `tasks.transports.nbd_command`'s.
"""

from __future__ import annotations

import errno
import logging
import queue
import socket
import ssl
import threading
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from typing import Self
from urllib.parse import parse_qs, quote, unquote, urlsplit

from pydantic import SecretStr

from tasks import tls
from tasks.errors import InvalidInput, NbdFailed, NbdTlsRefused, TransferInterrupted
from tasks.models import SECTOR_BYTES, Extent, NbdSettings, Trust, Value
from tasks.nbd import ZERO, Address, NbdReads, Read, Securing
from tasks.process import Stopped
from tasks.reader import TransientFault, aligned_buffer, cut, joined
from tasks.transports.nbd_command import ENDING_S, Command, filled, serving

DEFAULT_PORT = 10809
CONNECTIONS = 4
DEPTH = 4
AHEAD = 2  # requests of a thread under way
REQUEST_BYTES = 1024 * 1024
EXTENT_BYTES = 64 * 1024 * 1024  # at the end of each there is less under way
STATUS_BYTES = 1024 * 1024 * 1024  # asked for at once of what is allocated
READ_TIMEOUT_S = 60.0
ROUNDED_BYTES = 64 * 1024  # servers round sizes up to blocks of theirs

# What the connection died of, or what the storage behind may get over.
PASSING = frozenset(
    {errno.EIO, errno.ECONNRESET, errno.EPIPE, errno.ENOTCONN, errno.ECONNREFUSED, errno.ENOMEM, errno.EPROTO}
)

_log = logging.getLogger(__name__)


class NbdDisk(Value):
    """A disk as an NBD source finds it. blanks: what fills those of its URI or command. password: for `{password_fd}`.

    datastore_path: what it is called.
    """

    settings: NbdSettings
    blanks: dict[str, str]
    password: SecretStr
    datastore_path: str
    capacity_bytes: int


class NbdReader:
    """A disk behind NBD. See `tasks.reader.Reader`; `allocated` says what of it is worth asking for.

    Where it is a command, enter in a thread that lives as long. Entering raises NbdFailed, NbdCommandEnded,
    NbdTlsRefused, InvalidInput, Stopped.
    """

    depth = DEPTH
    preferred_extent_bytes = EXTENT_BYTES
    road = "nbd"

    def __init__(
        self, disk: NbdDisk, *, stop: threading.Event | None = None, read_timeout_s: float = READ_TIMEOUT_S
    ) -> None:
        self.size, self.source = disk.capacity_bytes, disk.datastore_path
        self.road_reason = ""
        self._disk, self._timeout_s = disk, read_timeout_s
        self._stop = stop or threading.Event()
        self._command: Command | None = None
        self._own = ExitStack()
        self._connections: list[NbdReads] = []
        self._mending, self._turn = threading.Lock(), count()
        self._free: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
        self._allocated: tuple[Extent, ...] = ()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._server = self._named(stack)
            stack.callback(self._close)
            with self._by_name():
                first = self._connect()
                self._connections.append(first)
                self._check_size(first)
                self._allocated, mapped = self._ask_what_is_allocated(first)
                self._add_connections(first)
            self._probe()
            several = f"{len(self._connections)} connections" if self._connections[1:] else "one connection"
            self.road_reason = f"{self._server}, {several}, {mapped}"
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
        wanted, under_way = deque(cut(extent, REQUEST_BYTES)), deque[tuple[Extent, memoryview, Read]]()
        connection = self._connection()
        with self._transient(extent):
            while wanted or under_way:
                while wanted and len(under_way) < AHEAD:
                    request, buffer = wanted.popleft(), self._buffer()
                    under_way.append((request, buffer, connection.ask(request.start, buffer[: request.length])))
                request, buffer, read = under_way.popleft()
                connection.settle(read)
                yield request.start, buffer[: request.length]
                self._free.put(buffer)  # what is under way when this is closed early is not used again

    def interrupt(self) -> None:
        """Wake every thread that waits for the server, with TransientFault."""
        for connection in self._connections:
            connection.interrupt()

    # ── opening ──────────────────────────────────────────────────────────────────────────────────────

    def _named(self, stack: ExitStack) -> str:
        """Find out where the server is, start it where it is a command, and return what it is called."""
        settings, disk = self._disk.settings, self._disk
        self._securing: Securing | None = None
        self._export = ""
        if settings.command:
            secrets = {"password_fd": disk.password, **({"secret_fd": settings.secret} if settings.secret else {})}
            command = serving(settings.command, disk.blanks, secrets, source=self.source)
            self._command = stack.enter_context(command)
            self._address: Address = self._command.address
            return settings.command[0]
        uri = filled(settings.uri, {name: quote(value, safe="") for name, value in disk.blanks.items()})
        self._address, self._export, host = parsed(uri)
        if uri.startswith("nbds:"):
            self._securing = lambda plain: self._secured(plain, host, settings.trust)
        return uri

    def _connect(self) -> NbdReads:
        try:
            return NbdReads(self._address, export=self._export, timeout_s=self._timeout_s, securing=self._securing)
        except OSError:
            if self._command:
                self._command.check(within_s=ENDING_S)
            raise

    def _secured(self, plain: socket.socket, host: str, trust: Trust) -> socket.socket:
        """Return the connection made one of TLS. Raises NbdTlsRefused, ssl.SSLError."""
        pinned = trust.thumbprint
        context = tls.unverified() if pinned or not trust.verify else tls.trusting_cas(trust)
        try:
            secure = context.wrap_socket(plain, server_hostname=host)
        except ssl.SSLCertVerificationError as error:
            raise self._failed(error.verify_message, NbdTlsRefused) from error
        if pinned:
            shown = tls.thumbprint_of(secure.getpeercert(binary_form=True) or b"", like=pinned)
            if shown != pinned:
                secure.close()
                why = f"its certificate's thumbprint is {tls.colons(shown)}, not the pinned {tls.colons(pinned)}"
                raise self._failed(why, NbdTlsRefused)
        return secure

    def _check_size(self, connection: NbdReads) -> None:
        if not self.size <= connection.size < self.size + ROUNDED_BYTES:
            raise self._failed(f"it serves {connection.size} bytes, where the disk has {self.size}")

    def _ask_what_is_allocated(self, connection: NbdReads) -> tuple[tuple[Extent, ...], str]:
        """Return what is allocated, and in words whether that is known."""
        if not connection.knows_allocation:
            return (Extent(start=0, length=self.size),), "all of it: the server does not say what is allocated"
        return tuple(joined(self._data_runs(connection), size=self.size)), "only what is allocated"

    def _data_runs(self, connection: NbdReads) -> Iterator[tuple[int, int]]:
        """Yield start and length of what does not read as zeros."""
        for part in cut(Extent(start=0, length=self.size), STATUS_BYTES):
            if self._stop.is_set():
                raise Stopped
            at = part.start
            for length, flags in connection.block_status(part.start, part.length):
                if not flags & ZERO:
                    yield at, length
                at += length

    def _add_connections(self, first: NbdReads) -> None:
        """Open more connections, where the server says that they see the same."""
        if not first.can_multi_conn or (self._command and self._command.single):
            return
        try:
            while len(self._connections) < CONNECTIONS:
                self._connections.append(self._connect())
        except OSError as error:  # it has a limit of its own
            _log.info("no more connections source=%r open=%d why=%s", self.source, len(self._connections), error)

    def _probe(self) -> None:
        """Read the first sector."""
        try:
            for _ in self.stream(Extent(start=0, length=min(SECTOR_BYTES, self.size))):
                pass
        except TransientFault as fault:
            raise self._failed(str(fault)) from fault

    def _close(self) -> None:
        for connection in self._connections:
            connection.__exit__()

    @contextmanager
    def _by_name(self) -> Iterator[None]:
        """Map what goes wrong while opening."""
        try:
            yield
        except PermissionError as error:
            raise self._failed(self._words(error), NbdTlsRefused) from error
        except OSError as error:
            raise self._failed(self._words(error)) from error

    # ── reading ──────────────────────────────────────────────────────────────────────────────────────

    def _connection(self) -> NbdReads:
        """Return a connection that lives: in turn, the one that was lost opened anew. Raises TransientFault."""
        number = next(self._turn) % len(self._connections)
        with self._mending:
            connection = self._connections[number]
            if not connection.lost:
                return connection
            if self._command:
                self._command.check(within_s=ENDING_S)
            if self._command and self._command.single:
                raise self._failed("it closed its only connection")
            try:
                fresh = self._connect()
            except OSError as error:
                raise TransientFault(self._words(error)) from error
            connection.__exit__()
            self._connections[number] = fresh
        _log.info("connected again source=%r", self.source)
        return fresh

    def _buffer(self) -> memoryview:
        try:
            return self._free.get_nowait()
        except queue.Empty:
            return aligned_buffer(REQUEST_BYTES)

    @contextmanager
    def _transient(self, extent: Extent) -> Iterator[None]:
        """Map what goes wrong while reading."""
        try:
            yield
        except TimeoutError as error:
            why = f"the NBD server does not answer for {self._timeout_s:.0f} s"
            raise TransferInterrupted(source=self.source, resumable_at=extent.start, why=why) from error
        except OSError as error:
            if self._command:
                self._command.check(within_s=ENDING_S if error.errno == errno.ECONNRESET else 0.0)
            if error.errno in PASSING or isinstance(error, ssl.SSLError):
                raise TransientFault(self._words(error)) from error
            raise self._failed(self._words(error)) from error

    def _words(self, error: OSError) -> str:
        if isinstance(error, TimeoutError):
            return f"no answer within {self._timeout_s:.0f} s"
        return error.strerror or str(error) or type(error).__name__

    def _failed(self, why: str, kind: type[NbdFailed] = NbdFailed) -> NbdFailed:
        return kind(source=self.source, server=self._server, why=why)


def parsed(uri: str) -> tuple[Address, str, str]:
    """Return address, export and host's name of an NBD URI. Raises InvalidInput.

    Source: https://github.com/NetworkBlockDevice/nbd/blob/master/doc/uri.md.
    """
    parts = urlsplit(uri)
    export = unquote(parts.path.removeprefix("/"))
    if parts.scheme == "nbd+unix":
        path = parse_qs(parts.query).get("socket", [""])[0]
        if path:
            return Path(path), export, ""
        raise InvalidInput(what=f"NBD URI {uri}", why="it names no socket", remedy="nbd+unix:///?socket=/path")
    if not parts.hostname:
        raise InvalidInput(what=f"NBD URI {uri}", why="it names no host", remedy="Give nbd://host:port/export")
    return (parts.hostname, parts.port or DEFAULT_PORT), export, parts.hostname
