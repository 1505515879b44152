"""Reading a flat extent over HTTPS: `https://<vCenter or host>/folder/<path>?dcPath=<dc>&dsName=<ds>`, by ranges.

The session belongs to somebody else: a cookie is asked for, and a new one when it has died. What the road
cannot read is named on entering, with the road that would.
"""

from __future__ import annotations

import logging
import re
import ssl
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import NoReturn, Self
from urllib.parse import quote

import httpx
from tenacity import (
    Retrying,
    retry_if_exception_type,
    retry_if_not_exception_type,
    stop_after_attempt,
    stop_after_delay,
    wait_random_exponential,
)

from tasks import tls
from tasks.errors import (
    AuthenticationFailed,
    ConnectionFailed,
    FileLocked,
    FileMissing,
    FileUnfit,
    Hyper2KvmError,
    PermissionMissing,
    SessionExpired,
    UnsupportedDisk,
)
from tasks.models import SECTOR_BYTES, Connection, Extent, Value, VirtualDisk, VirtualMachine
from tasks.reader import TransientFault, aligned_buffer
from tasks.transports import bulk

TIMEOUT_S = 10.0  # of connecting, of a read and of a write: longer than a stun of the VM, shorter than patience
BUFFER_BYTES = 1024 * 1024  # four leaves
DEPTH = 4  # connections: one gave 445 Mbit/s from an ESXi host, eight 730
PROBE_ATTEMPTS = 4
PROBE_WAIT_S = 1.0  # doubles, at random
LONGEST_RETRY_AFTER_S = 30.0
TRANSIENT = (408, 429, 500, 502, 503, 504)

OTHER_ROADS = "The roads vddk and nfc_lease, not built yet, will read such a disk"
UNLOCK = (
    "A host keeps a running VM's disks to itself: copy from a snapshot, or power the VM off; where the base under a "
    "snapshot is locked too (ESXi 8 on VMFS), power it off, or wait for the roads vddk and nfc_lease"
)
UNLOCK_FILE = (
    "A host keeps the files of a running VM to itself: download with a snapshot (--snapshot), power the VM off, or "
    "leave the file out (--exclude-glob)"
)
CHANGING = "If it changes while the VM runs, power the VM off, or leave it out (--exclude-glob); then run again"

_log = logging.getLogger(__name__)
_ANY_PATH = re.compile(r"\[(?P<datastore>.+?)\] ?(?P<path>.+)", re.DOTALL)
_DATASTORE_PATH = re.compile(r"\[(?P<datastore>.+?)\] ?(?P<path>.+)\.vmdk", re.DOTALL)
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


class FolderDisk(Value):
    """A disk whose bytes lie in one flat file.

    datacenter_path: inventory path as vSphere stores it (`/Folder/DC%2f1`). datastore_path: `[ds] dir/x.vmdk`.
    """

    connection: Connection
    datacenter_path: str
    datastore_path: str
    capacity_bytes: int

    @classmethod
    def of(cls, disk: VirtualDisk, *, vm: VirtualMachine, connection: Connection) -> Self:
        """Return where the bytes of a disk of `vm` lie."""
        return cls(
            connection=connection,
            datacenter_path=vm.datacenter_path,
            datastore_path=disk.datastore_path,
            capacity_bytes=disk.capacity_bytes,
        )

    def flat_url(self) -> httpx.URL:
        """Return the URL of `x-flat.vmdk`, every name quoted once. Raises UnsupportedDisk for another path."""
        match = _DATASTORE_PATH.fullmatch(self.datastore_path)
        if not match:
            raise UnsupportedDisk(
                disk=self.datastore_path, reason="that is no datastore path of a .vmdk", remedy=OTHER_ROADS
            )
        return self._url(match["datastore"], f"{match['path']}-flat.vmdk")

    def locked(self) -> FileLocked:
        """Return what a file is that no request opens."""
        return FileLocked(path=f"{self.datastore_path} (its flat file)", remedy=UNLOCK)

    def missing(self) -> Hyper2KvmError:
        """Return what "not found" means."""
        return self.unfit("it has no flat file (as on vSAN and vVol, or sparse), or it was moved or deleted")

    def unfit(self, reason: str) -> Hyper2KvmError:
        """Return what a reply means that is not of the file expected."""
        return UnsupportedDisk(disk=self.datastore_path, reason=reason, remedy=OTHER_ROADS)

    def _url(self, datastore: str, path: str) -> httpx.URL:
        where = f"dcPath={quote(self.datacenter_path.strip('/'), safe='')}&dsName={quote(datastore, safe='')}"
        return httpx.URL(f"https://{self.connection.address}/folder/{quote(path)}?{where}")


