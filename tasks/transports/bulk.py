"""An `httpx.Client` for bulk HTTPS: TLS in blocks of 256 KiB instead of a record at a time. It knows nothing of disks.

Python's `SSLSocket` hands out one record (16 KiB) for each read, and httpcore allocates 64 KiB for each: together
more than half of what a download costs. Here the socket is read in large blocks, decrypted through `ssl.MemoryBIO`
as far as the block goes. Trust, SNI and protocol versions are those of the `ssl.SSLContext` that is given.
"""

from __future__ import annotations

import select
import socket
import ssl
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from queue import Empty, LifoQueue
from typing import Any, NoReturn, TypeVar

import httpcore
import httpx

RECEIVE_BYTES = 256 * 1024
RECORD_BYTES = 16 * 1024  # of plain text in one TLS record, at most: RFC 8446, section 5.1
KEEP_ALIVE_S = 5.0  # httpx's own default

T = TypeVar("T")


def client(context: ssl.SSLContext, *, connections: int, timeout_s: float) -> httpx.Client:
    """Return a client that keeps at most `connections` open; `timeout_s` bounds each connect, read and write.

    No proxy of the environment: a cookie goes to the server that it is of, or nowhere. Plain http is refused.
    """
    return httpx.Client(
        transport=_Transport(context, connections),
        trust_env=False,
        timeout=timeout_s,
        headers={"Accept-Encoding": "identity"},
    )


class _Transport(httpx.BaseTransport):
    """As many of httpx's transports as there may be connections, each with one, used by one thread at a time.

    A pool that threads share looks for connections that the server has left by asking whether an idle one is
    readable, and so closes, now and then, one that another thread has just taken and gets its reply on.
    """

    def __init__(self, context: ssl.SSLContext, connections: int) -> None:
        self._all = [_Single(context) for _ in range(connections)]
        self._free: LifoQueue[_Single] = LifoQueue()  # the last one used first: the fewest connections
        for each in self._all:
            self._free.put(each)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request when a connection is free. Raises httpx.TransportError, PoolTimeout among them."""
        single = self._take(request.extensions.get("timeout", {}).get("pool"))
        try:
            response = single.handle_request(request)
        except BaseException:
            self._free.put(single)
            raise
        assert isinstance(response.stream, httpx.SyncByteStream)
        response.stream = _Body(response.stream, at_end=lambda: self._free.put(single))
        return response

    def close(self) -> None:
        for each in self._all:
            each.close()

    def _take(self, timeout_s: float | None) -> _Single:
        try:
            return self._free.get(timeout=timeout_s)
        except Empty:
            raise httpx.PoolTimeout(f"no connection was free within {timeout_s} s") from None


class _Single(httpx.HTTPTransport):
    """httpx's own transport, over one connection of the backend below: httpx has no public way to say so."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self._pool = httpcore.ConnectionPool(
            ssl_context=context, max_connections=1, keepalive_expiry=KEEP_ALIVE_S, network_backend=BulkBackend()
        )


class _Body(httpx.SyncByteStream):
    """The bytes of a reply; `at_end` is called once, when it is closed."""

    def __init__(self, stream: httpx.SyncByteStream, *, at_end: Callable[[], object]) -> None:
        self._stream, self._at_end = stream, at_end
        self._closed = False

    def __iter__(self) -> Iterator[bytes]:
        yield from self._stream

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        try:
            self._stream.close()
        finally:
            self._at_end()


class BulkBackend(httpcore.NetworkBackend):
    """Connects as httpcore does, and speaks TLS in blocks (https://www.encode.io/httpcore/network-backends/)."""

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        """Connect. Raises httpcore's ConnectError, ConnectTimeout."""
        return _Plain(httpcore.SyncBackend().connect_tcp(host, port, timeout, local_address, socket_options))


