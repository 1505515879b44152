"""Reading a disk as the stream of an NFC lease: `https://<ESXi host>/nfc/<ticket>/disk-0.vmdk`, from front to back.

It cannot seek: what is asked for again is read again from the beginning, and passed over up to there. The lease is
somebody else's to get and to keep (`tasks.vsphere.leases`); here it is only asked whether it lives.
"""

from __future__ import annotations

import logging
import os
import ssl
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from typing import NoReturn, Self

import httpx
from pydantic import SecretStr

from tasks import tls
from tasks.errors import BadLeaseStream, TransferInterrupted
from tasks.models import Connection, Extent, Trust, Value
from tasks.reader import Buffer, Hole, TransientFault
from tasks.transports import bulk
from tasks.transports.inflate import BLOCK_BYTES, Blocks
from tasks.transports.streamvmdk import BadStream, CutShort

CONNECT_TIMEOUT_S = 10.0
TIMEOUT_S = 300.0  # of a read: a host that looks for the next grain of a thick disk says nothing meanwhile
PIECE_BYTES = 1024 * 1024 * 1024  # of which a hole is one write
BEGINNINGS = 3  # of one run: each costs the whole stream
THREADS = min(4, os.cpu_count() or 1)
ACCEPT = {"Accept": "application/x-vnd.vmware-streamVmdk"}
STAR = "*"  # in a URL: the host that the lease was asked of (HttpNfcLeaseDeviceUrl.url)

_log = logging.getLogger(__name__)


class LeaseDisk(Value):
    """A disk of a lease. url: with the ticket that opens it. thumbprint: of the host's certificate, "" if not said.

    connection: whose host stands for `*` in the URL, and whose trust counts where there is no thumbprint.
    """

    connection: Connection
    url: SecretStr
    thumbprint: str = ""
    datastore_path: str
    capacity_bytes: int

    def where(self) -> httpx.URL:
        """Return the URL as it can be asked for."""
        host = f"[{self.connection.host}]" if ":" in self.connection.host else self.connection.host
        return httpx.URL(self.url.get_secret_value().replace(f"://{STAR}", f"://{host}", 1))

    def server(self) -> Connection:
        """Return what is needed to believe the host that the URL names; no login."""
        url = self.where()
        trust = Trust(thumbprint=self.thumbprint) if self.thumbprint else self.connection.trust
        return Connection(host=url.host, port=url.port or 443, username="", password=SecretStr(""), trust=trust)


