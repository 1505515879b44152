"""Service tickets: what an ESXi host lets one request in by, instead of a login there. No request is made here.

Rests on SessionManager.AcquireGenericServiceTicket, vSphere Web Services API.
"""

from __future__ import annotations

import ssl
from typing import Any, Literal

from pydantic import SecretStr
from pyVmomi import vim

from tasks import tls
from tasks.models import ServiceTicket, split_address
from tasks.vsphere.session import Session

METHODS = {"GET": "httpGet"}  # SessionManager.HttpServiceRequestSpec.Method


def acquire(session: Session, url: str, *, method: Literal["GET"] = "GET") -> ServiceTicket:
    """Return a ticket for one request of `url`, an address of an ESXi host below this vCenter. One round trip.

    It names where it can be spent, which may be another address than the URL's. Raises PermissionMissing,
    VsphereFault, ….
    """
    spec = vim.SessionManager.HttpServiceRequestSpec(method=METHODS[method], url=url)
    manager = session.content.sessionManager
    ticket = session.call("a ticket for the ESXi host", lambda: manager.AcquireGenericServiceTicket(spec))
    host, port = split_address(ticket.hostName or url)
    return ServiceTicket(id=SecretStr(ticket.id), host=host, port=port or 443, thumbprint=_thumbprint(ticket))


def _thumbprint(ticket: Any) -> str | None:
    """Return the thumbprint of the host's certificate: the strongest of the three ways in which servers say it."""
    if ticket.sslCertificate:  # 9.0
        return tls.thumbprint_of(ssl.PEM_cert_to_DER_cert(ticket.sslCertificate), like="SHA-256")
    said = [each.thumbprint for each in ticket.certThumbprintList or ()]  # 7.0.3
    return max([*said, ticket.sslThumbprint], key=lambda text: len(text or ""), default=None)
