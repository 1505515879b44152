"""How a download ends that does not go well, live: what it outlives, what it refuses, what it leaves behind."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import pytest
from prefect.client.orchestration import get_client
from prefect.states import Cancelled, Crashed

from flows.download_only import download_only
from tasks import errors
from tasks.succession import clean_up
from tests.integration.test_command_line import wait_for_bytes
from tests.integration.test_download import store, tree
from tests.integration.test_resume import bytes_flow
from tests.labs import ROOT, Lab, running_lab
from tests.runs import assert_nothing_left, command, download, faults, kill_after, vcenter_of

pytestmark = [pytest.mark.anyio, pytest.mark.live, pytest.mark.usefixtures("prefect_api")]

MIB = 1024 * 1024
SIZE = 24 * MIB
CUT = MIB
ONLY_THE_LOCK = {".hyper2kvm.lock"}
SITE = {
    "datacenters": [
        {
            "name": "DC",
            "clusters": [{"name": "c", "hosts": ["esx1"]}],
            "vms": [
                {"name": "off", "power": "off", "disks": [{"size": SIZE, "data": SIZE}]},
                {"name": "running", "disks": [{"size": SIZE, "data": SIZE}]},
                {"name": "small", "power": "off", "disks": [{"size": "1MiB"}]},
            ],
        }
    ],
    "keep_frozen": True,
}
OFF_AND_RUNNING = pytest.mark.parametrize(("name", "snapshot"), [("off", False), ("running", True)])


@pytest.fixture(scope="module")
def module_lab() -> Iterator[Lab]:
    with running_lab(scenario=SITE) as lab:
        yield lab


@pytest.fixture
def site(module_lab: Lab) -> Lab:
    module_lab.post("/faults", clear=True, expire_sessions=True)  # those of processes that were killed
    module_lab.post("/stats/reset")
    return module_lab


def left_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def size_of(contents: dict[str, bytes]) -> int:
    return sum(map(len, contents.values()))


# ── what it outlives ─────────────────────────────────────────────────────────────────────────────────


async def test_it_outlives_a_dead_session_a_busy_server_and_cut_connections(site, tmp_path):
    with faults(site, throttle_bytes_per_s=8 * MIB):
        running = asyncio.create_task(download(site, tmp_path, "off"))
        await bytes_flow(site, 2 * MIB)
        site.post("/faults", expire_sessions=True, folder_503=2)
        site.post("/faults", cut_after=CUT, count=3, throttle_bytes_per_s=0)
        await running
    there = tree(store(site, "off"))
    assert tree(tmp_path / "off") == there
    stats = site.stats()
    assert stats["logins"] == 2
    assert stats["bytes_served"] <= 1.05 * size_of(there) + 3 * CUT
    assert_nothing_left(site)


async def test_cut_connections_cost_no_byte_twice_but_those_in_flight(site, tmp_path):
    with faults(site, cut_after=CUT, count=8):
        await download(site, tmp_path, "off")
    there = tree(store(site, "off"))
    assert tree(tmp_path / "off") == there
    assert site.stats()["bytes_served"] <= 1.05 * size_of(there) + 8 * CUT // 2
    assert_nothing_left(site)


async def test_a_session_that_is_refused_for_good_is_named_and_what_arrived_is_kept(site, tmp_path):
    with faults(site, throttle_bytes_per_s=4 * MIB):
        running = asyncio.create_task(download(site, tmp_path, "off"))
        await bytes_flow(site, MIB)
        site.post("/faults", expire_forever=True, cut_after=1, count=1000)
        with pytest.raises(errors.SessionExpired):
            await running
    assert left_in(tmp_path / "off") == ONLY_THE_LOCK | {".hyper2kvm.job.json", ".hyper2kvm.parts"}
    await download(site, tmp_path, "off")
    assert tree(tmp_path / "off") == tree(store(site, "off"))
    assert_nothing_left(site)


async def test_a_lone_esxi_host_works_like_a_vcenter(tmp_path):
    with running_lab("-esx", "-disk-size", "2MiB") as host:
        manifest = await download(host, tmp_path, "demo", snapshot=True)
        content = (tmp_path / "demo" / "demo-flat.vmdk").read_bytes()
        frozen = host.sha256(manifest.vm.moref, 0, manifest.snapshot.moref)
        assert hashlib.sha256(content).hexdigest() == frozen
        assert_nothing_left(host)


# ── what ends it ─────────────────────────────────────────────────────────────────────────────────────


@OFF_AND_RUNNING
async def test_cancelled_it_leaves_nothing(site, tmp_path, name, snapshot):
    with faults(site, throttle_bytes_per_s=2 * MIB):
        running = asyncio.create_task(download(site, tmp_path, name, snapshot=snapshot))
        await bytes_flow(site, MIB)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    assert left_in(tmp_path / name) == ONLY_THE_LOCK
    assert_nothing_left(site)


@OFF_AND_RUNNING
def test_stopped_by_ctrl_c_it_leaves_nothing_and_says_so(site, tmp_path, api, name, snapshot):
    words = ["--vs-vm-name", name, "--output-dir", str(tmp_path), *(["--snapshot"] if snapshot else [])]
    with faults(site, throttle_bytes_per_s=2 * MIB):
        process = subprocess.Popen(
            command(site, "download-vm", *words),
            cwd=ROOT,
            env=os.environ | site.environment() | api,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        wait_for_bytes(site, process)
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Interrupted" in err
    assert "Traceback" not in out + err
    assert left_in(tmp_path / name) == ONLY_THE_LOCK
    assert_nothing_left(site)


async def test_killed_and_then_cancelled_nothing_is_left_but_killed_only_it_is_kept(site, tmp_path, api):
    words = ("--vs-vm-name", "off", "--output-dir", str(tmp_path))
    with faults(site, throttle_bytes_per_s=4 * MIB):
        assert await asyncio.to_thread(kill_after, site, command(site, "download-vm", *words), api, MIB)
    holder = json.loads((tmp_path / "off" / ".hyper2kvm.lock").read_text())
    block = await vcenter_of(site).save("lab", overwrite=True)
    async with get_client() as client:
        run = await client.read_flow_run(UUID(holder["flow_run_id"]))
    run.parameters["vcenter"] = {"$ref": {"block_document_id": str(block)}}
    await clean_up(download_only, run, Crashed())
    assert ".hyper2kvm.parts" in left_in(tmp_path / "off")
    await clean_up(download_only, run, Cancelled())
    assert left_in(tmp_path / "off") == ONLY_THE_LOCK
    assert_nothing_left(site)


@pytest.mark.parametrize("privilege", ["Datastore.FileManagement", "Datastore.Browse"])
async def test_a_refused_privilege_is_named(site, tmp_path, privilege):
    with faults(site, refuse_privilege=privilege), pytest.raises(errors.PermissionMissing, match=privilege):
        await download(site, tmp_path, "small")
    assert site.stats()["bytes_served"] == 0
    assert left_in(tmp_path / "small") == ONLY_THE_LOCK
    assert_nothing_left(site)


# ── files that go while it runs ──────────────────────────────────────────────────────────────────────


async def test_a_file_that_goes_after_it_was_listed_is_missing(site, tmp_path):
    with faults(site, list_as={"vmware.log": "gone.log"}):
        manifest = await download(site, tmp_path, "small")
        assert manifest.missing == ("[datastore1] small/gone.log",)
        assert any("Missing at the source: [datastore1] small/gone.log" in each for each in manifest.warnings)
        assert set(tree(tmp_path / "small")) == set(tree(store(site, "small"))) - {"vmware.log"}
        with pytest.raises(errors.FileMissing, match=r"\[datastore1\] small/gone\.log is not there"):
            await download(site, tmp_path / "strict", "small", fail_on_missing=True)
    assert left_in(tmp_path / "strict" / "small") == ONLY_THE_LOCK
    assert_nothing_left(site)


async def test_a_file_that_a_disk_is_made_of_and_that_goes_fails_the_run(site, tmp_path):
    with (
        faults(site, list_as={"vmware.log": "small-ctk.vmdk"}),
        pytest.raises(errors.FileMissing, match=r"\[datastore1\] small/small-ctk\.vmdk is not there"),
    ):
        await download(site, tmp_path, "small")
    assert left_in(tmp_path / "small") == ONLY_THE_LOCK
    assert_nothing_left(site)


# ── names ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("../../evil.vmx", "leads out of the folder"),
        ("/etc/passwd", "leads out of the folder"),
        ("..", "leads out of the folder"),
        ("a\nb", "cannot be shown"),
        ("small.vmx/x", "collides with that of"),
        ("SMALL.VMDK", "collides with that of"),
        (".hyper2kvm.landing.json", "one of ours"),
    ],
)
async def test_a_name_that_no_datastore_should_have_is_refused_before_the_first_byte(site, tmp_path, name, words):
    with faults(site, list_as={"vmware.log": name}), pytest.raises(errors.FileUnfit, match=words):
        await download(site, tmp_path, "small")
    assert site.stats()["bytes_served"] == 0
    assert {path.name for path in tmp_path.rglob("*")} == ONLY_THE_LOCK | {"small"}
    assert_nothing_left(site)
