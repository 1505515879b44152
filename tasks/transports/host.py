"""The ESXi host's own `/folder`: a ticket a request, over connections that its certificate is pinned on.

It is a way around the vCenter, which passes every byte through itself otherwise. Whatever goes wrong on it ends it,
with the reason; the vCenter's own road is still there then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx
from pydantic import SecretStr

from tasks import tls
from tasks.errors import Hyper2KvmError
from tasks.models import Connection, Extent, ServiceTicket, Trust
from tasks.transports import bulk


class HostRefuses(Exception):
    """The host, or who gives tickets for it, does not let us read: why, in words."""


class HostRoad:
    """One file at an ESXi host, by whole requests of which each needs a ticket of its own.

    url: of the file at the host. acquire: returns a ticket for one GET of it. Raises HostRefuses where there is no
    ticket, where it does not say which certificate to expect, or where the host cannot be reached or shows another.
    """

    def __init__(
        self, url: httpx.URL, *, acquire: Callable[[str], ServiceTicket], connections: int, timeout_s: float
    ) -> None:
        self._url, self._acquire = url, acquire
        ticket = self._ticket()  # which host it is, and how it is known, only a ticket says; this one is let lapse
        self._server = (ticket.host, ticket.port, ticket.thumbprint)
        self.address = self._connection().address
        if not ticket.thumbprint:
            raise HostRefuses(f"the ticket for {self.address} does not say which certificate to expect")
        try:
            context = tls.context_for(self._connection())
        except Hyper2KvmError as error:
            raise HostRefuses(error.cause) from error
        self._shared = bulk.Shared(context)
        self._transport = bulk.BulkTransport(self._shared, connections=connections)
        self._client = bulk.client(self._transport, timeout_s=timeout_s)

    @contextmanager
    def get(self, extent: Extent) -> Iterator[httpx.Response]:
        """Ask for `extent` with a ticket that nothing else was asked with; yield a reply of status 206."""
        ticket = self._ticket()
        if (ticket.host, ticket.port, ticket.thumbprint) != self._server:
            raise HostRefuses(f"a new ticket names another server than {self.address}")
        headers = {
            "Range": f"bytes={extent.start}-{extent.end - 1}",
            "Cookie": f"vmware_cgi_ticket={ticket.id.get_secret_value()}",
        }
        request = self._client.build_request("GET", self._at_host(), headers=headers)
        try:
            response = self._client.send(request, stream=True)
        except httpx.TransportError as error:
            raise HostRefuses(f"{self.address}: {type(error).__name__}: {error}".rstrip(": ")) from error
        try:
            if response.status_code != httpx.codes.PARTIAL_CONTENT:
                raise HostRefuses(f"{self.address} answers with status {response.status_code}")
            yield response
        finally:
            response.close()

    def close(self) -> None:
        self._client.close()
        self._shared.close()

    def shut_down(self) -> None:
        """Wake every thread that waits for the host."""
        self._transport.shut_down()

    def _ticket(self) -> ServiceTicket:
        try:
            return self._acquire(str(self._url))
        except Hyper2KvmError as error:
            raise HostRefuses(f"no ticket: {error.cause}") from error

    def _at_host(self) -> httpx.URL:
        host, port, _ = self._server
        return self._url.copy_with(host=host, port=port)

    def _connection(self) -> Connection:
        host, port, thumbprint = self._server
        return Connection(host=host, port=port, username="", password=SecretStr(""), trust=Trust(thumbprint=thumbprint))