class _Plain(httpcore.NetworkStream):
    """A connection before TLS: good for starting that, and for nothing else."""

    def __init__(self, stream: httpcore.NetworkStream) -> None:
        self._stream = stream

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        """Shake hands. Raises httpcore's ConnectError (from ssl.SSLCertVerificationError, …), ConnectTimeout."""
        try:
            with _mapped(httpcore.ConnectTimeout, httpcore.ConnectError):
                return BulkStream(self.get_extra_info("socket"), ssl_context, server_hostname, timeout)
        except BaseException:
            self.close()
            raise

    def read(self, max_bytes: int, timeout: float | None = None) -> NoReturn:
        raise httpcore.UnsupportedProtocol("nothing is read without TLS")

    def write(self, buffer: bytes, timeout: float | None = None) -> NoReturn:
        raise httpcore.UnsupportedProtocol("nothing is sent without TLS")

    def close(self) -> None:
        self._stream.close()

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


class BulkStream(httpcore.NetworkStream):
    """A TLS connection over a connected socket. Time-outs bound each call as a whole; None waits for ever."""

    def __init__(
        self, plain: socket.socket, context: ssl.SSLContext, server_hostname: str | None, timeout: float | None
    ) -> None:
        """Shake hands. Raises OSError: ssl.SSLError of all kinds, TimeoutError."""
        self._socket = plain
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=server_hostname)
        self._received = memoryview(bytearray(RECEIVE_BYTES))
        # a block, and the record whose beginning came with the block before: nothing decrypted stays behind in OpenSSL
        self._decrypted = memoryview(bytearray(RECEIVE_BYTES + RECORD_BYTES))
        self._until_done(self._tls.do_handshake, _deadline(timeout))

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """Return what has come, and b"" only after the server said that it ends. Raises ReadTimeout, ReadError.

        It may be more than `max_bytes`: httpcore asks for 64 KiB whatever it reads, and its parser takes any length.
        """
        with _mapped(httpcore.ReadTimeout, httpcore.ReadError):
            return bytes(self._decrypted[: self._until_done(self._decrypt, _deadline(timeout))])

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Send all of `buffer`. Raises WriteTimeout, WriteError."""
        with _mapped(httpcore.WriteTimeout, httpcore.WriteError):
            rest, deadline = memoryview(buffer), _deadline(timeout)
            while rest:
                part = rest
                rest = rest[self._until_done(lambda: self._tls.write(part), deadline) :]  # noqa: B023 - called at once

    def close(self) -> None:
        """Close the socket, without a word: as httpcore's own stream."""
        self._socket.close()

    def get_extra_info(self, info: str) -> Any:
        """Return what httpcore asks for by name; see its NetworkStream."""
        match info:
            case "ssl_object":
                return self._tls
            case "socket":
                return self._socket
            case "client_addr":
                return self._socket.getsockname()
            case "server_addr":
                return self._socket.getpeername()
            case "is_readable":
                return self._is_readable()
        return None

    def _decrypt(self) -> int:
        """Fill the buffer as far as what was received goes; return 0 at the end. Raises SSLWantReadError if nowhere."""
        filled = 0
        try:
            while len(self._decrypted) - filled >= RECORD_BYTES:
                length = self._tls.read(RECORD_BYTES, self._decrypted[filled:])
                if not length:
                    break
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

    def _is_readable(self) -> bool:
        """Tell whether anything has come that nobody asked for: between two requests, that the server has left."""
        if self._incoming.pending or self._tls.pending() or self._socket.fileno() < 0:
            return True
        waiting = select.poll()
        waiting.register(self._socket, select.POLLIN)
        return bool(waiting.poll(0))


def _deadline(timeout: float | None) -> float | None:
    return None if timeout is None else time.monotonic() + timeout


@contextmanager
def _mapped(timeout: type[Exception], error: type[Exception]) -> Iterator[None]:
    """Raise httpcore's classes for those of the system, as its own streams do."""
    try:
        yield
    except TimeoutError as cause:
        raise timeout(cause) from cause
    except OSError as cause:
        raise error(cause) from cause
