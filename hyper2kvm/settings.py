"""Who logs in where, from what was said and, where nothing was, from the environment.

`VCENTER_PASSWORD`, `VCENTER_CA_FILE` and `VCENTER_THUMBPRINT` fill what flags and arguments leave out.
"""

from __future__ import annotations

import getpass
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import SecretStr

from tasks.errors import InvalidInput
from tasks.models import CONNECTIONS, Connection, Trust, split_address

if TYPE_CHECKING:
    from blocks import VCenter


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A vCenter as an operator names it; `host` may be `host:port`. Nothing has been checked yet."""

    host: str
    username: str
    password: SecretStr
    port: int | None = None
    ca_file: str | None = None
    thumbprint: str | None = None
    verify: bool = True
    connections: int = CONNECTIONS
    host_tickets: bool = True

    def connection(self) -> Connection:
        """Return the plain value, without loading Prefect. Raises InvalidInput."""
        host, port = split_address(self.host)
        trust = Trust(ca_pem=self._ca_bundle(), thumbprint=self._thumbprint(), verify=self.verify)
        return Connection(
            host=host,
            port=self.port or port or 443,
            username=self.username,
            password=self.password,
            trust=trust,
            connections=self.connections,
            host_tickets=self.host_tickets,
        )

    def vcenter(self) -> VCenter:
        """Return the same as an unsaved block, for flow parameters. Raises InvalidInput."""
        from blocks import VCenter

        connection = self.connection()
        return VCenter(
            host=f"[{connection.host}]" if ":" in connection.host else connection.host,
            port=connection.port,
            username=connection.username,
            password=connection.password,
            ca_bundle=connection.trust.ca_pem,
            thumbprint=connection.trust.thumbprint,
            verify=connection.trust.verify,
            connections=connection.connections,
            host_tickets=connection.host_tickets,
        )

    def _ca_bundle(self) -> str | None:
        return self.ca_file or os.environ.get("VCENTER_CA_FILE") or None

    def _thumbprint(self) -> str | None:
        return self.thumbprint or os.environ.get("VCENTER_THUMBPRINT") or None


def password_from(file: Path | None, *, username: str, host: str) -> SecretStr:
    """Return the password: from a file, else VCENTER_PASSWORD, else asked for on a terminal. Raises InvalidInput."""
    if file:
        return SecretStr(_first_line(file.expanduser()))
    if secret := os.environ.get("VCENTER_PASSWORD"):
        return SecretStr(secret)
    if sys.stdin.isatty():
        return SecretStr(getpass.getpass(f"Password of {username} at {host}: "))
    raise InvalidInput(
        what="password",
        why="none given, and there is no terminal to ask at",
        remedy="Give --password-file, or set VCENTER_PASSWORD",
    )


def _first_line(file: Path) -> str:
    try:
        line = file.read_text().partition("\n")[0].rstrip("\r")
    except OSError as error:
        raise InvalidInput(
            what=f"password file {file}", why=error.strerror or str(error), remedy="Give a file that can be read"
        ) from error
    if not line:
        raise InvalidInput(what=f"password file {file}", why="its first line is empty", remedy="Put the password there")
    return line
