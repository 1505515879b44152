"""An ESXi host that lets an account in by SSH."""

from __future__ import annotations

from typing import Self

from prefect.blocks.core import Block
from pydantic import Field, SecretStr, model_validator

from tasks.models import SshSettings


class ESXiHost(Block):
    """An ESXi host that disks are read from by SSH, and an account there.

    Example:
        Save one, with its key as `ssh-keygen -lf` shows it at the host:

        ```python
        from blocks import ESXiHost

        ESXiHost(host="esx1.example.com", host_key="SHA256:…", password="…").save("esx1")
        ```
    """

    _block_type_name = "ESXi Host"
    _block_type_slug = "esxi-host"
    _description = "Address, SSH account and host key of a VMware ESXi host."

    host: str = Field(title="Host", description="Name or address.", examples=["esx1.example.com"], min_length=1)
    port: int = Field(default=22, title="Port", description="Of its SSH server.", examples=[22], ge=1, le=65535)
    user: str = Field(
        default="root", title="User name", description="An account with a shell.", examples=["root"], min_length=1
    )
    host_key: str = Field(
        title="Host key",
        description="SHA256:… or a public key, as the host itself shows it (ssh-keygen -lf "
        "/etc/ssh/ssh_host_rsa_key.pub). Another one is refused.",
        examples=["SHA256:…"],
    )
    password: SecretStr = Field(
        default=SecretStr(""),
        title="Password",
        description="Of the account, or of the private key where one is given. Kept encrypted by Prefect.",
    )
    key: SecretStr = Field(
        default=SecretStr(""),
        title="Private key",
        description="Text of a private key that the host knows. Kept encrypted by Prefect.",
    )

    def settings(self) -> SshSettings:
        """Return the plain value that the rooms below understand."""
        return SshSettings(
            host=self.host,
            port=self.port,
            user=self.user,
            host_key=self.host_key,
            key=self.key if self.key.get_secret_value() else None,
            password=self.password if self.password.get_secret_value() else None,
        )

    @model_validator(mode="after")
    def _usable(self) -> Self:
        settings = self.settings()
        if not (settings.key or settings.password):
            raise ValueError(f"give a key or a password of {self.user} at {self.host}")
        return self
