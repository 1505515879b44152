"""A small NBD client: one connection, with one request at a time (`NbdClient`) or many reads under way (`NbdReads`).

Follows https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md: fixed newstyle handshake,
structured replies, and the `base:allocation` context where the server offers them; TLS where the caller brings it.
"""

from __future__ import annotations

import errno
import os
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Self

TIMEOUT_S = 60.0  # a local server that is silent for so long has died with its storage
MAX_REQUEST_BYTES = 32 * 1024 * 1024  # what every server must accept (proto.md, "Size constraints")
MAX_ZERO_BYTES = 1024 * 1024 * 1024

HOLE, ZERO = 1, 2  # flags of base:allocation
ALLOCATION = b"base:allocation"

_INIT_MAGIC, _OPTION_MAGIC, _OPTION_REPLY_MAGIC = b"NBDMAGIC", b"IHAVEOPT", 0x3E889045565A9
_REQUEST_MAGIC, _SIMPLE_MAGIC, _CHUNK_MAGIC = 0x25609513, 0x67446698, 0x668E33EF
_FIXED_NEWSTYLE, _NO_ZEROES = 1, 2
_OPT_STARTTLS, _OPT_GO, _OPT_STRUCTURED_REPLY, _OPT_SET_META_CONTEXT = 5, 7, 8, 10
_REP_ACK, _REP_INFO, _REP_META_CONTEXT, _REP_ERROR = 1, 3, 4, 1 << 31
_REP_ERR_TLS_REQUIRED, _REP_ERR_UNKNOWN = _REP_ERROR + 5, _REP_ERROR + 6
_INFO_EXPORT = 0
_FLAG_READ_ONLY, _FLAG_CAN_MULTI_CONN = 1 << 1, 1 << 8
_READ, _WRITE, _DISCONNECT, _FLUSH, _WRITE_ZEROES, _BLOCK_STATUS = 0, 1, 2, 3, 6, 7
_CHUNK_DATA, _CHUNK_HOLE, _CHUNK_STATUS, _CHUNK_ERROR, _DONE = 1, 2, 5, 1 << 15, 1

_OPTION, _OPTION_REPLY = struct.Struct(">8sII"), struct.Struct(">QIII")
_REQUEST, _SIMPLE, _CHUNK = struct.Struct(">IHHQQI"), struct.Struct(">IQ"), struct.Struct(">HHQI")
_U32, _U64, _EXPORT, _HOLE_CHUNK = struct.Struct(">I"), struct.Struct(">Q"), struct.Struct(">HQH"), struct.Struct(">QI")

Address = Path | tuple[str, int] | socket.socket
Securing = Callable[[socket.socket], socket.socket]


