"""Groups that wait for groups: an order, or the circle that there is in place of one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from graphlib import CycleError, TopologicalSorter


def ordered(after: Mapping[str, Iterable[str]]) -> list[str]:
    """Return the groups, each behind all that it waits for. Raises ValueError for a circle or an unknown group."""
    for name, others in after.items():
        for other in others:
            if other not in after:
                raise ValueError(f"group {name!r} is after {other!r}, and there is no such group")
    try:
        return list(TopologicalSorter(after).static_order())
    except CycleError as error:
        circle = " after ".join(repr(name) for name in reversed(error.args[1]))
        raise ValueError(f"groups wait for each other in a circle: {circle}") from None


def all_before(after: Mapping[str, Iterable[str]], name: str) -> set[str]:
    """Return every group that `name` waits for, however far."""
    found: set[str] = set()
    waiting = list(after.get(name, ()))
    while waiting:
        each = waiting.pop()
        if each not in found:
            found.add(each)
            waiting.extend(after.get(each, ()))
    return found
