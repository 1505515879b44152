"""A transport of httpx for bulk HTTPS: TLS in blocks of a mebibyte, and bodies straight into the caller's buffers.

It knows nothing of disks. Python's `SSLSocket` hands out one record (16 KiB) for each read, and on the way through
httpcore and h11 each byte is copied five times, into memory that is allocated for it: together most of what a
download costs. Here the socket is read in large blocks and decrypted through `ssl.MemoryBIO` into the place where
the bytes are wanted. h11 speaks HTTP/1.1; only a body of known length goes past it. Trust, SNI and protocol
versions are those of the `ssl.SSLContext` that is given.
"""

from __future__ import annotations

import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from queue import Empty, LifoQueue
from typing import TypeVar

import h11
import httpx

from tasks.reader import Lent, aligned_buffer

RECEIVE_BYTES = 1024 * 1024
RECORD_BYTES = 16 * 1024  # of plain text in one TLS record, at most: RFC 8446, section 5.1
KEEP_ALIVE_S = 5.0  # httpx's own default
READ_INTO = "read_into"  # among a reply's extensions: `(memoryview) -> int`, how much of it was filled; 0 at the end

MOST_IDLE = 16  # connections

Server = tuple[str, int]  # host and port
T = TypeVar("T")


def client(transport: BulkTransport, *, timeout_s: float) -> httpx.Client:
    """Return a client over `transport`; `timeout_s` bounds each connect, read and write.

    No proxy of the environment: a cookie goes to the server that it is of, or nowhere. Plain http is refused.
    """
    return httpx.Client(
        transport=transport, trust_env=False, timeout=timeout_s, headers={"Accept-Encoding": "identity"}
    )


class Shared:
    """What those share who ask one server: its trust, connections kept alive from one to the next, buffers.

    Safe to use from several threads. Who made it closes it. several_ranges, one_range_each: whether the server was seen
    to answer several ranges of a file at once, and why it is not asked for that; "" while it may be.
    """

    def __init__(self, context: ssl.SSLContext) -> None:
        self.context = context
        self.several_ranges, self.one_range_each = False, ""
        self._idle: list[tuple[Server, float, BulkStream]] = []
        self.buffers, self.bodies = Lent(aligned_buffer), Lent(bytearray)
        self._lock, self._closed = threading.Lock(), False

    def connection(self, server: Server, timeout_s: float | None) -> BulkStream:
        """Return a connection to `server` that nobody else uses. Raises httpx.ConnectTimeout, ConnectError."""
        while kept := self._last_used(server):
            used_at, stream = kept
            if time.monotonic() - used_at <= KEEP_ALIVE_S and not stream.has_something():
                return stream
            stream.close()
        return BulkStream.connect(server, self.context, timeout_s)

    def keep(self, server: Server, stream: BulkStream) -> None:
        """Take back a connection whose last reply was read to its end."""
        with self._lock:
            if not self._closed and len(self._idle) < MOST_IDLE:
                self._idle.append((server, time.monotonic(), stream))
                return
        stream.close()

    def close(self) -> None:
        """Close what is idle, and from now on what comes back."""
        with self._lock:
            self._closed, idle = True, self._idle
            self._idle = []
        for _, _, stream in idle:
            stream.close()

    def _last_used(self, server: Server) -> tuple[float, BulkStream] | None:
        with self._lock:
            for at in reversed(range(len(self._idle))):
                if self._idle[at][0] == server:
                    return self._idle.pop(at)[1:]
        return None


