"""Reading a flat extent over HTTPS: `https://<vCenter or host>/folder/<path>?dcPath=<dc>&dsName=<ds>`, by ranges.

The session belongs to somebody else: a cookie is asked for, and a new one when it has died. What the road
cannot read is named on entering, with the road that would. Large requests go to the ESXi host itself where it lets us.
"""

from __future__ import annotations

import logging
import re
import ssl
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from typing import NamedTuple, NoReturn, Self
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
from tasks.models import SECTOR_BYTES, Connection, Extent, ServiceTicket, Value, VirtualDisk, VirtualMachine
from tasks.reader import TransientFault
from tasks.transports import bulk, ranges
from tasks.transports.host import HostRefuses, HostRoad

TIMEOUT_S = 10.0  # of connecting, of a read and of a write: longer than a stun of the VM, shorter than patience
BUFFER_BYTES = 4 * 1024 * 1024  # of which each is written by one call; a kill loses one a connection
REQUEST_BYTES = 32 * 1024 * 1024
TICKET_BYTES = 1024 * 1024 * 1024  # of a request that is worth a ticket
PROBE_ATTEMPTS = 8  # a busy vCenter answers 503 for seconds, and a run that it ends here was not worth beginning
PROBE_WAIT_S = 1.0  # doubles, at random
LONGEST_RETRY_AFTER_S = 30.0
TRANSIENT = (408, 429, 500, 502, 503, 504)
PASSING = (401, 403, 404, 408, 429, 502, 503, 504)  # that mean the same, however much is asked for at once

OTHER_ROADS = "The roads vddk and nbd read such a disk (--transport vddk, with VMware's VDDK)"
UNLOCK = (
    "A host keeps a running VM's disks to itself: copy from a snapshot, or power the VM off; where the base under a "
    "snapshot is locked too (ESXi 8 on VMFS), power it off, or take the road vddk (--transport vddk)"
)
UNLOCK_FILE = (
    "A host keeps the files of a running VM to itself: download with a snapshot (--snapshot), power the VM off, or "
    "leave the file out (--exclude-glob)"
)
CHANGING = "If it changes while the VM runs, power the VM off, or leave it out (--exclude-glob); then run again"

Parts = Generator[tuple[int, memoryview], None, None]

_log = logging.getLogger(__name__)
_ANY_PATH = re.compile(r"\[(?P<datastore>.+?)\] ?(?P<path>.+)", re.DOTALL)
_DATASTORE_PATH = re.compile(r"\[(?P<datastore>.+?)\] ?(?P<path>.+)\.vmdk", re.DOTALL)
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


class FolderDisk(Value):
    """A disk whose bytes lie in one flat file.

    datacenter_path: inventory path as vSphere stores it (`/Folder/DC%2f1`). datastore_path: `[ds] dir/x.vmdk`.
    host_name: of an ESXi host that has the datastore; "" where that is not known.
    """

    connection: Connection
    datacenter_path: str
    datastore_path: str
    capacity_bytes: int
    host_name: str = ""

    @classmethod
    def of(cls, disk: VirtualDisk, *, vm: VirtualMachine, connection: Connection) -> Self:
        """Return where the bytes of a disk of `vm` lie."""
        return cls(
            connection=connection,
            datacenter_path=vm.datacenter_path,
            datastore_path=disk.datastore_path,
            capacity_bytes=disk.capacity_bytes,
            host_name=vm.host_name,
        )

    def flat_url(self) -> httpx.URL:
        """Return the URL of the file, every name quoted once. Raises UnsupportedDisk for a path that is of no disk."""
        datastore, path = self._file()
        query = f"dcPath={quote(self.datacenter_path.strip('/'), safe='')}&dsName={quote(datastore, safe='')}"
        return httpx.URL(f"https://{self.connection.address}/folder/{quote(path)}?{query}")

    def url_at_host(self) -> httpx.URL:
        """Return the URL of the file at the ESXi host, which knows no datacenters."""
        datastore, path = self._file()
        host = f"[{self.host_name}]" if ":" in self.host_name else self.host_name
        return httpx.URL(f"https://{host}/folder/{quote(path)}?dsName={quote(datastore, safe='')}")

    def first_extent(self) -> Extent:
        """Return what is asked for on entering. Of a disk, no more than a sector: perhaps little of it is copied."""
        return Extent(start=0, length=min(SECTOR_BYTES, self.capacity_bytes))

    def locked(self) -> FileLocked:
        """Return what a file is that no request opens."""
        return FileLocked(path=f"{self.datastore_path} (its flat file)", remedy=UNLOCK)

    def missing(self) -> Hyper2KvmError:
        """Return what "not found" means."""
        return self.unfit("it has no flat file (as on vSAN and vVol, or sparse), or it was moved or deleted")

    def unfit(self, reason: str) -> Hyper2KvmError:
        """Return what a reply means that is not of the file expected."""
        return UnsupportedDisk(disk=self.datastore_path, reason=reason, remedy=OTHER_ROADS)

    def _file(self) -> tuple[str, str]:
        """Return datastore and path of the file that is read: of `[ds] dir/x.vmdk`, `x-flat.vmdk`."""
        match = _DATASTORE_PATH.fullmatch(self.datastore_path)
        if not match:
            raise self.unfit("that is no datastore path of a .vmdk")
        return match["datastore"], f"{match['path']}-flat.vmdk"