class NbdClient:
    """A connection to one export, a context manager; `size` in bytes.

    Every method raises OSError with the server's errno (ENOSPC, EPERM, EIO, …), EPROTO where the server speaks
    nonsense, ENOENT where there is no such export, EACCES where it wants TLS, or none. Offsets and lengths are bytes; a
    request is at most `MAX_REQUEST_BYTES` long. One thread at a time, but for `interrupt`.
    """

    def __init__(
        self, address: Address, *, export: str = "", timeout_s: float = TIMEOUT_S, securing: Securing | None = None
    ) -> None:
        """Connect to a unix socket's path or to (host, port), or take a socket, and open `export`.

        securing: makes a connection one of TLS, before anything is asked for.
        """
        self._socket = _connected(address, timeout_s)
        self._cookie = 0
        try:
            self._greet()
            if securing:
                self._socket = self._secured(securing)
            self._structured = self._option(_OPT_STRUCTURED_REPLY) is not None
            self._context = self._allocation_context(export) if self._structured else None
            self.size, self._flags = self._go(export)
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        with suppress(OSError):  # what was written is flushed, or the caller does not care
            self._send(_DISCONNECT, 0, 0)
        self._socket.close()

    @property
    def read_only(self) -> bool:
        """Whether the server refuses writes."""
        return bool(self._flags & _FLAG_READ_ONLY)

    @property
    def can_multi_conn(self) -> bool:
        """Whether a flush on one connection covers what was written on the others."""
        return bool(self._flags & _FLAG_CAN_MULTI_CONN)

    @property
    def knows_allocation(self) -> bool:
        """Whether the server says which parts are holes or zeros."""
        return self._context is not None

    def interrupt(self) -> None:
        """Make the request under way fail, from another thread; the connection is good only for closing then."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def read_into(self, offset: int, target: memoryview) -> None:
        """Fill `target` with the bytes at `offset`."""
        self._send(_READ, offset, len(target))
        if not self._structured:
            self._simple_reply(self._u32())
            self._receive_into(target)
            return
        filled = 0

        def take(kind: int, length: int) -> None:
            nonlocal filled
            start = self._unpack(_U64)[0] - offset
            count = self._unpack(_U32)[0] if kind == _CHUNK_HOLE else length - _U64.size
            if start < 0 or start + count > len(target):
                _nonsense("data outside the request")
            if kind == _CHUNK_HOLE:
                target[start : start + count] = bytes(count)
            else:
                self._receive_into(target[start : start + count])
            filled += count

        self._reply(take)
        if filled != len(target):
            _nonsense(f"{filled} bytes for {len(target)}")

    def write(self, offset: int, buffer: memoryview) -> None:
        """Write `buffer` at `offset`."""
        self._send(_WRITE, offset, len(buffer), buffer)
        self._reply()

    def zero(self, offset: int, length: int) -> None:
        """Make a range read as zeros, as a hole where the server can."""
        for start in range(offset, offset + length, MAX_ZERO_BYTES):
            self._send(_WRITE_ZEROES, start, min(MAX_ZERO_BYTES, offset + length - start))
            self._reply()

    def flush(self) -> None:
        """Return once what this connection has written is durable."""
        self._send(_FLUSH, 0, 0)
        self._reply()

    def block_status(self, offset: int, length: int) -> list[tuple[int, int]]:
        """Return `(length, flags)` of the runs from `offset` on, `length` in all; flags of `HOLE` and `ZERO`.

        Where the server tells nothing, all of it counts as data.
        """
        if self._context is None:
            return [(length, 0)]
        runs: list[tuple[int, int]] = []
        end = offset + length
        while offset < end:
            for run, flags in self._block_status(offset, min(end - offset, MAX_ZERO_BYTES)):
                runs.append((min(run, end - offset), flags))
                offset += runs[-1][0]
        return runs

    def _block_status(self, offset: int, length: int) -> list[tuple[int, int]]:
        runs: list[tuple[int, int]] = []

        def take(kind: int, length: int) -> None:
            body = self._receive(length)
            if kind == _CHUNK_STATUS and body[: _U32.size] == self._context:
                runs.extend(struct.iter_unpack(">II", body[_U32.size :]))

        self._send(_BLOCK_STATUS, offset, length)
        self._reply(take)
        if not runs or not all(run for run, _ in runs):
            _nonsense("an empty block status")
        return runs

    # ── handshake ────────────────────────────────────────────────────────────────────────────────────────

    def _greet(self) -> None:
        if self._receive(16) != _INIT_MAGIC + _OPTION_MAGIC:
            _nonsense("no newstyle greeting")
        (flags,) = struct.unpack(">H", self._receive(2))
        if not flags & _FIXED_NEWSTYLE:
            _nonsense("no fixed newstyle")
        self._socket.sendall(_U32.pack(flags & (_FIXED_NEWSTYLE | _NO_ZEROES)))

    def _secured(self, securing: Securing) -> socket.socket:
        if self._option(_OPT_STARTTLS) is None:
            raise PermissionError(errno.EACCES, "the NBD server speaks no TLS")
        return securing(self._socket)

    def _option(self, option: int, data: bytes = b"") -> list[tuple[int, bytes]] | None:
        """Send an option; return the (type, body) of its replies before the acknowledgement, None if refused."""
        self._socket.sendall(_OPTION.pack(_OPTION_MAGIC, option, len(data)) + data)
        replies: list[tuple[int, bytes]] = []
        while True:
            magic, _, kind, length = self._unpack(_OPTION_REPLY)
            if magic != _OPTION_REPLY_MAGIC or length > MAX_REQUEST_BYTES:
                _nonsense("no option reply")
            body = self._receive(length)
            if kind == _REP_ERR_UNKNOWN:
                raise FileNotFoundError(errno.ENOENT, "the NBD server has no such export")
            if kind == _REP_ERR_TLS_REQUIRED:
                raise PermissionError(errno.EACCES, "the NBD server asks for TLS (nbds://)")
            if kind >= _REP_ERROR:
                return None
            if kind == _REP_ACK:
                return replies
            replies.append((kind, body))

    def _allocation_context(self, export: str) -> bytes | None:
        name = export.encode()
        query = _U32.pack(len(name)) + name + _U32.pack(1) + _U32.pack(len(ALLOCATION)) + ALLOCATION
        replies = self._option(_OPT_SET_META_CONTEXT, query) or []
        return next((body[: _U32.size] for kind, body in replies if kind == _REP_META_CONTEXT), None)

    def _go(self, export: str) -> tuple[int, int]:
        name = export.encode()
        for kind, body in self._option(_OPT_GO, _U32.pack(len(name)) + name + b"\0\0") or []:
            if kind == _REP_INFO and body[:2] == _INFO_EXPORT.to_bytes(2, "big"):
                _, size, flags = _EXPORT.unpack(body)
                return size, flags
        _nonsense("no export")

    # ── requests and replies ─────────────────────────────────────────────────────────────────────────────

    def _send(self, kind: int, offset: int, length: int, payload: memoryview | None = None) -> None:
        self._cookie += 1
        self._socket.sendall(_REQUEST.pack(_REQUEST_MAGIC, 0, kind, self._cookie, offset, length))
        if payload is not None:
            self._socket.sendall(payload)

    def _reply(self, take: Callable[[int, int], None] | None = None) -> None:
        """Read one reply, giving the kind and length of each chunk that has a body to `take`, which reads it."""
        magic = self._u32()
        if magic == _SIMPLE_MAGIC:
            return self._simple_reply(magic)
        failed: OSError | None = None
        flags = 0
        while True:
            if magic != _CHUNK_MAGIC:
                _nonsense("no reply")
            flags, kind, cookie, length = self._unpack(_CHUNK)
            if cookie != self._cookie or length > MAX_REQUEST_BYTES + _U64.size:
                _nonsense("a reply to another request")
            if kind >= _CHUNK_ERROR:
                failed = failed or _error_in(self._receive(length))
            elif length and take:
                take(kind, length)
            if flags & _DONE:
                break
            magic = self._u32()
        if failed:
            raise failed

    def _simple_reply(self, magic: int) -> None:
        if magic != _SIMPLE_MAGIC:
            _nonsense("no reply")
        number, cookie = self._unpack(_SIMPLE)
        if cookie != self._cookie:
            _nonsense("a reply to another request")
        if number:
            raise OSError(number, os.strerror(number))

    def _u32(self) -> int:
        return int(self._unpack(_U32)[0])

    def _unpack(self, shape: struct.Struct) -> tuple[int, ...]:
        return shape.unpack(self._receive(shape.size))

    def _receive(self, length: int) -> bytes:
        buffer = bytearray(length)
        self._receive_into(memoryview(buffer))
        return bytes(buffer)

    def _receive_into(self, target: memoryview) -> None:
        while target:
            done = self._socket.recv_into(target)
            if not done:
                raise _lost()
            target = target[done:]


@dataclass
class Read:
    """A read under way."""

    offset: int
    target: memoryview
    filled: int = 0
    failed: OSError | None = None
    done: bool = False


class NbdReads(NbdClient):
    """The same connection with many reads under way, which any thread asks for and waits for.

    Who waits takes whatever reply comes, its own or another thread's. A connection that failed is `lost`: all that is
    under way fails, and whatever is asked for later.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._reads: dict[int, Read] = {}
        self._asking, self._why = threading.Lock(), _lost()
        secured = isinstance(self._socket, ssl.SSLSocket)  # OpenSSL: not to be read from and written to at once
        self._hearing = self._asking if secured else threading.Lock()
        self.lost = False

    def __exit__(self, *exc: object) -> None:
        self.interrupt()
        self._socket.close()

    def ask(self, offset: int, target: memoryview) -> Read:
        """Ask for the bytes at `offset`; they are in `target` once `settle` has returned."""
        read = Read(offset, target)
        with self._asking, self._losing():
            self._reads[self._cookie + 1] = read
            self._send(_READ, offset, len(target))
        return read

    def settle(self, read: Read) -> None:
        """Wait for a read. Raises OSError: the server's, or what the connection was lost by (TimeoutError, …)."""
        while not read.done:
            with self._hearing:
                if not read.done:
                    with self._losing():
                        self._hear()
        if read.failed:
            raise read.failed

    @contextmanager
    def _losing(self) -> Iterator[None]:
        """Have the connection count as lost where the block fails; refuse to enter where it is."""
        if self.lost:
            raise self._why
        try:
            yield
        except OSError as error:
            self.lost, self._why = True, error
            self.interrupt()
            raise

    def _hear(self) -> None:
        """Take one simple reply, or one chunk of a structured one."""
        magic = self._u32()
        if magic == _SIMPLE_MAGIC:
            number, cookie = self._unpack(_SIMPLE)
            read = self._read_of(cookie)
            if number:
                read.failed = OSError(number, os.strerror(number))
            else:
                self._fill(read, 0, len(read.target))
            self._end(cookie)
            return
        if magic != _CHUNK_MAGIC:
            _nonsense("no reply")
        flags, kind, cookie, length = self._unpack(_CHUNK)
        if length > MAX_REQUEST_BYTES + _U64.size:
            _nonsense("a chunk without end")
        self._chunk(self._read_of(cookie), kind, length)
        if flags & _DONE:
            self._end(cookie)

    def _chunk(self, read: Read, kind: int, length: int) -> None:
        if kind >= _CHUNK_ERROR:
            read.failed = read.failed or _error_in(self._receive(length))
        elif kind == _CHUNK_HOLE:
            start, count = self._unpack(_HOLE_CHUNK)
            self._fill(read, start - read.offset, count, zeros=True)
        elif kind == _CHUNK_DATA:
            self._fill(read, self._unpack(_U64)[0] - read.offset, length - _U64.size)
        elif length:
            _nonsense("a chunk that was not asked for")

    def _fill(self, read: Read, start: int, count: int, *, zeros: bool = False) -> None:
        if start < 0 or count < 0 or start + count > len(read.target):
            _nonsense("data outside the request")
        if zeros:
            read.target[start : start + count] = bytes(count)
        else:
            self._receive_into(read.target[start : start + count])
        read.filled += count

    def _read_of(self, cookie: int) -> Read:
        if cookie not in self._reads:
            _nonsense("a reply to no request")
        return self._reads[cookie]

    def _end(self, cookie: int) -> None:
        read = self._reads.pop(cookie)
        if not read.failed and read.filled != len(read.target):
            _nonsense(f"{read.filled} bytes for {len(read.target)}")
        read.done = True


def _lost() -> OSError:
    return ConnectionResetError(errno.ECONNRESET, "the NBD server closed the connection")


def _connected(address: Address, timeout_s: float) -> socket.socket:
    if isinstance(address, socket.socket):
        address.settimeout(timeout_s)
        return address
    if not isinstance(address, Path):
        connection = socket.create_connection(address, timeout_s)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(timeout_s)
    try:
        connection.connect(str(address))
    except OSError:
        connection.close()
        raise
    return connection


def _error_in(body: bytes) -> OSError:
    number, length = struct.unpack_from(">IH", body)
    text = body[6 : 6 + length].decode(errors="replace")
    return OSError(number, text or os.strerror(number))


def _nonsense(what: str) -> NoReturn:
    raise OSError(errno.EPROTO, f"the NBD server sent {what}")