class BulkTransport(httpx.BaseTransport):
    """At most `connections` connections at once, each used by one thread at a time and then left to `shared`.

    A reply's `extensions["read_into"]` fills a buffer with the body: what a bulk reader wants. Iterating over the reply
    works as ever.
    """

    def __init__(self, shared: Shared, *, connections: int) -> None:
        self._all = [_Connection(shared) for _ in range(connections)]
        self._free: LifoQueue[_Connection] = LifoQueue()
        for each in self._all:
            self._free.put(each)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request when a connection is free. Raises httpx.TransportError, PoolTimeout among them."""
        connection = self._take(request.extensions.get("timeout", {}).get("pool"))
        try:
            return connection.send(request, at_end=lambda: self._free.put(connection))
        except BaseException:
            connection.close()
            self._free.put(connection)
            raise

    def close(self) -> None:
        for each in self._all:
            each.close()

    def shut_down(self) -> None:
        """Make whatever waits for a connection fail at once, from another thread; good only for closing then."""
        for each in self._all:
            each.shut_down()

    def _take(self, timeout_s: float | None) -> _Connection:
        try:
            return self._free.get(timeout=timeout_s)
        except Empty:
            raise httpx.PoolTimeout(f"no connection was free within {timeout_s} s") from None


class _Connection:
    """One request at a time, over a connection that is its own for as long."""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self._stream: BulkStream | None = None
        self._shut, self._lock = False, threading.Lock()

    def send(self, request: httpx.Request, *, at_end: Callable[[], object]) -> httpx.Response:
        """Send a request; return the reply, whose body is to be read. `at_end` is called once it is closed."""
        timeouts = request.extensions.get("timeout", {})
        if request.url.scheme != "https":
            raise httpx.UnsupportedProtocol(f"nothing is sent without TLS, and {request.url.scheme} has none")
        server = (request.url.host, request.url.port or 443)
        stream = self._use(self._shared.connection(server, timeouts.get("connect")))
        http = h11.Connection(h11.CLIENT)
        head = h11.Request(method=request.method, target=request.url.raw_path, headers=request.headers.raw)
        parts = [http.send(head), *(http.send(h11.Data(data=part)) for part in request.stream)]  # type: ignore[union-attr]
        parts.append(http.send(h11.EndOfMessage()))
        stream.write(b"".join(part for part in parts if part), timeouts.get("write"))
        talk = _Talk(stream, http, timeouts.get("read"))
        reply = talk.head()
        direct = _length_of(reply) if request.method == "GET" else None
        body = _Body(
            _Framed(talk) if direct is None else _Counted(talk, direct),
            lambda ended: self._done(server, kept=ended and _stays(reply), at_end=at_end),
        )
        return httpx.Response(
            reply.status_code,
            headers=reply.headers.raw_items(),
            stream=body,
            extensions={"http_version": b"HTTP/" + reply.http_version, READ_INTO: body.read_into},
        )

    def close(self) -> None:
        if stream := self._let_go():
            stream.close()

    def shut_down(self) -> None:
        with self._lock:
            self._shut = True
            if self._stream:
                self._stream.shut_down()

    def _use(self, stream: BulkStream) -> BulkStream:
        with self._lock:
            self._stream = stream
            if self._shut:
                stream.shut_down()
        return stream

    def _let_go(self) -> BulkStream | None:
        with self._lock:
            stream, self._stream = self._stream, None
        return stream

    def _done(self, server: Server, *, kept: bool, at_end: Callable[[], object]) -> None:
        """Leave the connection to the next request, where both sides can tell where this one ended."""
        stream = self._let_go()
        if stream and kept and not self._shut:
            self._shared.keep(server, stream)
        elif stream:
            stream.close()
        at_end()


def _stays(reply: h11.Response) -> bool:
    """Tell whether the server leaves the connection open after this reply."""
    closes = any(name == b"connection" and b"close" in value.lower() for name, value in reply.headers)
    return not closes and reply.http_version >= b"1.1"


class _Talk:
    """One request's reply, as h11 reads it."""

    def __init__(self, stream: BulkStream, http: h11.Connection, timeout_s: float | None) -> None:
        self.stream, self.timeout_s = stream, timeout_s
        self._http = http
        self._scratch = memoryview(bytearray(RECORD_BYTES))

    def head(self) -> h11.Response:
        """Return the head of the reply. Raises RemoteProtocolError, ReadError, ReadTimeout."""
        while not isinstance(event := self._event(), h11.Response):
            if isinstance(event, h11.ConnectionClosed):
                raise httpx.RemoteProtocolError("the server hung up instead of an answer")
        return event

    def early(self) -> bytes:
        """Return what came of the body with the head."""
        return self._http.trailing_data[0]

    def part(self) -> bytes | None:
        """Return what comes next of a body of any framing; None at its end."""
        event = self._event()
        return bytes(event.data) if isinstance(event, h11.Data) else None

    def _event(self) -> object:
        while True:
            try:
                event = self._http.next_event()
                if event is not h11.NEED_DATA:
                    return event
                count = self.stream.read_into(self._scratch, self.timeout_s)
                self._http.receive_data(bytes(self._scratch[:count]))
            except h11.RemoteProtocolError as error:
                raise httpx.RemoteProtocolError(str(error)) from error


