"""What the options say of the roads `nbd` and `ssh`, as parameters of a flow: blocks, saved or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect.blocks.core import Block
from pydantic import SecretStr

from blocks import ESXiHost, NbdSource
from tasks.errors import InvalidInput
from tasks.models import ExportOptions, split_address


def road_blocks(options: ExportOptions) -> dict[str, Any]:
    """Return the blocks, not saved, of the roads that the options describe. Raises InvalidInput."""
    blocks: dict[str, Any] = {}
    if options.nbd_uri or options.nbd_command:
        where = {"uri": options.nbd_uri, "command": options.nbd_command}
        blocks["nbd_source"] = NbdSource(ca_bundle=options.nbd_ca_file, **where)
    if options.esxi_host:
        host, port = split_address(options.esxi_host)
        blocks["esxi_host"] = ESXiHost(
            host=host,
            port=port or 22,
            user=options.esxi_user,
            host_key=options.esxi_host_key,
            key=_secret_in(options.esxi_key_file),
            password=_secret_in(options.esxi_password_file),
        )
    return blocks


def _secret_in(file: Path | None) -> SecretStr:
    try:
        return SecretStr(file.expanduser().read_text().strip() if file else "")
    except OSError as error:
        raise InvalidInput(
            what=f"file {file}", why=error.strerror or str(error), remedy="Give a file that can be read"
        ) from error


async def saved_blocks(options: ExportOptions) -> dict[str, Any]:
    """Return the saved blocks that the options name. Raises InvalidInput for one that is not there."""
    named: dict[str, tuple[type[Block], str]] = {
        "nbd_source": (NbdSource, options.nbd_source),
        "esxi_host": (ESXiHost, options.esxi_block),
    }
    blocks: dict[str, Any] = {}
    for parameter, (kind, name) in named.items():
        if name:
            try:
                blocks[parameter] = await kind.aload(name)
            except ValueError as error:
                what = f"{kind.get_block_type_slug()} {name!r}"
                raise InvalidInput(what=what, why="no such block is saved", remedy="Save it in the UI") from error
    return blocks
