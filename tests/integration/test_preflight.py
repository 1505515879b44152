"""Preflight against a live lab: what would stop a run is found, by its code, in a constant number of calls."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.preflight import preflight
from tasks.errors import PreflightRefused
from tasks.facts import Checked, Preflight
from tasks.wave.models import PreflightJob
from tests.labs import VDDK, Lab, running_lab
from tests.runs import faults, run_command, vcenter_of
from tests.waves import fleet

pytestmark = [pytest.mark.live, pytest.mark.anyio, pytest.mark.usefixtures("prefect_api")]

SMALL: dict[str, Any] = {"size": "1MiB", "thin": True}
# name: what the scenario says of the VM; what is found of it. Tools are off where a guest that is on is not at hand.
VMS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "sound": ({}, set()),
    "template": ({"template": True, "power": "off"}, {"template"}),
    "fault-tolerant": ({"fault_tolerance": True}, {"fault-tolerance"}),
    "no-snapshots": ({"disabled_methods": ["CreateSnapshot_Task"]}, {"disabled-method"}),
    "moving": ({"disabled_methods": ["RelocateVM_Task"]}, {"disabled-method"}),
    "consolidate": ({"consolidation_needed": True}, {"consolidation", "linked-clone"}),
    "snapshots": ({"snapshots": [{"name": "before update"}]}, {"existing-snapshot"}),
    "independent": ({"disks": [SMALL | {"mode": "independent_persistent"}]}, {"independent-disk"}),
    "rdm": ({"disks": [SMALL | {"backing": "rdm"}]}, {"rdm"}),
    "shared": ({"disks": [SMALL | {"sharing": "sharingMultiWriter"}]}, {"shared-disk"}),
    "encrypted": ({"disks": [SMALL | {"encrypted": True}]}, {"encrypted"}),
    "vsan": ({"disks": [SMALL | {"backing": "vsan"}]}, {"vsan-vvol"}),
    "passthrough": ({"devices": ["passthrough"]}, {"passthrough"}),
    "no-tools": ({"tools": False}, {"tools"}),
}
WARNINGS = {"sound", "moving", "no-tools"}


def scenario() -> dict[str, Any]:
    vms = [{"name": name, "disks": [SMALL], **said} for name, (said, _) in VMS.items()]
    hosts = [{"name": "c", "hosts": ["localhost"]}]
    return {"datacenters": [{"name": "DC", "clusters": hosts, "vms": vms}]}


@pytest.fixture(scope="module")
def troubled() -> Iterator[Lab]:
    with running_lab(scenario=scenario()) as lab:
        yield lab


async def found_of(lab: Lab, folder: Path, *select: str, **job: Any) -> Preflight:
    """Return what a preflight finds, whether it refuses or not."""
    options = PreflightJob(select=select, output_dir=folder, **job)
    try:
        return await preflight(vcenter=vcenter_of(lab), options=options)
    except PreflightRefused as error:
        found: Preflight = error.found
        return found


def codes(vm: Checked) -> set[str]:
    return {finding.code for finding in vm.findings}


async def test_each_trouble_is_found_by_its_name_with_what_to_do(troubled: Lab, tmp_path: Path) -> None:
    found = {vm.name: vm for vm in (await found_of(troubled, tmp_path, "*")).vms}
    assert {name: codes(vm) for name, vm in found.items()} == {name: expected for name, (_, expected) in VMS.items()}
    assert {name for name, vm in found.items() if vm.go} == WARNINGS
    assert all(finding.reason and finding.remedy for vm in found.values() for finding in vm.findings)
    assert troubled.stats()["open_snapshots"] == 1, "nothing is changed: the one that was there"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"transport": "ssh", "esxi_host": "127.0.0.1:{port}"}, "which ssh reads from"),
        ({"transport": "nbd", "nbd_uri": "nbd://127.0.0.1:{port}/disk"}, "which nbd reads from"),
        ({"transport": "ssh", "esxi_host": "nowhere.invalid"}, "nowhere.invalid is no name here"),
    ],
)
async def test_what_ssh_and_nbd_read_from_must_answer(
    troubled: Lab, tmp_path: Path, options: dict[str, str], reason: str
) -> None:
    def said(port: int) -> dict[str, str]:
        return {name: value.format(port=port) for name, value in options.items()}

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        answered = await found_of(troubled, tmp_path, "sound", options=said(port))
    silent = await found_of(troubled, tmp_path, "sound", options=said(port))
    (vm,) = silent.vms
    assert not vm.go and [finding.reason for finding in vm.findings if reason in finding.reason]
    assert answered.vms[0].go is ("nowhere" not in reason)


async def test_a_virtual_tpm_is_a_warning(new_lab: Callable[..., Lab], tmp_path: Path) -> None:
    vms = [{"name": "tpm", "disks": [SMALL], "devices": ["tpm"], "firmware": "efi"}]
    hosts = [{"name": "c", "hosts": ["localhost"]}]
    lab = new_lab(scenario={"api_version": "8.0.2.0", "datacenters": [{"name": "DC", "clusters": hosts, "vms": vms}]})
    (vm,) = (await found_of(lab, tmp_path, "tpm")).vms
    assert vm.go and codes(vm) == {"vtpm"}


async def test_what_a_road_reads_is_no_trouble_on_it(troubled: Lab, tmp_path: Path) -> None:
    options = {"transport": "vddk", "vddk_libdir": str(VDDK)}
    report = await found_of(troubled, tmp_path, "vsan", "snapshots", options=options)
    for vm in report.vms:
        refusing = {finding.code for finding in vm.findings if finding.severity == "no-go"}
        assert refusing == {"host-port"}, vm.findings  # nobody listens on port 902 of this machine
    (missing,) = (await found_of(troubled, tmp_path, "sound", options=options | {"vddk_libdir": str(tmp_path)})).vms
    assert "vddk" in codes(missing)


async def test_a_hundred_vms_cost_as_many_calls_as_two(new_lab: Callable[..., Lab], tmp_path: Path) -> None:
    lab = new_lab(scenario=fleet(vms=100))
    calls = {}
    for select in (("app-01", "app-02"), ("app-*",)):
        lab.post("/stats/reset")
        report = await found_of(lab, tmp_path, *select)
        assert report.go and len(report.vms) == len(select) if len(select) > 1 else 100
        calls[select] = lab.stats()["soap_calls"]["RetrievePropertiesEx"]
    few, many = calls.values()
    assert many <= few, calls


async def test_missing_privileges_are_named(troubled: Lab, tmp_path: Path) -> None:
    with faults(troubled, refuse_privilege="VirtualMachine.State.CreateSnapshot"):
        (vm,) = (await found_of(troubled, tmp_path, "sound")).vms
    (finding,) = vm.findings
    assert (finding.code, finding.severity) == ("privilege", "no-go")
    assert "VirtualMachine.State.CreateSnapshot on sound" in finding.reason


async def test_tracking_is_looked_at_where_a_sync_is_to_be(troubled: Lab, tmp_path: Path) -> None:
    options: dict[str, Any] = {"enable_cbt": True}
    off, wanted, blind = [
        (await found_of(troubled, tmp_path, name, mode="cbt_sync", options=own)).vms[0]
        for name, own in (("sound", {}), ("sound", options), ("snapshots", options))
    ]
    assert not off.go and "--enable-cbt" in off.findings[0].remedy
    assert wanted.go and codes(wanted) == {"cbt-off"}
    assert "cbt-below-snapshots" in codes(blind)


async def test_targets_that_are_the_same_and_no_room_are_found(new_lab: Callable[..., Lab], tmp_path: Path) -> None:
    vms = [{"name": "web", "folder": each, "disks": [SMALL]} for each in ("a", "b")]
    vms.append({"name": "huge", "disks": [{"size": "12TiB", "data": 0}]})
    lab = new_lab(scenario={"datacenters": [{"name": "DC", "clusters": [{"name": "c", "hosts": ["h"]}], "vms": vms}]})
    report = {vm.path: vm for vm in (await found_of(lab, tmp_path, "*")).vms}
    assert "duplicate-target" in codes(report["/DC/vm/a/web"]) and "/DC/vm/b/web goes to" in str(report["/DC/vm/a/web"])
    assert {"room-here", "host-name"} <= codes(report["/DC/vm/huge"])


async def test_the_command_line_prints_a_table_and_says_no(troubled: Lab, tmp_path: Path) -> None:
    words = ("rdm", "--output-dir", str(tmp_path), "--json")
    done = run_command(troubled, "preflight", *words)
    assert done.returncode == 1, done.stderr
    (vm,) = json.loads(done.stdout)["vms"]
    assert vm["findings"][0]["code"] == "rdm"