class _Counted:
    """A body of known length, from the stream into whatever wants it."""

    def __init__(self, talk: _Talk, length: int) -> None:
        self._stream, self._timeout_s = talk.stream, talk.timeout_s
        self._early = memoryview(talk.early())
        self.left = length

    @property
    def ended(self) -> bool:
        """Whether all of the body was read, and nothing came that is not of it."""
        return not (self.left or self._early)

    def read_into(self, view: memoryview) -> int:
        """Return how many bytes of the body are in `view` now, 0 at its end."""
        view = view[: self.left]
        if self._early:
            count = min(len(view), len(self._early))
            view[:count], self._early = self._early[:count], self._early[count:]
        else:
            count = self._stream.read_into(view, self._timeout_s) if view else 0
            if view and not count:
                raise httpx.RemoteProtocolError(f"the server hung up with {self.left} bytes of the reply to come")
        self.left -= count
        return count


class _Framed:
    """A body of any framing, as h11 takes it apart."""

    def __init__(self, talk: _Talk) -> None:
        self._talk, self._rest = talk, memoryview(b"")
        self.ended = False

    def read_into(self, view: memoryview) -> int:
        """Return how many bytes of the body are in `view` now, 0 at its end."""
        while not self._rest and not self.ended:
            part = self._talk.part()
            self._rest, self.ended = memoryview(part or b""), part is None
        count = min(len(view), len(self._rest))
        view[:count], self._rest = self._rest[:count], self._rest[count:]
        return count


class _Body(httpx.SyncByteStream):
    """The bytes of a reply. `done` is called once, when it is closed, with whether all of it was read.

    read_into: fills a buffer as far as what has come goes, and returns how far: 0 at the end of the body only. Raises
    ReadError, ReadTimeout, RemoteProtocolError.
    """

    def __init__(self, source: _Counted | _Framed, done: Callable[[bool], object]) -> None:
        self._source, self._done, self.read_into = source, done, source.read_into
        self._closed = False

    def __iter__(self) -> Iterator[bytes]:
        buffer = memoryview(bytearray(RECEIVE_BYTES))
        while count := self.read_into(buffer):
            yield bytes(buffer[:count])

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._done(self._source.ended)


