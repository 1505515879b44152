"""The saved blocks that the options of runs name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from prefect.blocks.core import Block

from blocks import ESXiHost, NbdSource, VddkToolkit
from tasks.errors import InvalidInput
from tasks.models import split_address
from tasks.reach import Server

SSH, NBD = 22, 10809  # ports, where none is said

BLOCKS: Mapping[str, tuple[str, type[Block]]] = {
    "toolkit": ("toolkit", VddkToolkit),
    "nbd_source": ("nbd_source", NbdSource),
    "esxi_block": ("esxi_host", ESXiHost),
}
"""What a VM's options may name of saved blocks: the parameter of its flow, and the kind."""


async def saved_block(option: str, name: str) -> Block:
    """Return the saved block that an option of `BLOCKS` names. Raises InvalidInput."""
    try:
        return await BLOCKS[option][1].aload(name)
    except ValueError as error:
        what = f"{option} {name!r}"
        raise InvalidInput(what=what, why="no such block is saved", remedy="Save it in the UI") from error


async def server_of(options: Mapping[str, Any]) -> Server | None:
    """Return what a run reads from by ssh or nbd, by its options; None where that is no machine, or not known yet."""
    transport = str(options.get("transport") or "")
    if transport == "ssh":
        name = options.get("esxi_block")
        block = await saved_block("esxi_block", str(name)) if name else None
        if isinstance(block, ESXiHost):
            return Server(host=block.host, port=block.port)
        host, port = split_address(str(options["esxi_host"])) if options.get("esxi_host") else ("", None)
        return Server(host=host, port=port or SSH) if host else None
    if transport == "nbd":
        name = options.get("nbd_source")
        block = await saved_block("nbd_source", str(name)) if name else None
        uri = urlsplit(block.uri if isinstance(block, NbdSource) else str(options.get("nbd_uri") or ""))
        if uri.scheme in ("nbd", "nbds") and uri.hostname and "{" not in uri.netloc:
            return Server(host=uri.hostname, port=uri.port or NBD)
    return None


async def libdir_of(options: Mapping[str, Any]) -> str:
    """Return where VDDK lies by a run's options: in the folder of the toolkit that they name, or the one they say."""
    if name := options.get("toolkit"):
        toolkit = await saved_block("toolkit", str(name))
        return toolkit.libdir if isinstance(toolkit, VddkToolkit) else ""
    return str(options.get("vddk_libdir") or "")
