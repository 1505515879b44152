"""Where a vCenter or host is, who logs in there, and why its certificate is believed."""

from __future__ import annotations

import re

from pydantic import (
    Field,
    SecretStr,
    field_validator,
)

from tasks.errors import InvalidInput
from tasks.models.base import Value


class Trust(Value):
    """Why the certificate of a server is believed: a pinned thumbprint, else CAs, else (in words) nothing.

    `thumbprint` is hex digits in upper case without colons: 40 for SHA-1, 64 for SHA-256.
    `ca_pem` is PEM text; None is the system's own CAs.
    """

    ca_pem: str | None = None
    thumbprint: str | None = None
    verify: bool = True

    @field_validator("thumbprint", mode="before")
    @classmethod
    def _normalised(cls, value: str | None) -> str | None:
        return normalise_thumbprint(value) if value else None


CONNECTIONS = 4  # of a disk: one gave 445 Mbit/s from an ESXi host, eight 730


class Connection(Value):
    """Everything needed to log in to one vCenter or ESXi host, and to read from it.

    connections: HTTPS connections that a disk or file is read over. host_tickets: whether large files may come from
    the ESXi hosts themselves.
    """

    host: str
    port: int = 443
    username: str
    password: SecretStr
    trust: Trust = Trust()
    connections: int = Field(default=CONNECTIONS, ge=1, le=32)
    host_tickets: bool = True

    @property
    def address(self) -> str:
        """`host:port`, the host in brackets where it is an IPv6 address."""
        return f"{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"


def normalise_thumbprint(text: str) -> str:
    """Read a SHA-1 or SHA-256 thumbprint in any usual spelling; return upper-case hex without separators.

    Colons, spaces, dashes and a leading `sha1`/`sha256` with `:` or `=` (also openssl's `sha256 Fingerprint=`)
    may stand or be left out. Raises InvalidInput.
    """
    stripped = re.sub(r"^\s*sha-?(1|256)(\s*fingerprint)?\s*[:=]\s*", "", text, flags=re.IGNORECASE)
    digits = re.sub(r"[\s:-]", "", stripped).upper()
    if len(digits) not in (40, 64) or re.search(r"[^0-9A-F]", digits):
        raise InvalidInput(
            what="thumbprint",
            why=f"{text!r} has not the 40 hex digits of SHA-1 nor the 64 of SHA-256",
            remedy="Copy it whole: openssl x509 -noout -fingerprint -sha256 prints it",
        )
    return digits


def split_address(text: str) -> tuple[str, int | None]:
    """Split `host`, `host:port`, `[v6]:port` or an `https://host:port/sdk` URL into host and port (None: not said)."""
    bare = re.sub(r"^https?://", "", text.strip()).partition("/")[0]
    match = re.fullmatch(r"(?:\[(?P<v6>[0-9A-Fa-f:.%\w]+)\]|(?P<name>[^:\s\[\]]+))(?::(?P<port>\d{1,5}))?", bare)
    if match:
        return match["v6"] or match["name"], int(match["port"]) if match["port"] else None
    if re.fullmatch(r"[0-9A-Fa-f:.]+", bare) and bare.count(":") > 1:
        return bare, None
    raise InvalidInput(
        what="vCenter address",
        why=f"{text!r} is neither a host nor host:port",
        remedy="Give a name or an address, with the port after a colon where it is not 443",
    )
