"""Finding one VM: by path, UUID or moref in a constant number of calls, by name in one paged query. Listing them."""

from __future__ import annotations

import difflib
import fnmatch
import re
import uuid
from collections.abc import Iterator
from functools import partial
from typing import Any

from pyVmomi import vim, vmodl

from tasks.errors import AmbiguousVmName, InvalidInput, VmNotFound, VsphereFault
from tasks.models import Value
from tasks.vsphere import names
from tasks.vsphere.faults import caused_by
from tasks.vsphere.properties import ancestors, pages_of, retrieve
from tasks.vsphere.session import Session

NEAR_MATCHES = 5


class VmEntry(Value):
    """A VM in a list. `path` is its inventory path, `power` the vSphere power state."""

    path: str
    moref: str
    power: str


def find_vm(session: Session, wanted: str) -> str:
    """Return the moref of the VM that `wanted` names: an inventory path, instance or BIOS UUID, moref, or else a name.

    The first of these that fits is meant. A lone ESXi host's morefs are plain numbers.

    Raises VmNotFound (with near names), AmbiguousVmName (with every candidate), InvalidInput.
    Source: SearchIndex.FindByInventoryPath and FindAllByUuid.
    """
    if not wanted.strip():
        raise InvalidInput(what="VM", why="no name given", remedy="Name one: path, moref, UUID or name")
    return str(_find(session, wanted)._moId)


def _find(session: Session, wanted: str) -> Any:
    if names.is_path(wanted):
        return _by_path(session, wanted)
    if _is_uuid(wanted) and (found := _by_uuid(session, wanted)):
        return _one_of(session, wanted, found)
    if re.fullmatch(r"vm-\d+|\d+", wanted) and (vm := _by_moref(session, wanted)):
        return vm
    return _by_name(session, wanted)


def list_vms(session: Session, pattern: str = "*") -> Iterator[list[VmEntry]]:
    """Yield the VMs whose name or inventory path matches a glob, a page at a time, in the server's order."""
    known: dict[Any, dict[str, Any]] = {}
    for page in pages_of(session, vim.VirtualMachine, ("name", "parent", "parentVApp", "runtime.powerState")):
        homes = {names.home(found) for _, found in page}
        known |= ancestors(session, [each for each in homes if each is not None and each not in known])
        entries = [_entry(vm, found, known) for vm, found in page]
        yield [entry for entry in entries if _matches(entry, pattern)]


def _entry(vm: Any, found: dict[str, Any], known: dict[Any, dict[str, Any]]) -> VmEntry:
    path, power = _path(found, known), str(found.get("runtime.powerState", "unknown"))
    return VmEntry(path=path, moref=vm._moId, power=power)


def _path(found: dict[str, Any], known: dict[Any, dict[str, Any]]) -> str:
    return f"{names.inventory_path(names.home(found), known)}/{found['name']}"


def _matches(entry: VmEntry, pattern: str) -> bool:
    name = names.shown(entry.path.rpartition("/")[2])
    return any(fnmatch.fnmatchcase(text, pattern) for text in (name, entry.path))


def _is_uuid(text: str) -> bool:
    try:
        return len(text) >= 32 and bool(uuid.UUID(text))
    except ValueError:
        return False


def _by_path(session: Session, path: str) -> Any:
    """Return the VM at a path; one that is typed and stored in different unicode forms takes up to two calls more."""
    search = session.content.searchIndex
    for stored in names.spellings(names.as_stored_path(path)):
        found = session.call("a lookup by path", partial(search.FindByInventoryPath, stored))
        if isinstance(found, vim.VirtualMachine):
            return found
    raise VmNotFound(wanted=path)


def _by_uuid(session: Session, text: str) -> list[Any]:
    search, canonical = session.content.searchIndex, str(uuid.UUID(text))
    for instance in (True, False):
        found = session.call("a lookup by UUID", partial(search.FindAllByUuid, None, canonical, True, instance))
        if found:
            return list(found)
    return []


def _by_moref(session: Session, moref: str) -> Any:
    vm = session.entity(vim.VirtualMachine, moref)
    try:
        return vm if retrieve(session, [vm], ("name",)) else None
    except VsphereFault as error:
        if caused_by(error, vmodl.fault.ManagedObjectNotFound):
            return None
        raise


def _by_name(session: Session, wanted: str) -> Any:
    found: list[Any] = []
    seen: set[str] = set()
    for page in pages_of(session, vim.VirtualMachine, ("name",)):
        for vm, values in page:
            stored = values["name"]
            seen.add(names.shown(stored))
            if names.same_name(wanted, names.shown(stored)) or wanted == stored:
                found.append(vm)
    return _one_of(session, wanted, found, near=_near(wanted, seen))


def _near(wanted: str, seen: set[str]) -> tuple[str, ...]:
    by_folded = {name.casefold(): name for name in sorted(seen)}
    return tuple(by_folded[each] for each in difflib.get_close_matches(wanted.casefold(), by_folded, n=NEAR_MATCHES))


def _one_of(session: Session, wanted: str, found: list[Any], *, near: tuple[str, ...] = ()) -> Any:
    if len(found) == 1:
        return found[0]
    if not found:
        raise VmNotFound(wanted=wanted, near=near)
    each = retrieve(session, found, ("name", "parent", "parentVApp"))
    known = ancestors(session, [home for home in {names.home(values) for values in each.values()} if home is not None])
    candidates = sorted((_path(values, known), vm._moId) for vm, values in each.items())
    raise AmbiguousVmName(wanted=wanted, candidates=tuple(candidates))
