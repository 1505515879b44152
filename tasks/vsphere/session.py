"""One session a process and vCenter: logged in at the first use, kept alive, renewed, logged out after the last.

A step borrows it (`borrow`); a flow holds it for its whole length (`hold`), so that its steps share one login.
"""

from __future__ import annotations

import atexit
import logging
import socket
import ssl
import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from pyVim.connect import SmartStubAdapter
from pyVmomi import vim, vmodl
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from tasks import tls
from tasks.errors import AuthenticationFailed, ConnectionFailed, SessionExpired
from tasks.models import Connection, VCenterInfo
from tasks.vsphere.faults import CONNECTION_ERRORS, is_transient, translated

SOAP_TIMEOUT_S = 30
KEEP_ALIVE_S = 300.0  # vCenter ends a session after 30 idle minutes by default
ATTEMPTS = 4
MAX_WAIT_S = 8.0
LONE_HOST = "ha-host"  # the moref of the one host that an ESXi host has in its own inventory

log = logging.getLogger(__name__)


class Closable(Protocol):
    """What ends with a session."""

    def close(self) -> None: ...


T = TypeVar("T")
C = TypeVar("C", bound=Closable)


class Session:
    """A live login to one vCenter or ESXi host. Safe to use from several threads."""

    def __init__(self, connection: Connection) -> None:
        """Log in, once: a wrong password is never tried twice. Raises the classes below ConnectionFailed."""
        self.connection = connection
        self._renewing = threading.Lock()
        self._ended = threading.Event()
        self._companions: dict[Callable[[ssl.SSLContext], Any], Any] = {}
        with translated(connection, "the login"):
            self.tls = tls.context_for(connection)
            self._stub = _stub(connection, self.tls)
            self.content: Any = vim.ServiceInstance("ServiceInstance", self._stub).RetrieveContent()
            self._login()
            self.info = self._described()
        threading.Thread(target=self._keep_alive, name="vcenter-keep-alive", daemon=True).start()

    @property
    def cookie(self) -> str:
        """The session as the HTTP header `Cookie` wants it: `vmware_soap_session=…`. A secret."""
        return str(self._stub.cookie).partition(";")[0]

    def entity(self, kind: type[Any], moref: str) -> Any:
        """Return a managed object by reference, without a round trip."""
        return kind(moref, self._stub)

    def companion(self, kind: Callable[[ssl.SSLContext], C]) -> C:
        """Return the one that `kind` makes of this session's trust; it is closed when the session is."""
        with self._renewing:
            if kind not in self._companions:
                self._companions[kind] = kind(self.tls)
            made: C = self._companions[kind]
            return made

    def call(self, action: str, method: Callable[[], T], *, repeatable: bool = True) -> T:
        """Call a vSphere method; log in again, once, where the session has died.

        repeatable: whether a call that may have arrived may be made again (transient faults, resets).
        `action` completes "vSphere refused …". Raises classes of `tasks.errors`.
        """
        retrying = Retrying(
            retry=retry_if_exception(is_transient),
            stop=stop_after_attempt(ATTEMPTS if repeatable else 1),
            wait=wait_random_exponential(max=MAX_WAIT_S),
            reraise=True,
        )
        with translated(self.connection, action):
            result: T = retrying(self._authenticated, method)
            return result

    def renew(self, stale_cookie: str) -> str:
        """Log in again unless another thread has done so since `stale_cookie`; return the cookie that holds now.

        Raises SessionExpired where the account is no longer let in.
        """
        with self._renewing:
            if self.cookie == stale_cookie:
                try:
                    with translated(self.connection, "a new login"):
                        self._login()
                except AuthenticationFailed as error:  # it was the right password an hour ago
                    raise SessionExpired(host=self.connection.address) from error
                log.warning("session renewed host=%s", self.connection.address)
            return self.cookie

    def close(self) -> None:
        """Log out. A server that cannot be told is logged, not raised: it ends idle sessions itself."""
        self._ended.set()
        for companion in self._companions.values():
            companion.close()
        try:
            self.content.sessionManager.Logout()
        except (vmodl.MethodFault, *CONNECTION_ERRORS) as error:
            log.warning("logout failed host=%s error=%s", self.connection.address, type(error).__name__)
        self._stub.DropConnections()

    def _described(self) -> VCenterInfo:
        """Say which server this is; log out again where it does not say."""
        about = self.content.about
        try:
            identity = about.instanceUuid or self._hardware_uuid()
        except BaseException:
            self.close()
            raise
        return VCenterInfo(
            uuid=identity,
            name=about.fullName,
            version=about.version,
            build=about.build,
            is_vcenter=about.apiType == "VirtualCenter",
        )

    def _hardware_uuid(self) -> str:
        """Return the hardware UUID of a lone ESXi host, which has no instance UUID. One round trip."""
        kind, path = vmodl.query.PropertyCollector, "hardware.systemInfo.uuid"
        wanted = kind.FilterSpec(
            objectSet=[kind.ObjectSpec(obj=self.entity(vim.HostSystem, LONE_HOST))],
            propSet=[kind.PropertySpec(type=vim.HostSystem, pathSet=[path])],
        )
        answer = self.content.propertyCollector.RetrievePropertiesEx([wanted], kind.RetrieveOptions())
        return str(answer.objects[0].propSet[0].val)

    def _authenticated(self, method: Callable[[], T]) -> T:
        cookie = self.cookie
        try:
            return method()
        except vim.fault.NotAuthenticated:
            self.renew(cookie)
            return method()

    def _login(self) -> None:
        self._stub.cookie = ""
        self.content.sessionManager.Login(self.connection.username, self.connection.password.get_secret_value())

    def _keep_alive(self) -> None:
        ping = vim.ServiceInstance("ServiceInstance", self._stub).CurrentTime
        while not self._ended.wait(KEEP_ALIVE_S):
            try:
                self.call("the session to be kept alive", ping)
            except Exception as error:  # noqa: BLE001 - the thread's edge: the next real call meets and reports it
                log.warning("keep-alive failed host=%s error=%s", self.connection.address, error)


