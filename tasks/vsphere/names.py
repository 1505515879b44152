"""Names as vSphere stores, shows and wants them: inventory paths, host-system paths, libvirt's vpx URIs.

vSphere stores `%`, `/` and `\\` in a name as `%25`, `%2f` and `%5c`. Names are decoded to be matched and shown;
paths keep the stored form, which is what FindByInventoryPath takes.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote

from pyVmomi import vim

from tasks.models import Connection

_STORED = {"%25": "%", "%2f": "/", "%5c": "\\"}


def shown(stored: str) -> str:
    """Return a name as an operator sees it in the vSphere client."""
    return re.sub("%(?:25|2f|5c)", lambda match: _STORED[match[0].lower()], stored, flags=re.IGNORECASE)


def as_stored_path(path: str) -> str:
    """Return an inventory path as FindByInventoryPath takes it; `%` and `\\` may be given as shown."""
    return re.sub("%(?!25|2f|5c)", "%25", path, flags=re.IGNORECASE).replace("\\", "%5c").strip("/")


def same_name(one: str, other: str) -> bool:
    """Whether two names are the same to an eye: equal once composed (unicode NFC)."""
    return unicodedata.normalize("NFC", one) == unicodedata.normalize("NFC", other)


def lineage(entity: Any, known: Mapping[Any, Mapping[str, Any]]) -> Iterator[Any]:
    """Yield `entity` and what it lies in, innermost first, without the root folder. `known`: see `ancestors`."""
    while entity is not None and entity in known:
        parent = known[entity].get("parent")
        if parent is None and isinstance(entity, vim.Folder):
            return  # the root folder ("Datacenters") is in no path
        yield entity
        entity = parent


def inventory_path(entity: Any, known: Mapping[Any, Mapping[str, Any]]) -> str:
    """Return `/DC/vm/folder/name` (stored form)."""
    return "".join(f"/{known[each]['name']}" for each in reversed(list(lineage(entity, known))))


def datacenter_of(entity: Any, known: Mapping[Any, Mapping[str, Any]]) -> Any:
    """Return the datacenter that `entity` lies in, or None."""
    return next((each for each in lineage(entity, known) if isinstance(each, vim.Datacenter)), None)


def vpx_uri(connection: Connection, host: Any, known: Mapping[Any, Mapping[str, Any]]) -> str:
    """Return libvirt's URI of a host: `vpx://user@vcenter/DC/cluster/esx`, without a query.

    It leaves out the hidden `host` folder, and a standalone host's compute resource; a name in stored form is
    quoted once more. Source: libvirt's ESX driver documentation.
    """
    line = [each for each in reversed(list(lineage(host, known))) if not _left_out(each, known)]
    path = "/".join(quote(known[each]["name"], safe="") for each in line)
    port = "" if connection.port == 443 else f":{connection.port}"
    server = connection.address.rpartition(":")[0] + port
    return f"vpx://{quote(connection.username, safe='')}@{server}/{path}"


def _left_out(entity: Any, known: Mapping[Any, Mapping[str, Any]]) -> bool:
    hidden_folder = isinstance(entity, vim.Folder) and isinstance(known[entity].get("parent"), vim.Datacenter)
    standalone = isinstance(entity, vim.ComputeResource) and not isinstance(entity, vim.ClusterComputeResource)
    return hidden_folder or standalone