class LeaseReader:
    """A disk of an NFC lease. See `tasks.reader.Reader`.

    alive: raises what it means that the lease is lost, where it is. progress: told how many bytes of the disk have
    come, as they do. Entering looks at the host's certificate and asks for nothing: a stream that was begun for a trial
    would have to be broken off. Raises ThumbprintMismatch, CertificateUntrusted, ConnectionFailed.

    Bytes count only once the stream has come to a sound end: the last of them are held back until then. One that does
    not is BadLeaseStream, or, where it was cut, TransientFault, and TransferInterrupted at the third time.
    """

    road = "nfc_lease"
    depth = 1
    preferred_extent_bytes = PIECE_BYTES

    def __init__(
        self,
        disk: LeaseDisk,
        *,
        alive: Callable[[], None] = lambda: None,
        progress: Callable[[int], object] = lambda count: None,
        timeout_s: float = TIMEOUT_S,
        threads: int = THREADS,
    ) -> None:
        self.size = disk.capacity_bytes
        self.source = disk.datastore_path
        self.road_reason = f"a stream of {disk.where().host}, deflated"
        self._disk, self._alive, self._progress = disk, alive, progress
        self._timeout_s, self._threads = timeout_s, threads
        self._run: _Run | None = None
        self._begun, self._why = 0, ""

    def __enter__(self) -> Self:
        server = self._disk.server()
        tls.believed_certificate(server)
        self._tls = tls.context_for(server)
        return self

    def __exit__(self, *exc: object) -> None:
        """See the stream to its end where all went well: what came of it counts only then."""
        try:
            if self._run and not any(exc):
                with self._errors():
                    for _ in self._run.until(self.size):
                        pass
        finally:
            self._give_up()

    def stream(self, extent: Extent) -> Generator[tuple[int, Buffer], None, None]:
        """Yield the bytes of `extent` in order, holes as such; goes on where the last one ended, or begins anew."""
        with self._errors():
            if not self._run or self._run.position > extent.start:
                self._begin(extent.start)
            assert self._run
            for offset, buffer in self._run.until(extent.end):
                passed_over = max(0, extent.start - offset)
                if wanted := buffer[passed_over:]:
                    yield offset + passed_over, wanted
                self._progress(len(buffer))

    def interrupt(self) -> None:
        """Break the stream off: what waits for it fails at once, with TransientFault."""
        if run := self._run:
            run.interrupt()

    def _begin(self, start: int) -> None:
        """Ask for the stream from its beginning, for what lies from `start` on."""
        self._give_up()
        if self._begun == BEGINNINGS:
            why = f"{self._why}; a lease cannot seek, and {BEGINNINGS} times from the beginning are enough"
            raise TransferInterrupted(source=self.source, resumable_at=start, why=why)
        self._begun += 1
        if self._begun > 1 or start:
            _log.warning("a lease cannot seek: begun again from nothing source=%r passed_over=%d", self.source, start)
            again = f"begun {self._begun} times" if self._begun > 1 else "what was here already was read again"
            self.road_reason = f"a stream of {self._disk.where().host}, deflated; it cannot seek: {again}"
        self._run = _Run(self._disk, self._tls, start=start, threads=self._threads, timeout_s=self._timeout_s)

    def _give_up(self) -> None:
        run, self._run = self._run, None
        if run:
            run.close()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Map what a stream ends in. Whatever it is, the lease may be the cause."""
        try:
            yield
        except BadStream as error:
            self._give_up()
            if not isinstance(error, CutShort):
                raise BadLeaseStream(source=self.source, why=str(error)) from error
            self._cut(str(error), error)
        except httpx.TransportError as error:
            self._give_up()
            self._cut(f"{type(error).__name__}: {error}".rstrip(": "), error)

    def _cut(self, why: str, error: Exception) -> NoReturn:
        self._alive()
        self._why = why
        raise TransientFault(why) from error


class _Run:
    """One stream, from its beginning. position: the first byte of the disk that was not given yet."""

    def __init__(self, disk: LeaseDisk, context: ssl.SSLContext, *, start: int, threads: int, timeout_s: float) -> None:
        """Ask for it. Raises httpx.TransportError."""
        self.position = start // BLOCK_BYTES * BLOCK_BYTES
        self._rest: Buffer = Hole(0)
        with ExitStack() as stack:
            shared = bulk.Shared(context)
            stack.callback(shared.close)
            self._transport = bulk.BulkTransport(shared, connections=1)
            client = stack.enter_context(bulk.client(self._transport, timeout_s=timeout_s))
            patience = httpx.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S)
            reply = stack.enter_context(client.stream("GET", disk.where(), headers=ACCEPT, timeout=patience))
            if reply.status_code != httpx.codes.OK:
                raise httpx.ReadError(f"the host answers with status {reply.status_code}")
            read_into = reply.extensions[bulk.READ_INTO]
            blocks = Blocks(read_into, size=disk.capacity_bytes, start=start, threads=threads)
            self._blocks = iter(stack.enter_context(blocks))
            stack.callback(self.interrupt)
            self._own = stack.pop_all()

    def until(self, end: int) -> Iterator[tuple[int, Buffer]]:
        """Yield what comes next of the disk, up to `end`."""
        while self.position < end:
            if not self._rest:
                _, self._rest = next(self._blocks)
            part, self._rest = self._rest[: end - self.position], self._rest[end - self.position :]
            self.position += len(part)
            yield self.position - len(part), part

    def interrupt(self) -> None:
        """Break it off: whoever waits for it fails."""
        self._transport.shut_down()

    def close(self) -> None:
        self._own.close()
