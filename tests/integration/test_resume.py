"""An export that is killed, cut off or cancelled: what the next run does, and what is left behind."""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from flows.export import export_vm
from tasks import errors
from tasks.images.copy import Limits
from tasks.models import ExportJob
from tests.labs import ROOT, Lab, running_lab
from tests.runs import (
    assert_nothing_left,
    chance_of_this_run,
    command,
    export,
    faults,
    kill_after,
    kill_at_random,
    raw_sha256,
    run_command,
    vcenter_of,
)
from tests.waits import await_that

pytestmark = [pytest.mark.anyio, pytest.mark.live, pytest.mark.usefixtures("prefect_api")]

MIB = 1024 * 1024
SIZE = 160 * MIB
WINDOW = 64 * MIB
SITE = {
    "datacenters": [
        {
            "name": "DC",
            "clusters": [{"name": "c", "hosts": ["esx1"]}],
            "vms": [{"name": "db", "disks": [{"size": SIZE, "data": 100 * MIB}, {"size": "4MiB"}]}],
        }
    ],
    "keep_frozen": True,
}
POINTS = {
    "snapshot taken, before the state is written": "tasks.images.state:write_state:before",
    "before it is known to be readable": "tasks.images.state:write_state:after",
    "before the first journal append": "tasks.images.journal:Journal.append:before",
    "after the first journal append": "tasks.images.journal:Journal.append:after",
    "all arrived, the state not yet written": "tasks.images.state:write_state:before:3",
    "all arrived, the snapshot still there": "tasks.images.state:write_state:after:3",
    "while qemu-img has converted": "tasks.images.qemu:check:before",
    "verified, before the first rename": "tasks.images.output:publish:before",
    "after the first rename": "tasks.images.output:publish:after",
    "after every rename, before the manifest": "tasks.images.output:write_manifest:before",
    "after the manifest": "tasks.images.output:write_manifest:after",
}


@pytest.fixture(scope="module")
def module_lab():
    with running_lab(scenario=SITE) as lab:
        yield lab


@pytest.fixture
def site(module_lab):
    """The lab without the sessions of processes that were killed, which are the server's to time out."""
    module_lab.post("/faults", clear=True, expire_sessions=True)
    return module_lab


def words(output_dir: Path, image_format: str = "qcow2") -> tuple[str, ...]:
    return ("--vs-vm-name", "db", "--output-dir", str(output_dir), "--format", image_format)


def export_to(lab: Lab, output_dir: Path) -> list[str]:
    """Return the command line that exports the VM."""
    return command(lab, "export-vm", *words(output_dir))


def assert_equal_to_the_frozen_chain(lab: Lab, folder: Path, scratch: Path) -> None:
    """Compare every image with what qemu-img reads in the frozen copy of the chain: it is the oracle, not the lab."""
    manifest = json.loads((folder / "manifest.json").read_text())
    frozen = Path(lab.state_dir) / "frozen" / manifest["snapshot"]["moref"]
    for image in manifest["disks"]:
        source = frozen / image["source"].rpartition("/")[2]
        assert raw_sha256(folder / image["path"], scratch) == raw_sha256(source, scratch), image["path"]


def assert_only_the_copy_is_left(folder: Path, image_format: str) -> None:
    names = {path.name for path in folder.iterdir()} - {".hyper2kvm.lock"}
    assert names == {f"disk-{n}.{end}" for n in (0, 1) for end in (image_format, "digests")} | {
        "domain.xml",
        "manifest.json",
    }


@pytest.mark.parametrize(
    ("moment", "image_format"),
    [(moment, "qcow2") for moment in POINTS]
    + [(moment, "raw") for moment in ("after the first journal append", "after the first rename")],
)
def test_killed_there_the_next_run_ends_with_an_equal_copy(site, tmp_path, api, moment, image_format):
    site.post("/stats/reset")
    argv = [sys.executable, "-m", "tests.integration.dying", POINTS[moment]]
    argv += command(site, "export-vm", *words(tmp_path, image_format))[3:]
    died = subprocess.run(argv, cwd=ROOT, env=os.environ | site.environment() | api, capture_output=True, timeout=120)
    assert died.returncode == -9, died.stderr
    vm = site.vm("db")["moref"]
    site.post("/guest-write", vm=vm, disk=0, offset=MIB, length=4 * MIB, seed=random.randrange(1 << 30))
    if moment == "after the manifest":
        done = run_command(site, "export-vm", *words(tmp_path, image_format), env=api)
        assert "exists already" in done.stderr
    else:
        done = run_command(site, "export-vm", *words(tmp_path, image_format), env=api)
        assert done.returncode == 0, done.stderr
        assert_only_the_copy_is_left(tmp_path / "db", image_format)
    assert_equal_to_the_frozen_chain(site, tmp_path / "db", tmp_path)
    assert site.stats()["bytes_served"] <= 1.05 * (SIZE + 4 * MIB) + WINDOW
    assert site.stats()["open_snapshots"] == 0


