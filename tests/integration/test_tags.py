"""Tags of vSphere, by the vCenter's REST interface, which the simulator's own authors wrote."""

from __future__ import annotations

from collections.abc import Callable

import httpx
import pytest

from tasks.errors import InvalidInput
from tasks.vsphere.session import borrow
from tasks.vsphere.tags import LOGIN, TAGGING, tags_of
from tests.labs import Lab
from tests.waves import fleet

pytestmark = pytest.mark.live


def tag(lab: Lab, name: str, *morefs: str) -> None:
    """Make a tag as an administrator does, and put it on VMs."""
    with httpx.Client(base_url=f"https://{lab.address}", verify=str(lab.ca_file), trust_env=False) as client:

        def call(path: str, **body: object) -> str:
            answer = client.post(path, json=body)
            assert answer.is_success, answer.text
            return str(answer.json()["value"]) if answer.content else ""

        token = client.post(LOGIN, auth=(lab.username, lab.password)).json()["value"]
        client.headers["vmware-api-session-id"] = token
        about = {"name": f"of {name}", "description": "", "cardinality": "MULTIPLE", "associable_types": []}
        category = call(f"{TAGGING}/category", create_spec=about)
        made = call(f"{TAGGING}/tag", create_spec={"name": name, "description": "", "category_id": category})
        for moref in morefs:
            path = f"{TAGGING}/tag-association/id:{made}?~action=attach"
            call(path, object_id={"type": "VirtualMachine", "id": moref})


def test_vms_are_found_by_their_tags_and_no_login_is_left(new_lab: Callable[..., Lab]) -> None:
    lab = new_lab(scenario=fleet(vms=3))
    first, second, _ = (vm["moref"] for vm in lab.vms)
    tag(lab, "gold", first, second)
    tag(lab, "silver", second)
    with borrow(lab.connection()) as session:
        assert tags_of(session, ()) == {}
        assert tags_of(session, ("gold", "silver")) == {first: ("gold",), second: ("gold", "silver")}
        with pytest.raises(InvalidInput, match="tag 'bronze'"):
            tags_of(session, ("bronze",))
