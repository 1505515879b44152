"""The address of a vCenter (or lone ESXi host), who logs in there, and why its certificate is believed."""

from __future__ import annotations

from typing import Any

from prefect.blocks.core import Block
from pydantic import Field, SecretStr, field_validator, model_validator

from tasks.errors import InvalidInput
from tasks.models import CONNECTIONS, OptionalText, normalise_thumbprint, split_address


class VCenter(Block):
    """A vCenter Server, or a lone ESXi host, and an account there.

    Example:
        Save one, and export with it:

        ```python
        from blocks import VCenter

        VCenter(host="vcenter.example.com", username="svc-export@vsphere.local", password="…").save("production")
        ```
    """

    _block_type_name = "vCenter"
    _block_type_slug = "vcenter"
    _description = "Address, account and trust of a VMware vCenter Server or ESXi host."

    host: str = Field(
        title="Host",
        description="Name or address; host:port is understood.",
        examples=["vcenter.example.com"],
        min_length=1,
    )
    port: int = Field(default=443, title="Port", description="HTTPS port.", examples=[443], ge=1, le=65535)
    username: str = Field(
        title="User name",
        description="An account that may read the inventory, make snapshots and browse datastores.",
        examples=["svc-export@vsphere.local"],
        min_length=1,
    )
    password: SecretStr = Field(title="Password", description="Kept encrypted by Prefect; shown to nobody.")
    ca_bundle: OptionalText = Field(
        default="",
        title="CA bundle",
        description="PEM text of the CAs that sign its certificate, or the path of such a file on the worker. "
        "Empty: the worker's own CAs.",
        examples=["/etc/ssl/vcenter-ca.pem"],
    )
    thumbprint: OptionalText = Field(
        default="",
        title="Thumbprint",
        description="SHA-256 or SHA-1 of its certificate, in any usual spelling. Given, it alone decides.",
        examples=["AB:CD:…"],
    )
    verify: bool = Field(
        default=True,
        title="Verify the certificate",
        description="Off: anybody in between can read the password and change the disks.",
        examples=[True],
    )
    connections: int = Field(
        default=CONNECTIONS,
        title="Connections a disk",
        description="HTTPS connections that a disk or file is read over. More help where the network is long.",
        examples=[CONNECTIONS],
        ge=1,
        le=32,
    )
    host_tickets: bool = Field(
        default=True,
        title="Read from the hosts themselves",
        description="Files of 1 GiB and more come from the VM's ESXi host, where it can be reached on port 443, "
        "by tickets of the vCenter. All else, and everything if off, comes through the vCenter.",
        examples=[True],
    )

    @model_validator(mode="before")
    @classmethod
    def _port_out_of_host(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not isinstance(values.get("host"), str):
            return values
        host, port = split_address(values["host"])
        return {**values, "host": host, **({"port": port} if port else {})}

    @field_validator("password")
    @classmethod
    def _not_a_mask(cls, password: SecretStr) -> SecretStr:
        secret = password.get_secret_value()
        if not secret.strip("*"):
            raise InvalidInput(
                what="password",
                why="it is empty or nothing but asterisks: what Prefect shows in place of a secret",
                remedy='Give the saved block itself: {"$ref": {"block_document_id": …}}',
            )
        return password

    @field_validator("thumbprint")
    @classmethod
    def _normalised(cls, thumbprint: str) -> str:
        return normalise_thumbprint(thumbprint) if thumbprint else ""