class FolderFile(FolderDisk):
    """Any file of a datastore, read as it is; its size is `capacity_bytes`."""

    def flat_url(self) -> httpx.URL:
        """Return the URL of the file itself. Raises FileUnfit for what is no datastore path."""
        match = _ANY_PATH.fullmatch(self.datastore_path)
        if not match:
            raise self.unfit("that is no datastore path")
        return self._url(match["datastore"], match["path"])

    def locked(self) -> FileLocked:
        """Return what a file is that no request opens."""
        return FileLocked(path=self.datastore_path, remedy=UNLOCK_FILE)

    def missing(self) -> Hyper2KvmError:
        """Return what "not found" means."""
        return FileMissing(
            path=self.datastore_path,
            why="it was there when the folder was listed, and was moved, renamed or deleted since",
            remedy="Run again; leave it out (--exclude-glob) if it comes and goes",
        )

    def unfit(self, reason: str) -> Hyper2KvmError:
        """Return what a reply means that is not of the file expected."""
        return FileUnfit(path=self.datastore_path, reason=reason, remedy=CHANGING)


class FolderReader:
    """A flat extent behind `/folder`. See `tasks.reader.Reader`.

    cookie: returns the session's cookie (`vmware_soap_session="…"`). renew: given a cookie that was refused, returns
    one that lives; several threads may call it at once. Entering asks for one sector, and raises FileLocked,
    UnsupportedDisk, PermissionMissing, SessionExpired or another ConnectionFailed.
    Rests on "HTTP Access to vSphere Server Files", vSphere Web Services SDK Programming Guide.
    """

    preferred_extent_bytes = 32 * 1024 * 1024
    road = "folder"

    def __init__(
        self,
        disk: FolderDisk,
        *,
        cookie: Callable[[], str],
        renew: Callable[[str], str],
        depth: int = DEPTH,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self.size = disk.capacity_bytes
        self.source = disk.datastore_path
        self.depth = depth
        self._disk, self._url = disk, disk.flat_url()
        self._cookie, self._renew = cookie, renew
        self._timeout_s = timeout_s
        self._buffers = threading.local()

    def __enter__(self) -> Self:
        context = tls.context_for(self._disk.connection)
        self._transport = bulk.BulkTransport(context, connections=self.depth)
        self._client = bulk.client(self._transport, timeout_s=self._timeout_s)
        try:
            self._probe()
        except BaseException:
            self._client.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            self._client.close()
        except (OSError, httpx.HTTPError) as error:
            _log.warning("closing a source failed source=%r error=%s", self.source, type(error).__name__)

    def stream(self, extent: Extent) -> Generator[tuple[int, memoryview], None, None]:
        """Yield the bytes of `extent` in order, by one request. Raises TransientFault, or as on entering."""
        offset, buffer = extent.start, self._buffer()
        with self._get(extent) as response:
            _check_range(response, self._disk, extent)
            while offset < extent.end:
                # up to the next multiple of the buffer's length, so that whole leaves come whole
                count, failure = _fill(buffer[: BUFFER_BYTES - offset % BUFFER_BYTES], response)
                if offset + count > extent.end:
                    raise self._disk.unfit("the server sends more than it was asked for")
                if count:
                    yield offset, buffer[:count]
                offset += count
                if failure:
                    raise failure
                if not count:
                    break
        if offset != extent.end:
            raise TransientFault(f"the reply ended at byte {offset} of {extent.end}")

    def _buffer(self) -> memoryview:
        """Return this thread's own buffer."""
        if not hasattr(self._buffers, "mine"):
            self._buffers.mine = aligned_buffer(BUFFER_BYTES)
        return self._buffers.mine  # type: ignore[no-any-return]

    def interrupt(self) -> None:
        """Shut every connection down: what waits for one fails at once, with TransientFault."""
        self._transport.shut_down()

    def _probe(self) -> None:
        """Ask for the first sector. A busy server is asked a few times; a file that no request opens is named."""
        sector = Extent(start=0, length=min(SECTOR_BYTES, self.size))
        patience = Retrying(
            retry=retry_if_exception_type(TransientFault) & retry_if_not_exception_type(_ServerError),
            stop=stop_after_attempt(PROBE_ATTEMPTS) | stop_after_delay(self._timeout_s),
            wait=wait_random_exponential(PROBE_WAIT_S, 5.0),
            reraise=True,
        )
        try:
            patience(lambda: [None for _ in self.stream(sector)])
        except _ServerError as fault:
            raise self._disk.locked() from fault
        except TransientFault as fault:
            raise ConnectionFailed(host=self._disk.connection.address, why=str(fault)) from fault

    @contextmanager
    def _get(self, extent: Extent) -> Iterator[httpx.Response]:
        """Send the request, with a new session where the old one has died; yield the reply that is no refusal."""
        cookie = self._cookie()
        with self._errors(), self._send(extent, cookie) as response:
            if response.status_code != httpx.codes.UNAUTHORIZED:
                self._refuse(response)
                yield response
                return
        fresh = self._fresh(cookie)
        with self._errors(), self._send(extent, fresh) as response:
            self._refuse(response)
            yield response

    def _fresh(self, stale: str) -> str:
        """Return a cookie that lives. A login that worked before and is refused now has another cause than a typo."""
        _log.info("session refused, asking for a new one source=%r", self.source)
        try:
            return self._renew(stale)
        except AuthenticationFailed as error:
            raise SessionExpired(host=self._disk.connection.address) from error

    @contextmanager
    def _send(self, extent: Extent, cookie: str) -> Iterator[httpx.Response]:
        headers = {"Range": f"bytes={extent.start}-{extent.end - 1}", "Cookie": cookie.partition(";")[0].strip()}
        with self._client.stream("GET", self._url, headers=headers) as response:
            yield response

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Map what httpx raises: a certificate that does not verify is a class of ours, all else may pass."""
        try:
            yield
        except httpx.TransportError as error:
            certificate = _certificate_error(error)
            if certificate:
                raise tls.untrusted(self._disk.connection, certificate) from error
            raise TransientFault(f"{type(error).__name__}: {error}".rstrip(": ")) from error

    def _refuse(self, response: httpx.Response) -> None:
        """Raise what a status other than 200, 206 and 416 means."""
        status = response.status_code
        host, datastore = self._disk.connection.address, self.source.partition("]")[0].lstrip("[")
        if status == httpx.codes.UNAUTHORIZED:
            raise SessionExpired(host=host)
        if status == httpx.codes.FORBIDDEN:
            privilege = "Datastore.FileManagement (and Datastore.Browse)"
            raise PermissionMissing(privilege=privilege, object=f"datastore {datastore}")
        if status == httpx.codes.NOT_FOUND:
            raise self._disk.missing()
        if status == httpx.codes.INTERNAL_SERVER_ERROR:
            raise _ServerError("status 500")
        if status in TRANSIENT:
            raise TransientFault(f"status {status}", wait_s=_retry_after(response))
        if response.is_redirect:
            raise ConnectionFailed(host=host, why=f"it redirects elsewhere (status {status}), which is not followed")
        if status not in (httpx.codes.OK, httpx.codes.PARTIAL_CONTENT, httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE):
            raise ConnectionFailed(host=host, why=f"status {status} for {self.source}")


class _ServerError(TransientFault):
    """A bare 500: on the first request a file that is locked, later perhaps something that passes."""


def _fill(view: memoryview, response: httpx.Response) -> tuple[int, httpx.TransportError | None]:
    """Fill `view` from a reply's body; return how much came, and what ended it early if anything failed."""
    read_into, filled = response.extensions[bulk.READ_INTO], 0
    try:
        while filled < len(view) and (count := read_into(view[filled:])):
            filled += count
    except httpx.TransportError as error:
        return filled, error
    return filled, None


def _check_range(response: httpx.Response, disk: FolderDisk, extent: Extent) -> None:
    """Raise UnsupportedDisk unless the reply is exactly what was asked for, of a file of the disk's capacity."""
    match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    if response.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
        _refused(disk, f"its file is shorter than the {disk.capacity_bytes} bytes expected")
    if response.status_code != httpx.codes.PARTIAL_CONTENT or not match:
        _refused(disk, "the server ignores Range requests")
    if response.headers.get("Content-Encoding", "identity") != "identity":
        _refused(disk, f"the server encodes what it sends ({response.headers['Content-Encoding']})")
    first, last, total = map(int, match.groups())
    if total != disk.capacity_bytes:
        _refused(disk, f"its file has {total} bytes, not the {disk.capacity_bytes} expected")
    if (first, last) != (extent.start, extent.end - 1):
        _refused(disk, f"the server sent bytes {first}-{last} for {extent.start}-{extent.end - 1}")


def _refused(disk: FolderDisk, reason: str) -> NoReturn:
    raise disk.unfit(reason)


def _retry_after(response: httpx.Response) -> float:
    """Return the seconds of a Retry-After header, bounded; its other form, a date, counts as none."""
    text = response.headers.get("Retry-After", "")
    return min(float(text), LONGEST_RETRY_AFTER_S) if text.isdecimal() else 0.0


def _certificate_error(error: BaseException) -> ssl.SSLCertVerificationError | None:
    cause: BaseException | None = error
    while cause:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return cause
        cause = cause.__cause__ or cause.__context__
    return None
