"""Whole runs by the road `vddk`: the mode of its own, and `export`."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tasks import errors, road
from tests.labs import ROOT, VDDK, running_lab
from tests.runs import (
    assert_equal_to_the_guests_disks,
    assert_nothing_left,
    command,
    faults,
    kill_after,
    run_command,
    vddk_download,
)

pytestmark = [pytest.mark.anyio, pytest.mark.live, pytest.mark.usefixtures("prefect_api")]

MIB = 1024 * 1024


@pytest.fixture(scope="module")
def site():
    machines = [
        {"name": "web", "disks": [{"size": "16MiB"}, {"size": "8MiB"}]},
        {"name": "half", "disks": [{"size": "32MiB", "data": "8MiB"}]},
        {"name": "objects", "disks": [{"size": "4MiB"}, {"size": "1MiB", "backing": "rdm"}]},
        {"name": "large", "disks": [{"size": "64MiB", "data": "60MiB"}]},
    ]
    center = {"name": "DC", "clusters": [{"name": "c", "hosts": ["esx1"]}], "vms": machines}
    with running_lab(scenario={"datacenters": [center], "locks": "strict"}) as lab:
        yield lab


async def test_every_disk_of_a_running_vm_is_the_guests_at_the_snapshot_while_it_writes(site, tmp_path):
    moref = site.vm("web")["moref"]
    for disk in (0, 1):
        site.post("/guest-load", vm=moref, disk=disk, bytes_per_s=MIB, seed=disk)
    manifest = await vddk_download(site, tmp_path, "web", all_disks=True)
    assert [(image.path, image.road, image.verified) for image in manifest.disks] == [
        ("disk-0.raw", "vddk", "direct"),
        ("disk-1.raw", "vddk", "direct"),
    ]
    assert_equal_to_the_guests_disks(site, manifest, tmp_path / "web", tmp_path)
    for disk in (0, 1):
        site.post("/guest-load", vm=moref, disk=disk, stop=True)
    assert_nothing_left(site)


async def test_no_more_disks_of_a_host_are_open_at_once_than_it_bears(site, tmp_path, monkeypatch):
    monkeypatch.setattr(road, "VDDK_DISKS_A_HOST", 1)
    site.post("/stats/reset")
    await vddk_download(site, tmp_path, "web", all_disks=True, parallel_disks=2)
    assert site.stats()["vddk_prepared_peak"] == 1


@pytest.mark.parametrize("wanted", ["2001", "hard disk 2", "1"])
async def test_one_disk_is_named_by_key_label_or_number(site, tmp_path, wanted):
    manifest = await vddk_download(site, tmp_path, "web", disk=wanted)
    assert [image.path for image in manifest.disks] == ["disk-1.raw"]
    assert manifest.warnings == (f"Copied was disk {wanted}, and not: Hard disk 1 ([datastore1] web/web.vmdk).",)
    assert_equal_to_the_guests_disks(site, manifest, tmp_path / "web", tmp_path)


async def test_without_a_name_it_is_the_first_disk_and_the_report_says_so(site, tmp_path):
    manifest = await vddk_download(site, tmp_path, "web")
    assert [image.path for image in manifest.disks] == ["disk-0.raw"]
    assert manifest.warnings == ("Copied was the first disk, and not: Hard disk 2 ([datastore1] web/web_1.vmdk).",)
    assert not (await vddk_download(site, tmp_path, "half")).warnings


async def test_a_disk_that_is_not_there_is_refused_with_those_that_are(site, tmp_path):
    with pytest.raises(errors.InvalidInput, match=r"'7'.*0: Hard disk 1, key 2000; 1: Hard disk 2, key 2001"):
        await vddk_download(site, tmp_path, "web", disk="7")
    assert_nothing_left(site)


async def test_what_is_not_allocated_is_not_read_and_takes_no_room_here(site, tmp_path):
    site.post("/stats/reset")
    manifest = await vddk_download(site, tmp_path, "half")
    assert_equal_to_the_guests_disks(site, manifest, tmp_path / "half", tmp_path)
    assert manifest.disks[0].bytes_transferred <= 20 * MIB
    assert site.stats()["bytes_served"] <= 21 * MIB
    assert (tmp_path / "half" / "disk-0.raw").stat().st_blocks * 512 <= 20 * MIB


async def test_a_disk_that_no_road_can_copy_is_in_the_way_only_where_it_is_wanted(site, tmp_path):
    with pytest.raises(errors.UnsupportedDisk, match="raw device mapping"):
        await vddk_download(site, tmp_path, "objects", all_disks=True)
    assert_nothing_left(site)
    manifest = await vddk_download(site, tmp_path, "objects")
    assert_equal_to_the_guests_disks(site, manifest, tmp_path / "objects", tmp_path)


async def test_a_missing_library_is_named_before_anything_is_connected(site, tmp_path):
    site.post("/stats/reset")
    with pytest.raises(errors.VddkUnavailable, match="there is no libvixDiskLib"):
        await vddk_download(site, tmp_path, "web", libdir=tmp_path)
    assert site.stats()["soap_total"] == 0


def test_killed_it_is_gone_on_with_from_what_is_here_and_the_vm_is_released(site, tmp_path, api):
    words = ["--vs-vm-name", "large", "--vddk-libdir", str(VDDK), "--output-dir", str(tmp_path)]
    site.post("/stats/reset")
    with faults(site, throttle_bytes_per_s=MIB):
        assert kill_after(site, command(site, "vddk-export", *words), api, 32 * MIB)
    left = site.stats()
    assert (left["open_snapshots"], left["vddk_prepared"]) == (1, 1)
    state = json.loads((tmp_path / "large" / ".hyper2kvm.job.json").read_text())
    assert (state["road"]["libdir"], state["selection"]) == (str(VDDK), "the first disk")
    site.post("/stats/reset")
    done = run_command(site, "vddk-export", *words, "--json", env=api)
    assert done.returncode == 0, done.stderr
    assert site.stats()["bytes_served"] < 60 * MIB
    assert_nothing_left(site)
    manifest = json.loads(done.stdout)
    moref, snapshot = manifest["vm"]["moref"], manifest["snapshot"]["moref"]
    image = (tmp_path / "large" / "disk-0.raw").read_bytes()
    assert hashlib.sha256(image).hexdigest() == site.sha256(moref, 0, snapshot)


def test_interrupted_it_leaves_nothing(site, tmp_path, api):
    words = ["--vs-vm-name", "large", "--vddk-libdir", str(VDDK), "--output-dir", str(tmp_path)]
    site.post("/stats/reset")
    with faults(site, throttle_bytes_per_s=MIB):
        run = subprocess.Popen(
            command(site, "vddk-export", *words),
            cwd=ROOT,
            env=os.environ | site.environment() | api,
            start_new_session=True,
        )
        while site.stats()["bytes_served"] < 4 * MIB:
            assert run.poll() is None
            time.sleep(0.05)
        os.killpg(run.pid, signal.SIGINT)
        assert run.wait(60) == 130
    assert_nothing_left(site)
    assert not list((tmp_path / "large").glob("disk-*"))


def test_killed_and_asked_for_another_disk_it_starts_anew(site, tmp_path, api):
    words = ["--vs-vm-name", "web", "--vddk-libdir", str(VDDK), "--output-dir", str(tmp_path)]
    site.post("/stats/reset")
    with faults(site, throttle_bytes_per_s=MIB):
        assert kill_after(site, command(site, "vddk-export", *words), api, 2 * MIB)
    state = json.loads((tmp_path / "web" / ".hyper2kvm.job.json").read_text())
    assert (state["road"]["libdir"], state["selection"]) == (str(VDDK), "the first disk")
    done = run_command(site, "vddk-export", *words, "--vddk-disk", "1", env=api)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in Path(tmp_path / "web").glob("disk-*")} == {"disk-1.raw", "disk-1.digests"}
    assert "Copied was disk 1, and not: Hard disk 1" in done.stdout
    assert_nothing_left(site)
