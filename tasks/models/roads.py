"""The roads that bytes take out of vSphere: what each needs to be told, and what is borrowed for it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    Field,
    SecretStr,
    field_validator,
    model_validator,
)

from tasks.errors import InvalidInput
from tasks.models.access import Trust
from tasks.models.base import Value

VDDK_TRANSPORT_MODES = "nbdssl:nbd:hotadd:san"
VddkCompression = Literal["none", "zlib", "fastlz", "skipz"]


class FolderSettings(Value):
    """The road `folder` needs nothing but the connection to the vCenter."""

    road: Literal["folder"] = "folder"


class VddkSettings(Value):
    """Where VMware's VDDK lies here, and how it is to read.

    libdir: its distribution's root, or the folder of its libraries; None: looked for where it usually is.
    transport_modes: tried in that order. compression: of what goes over the network. large_buffers: sixteen times
    64 KiB, four of them, for each session with a host.
    """

    road: Literal["vddk"] = "vddk"
    libdir: Path | None = None
    transport_modes: str = VDDK_TRANSPORT_MODES
    compression: VddkCompression = "none"
    large_buffers: bool = False


NBD_BLANKS = (
    "host", "port", "user", "esxi", "moref", "snapshot", "path", "key", "number", "thumbprint", "socket",
    "password_fd", "secret_fd",
)  # fmt: skip
"""What may stand in braces in the URI or command of an NBD source; the last three in a command only."""
BLANK = re.compile(r"(?<!\$){([a-z_]+)}")  # `${name}` is a shell's
NBD_SCHEMES = ("nbd", "nbd+unix", "nbds")


class NbdSettings(Value):
    """An NBD server that there is, or a command that is one: exactly one of the two, with blanks to fill for a disk.

    command: words; it serves on stdin and stdout, or on the socket that `{socket}` names, and stays in the foreground.
    secret: what it may read from the file descriptor `{secret_fd}`. trust: of a server reached by TLS.
    """

    road: Literal["nbd"] = "nbd"
    uri: str = ""
    command: tuple[str, ...] = ()
    trust: Trust = Trust()
    secret: SecretStr | None = Field(default=None, exclude=True)

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if bool(self.uri) == bool(self.command):
            raise ValueError("give the URI of an NBD server, or a command that is one")
        if self.uri and self.uri.partition("://")[0] not in NBD_SCHEMES:
            raise ValueError(f"{self.uri!r} begins with none of {', '.join(f'{each}://' for each in NBD_SCHEMES)}")
        known = NBD_BLANKS if self.command else NBD_BLANKS[:-3]
        for word in (self.uri, *self.command):
            for blank in BLANK.findall(word):
                if blank not in known:
                    raise ValueError(f"{{{blank}}} is no blank: there are {', '.join(known)}")
        return self


class SshSettings(Value):
    """An account at an ESXi host that may log in by SSH.

    host_key: the host's, pinned: `SHA256:…` or `ssh-ed25519 AAAA…`. key: a private key in OpenSSH's or PEM form.
    password: of the account, or of the key where one is given. One of the two is needed to log in.
    """

    road: Literal["ssh"] = "ssh"
    host: str
    port: int = 22
    user: str = "root"
    host_key: str
    key: SecretStr | None = Field(default=None, exclude=True)
    password: SecretStr | None = Field(default=None, exclude=True)

    @field_validator("host_key")
    @classmethod
    def _is_a_key(cls, text: str) -> str:
        return normalise_host_key(text)


def normalise_host_key(text: str) -> str:
    """Return `SHA256:…` or `<type> <base64>` out of a fingerprint, a public key or a line of known_hosts.

    Raises InvalidInput.
    """
    if match := re.search(r"\bSHA256:[A-Za-z0-9+/]{43}\b", text):
        return match[0]
    if match := re.search(r"\b((?:ssh|ecdsa)-[\w@.-]+) +(AAAA[A-Za-z0-9+/]+=*)", text):
        return f"{match[1]} {match[2]}"
    raise InvalidInput(
        what="SSH host key",
        why=f"{text!r} is neither SHA256:… nor a public key",
        remedy="Copy it at the host itself (ssh-keygen -lf /etc/ssh/ssh_host_rsa_key.pub)",
    )


class LeaseSettings(Value):
    """The road `nfc_lease` needs nothing but the connection to the vCenter."""

    road: Literal["nfc_lease"] = "nfc_lease"


RoadSettings = Annotated[
    FolderSettings | VddkSettings | NbdSettings | SshSettings | LeaseSettings, Field(discriminator="road")
]
"""What a road needs to know beside the disk, a class a road. A job's state holds it: a secret in it is not dumped."""


class SkippedRoad(Value):
    """A road that was not taken, and why."""

    road: str
    why: str


class Roads(Value):
    """The roads that a job may take, best first, and why others are not among them."""

    candidates: tuple[RoadSettings, ...] = (FolderSettings(),)
    skipped: tuple[SkippedRoad, ...] = ()


class ServiceTicket(Value):
    """What opens one URL by one method, once, at an ESXi host whose certificate has `thumbprint` (None: not said)."""

    id: SecretStr
    host: str
    port: int
    thumbprint: str | None


class LeasedDevice(Value):
    """What an export lease gives of a VM: a device by its key, behind a URL that opens it without a login.

    thumbprint: of the certificate of the host that the URL names; "" where the lease does not say.
    """

    key: str
    url: SecretStr
    thumbprint: str = ""


class VCenterInfo(Value):
    """Which server answered: `ServiceContent.about`. `uuid`: vCenter's instance, or a lone ESXi host's hardware."""

    uuid: str
    name: str
    version: str
    build: str
    is_vcenter: bool
