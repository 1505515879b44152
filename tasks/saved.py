"""The saved blocks that the options of runs name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from prefect.blocks.core import Block

from blocks import ESXiHost, NbdSource, VddkToolkit
from tasks.errors import InvalidInput
from tasks.models import Value, split_address
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


class Needs(Value):
    """What a run's road needs on this side. libdir: of VDDK. server: what ssh or nbd reads from, if it is a machine."""

    libdir: str
    server: Server | None


async def needs_of(runs: Sequence[Mapping[str, Any]]) -> list[Needs]:
    """Return what the roads of runs need, by their options; each block that these name is asked for once."""
    named = [_named(options) for options in runs]
    blocks = {each: await saved_block(*each) for each in sorted({each for names in named for each in names.items()})}
    return [
        _needs(options, {option: blocks[option, name] for option, name in names.items()})
        for options, names in zip(runs, named, strict=True)
    ]


def _named(options: Mapping[str, Any]) -> dict[str, str]:
    """Return the blocks that a run's options name and its road looks at, by option."""
    looked_at = ("toolkit", {"ssh": "esxi_block", "nbd": "nbd_source"}.get(str(options.get("transport"))))
    return {option: str(options[option]) for option in looked_at if option and options.get(option)}


def _needs(options: Mapping[str, Any], blocks: Mapping[str, Block]) -> Needs:
    toolkit, transport = blocks.get("toolkit"), options.get("transport")
    libdir = toolkit.libdir if isinstance(toolkit, VddkToolkit) else str(options.get("vddk_libdir") or "")
    if transport == "ssh":
        return Needs(libdir=libdir, server=_ssh_server(options, blocks.get("esxi_block")))
    if transport == "nbd":
        return Needs(libdir=libdir, server=_nbd_server(options, blocks.get("nbd_source")))
    return Needs(libdir=libdir, server=None)


def _ssh_server(options: Mapping[str, Any], block: Block | None) -> Server | None:
    if isinstance(block, ESXiHost):
        return Server(host=block.host, port=block.port)
    if not options.get("esxi_host"):
        return None
    host, port = split_address(str(options["esxi_host"]))
    return Server(host=host, port=port or SSH)


def _nbd_server(options: Mapping[str, Any], block: Block | None) -> Server | None:
    """Return the server of a URI; None for a command, a socket, or a host that is filled in for each disk."""
    uri = urlsplit(block.uri if isinstance(block, NbdSource) else str(options.get("nbd_uri") or ""))
    if uri.scheme in ("nbd", "nbds") and uri.hostname and "{" not in uri.netloc:
        return Server(host=uri.hostname, port=uri.port or NBD)
    return None
