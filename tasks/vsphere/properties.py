"""Named properties through the PropertyCollector, in pages: the only way in which this project reads vSphere.

A whole `runtime` or `summary` is never asked for: pyvmomi fails on members that it does not know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from pyVmomi import vim, vmodl

from tasks.vsphere.session import Session

PAGE_OBJECTS = 500

_Collector = vmodl.query.PropertyCollector


def retrieve(session: Session, entities: Sequence[Any], names: Sequence[str]) -> dict[Any, dict[str, Any]]:
    """Return `{entity: {property: value}}` for entities of one type; a property that is not set is left out.

    One round trip a page of 500. Source: PropertyCollector.RetrievePropertiesEx.
    """
    if not entities:
        return {}
    spec = _filter(type(entities[0]), names, [_Collector.ObjectSpec(obj=entity) for entity in entities])
    return dict(_pages(session, spec))


def ancestors(session: Session, entities: Sequence[Any]) -> dict[Any, dict[str, Any]]:
    """Return `name` and `parent` of `entities` and of all that they lie in, up to the root: one round trip.

    One more for each level of vApps, whose `parent` is given as what the inventory shows them in: their VM folder or
    the vApp around them, not their resource pool. Source: VirtualApp.parentFolder, parentVApp.
    """
    known = _vapps(session, [each for each in entities if isinstance(each, vim.VirtualApp)])
    outside = [each["parent"] for each in known.values()] + list(entities)
    return known | _upwards(session, [each for each in outside if each is not None and each not in known])


def _vapps(session: Session, wanted: Sequence[Any]) -> dict[Any, dict[str, Any]]:
    known: dict[Any, dict[str, Any]] = {}
    while wanted:
        for vapp, found in retrieve(session, wanted, ("name", "parentFolder", "parentVApp")).items():
            known[vapp] = {"name": found["name"], "parent": found.get("parentVApp") or found.get("parentFolder")}
        around = {each["parent"] for each in known.values() if isinstance(each["parent"], vim.VirtualApp)}
        wanted = [each for each in around if each not in known]
    return known


def _upwards(session: Session, entities: Sequence[Any]) -> dict[Any, dict[str, Any]]:
    if not entities:
        return {}
    up = _Collector.TraversalSpec(
        name="up", type=vim.ManagedEntity, path="parent", selectSet=[_Collector.SelectionSpec(name="up")]
    )
    objects = [_Collector.ObjectSpec(obj=entity, selectSet=[up]) for entity in entities]
    return dict(_pages(session, _filter(vim.ManagedEntity, ("name", "parent"), objects)))


def pages_of(session: Session, kind: type[Any], names: Sequence[str]) -> Iterator[list[tuple[Any, dict[str, Any]]]]:
    """Yield everything of a kind in the inventory, `PAGE_OBJECTS` at a time, with only the properties named."""
    with _view(session, kind) as view:
        step = _Collector.TraversalSpec(name="view", type=vim.view.ContainerView, path="view", skip=False)
        objects = [_Collector.ObjectSpec(obj=view, skip=True, selectSet=[step])]
        yield from _page_lists(session, _filter(kind, names, objects))


@contextmanager
def _view(session: Session, kind: type[Any]) -> Iterator[Any]:
    root, manager = session.content.rootFolder, session.content.viewManager
    view = session.call("a look at the inventory", lambda: manager.CreateContainerView(root, [kind], True))
    try:
        yield view
    finally:
        session.call("the end of a look at the inventory", view.DestroyView)


def _filter(kind: type[Any], names: Sequence[str], objects: list[Any]) -> Any:
    properties = _Collector.PropertySpec(type=kind, pathSet=list(names), all=False)
    return _Collector.FilterSpec(objectSet=objects, propSet=[properties], reportMissingObjectsInResults=False)


def _pages(session: Session, spec: Any) -> Iterator[tuple[Any, dict[str, Any]]]:
    for page in _page_lists(session, spec):
        yield from page


def _page_lists(session: Session, spec: Any) -> Iterator[list[tuple[Any, dict[str, Any]]]]:
    collector = session.content.propertyCollector
    options = _Collector.RetrieveOptions(maxObjects=PAGE_OBJECTS)
    request = partial(collector.RetrievePropertiesEx, [spec], options)
    while True:
        result = session.call("a look at properties", partial(_answered, request))
        yield [(found.obj, {entry.name: entry.val for entry in found.propSet or ()}) for found in _objects(result)]
        if result is None or not result.token:
            return
        request = partial(collector.ContinueRetrievePropertiesEx, result.token)


def _answered(request: Callable[[], Any]) -> Any:
    """Return a page; raise what a property is missing for, where that is the session or a privilege.

    vCenter answers a dead session so: with a page of properties that are all missing, not with a fault.
    """
    result = request()
    for found in _objects(result):
        for missing in found.missingSet or ():
            if isinstance(missing.fault, (vim.fault.NotAuthenticated, vim.fault.NoPermission)):
                raise missing.fault
    return result


def _objects(result: Any) -> list[Any]:
    return list(result.objects or ()) if result is not None else []