def _stub(connection: Connection, context: Any) -> Any:
    """Return a SOAP stub of the newest API version that both sides know. Raises ConnectionFailed for no vCenter."""
    with socket.create_connection((connection.host, connection.port), tls.HANDSHAKE_TIMEOUT_S):
        pass  # pyvmomi asks for the versions without a time-out: an address that swallows packets is found here
    try:
        return SmartStubAdapter(
            host=connection.host, port=connection.port, sslContext=context, httpConnectionTimeout=SOAP_TIMEOUT_S
        )
    except CONNECTION_ERRORS:
        raise
    except Exception as error:  # pyvmomi raises bare Exception where it finds no version list
        raise ConnectionFailed(host=connection.address, why="it answers, but not as a vCenter or ESXi host") from error


@dataclass
class _Lent:
    session: Session
    borrowers: set[Hashable] = field(default_factory=set)


_pool: dict[Connection, _Lent] = {}
_pool_lock = threading.Lock()


def hold(connection: Connection, borrower: Hashable) -> Session:
    """Lend the process's session with `connection` to `borrower` until `release`; log in for the first one."""
    with _pool_lock:
        if connection not in _pool:
            _pool[connection] = _Lent(Session(connection))
        lent = _pool[connection]
        lent.borrowers.add(borrower)
        return lent.session


def release(connection: Connection, borrower: Hashable) -> None:
    """Take the session back from `borrower`, who need not have it; log out after the last one."""
    with _pool_lock:
        lent = _pool.get(connection)
        if lent is None:
            return
        lent.borrowers.discard(borrower)
        if not lent.borrowers:
            _pool.pop(connection).session.close()


@contextmanager
def borrow(connection: Connection) -> Iterator[Session]:
    """Lend the process's session with `connection` for the block."""
    borrower = object()
    session = hold(connection, borrower)
    try:
        yield session
    finally:
        release(connection, borrower)


@atexit.register
def _log_out_everywhere() -> None:
    with _pool_lock:
        while _pool:
            _pool.popitem()[1].session.close()
