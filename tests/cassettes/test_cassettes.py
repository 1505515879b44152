"""The control-plane against what a vCenter said once: recorded from the lab, scrubbed, replayed with no lab running.

`make cassettes` records them anew; everywhere else nothing is recorded (`record_mode="none"`).
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import pyVim.connect
import pyVmomi.five
import pyVmomi.SoapAdapter
import vcr
import yaml
from pydantic import SecretStr
from vcr.stubs import VCRHTTPSConnection

from tasks.models import Connection, Trust
from tasks.vsphere import lookup, machine, session, snapshots
from tasks.vsphere.disks import snapshot_disks

HERE = Path(__file__).parent
RECORDING = os.environ.get("HYPER2KVM_RECORD") == "1"
PORT = 44300  # in the cassettes; nothing needs to be served there
LARGEST_BYTES = 200 * 1024
FLAGS = ("-disks", "2", "-disk-size", "1MiB", "-vm", "web", "-folder", "production")
PASSWORD = re.compile(r"(?P<open><password\b[^>]*>)(?P<secret>[^<]*)<")


def scrubbed_request(request: Any) -> Any:
    request.headers.pop("Cookie", None)
    body = request.body.decode() if isinstance(request.body, bytes) else (request.body or "")
    request.body = PASSWORD.sub(r"\g<open>scrubbed<", body).encode()
    return request


def scrubbed_response(response: dict[str, Any]) -> dict[str, Any]:
    for name in [name for name in response["headers"] if name.lower() == "set-cookie"]:
        del response["headers"][name]
    return response


RECORDER = vcr.VCR(
    cassette_library_dir=str(HERE),
    record_mode="all" if RECORDING else "none",
    match_on=("method", "path", "body"),
    before_record_request=scrubbed_request,
    before_record_response=scrubbed_response,
    decode_compressed_response=True,
    custom_patches=tuple(
        (module, "HTTPSConnection", VCRHTTPSConnection) for module in (pyVmomi.SoapAdapter, pyVim.connect, pyVmomi.five)
    ),
)


@contextmanager
def replayed(name: str) -> Iterator[Connection]:
    """Yield a connection whose every answer comes from the cassette `name` (from a lab, when recording)."""
    with ExitStack() as stack:
        password, port = "from the cassette", PORT
        if RECORDING:
            from tests.labs import running_lab

            lab = stack.enter_context(running_lab("-listen", f"127.0.0.1:{PORT}", *FLAGS))
            password = lab.password
        else:
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            port = listener.getsockname()[1]
        stack.enter_context(RECORDER.use_cassette(f"{name}.yaml"))
        yield Connection(
            host="127.0.0.1", port=port, username="hyper", password=SecretStr(password), trust=Trust(verify=False)
        )


def test_connect():
    with replayed("connect") as connection, session.borrow(connection) as live:
        assert live.info.is_vcenter
        assert re.fullmatch(r"[0-9a-f-]{36}", live.info.uuid)
        assert live.info.version


def test_resolve():
    with replayed("resolve") as connection, session.borrow(connection) as live:
        found = {lookup.find_vm(live, wanted) for wanted in ("web", "/DC/vm/production/web")}
        (moref,) = found
        vm = machine.describe_vm(live, moref)
    assert (vm.name, vm.inventory_path) == ("web", "/DC/vm/production/web")
    assert vm.host_path == "/DC/host/cluster/esx1"
    assert vm.vpx_uri.endswith("/DC/cluster/esx1")
    assert vm.power_state == "poweredOn"
    assert [nic.model for nic in vm.nics] == ["VirtualVmxnet3"]


def test_enumerate():
    with replayed("enumerate") as connection, session.borrow(connection) as live:
        vm = machine.describe_vm(live, lookup.find_vm(live, "/DC/vm/production/web"))
        taken = snapshots.take_snapshot(
            live, vm, name="hyper2kvm-cassette", description="{}", quiesce=False, or_crash_consistent=False
        )
        disks = snapshot_disks(live, taken)
        snapshots.drop_snapshot(live, vm.moref, name=taken.name)
    assert [disk.index for disk in disks] == [0, 1]
    assert [disk.datastore_path for disk in disks] == ["[datastore1] web/web.vmdk", "[datastore1] web/web_1.vmdk"]
    assert {disk.capacity_bytes for disk in disks} == {1 << 20}
    assert len({disk.uuid for disk in disks}) == 2


@pytest.mark.parametrize("name", ["connect", "resolve", "enumerate"])
def test_a_cassette_is_small_and_holds_no_secret(name):
    path = HERE / f"{name}.yaml"
    assert path.stat().st_size < LARGEST_BYTES
    interactions = yaml.safe_load(path.read_text())["interactions"]
    logins = [match for each in interactions for match in PASSWORD.finditer(str(each["request"]["body"]))]
    assert [match["secret"] for match in logins] == ["scrubbed"]
    headers = {name.lower() for each in interactions for side in each.values() for name in side["headers"]}
    assert not {"cookie", "set-cookie", "authorization"} & headers
    assert "vmware_soap_session" not in path.read_text()
