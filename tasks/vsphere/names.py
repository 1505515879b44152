"""Names as vSphere stores, shows and wants them: inventory paths, host-system paths, libvirt's URIs.

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


def is_path(text: str) -> bool:
    """Whether `text` has the form of a VM's inventory path, `/DC/vm/name` or longer; a name may begin with `/` too."""
    return text.startswith("/") and len(text.strip("/").split("/")) >= 3


def as_stored_path(path: str) -> str:
    """Return an inventory path as FindByInventoryPath takes it; `%` and `\\` may be given as shown."""
    return re.sub("%(?!25|2f|5c)", "%25", path, flags=re.IGNORECASE).replace("\\", "%5c").strip("/")


def same_name(one: str, other: str) -> bool:
    """Whether two names are the same to an eye: equal once composed (unicode NFC)."""
    return unicodedata.normalize("NFC", one) == unicodedata.normalize("NFC", other)


def spellings(text: str) -> list[str]:
    """Return `text` as given, composed (NFC) and decomposed (NFD), each once: what an eye takes for the same."""
    return list(dict.fromkeys((text, *(unicodedata.normalize(form, text) for form in ("NFC", "NFD")))))


def home(found: Mapping[str, Any]) -> Any:
    """Return what a VM lies in, of its properties: its folder, or the vApp that it is part of; None for an orphan."""
    return found.get("parent") or found.get("parentVApp")


def type_name(thing: Any) -> str:
    """Return the vSphere type of an object: `ParaVirtualSCSIController`."""
    return type(thing).__name__.rpartition(".")[2]


def label_of(device: Any) -> str:
    """Return a virtual device's name in the vSphere client: `Hard disk 1`."""
    return device.deviceInfo.label if device.deviceInfo else f"device {device.key}"


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


def libvirt_uri(connection: Connection, host: Any, known: Mapping[Any, Mapping[str, Any]], *, lone_host: bool) -> str:
    """Return the URI by which libvirt reaches a host: through its vCenter, or itself where it is a lone one."""
    return esx_uri(connection) if lone_host else vpx_uri(connection, host, known)


def vpx_uri(connection: Connection, host: Any, known: Mapping[Any, Mapping[str, Any]]) -> str:
    """Return libvirt's URI of a host: `vpx://user@vcenter/DC/cluster/esx`, without a query.

    It leaves out the hidden `host` folder, and a standalone host's compute resource; a name in stored form is
    quoted once more. Source: libvirt's ESX driver documentation.
    """
    line = [each for each in reversed(list(lineage(host, known))) if not _left_out(each, known)]
    path = "/".join(quote(known[each]["name"], safe="") for each in line)
    return f"vpx://{_authority(connection)}/{path}"


def esx_uri(connection: Connection) -> str:
    """Return libvirt's URI of a lone ESXi host, which has no path: `esx://user@host/`."""
    return f"esx://{_authority(connection)}/"


def _authority(connection: Connection) -> str:
    port = "" if connection.port == 443 else f":{connection.port}"
    return f"{quote(connection.username, safe='')}@{connection.address.rpartition(':')[0]}{port}"


def _left_out(entity: Any, known: Mapping[Any, Mapping[str, Any]]) -> bool:
    hidden_folder = isinstance(entity, vim.Folder) and isinstance(known[entity].get("parent"), vim.Datacenter)
    standalone = isinstance(entity, vim.ComputeResource) and not isinstance(entity, vim.ClusterComputeResource)
    return hidden_folder or standalone
