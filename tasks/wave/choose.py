"""Which VMs of an inventory a wave means: selectors against a list of what there is. Names only, no I/O."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from pydantic import Field

from tasks.errors import AmbiguousVmName, InvalidInput, VmNotFound
from tasks.models import Value
from tasks.wave.models import CANARY, KINDS, Group, Wave

MAGIC = re.compile(r"[*?\[]")


class Listed(Value):
    """A VM of the inventory, by all that it can be named by. `name` is as shown, `path` as stored."""

    moref: str
    name: str
    path: str
    instance_uuid: str = ""
    bios_uuid: str = ""
    tags: tuple[str, ...] = ()

    @classmethod
    def of(cls, told: tuple[str, str, str, str, str], tags: tuple[str, ...] = ()) -> Listed:
        """Return one of what a listing tells: moref, name, path, instance and BIOS UUID."""
        moref, name, path, instance, bios = told
        return cls(moref=moref, name=name, path=path, instance_uuid=instance, bios_uuid=bios, tags=tags)


def is_pattern(selector: str) -> bool:
    """Whether a selector can mean more VMs than one, so that all must be looked at."""
    kind = selector.partition(":")[0]
    return bool(MAGIC.search(selector)) or kind in ("folder", "tag", "regex")


class Member(Value):
    """A VM of a wave: the group it is in, how it is migrated. `selector`: what it was named by."""

    vm: Listed
    group: str
    canary: bool = False
    mode: str
    output_dir: str
    options: dict[str, Any] = Field(default_factory=dict)


def chosen(selectors: Iterable[str], inventory: Sequence[Listed]) -> list[Listed]:
    """Return the VMs that selectors mean, each once, in the inventory's order for a pattern.

    A plain name must name exactly one VM; a pattern may match none. Raises VmNotFound, AmbiguousVmName, InvalidInput.
    """
    found: dict[str, Listed] = {}
    for selector in selectors:
        for vm in _of(selector, inventory):
            found[vm.moref] = vm
    return list(found.values())


def _of(selector: str, inventory: Sequence[Listed]) -> list[Listed]:
    kind, _, value = selector.partition(":")
    if kind not in KINDS or not value:
        kind, value = ("pattern" if MAGIC.search(selector) else "plain"), selector
    if kind == "plain" or (kind in ("name", "path") and not MAGIC.search(value)):
        return [_the_one(value, inventory)]
    return [vm for vm in inventory if _matcher(kind, value)(vm)]


def _matcher(kind: str, value: str) -> Callable[[Listed], bool]:
    if kind == "tag":
        return lambda vm: value in vm.tags
    if kind == "folder":
        inside = value.rstrip("/") + "/"
        return lambda vm: vm.path.startswith(inside)
    if kind == "regex":
        try:
            pattern = re.compile(value)
        except re.error as error:
            raise InvalidInput(what=f"selector regex:{value}", why=str(error), remedy="Mend the expression") from error
        return lambda vm: bool(pattern.search(vm.name) or pattern.search(vm.path))
    return lambda vm: fnmatch.fnmatchcase(vm.name, value) or fnmatch.fnmatchcase(vm.path, value)


def _the_one(wanted: str, inventory: Sequence[Listed]) -> Listed:
    by: tuple[Callable[[Listed], Iterable[str]], ...] = (
        lambda vm: (vm.path, vm.moref),
        lambda vm: (vm.instance_uuid, vm.bios_uuid),
        lambda vm: (vm.name,),
    )
    for names in by:
        if found := [vm for vm in inventory if wanted in names(vm)]:
            if len(found) > 1:
                raise AmbiguousVmName(wanted=wanted, candidates=tuple((vm.path, vm.moref) for vm in found))
            return found[0]
    near = tuple(vm.name for vm in inventory if wanted.casefold() in vm.name.casefold())[:5]
    raise VmNotFound(wanted=wanted, near=near)


def members(wave: Wave, inventory: Sequence[Listed]) -> list[Member]:
    """Return every VM of a wave, each once. Raises what `chosen` raises; InvalidInput for a VM in two groups, or none.

    A canary that is in no selection besides is of the wave all the same.
    """
    out = {vm.moref for vm in chosen(wave.exclude, inventory)}
    groups = [Group.model_construct(name="", select=wave.select), *wave.groups]  # those that wait for nobody
    of: dict[str, tuple[Listed, Group]] = {}
    for group in reversed(groups):  # a named group goes before the wave's own selection
        for vm in chosen(group.select, inventory):
            if vm.moref in out:
                continue
            other = of.get(vm.moref, (vm, group))[1]
            if group.name and other.name != group.name:
                raise InvalidInput(
                    what=f"group {group.name!r}",
                    why=f"{vm.path} is in group {other.name!r} too",
                    remedy="Leave it in one of them",
                )
            of.setdefault(vm.moref, (vm, group))
    canaries = {vm.moref for vm in chosen(wave.canary, inventory) if vm.moref not in out}
    for vm in chosen(wave.canary, inventory):
        if vm.moref not in out:
            of.setdefault(vm.moref, (vm, groups[0]))
    if not of:
        raise InvalidInput(what=f"wave {wave.name}", why="it means no VM", remedy="Select some (select, groups)")
    special = _exceptions(wave, inventory)
    found = [_member(wave, vm, group, special.get(vm.moref, {}), vm.moref in canaries) for vm, group in of.values()]
    return sorted(found, key=lambda member: (member.vm.path, member.vm.moref))


def _exceptions(wave: Wave, inventory: Sequence[Listed]) -> dict[str, dict[str, Any]]:
    return {_the_one(wanted, inventory).moref: own for wanted, own in wave.overrides.items()}


def _member(wave: Wave, vm: Listed, group: Group, own: Mapping[str, Any], canary: bool) -> Member:
    options = {**wave.options, **group.options, **own}
    mode = str(options.pop("mode", "") or group.mode or wave.mode)
    output_dir = str(options.pop("output_dir", "") or wave.folder())
    return Member(vm=vm, group=group.name, canary=canary, mode=mode, output_dir=output_dir, options=options)


def canary_group(group: str) -> str:
    """Return what the canaries of a group are scheduled as."""
    return f"{CANARY} of {group}" if group else CANARY


def waits(wave: Wave, found: Iterable[Member]) -> dict[str, tuple[str, ...]]:
    """Return what each group of the schedule waits for: canaries first, in the groups' own order, then all others."""
    canaries = sorted({canary_group(member.group) for member in found if member.canary})
    after: dict[str, tuple[str, ...]] = {"": tuple(canaries)}
    for group in wave.groups:
        before = tuple(each for each in map(canary_group, group.after) if each in canaries)
        if canary_group(group.name) in canaries:
            after[canary_group(group.name)] = before
        after[group.name] = (*canaries, *group.after)
    if CANARY in canaries:
        after[CANARY] = ()
    return after
