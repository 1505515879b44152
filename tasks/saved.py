"""The saved blocks that the options of runs name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefect.blocks.core import Block

from blocks import ESXiHost, NbdSource, VddkToolkit
from tasks.errors import InvalidInput

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


async def libdir_of(options: Mapping[str, Any]) -> str:
    """Return where VDDK lies by a run's options: in the folder of the toolkit that they name, or the one they say."""
    if name := options.get("toolkit"):
        toolkit = await saved_block("toolkit", str(name))
        return toolkit.libdir if isinstance(toolkit, VddkToolkit) else ""
    return str(options.get("vddk_libdir") or "")