class BulkStream:
    """A TLS connection over a connected socket. Time-outs bound each call as a whole; None waits for ever."""

    def __init__(
        self, plain: socket.socket, context: ssl.SSLContext, server_hostname: str | None, timeout_s: float | None
    ) -> None:
        """Shake hands. Raises OSError: ssl.SSLError of all kinds, TimeoutError."""
        self._socket = plain
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=server_hostname)
        self._received = memoryview(bytearray(RECEIVE_BYTES))
        self._until_done(self.tls.do_handshake, _deadline(timeout_s))

    @classmethod
    def connect(cls, server: Server, context: ssl.SSLContext, timeout_s: float | None) -> BulkStream:
        """Connect and shake hands.

        Raises httpx.ConnectTimeout, ConnectError (from ssl.SSLCertVerificationError, …).
        """
        with _mapped(httpx.ConnectTimeout, httpx.ConnectError):
            plain = socket.create_connection(server, timeout_s)
            try:
                plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return cls(plain, context, server[0], timeout_s)
            except BaseException:
                plain.close()
                raise

    def read_into(self, view: memoryview, timeout_s: float | None = None) -> int:
        """Fill `view` as far as what has come goes, and return how far: 0 only after the server said that it ends.

        Raises ReadTimeout, ReadError.
        """
        with _mapped(httpx.ReadTimeout, httpx.ReadError):
            return self._until_done(lambda: self._decrypt(view), _deadline(timeout_s))

    def write(self, buffer: bytes, timeout_s: float | None = None) -> None:
        """Send all of `buffer`. Raises WriteTimeout, WriteError."""
        with _mapped(httpx.WriteTimeout, httpx.WriteError):
            rest, deadline = memoryview(buffer), _deadline(timeout_s)
            while rest:
                part = rest
                rest = rest[self._until_done(lambda: self.tls.write(part), deadline) :]  # noqa: B023 - called at once

    def close(self) -> None:
        """Close the socket, without a word: as httpcore's own stream."""
        self._socket.close()

    def shut_down(self) -> None:
        """Wake a thread that waits for the server, from another one."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def has_something(self) -> bool:
        """Tell whether anything has come that nobody asked for: between two requests, that the server has left."""
        if self._incoming.pending or self.tls.pending() or self._socket.fileno() < 0:
            return True
        waiting = select.poll()
        waiting.register(self._socket, select.POLLIN)
        return bool(waiting.poll(0))

    def _decrypt(self, view: memoryview) -> int:
        """Fill `view` as far as what was received goes; return 0 at the end. Raises SSLWantReadError if nowhere."""
        filled = 0
        try:
            while filled < len(view) and (length := self.tls.read(len(view) - filled, view[filled:])):
                filled += int(length)
        except ssl.SSLWantReadError:
            if not filled:
                raise
        return filled

    def _until_done(self, step: Callable[[], T], deadline: float | None) -> T:
        """Repeat `step` with more from the server until it is content; send what TLS itself has to say."""
        while True:
            try:
                done = step()
            except ssl.SSLWantReadError:
                self._send(deadline)
                self._receive(deadline)
                continue
            except ssl.SSLError:
                with suppress(OSError):  # the alert that tells the server why
                    self._send(deadline)
                raise
            self._send(deadline)
            return done

    def _send(self, deadline: float | None) -> None:
        if self._outgoing.pending:
            self._wait_at_most(deadline)
            self._socket.sendall(self._outgoing.read())

    def _receive(self, deadline: float | None) -> None:
        self._wait_at_most(deadline)
        length = self._socket.recv_into(self._received)
        if length:
            self._incoming.write(self._received[:length])
        else:
            self._incoming.write_eof()  # without a close_notify before it, TLS calls that an error

    def _wait_at_most(self, deadline: float | None) -> None:
        if deadline is None:
            self._socket.settimeout(None)
        elif (left_s := deadline - time.monotonic()) > 0:
            self._socket.settimeout(left_s)
        else:
            raise TimeoutError("timed out")


def _length_of(reply: h11.Response) -> int | None:
    """Return the length of a body that is framed by nothing else."""
    fields = {name: value for name, value in reply.headers}
    if b"transfer-encoding" in fields or reply.status_code in (204, 304) or b"content-length" not in fields:
        return None
    return int(fields[b"content-length"])


def _deadline(timeout_s: float | None) -> float | None:
    return None if timeout_s is None else time.monotonic() + timeout_s


@contextmanager
def _mapped(timeout: type[Exception], error: type[Exception]) -> Iterator[None]:
    """Raise httpx's classes for those of the system, as its own transport does."""
    try:
        yield
    except TimeoutError as cause:
        raise timeout(str(cause)) from cause
    except OSError as cause:
        raise error(str(cause)) from cause
