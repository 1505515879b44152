"""The one place where what vSphere says went wrong becomes one of our errors: by class, never by message text."""

from __future__ import annotations

import http.client
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pyVmomi import vim, vmodl

from tasks import tls
from tasks.errors import (
    AuthenticationFailed,
    ConnectionFailed,
    Hyper2KvmError,
    LicenceForbids,
    PermissionMissing,
    SessionExpired,
    VsphereFault,
)
from tasks.models import Connection

# A new call may survive these; vSphere API reference, each fault's page.
TRANSIENT_FAULTS = (vim.fault.TaskInProgress, vmodl.fault.HostCommunication, vim.fault.HostConnectFault)
CONNECTION_ERRORS = (OSError, http.client.HTTPException)


def is_transient(error: BaseException) -> bool:
    """Whether a call that failed with `error`, and can be repeated, should be."""
    if isinstance(error, ssl.SSLError):
        return False
    return isinstance(error, (*TRANSIENT_FAULTS, *CONNECTION_ERRORS))


@contextmanager
def translated(connection: Connection, action: str) -> Iterator[None]:
    """Raise what goes wrong in the block as a class of `tasks.errors`. `action` completes "vSphere refused …"."""
    try:
        yield
    except (vmodl.MethodFault, *CONNECTION_ERRORS) as error:
        raise as_ours(error, connection=connection, action=action) from error


def caused_by(error: BaseException, kind: type[Exception]) -> bool:
    """Whether an error of ours was made of a vSphere fault of that class."""
    return isinstance(error.__cause__, kind)


def as_ours(error: Exception, *, connection: Connection, action: str) -> Hyper2KvmError:
    """Return the error of ours for a fault of vSphere or an error of the connection to it."""
    host = connection.address
    match error:
        case vim.fault.InvalidLogin():
            return AuthenticationFailed(host=host, username=connection.username)
        case vim.fault.NotAuthenticated():
            return SessionExpired(host=host)
        case vim.fault.NoPermission():
            return PermissionMissing(privilege=error.privilegeId, object=_reference(error.object), action=action)
        case vim.fault.RestrictedVersion():
            return LicenceForbids(host=host, action=action)
        case vmodl.MethodFault():
            return VsphereFault(action=action, fault=describe(error), remedy="See the VM's tasks and events in vSphere")
        case ssl.SSLCertVerificationError():
            return tls.untrusted(connection, error)
        case OSError():
            return ConnectionFailed(host=host, why=tls.reason(error))
        case _:
            return ConnectionFailed(host=host, why=f"{type(error).__name__} while trying {action}")


def describe(fault: Any) -> str:
    """Return a fault, and the messages it carries, as `Class: message; message`."""
    messages = [fault.msg, *(entry.message for entry in fault.faultMessage or ())]
    said = "; ".join(dict.fromkeys(message.strip() for message in messages if message and message.strip()))
    name = type(fault).__name__.rpartition(".")[2]
    return f"{name}: {said}" if said else name


def _reference(entity: Any) -> str:
    return f"{type(entity).__name__.rpartition('.')[2]} {entity._moId}" if entity is not None else "the inventory root"