def test_killed_at_random_it_copies_little_twice(site, tmp_path, api):
    kill_and_resume(site, tmp_path, api, random.Random(chance_of_this_run()), kills=3)


@pytest.mark.soak
def test_killed_thirty_times_it_copies_little_twice(tmp_path, api):
    seed = chance_of_this_run()
    with running_lab(scenario=SITE) as lab:
        for number in range(10):
            kill_and_resume(lab, tmp_path / str(number), api, random.Random(seed + number), kills=3)


def kill_and_resume(lab: Lab, output_dir: Path, api: dict[str, str], chance: random.Random, *, kills: int) -> None:
    output_dir.mkdir(exist_ok=True)
    kill_at_random(lab, export_to(lab, output_dir), api, chance, size=SIZE, kills=kills)
    done = run_command(lab, "export-vm", *words(output_dir), env=api)
    assert done.returncode == 0, done.stderr
    assert_equal_to_the_frozen_chain(lab, output_dir / "db", output_dir)
    assert_only_the_copy_is_left(output_dir / "db", "qcow2")
    assert lab.stats()["bytes_served"] <= 1.05 * (SIZE + 4 * MIB) + kills * WINDOW
    assert lab.stats()["open_snapshots"] == 0


async def test_a_dead_run_is_closed_by_the_one_that_goes_on(site, tmp_path, api):
    from prefect.client.orchestration import get_client

    with faults(site, throttle_bytes_per_s=24 * MIB):
        site.post("/stats/reset")
        await asyncio.to_thread(kill_after, site, export_to(site, tmp_path), api, 8 * MIB)
    dead = json.loads((tmp_path / "db" / ".hyper2kvm.lock").read_text())["flow_run_id"]
    async with get_client() as client:
        assert (await client.read_flow_run(dead)).state.is_running()
        await export(site, tmp_path, "db", format="raw")
        closed = (await client.read_flow_run(dead)).state
    assert closed.is_crashed()
    assert "another run" in closed.message
    assert_equal_to_the_frozen_chain(site, tmp_path / "db", tmp_path)


async def test_a_server_that_stays_away_leaves_a_job_to_go_on_with(site, tmp_path, monkeypatch):
    monkeypatch.setattr("tasks.fetch.Limits", partial(Limits, longest_wait_s=1.0))  # else it is waited for a minute
    site.post("/stats/reset")
    with faults(site, throttle_bytes_per_s=16 * MIB):
        running = asyncio.create_task(export(site, tmp_path, "db", format="raw"))
        await bytes_flow(site, 100 * MIB)
        site.post("/faults", folder_503=100_000)
        site.post("/faults", cut_after=1, count=100_000)
        with pytest.raises(errors.TransferInterrupted):
            await running
    assert site.stats()["open_snapshots"] == 1
    assert site.stats()["live_sessions"] == 0
    site.post("/guest-write", vm=site.vm("db")["moref"], disk=0, offset=0, length=MIB, seed=5)
    before = site.stats()["bytes_served"]
    manifest = await export(site, tmp_path, "db", format="raw")
    assert site.stats()["bytes_served"] - before < SIZE - 30 * MIB
    assert manifest.consistent
    assert_equal_to_the_frozen_chain(site, tmp_path / "db", tmp_path)
    assert_nothing_left(site)


async def test_a_session_that_expires_for_good_is_named_and_the_job_kept(site, tmp_path):
    site.post("/stats/reset")
    with faults(site, throttle_bytes_per_s=24 * MIB):
        running = asyncio.create_task(export(site, tmp_path, "db", format="raw"))
        await bytes_flow(site, 8 * MIB)
        site.post("/faults", expire_sessions=True, expire_forever=True)
        with pytest.raises(errors.SessionExpired):
            await running
    assert site.stats()["open_snapshots"] == 1
    await export(site, tmp_path, "db", format="raw")
    assert_equal_to_the_frozen_chain(site, tmp_path / "db", tmp_path)
    assert_nothing_left(site)


