"""Which VMs have a tag of vSphere: by the vCenter's REST interface, since SOAP knows no tags."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from tasks.errors import AuthenticationFailed, ConnectionFailed, InvalidInput, VsphereFault
from tasks.vsphere.session import Session

TIMEOUT_S = 30.0
LOGIN, TAGGING = "/rest/com/vmware/cis/session", "/rest/com/vmware/cis/tagging"


def tags_of(session: Session, wanted: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Return the tags among `wanted` (names) that VMs have, by the VMs' morefs. No round trip where none is wanted.

    Raises InvalidInput for a tag that there is not. Source: vSphere Automation API, `cis/tagging`.
    """
    if not wanted:
        return {}
    found: dict[str, list[str]] = {}
    with _logged_in(session) as client:
        ids = _ids(client, session)
        for name in wanted:
            if name not in ids:
                raise InvalidInput(what=f"tag {name!r}", why="the vCenter has none of that name", remedy="Name another")
            for tag in ids[name]:
                path = f"{TAGGING}/tag-association/id:{tag}?~action=list-attached-objects"
                for each in _value(client.post(path, json={}), session):
                    if each.get("type") == "VirtualMachine":
                        found.setdefault(each["id"], []).append(name)
    return {moref: tuple(dict.fromkeys(names)) for moref, names in found.items()}


def _ids(client: httpx.Client, session: Session) -> dict[str, list[str]]:
    """Return the tags' ids by their names: categories may have tags of the same name."""
    ids: dict[str, list[str]] = {}
    for tag in _value(client.get(f"{TAGGING}/tag"), session):
        about = _value(client.get(f"{TAGGING}/tag/id:{tag}"), session)
        ids.setdefault(about["name"], []).append(tag)
    return ids


@contextmanager
def _logged_in(session: Session) -> Iterator[httpx.Client]:
    connection = session.connection
    account = (connection.username, connection.password.get_secret_value())
    base = f"https://{connection.address}"
    with httpx.Client(base_url=base, verify=session.tls, timeout=TIMEOUT_S, trust_env=False) as client:
        try:
            token = _value(client.post(LOGIN, auth=account), session)
            client.headers["vmware-api-session-id"] = str(token)
            try:
                yield client
            finally:
                client.delete(LOGIN)
        except httpx.TransportError as error:
            raise ConnectionFailed(host=connection.address, why=str(error) or type(error).__name__) from error


def _value(answer: httpx.Response, session: Session) -> Any:
    connection = session.connection
    if answer.status_code == httpx.codes.UNAUTHORIZED:
        raise AuthenticationFailed(host=connection.address, username=connection.username)
    if not answer.is_success:
        raise VsphereFault(
            action="a look at tags",
            fault=f"status {answer.status_code}",
            remedy="A lone ESXi host has no tags; select by name, path, folder or regex",
        )
    return answer.json()["value"]
