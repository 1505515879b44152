"""A server that speaks NBD, or a command that is one, as a source of disks."""

from __future__ import annotations

import shlex
from typing import Self

from prefect.blocks.core import Block
from pydantic import ConfigDict, Field, SecretStr, model_validator

from blocks.closed import closed
from tasks.models import NbdSettings, OptionalText, Trust


class NbdSource(Block):
    """Disks by NBD: from a server that runs, or from a command that is started for each disk and ended after it.

    In both, blanks are filled for a disk: {host}, {port}, {user} (of the vCenter's block), {esxi} (the VM's host),
    {moref}, {snapshot} (its moref), {path} ([datastore] folder/x.vmdk), {key}, {number} (of the disk), {thumbprint}
    (SHA-1, of the vCenter). In a command also {socket}, where it is to listen; without it, on stdin and stdout.

    Example:
        nbdkit's VDDK plugin, which reads the vCenter account's password from a file descriptor:

        ```python
        from blocks import NbdSource

        NbdSource(
            command="nbdkit -s -r vddk libdir=/opt/vddk server={host} user={user} password=-{password_fd} "
            "thumbprint={thumbprint} vm=moref={moref} snapshot={snapshot} file={path}"
        ).save("nbdkit-vddk")
        ```
    """

    model_config = ConfigDict(json_schema_extra=closed)

    _block_type_name = "NBD Source"
    _block_type_slug = "nbd-source"
    _description = "An NBD server, or a command that serves NBD, that disks are read from."

    uri: OptionalText = Field(
        default="",
        title="URI",
        description="Of a server that runs: nbd://host:10809/export, nbds://… (TLS), nbd+unix:///export?socket=/path; "
        "with blanks such as {moref} and {number}.",
        examples=["nbds://backup.example.com/{moref}-{number}"],
    )
    command: OptionalText = Field(
        default="",
        title="Command",
        description="Instead of a URI. Words as in a shell, which none of it goes through; it stays in the foreground. "
        "{password_fd} and {secret_fd}: descriptors from which it reads the vCenter account's password and the secret.",
        examples=["nbdkit -s -r vddk server={host} user={user} password=-{password_fd} vm=moref={moref} file={path}"],
    )
    secret: SecretStr = Field(
        default=SecretStr(""),
        title="Secret",
        description="What the command may read from {secret_fd}. Kept encrypted by Prefect; shown to nobody.",
    )
    ca_bundle: OptionalText = Field(
        default="",
        title="CA bundle",
        description="Of an nbds:// server: PEM text of the CAs that sign its certificate, or the path of such a file "
        "on the worker. Empty: the worker's own CAs.",
        examples=["/etc/ssl/nbd-ca.pem"],
    )
    thumbprint: OptionalText = Field(
        default="",
        title="Thumbprint",
        description="SHA-256 or SHA-1 of the certificate of an nbds:// server. Given, it alone decides.",
        examples=["AB:CD:…"],
    )

    def settings(self) -> NbdSettings:
        """Return the plain value that the rooms below understand."""
        secret = self.secret if self.secret.get_secret_value() else None
        return NbdSettings(
            uri=self.uri,
            command=tuple(shlex.split(self.command)),
            trust=Trust(ca_pem=self.ca_bundle or None, thumbprint=self.thumbprint or None),
            secret=secret,
        )

    @model_validator(mode="after")
    def _usable(self) -> Self:
        self.settings()
        return self