class FolderFile(FolderDisk):
    """Any file of a datastore, read as it is; its size is `capacity_bytes`. `begun`: some of it may be here already."""

    begun: bool = False

    def first_extent(self) -> Extent:
        """Return all of a file, where one request can have it: most are small, and every round trip counts."""
        if self.begun or self.capacity_bytes > REQUEST_BYTES:
            return super().first_extent()
        return Extent(start=0, length=self.capacity_bytes)

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

    def _file(self) -> tuple[str, str]:
        """Return datastore and path of the file itself."""
        match = _ANY_PATH.fullmatch(self.datastore_path)
        if not match:
            raise self.unfit("that is no datastore path")
        return match["datastore"], match["path"]


class FolderReader:
    """A flat extent behind `/folder`. See `tasks.reader.Reader`.

    cookie: returns the session's cookie (`vmware_soap_session="…"`). renew: given a cookie that was refused, returns
    one that lives; several threads may call it at once. acquire: returns a ticket for one GET of a URL of an ESXi host;
    None where there are no tickets. shared: what readers of this server share; None: it has its own. Entering asks for
    the disk's `first_extent`, and raises FileLocked, UnsupportedDisk, PermissionMissing, SessionExpired or another
    ConnectionFailed; the reply is what `stream` then gives of that extent.

    A large file is asked for in a few requests of the host itself, with a ticket each; what is smaller, and all else
    once the host has refused, goes by the cookie. `road` is `host` or `folder` accordingly.
    Rests on "HTTP Access to vSphere Server Files", vSphere Web Services SDK Programming Guide.
    """

    road = "folder"

    def __init__(
        self,
        disk: FolderDisk,
        *,
        cookie: Callable[[], str],
        renew: Callable[[str], str],
        acquire: Callable[[str], ServiceTicket] | None = None,
        shared: bulk.Shared | None = None,
        depth: int | None = None,
        timeout_s: float = TIMEOUT_S,
        ticket_bytes: int = TICKET_BYTES,
    ) -> None:
        self.size = disk.capacity_bytes
        self.source = disk.datastore_path
        self.depth = depth or disk.connection.connections
        self.preferred_extent_bytes = REQUEST_BYTES
        self.road_reason = ""
        self._disk, self._url = disk, disk.flat_url()
        self._cookie, self._renew, self._acquire = cookie, renew, acquire
        self._ticket_bytes = ticket_bytes
        self._host: HostRoad | None = None
        self._begun: list[_Begun] = []
        self._shared, self._own = shared, ExitStack()
        self._timeout_s = timeout_s
        self._extensions = {"timeout": httpx.Timeout(timeout_s).as_dict()}

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            if not self._shared:
                self._shared = bulk.Shared(tls.context_for(self._disk.connection))
                stack.callback(self._shared.close)
            self._transport = bulk.BulkTransport(self._shared, connections=self.depth)
            stack.callback(self._transport.close)
            stack.callback(self._take_begun, None)
            self._probe()
            self._look_for_host()
            if self._host:
                stack.callback(self._host.close)
            self._own = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            self._own.close()
        except (OSError, httpx.HTTPError) as error:
            _log.warning("closing a source failed source=%r error=%s", self.source, type(error).__name__)

    def stream(self, extent: Extent) -> Parts:
        """Yield the bytes of `extent` in order, by one request. Raises TransientFault, or as on entering."""
        begun = self._take_begun(extent)
        with closing(begun.rest if begun else self._ask(extent)) as rest:
            if begun:
                yield begun.first
            yield from rest

    def interrupt(self) -> None:
        """Shut every connection down: what waits for one fails at once, with TransientFault."""
        self._transport.shut_down()
        if self._host:
            self._host.shut_down()

    def _ask(self, extent: Extent) -> Parts:
        """Yield what one request for `extent` brings."""
        assert self._shared
        offset = extent.start
        with self._errors(), self._shared.buffers.memory(BUFFER_BYTES) as buffer, ExitStack() as stack:
            response = self._reply(extent, stack)
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

    def stream_scattered(self, extents: Sequence[Extent]) -> Generator[tuple[int, memoryview], None, None]:
        """Yield the bytes of `extents` in order, many by one request where the server does that. Raises as `stream`."""
        assert self._shared
        for group in ranges.groups(extents):
            if len(group) > 1 and not self._shared.one_range_each:
                try:
                    yield from self._parts(group)
                    continue
                except ranges.OneEach as refusal:
                    self._ask_one_by_one(str(refusal))
            for extent in group:
                yield from self.stream(extent)

    def _parts(self, extents: Sequence[Extent]) -> Iterator[tuple[int, memoryview]]:
        """Yield the bytes of `extents` by one request. Raises ranges.OneEach, before anything is yielded."""
        assert self._shared
        most = ranges.body_bytes(extents)
        with self._errors(), self._shared.bodies.memory(ranges.BODY_BYTES) as body:
            with self._get(ranges.asked(extents), refuse=self._refuse_several) as response:
                boundary = _boundary(response)
                length, failure = _fill(memoryview(body)[:most], response)
            if failure:
                raise failure
            if length == most:
                raise ranges.OneEach("it sends more than the ranges that it was asked for")
            try:
                parts = ranges.parts_of(body, length, boundary, extents, size=self.size)
            except ranges.FalseParts as error:
                raise self._disk.unfit(str(error)) from error
            self._shared.several_ranges = True
            yield from parts

    def _refuse_several(self, response: httpx.Response) -> None:
        """Raise OneEach for what a server that does not do several ranges may answer, until it has once done it."""
        assert self._shared
        status = response.status_code
        if not self._shared.several_ranges and status >= httpx.codes.BAD_REQUEST and status not in PASSING:
            raise ranges.OneEach(f"it answers several ranges with status {status}")
        self._refuse(response)

    def _ask_one_by_one(self, reason: str) -> None:
        assert self._shared
        if not self._shared.one_range_each:
            self._shared.one_range_each = reason
            _log.warning("one range a request from now on source=%r reason=%r", self.source, reason)
        self.road_reason = f"{self.road_reason}; one range a request: {reason}"

    def _look_for_host(self) -> None:
        """Find out whether the host itself can be asked, if the file is worth it; plan for few large requests then."""
        if not self._acquire or not self._disk.host_name:
            self._by_cookie("no host tickets: they are switched off, or this is a host itself")
        elif self.size < self._ticket_bytes:
            self._by_cookie(f"smaller than the {self._ticket_bytes} bytes that are worth a host ticket")
        else:
            url = self._disk.url_at_host()
            try:
                self._host = HostRoad(url, acquire=self._acquire, connections=self.depth, timeout_s=self._timeout_s)
            except HostRefuses as refusal:
                self._by_cookie(str(refusal))
            else:
                self.road, self.road_reason = "host", f"{self._host.address} itself, a ticket a request"
                self.preferred_extent_bytes = _share(self.size, min(self.depth, self.size // self._ticket_bytes))

    def _by_cookie(self, reason: str) -> None:
        self.road, self.road_reason = "folder", reason

    def _reply(self, extent: Extent, stack: ExitStack) -> httpx.Response:
        """Ask the host for a large extent; ask by the cookie for others, and for all once the host has refused."""
        if self.road == "host" and self._host and extent.length >= self._ticket_bytes:
            try:
                return stack.enter_context(self._host.get(extent))
            except HostRefuses as refusal:
                _log.warning("the host is left for the vCenter source=%r reason=%r", self.source, str(refusal))
                self._by_cookie(str(refusal))
        return stack.enter_context(self._get(ranges.asked([extent]), refuse=self._refuse))

    def _probe(self) -> None:
        """Ask for the first bytes. A busy server is asked a few times; a file that no request opens is named."""
        patience = Retrying(
            retry=retry_if_exception_type(TransientFault) & retry_if_not_exception_type(_ServerError),
            stop=stop_after_attempt(PROBE_ATTEMPTS) | stop_after_delay(4 * self._timeout_s),
            wait=wait_random_exponential(PROBE_WAIT_S, 5.0),
            reraise=True,
        )
        try:
            patience(self._begin)
        except _ServerError as fault:
            raise self._disk.locked() from fault
        except TransientFault as fault:
            raise ConnectionFailed(host=self._disk.connection.address, why=str(fault)) from fault

    def _begin(self) -> None:
        """Send the first request; leave the rest of its reply to `stream` where that is all of the file."""
        extent = self._disk.first_extent()
        rest = self._ask(extent)
        first = next(rest)
        if extent.length == self.size:
            self._begun.append(_Begun(extent, first, rest))
        else:
            for _ in rest:
                pass

    def _take_begun(self, extent: Extent | None) -> _Begun | None:
        """Return what entering asked for, if that is `extent` and nobody had it yet; end it if it is another."""
        with suppress(IndexError):  # several threads may look
            begun = self._begun.pop()
            if begun.extent == extent:
                return begun
            begun.rest.close()
        return None

    @contextmanager
    def _get(self, asked: str, *, refuse: Callable[[httpx.Response], None]) -> Iterator[httpx.Response]:
        """Send the request, with a new session where the old one has died; yield the reply that `refuse` lets pass."""
        cookie = self._cookie()
        with self._send(asked, cookie) as response:
            if response.status_code != httpx.codes.UNAUTHORIZED:
                refuse(response)
                yield response
                return
        fresh = self._fresh(cookie)
        with self._send(asked, fresh) as response:
            refuse(response)
            yield response

    def _fresh(self, stale: str) -> str:
        """Return a cookie that lives. A login that worked before and is refused now has another cause than a typo."""
        _log.info("session refused, asking for a new one source=%r", self.source)
        try:
            return self._renew(stale)
        except AuthenticationFailed as error:
            raise SessionExpired(host=self._disk.connection.address) from error

    @contextmanager
    def _send(self, asked: str, cookie: str) -> Iterator[httpx.Response]:
        headers = {
            "Range": asked,
            "Cookie": cookie.partition(";")[0].strip(),
            "Accept-Encoding": "identity",
        }
        # past httpx.Client: its redirects, cookies and authentication are a third of what a small request costs
        request = httpx.Request("GET", self._url, headers=headers, extensions=self._extensions)
        response = self._transport.handle_request(request)
        try:
            yield response
        finally:
            response.close()

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


class _Begun(NamedTuple):
    """A request that was sent on entering: what has come, and all that is to come."""

    extent: Extent
    first: tuple[int, memoryview]
    rest: Parts


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


def _boundary(response: httpx.Response) -> bytes:
    """Return what is between the parts of a reply. Raises OneEach for another reply than one of parts."""
    if response.status_code != httpx.codes.PARTIAL_CONTENT:
        raise ranges.OneEach(f"it answers several ranges with status {response.status_code}")
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise ranges.OneEach(f"it encodes several ranges ({response.headers['Content-Encoding']})")
    return ranges.boundary_of(response.headers.get("Content-Type", ""))


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


def _share(size: int, shares: int) -> int:
    """Return the size of equal contiguous shares, in whole buffers; a rest, smaller than any, may be left."""
    return size // shares // BUFFER_BYTES * BUFFER_BYTES


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