async def test_a_flow_that_runs_out_of_time_leaves_nothing(site, tmp_path):
    site.post("/stats/reset")
    limited = export_vm.with_options(timeout_seconds=6)
    job = ExportJob(vm_name="db", output_dir=tmp_path)
    with faults(site, throttle_bytes_per_s=8 * MIB), pytest.raises(TimeoutError):
        await limited(vcenter=vcenter_of(site), options=job)
    assert site.stats()["bytes_served"] > 0
    assert {path.name for path in (tmp_path / "db").iterdir()} == {".hyper2kvm.lock"}
    assert_nothing_left(site)


async def test_cancelled_it_leaves_no_part_behind(site, tmp_path):
    site.post("/stats/reset")
    with faults(site, throttle_bytes_per_s=24 * MIB):
        running = asyncio.create_task(export(site, tmp_path, "db"))
        await bytes_flow(site, 8 * MIB)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    assert {path.name for path in (tmp_path / "db").iterdir()} == {".hyper2kvm.lock"}
    assert_nothing_left(site)


async def test_a_kept_leaf_that_rotted_is_fetched_again(site, tmp_path, api):
    site.post("/stats/reset")
    with faults(site, throttle_bytes_per_s=48 * MIB):
        await asyncio.to_thread(kill_after, site, export_to(site, tmp_path), api, 120 * MIB)
    part = tmp_path / "db" / "disk-0.qcow2.part"
    rot = ["qemu-io", "-f", "qcow2", "-c", "write -q -P 0x5a 0 512", part]
    # the killed run's qemu-nbd ends, and gives its lock up, a moment after it
    await asyncio.to_thread(await_that, lambda: subprocess.run(rot, stderr=subprocess.DEVNULL).returncode == 0)
    manifest = await export(site, tmp_path, "db", skip_readback=True)
    assert manifest.consistent
    assert_equal_to_the_frozen_chain(site, tmp_path / "db", tmp_path)


async def test_a_job_that_was_naming_raw_images_is_not_gone_on_with_as_qcow2(site, tmp_path, api):
    # the digests and the image of disk 0 have their names
    argv = [sys.executable, "-m", "tests.integration.dying", "tasks.images.output:publish:after:2"]
    argv += command(site, "export-vm", *words(tmp_path, "raw"))[3:]
    environment = os.environ | site.environment() | api
    died = await asyncio.to_thread(subprocess.run, argv, cwd=ROOT, env=environment, capture_output=True, timeout=120)
    assert died.returncode == -9, died.stderr
    with pytest.raises(errors.InvalidInput, match="Run again with --format raw"):
        await export(site, tmp_path, "db", format="qcow2")
    await export(site, tmp_path, "db", format="raw")
    assert_equal_to_the_frozen_chain(site, tmp_path / "db", tmp_path)


async def test_a_snapshot_that_somebody_removed_means_a_new_point_in_time(site, tmp_path, api):
    site.post("/stats/reset")
    with faults(site, throttle_bytes_per_s=48 * MIB):
        await asyncio.to_thread(kill_after, site, export_to(site, tmp_path), api, 100 * MIB)
    await asyncio.to_thread(site.govc, "snapshot.remove", "-vm", site.vm("db")["path"], "*")
    site.post("/guest-write", vm=site.vm("db")["moref"], disk=0, offset=0, length=8 * MIB, seed=77)
    await export(site, tmp_path, "db", format="raw")
    assert_equal_to_the_frozen_chain(site, tmp_path / "db", tmp_path)
    assert_nothing_left(site)


async def test_another_jobs_snapshot_is_named_as_ours(site, tmp_path, api):
    with faults(site, throttle_bytes_per_s=24 * MIB):
        site.post("/stats/reset")
        await asyncio.to_thread(kill_after, site, export_to(site, tmp_path / "one"), api, 8 * MIB)
    with pytest.raises(errors.FenceClosed, match="another job of ours"):
        await export(site, tmp_path / "two", "db")
    await export(site, tmp_path / "one", "db", format="raw", skip_readback=True)
    assert_nothing_left(site)


async def bytes_flow(lab: Lab, count: int, timeout_s: float = 60) -> None:
    """Wait until the lab has served `count` bytes of disks."""
    deadline = time.monotonic() + timeout_s
    while lab.stats()["bytes_served"] < count:
        assert time.monotonic() < deadline, "no bytes flow"
        await asyncio.sleep(0.05)
