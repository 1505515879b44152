"""`cbt_sync` against a live lab: a whole copy, then only what changed, whatever vSphere says of that."""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect.client.orchestration import get_client
from prefect.states import Crashed

from flows.cbt_sync import cbt_sync
from tasks import errors
from tasks.images.dirty import refuse_torn
from tasks.models import Manifest, SyncJob
from tasks.succession import clean_up
from tests.labs import ROOT, Lab, running_lab
from tests.runs import (
    assert_equal_to_the_guests_disks,
    assert_nothing_left,
    command,
    export,
    faults,
    vcenter_of,
)

pytestmark = [pytest.mark.anyio, pytest.mark.live, pytest.mark.usefixtures("prefect_api")]

MIB = 1024 * 1024
BLOCK = 64 * 1024  # what CBT tells apart
PROBES = 2 * 2 * 512  # a sector of each disk, before the run's first byte and before the disk's
DISKS = [{"size": "16MiB", "data": "4MiB"}, {"size": "8MiB", "data": "1MiB"}]


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    vms = [
        {"name": "tracked", "cbt": True, "disks": DISKS},
        {"name": "untracked", "disks": DISKS},
        {"name": "growing", "cbt": True, "disks": DISKS},
        {"name": "other", "cbt": True, "disks": DISKS[1:]},
        {"name": "mixed", "cbt": True, "disks": [DISKS[1], DISKS[1] | {"mode": "independent_persistent"}]},
    ]
    with running_lab(scenario=site(vms)) as lab:
        yield lab


def site(vms: list[dict[str, Any]]) -> dict[str, Any]:
    return {"datacenters": [{"name": "DC", "standalone_hosts": ["esx1"], "vms": vms}]}


async def sync(lab: Lab, folder: Path, vm: str = "tracked", **options: Any) -> Manifest:
    job = SyncJob(vm_name=vm, output_dir=folder, **options)
    manifest: Manifest = await cbt_sync(vcenter=vcenter_of(lab), options=job)
    return manifest


def write(lab: Lab, *places: tuple[int, int], vm: str = "tracked", disk: int = 0, zero: bool = False) -> None:
    """Have the guest write at (offset, length), noise or zeros."""
    for offset, length in places:
        body = {"zero": True} if zero else {"seed": random.getrandbits(32)}
        lab.post("/guest-write", vm=lab.vm(vm)["moref"], disk=disk, offset=offset, length=length, **body)


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
async def test_each_run_brings_the_copy_up_to_now_and_fetches_only_what_changed(lab, tmp_path, image_format):
    first = await sync(lab, tmp_path, format=image_format)
    folder = tmp_path / "tracked"
    assert_equal_to_the_guests_disks(lab, first, folder, tmp_path)
    for number in range(3):
        write(lab, (number * 3 * MIB + 5, 100), (number * MIB + 300 * 1024, BLOCK), (15 * MIB + 17, 4096))
        write(lab, (number * MIB, 2 * BLOCK), zero=True)
        write(lab, (MIB * (1 + number), 8), disk=1)
        lab.post("/stats/reset")
        manifest = await sync(lab, tmp_path)
        assert_equal_to_the_guests_disks(lab, manifest, folder, tmp_path)
        fetched = sum(image.bytes_transferred for image in manifest.disks)
        assert fetched <= 7 * BLOCK + 128 * 1024
        assert lab.stats()["bytes_served"] <= fetched + PROBES
        assert [image.change_id for image in manifest.disks] != [image.change_id for image in first.disks]
        assert {image.format for image in manifest.disks} == {image_format}
    assert {path.name for path in folder.iterdir() if not path.name.startswith(".")} == {
        *(f"disk-{n}.{end}" for n in (0, 1) for end in (image_format, "digests")),
        "manifest.json",
        "domain.xml",
    }
    assert_nothing_left(lab)


@pytest.mark.parametrize(("star", "share"), [("allocated", 0.75), ("whole", 1.0), ("fail", 1.0)])
async def test_of_a_first_copy_only_what_is_allocated_is_read_where_vsphere_can_tell(lab, tmp_path, star, share):
    with faults(lab, cbt={"star": star}):
        manifest = await sync(lab, tmp_path)
    read, size = manifest.disks[0].bytes_transferred, manifest.disks[0].virtual_size
    assert read <= share * size
    assert (read == size) is (share == 1.0)
    assert_equal_to_the_guests_disks(lab, manifest, tmp_path / "tracked", tmp_path)


async def test_a_run_in_which_nothing_changed_fetches_nothing(lab, tmp_path):
    await sync(lab, tmp_path)
    lab.post("/stats/reset")
    manifest = await sync(lab, tmp_path)
    assert [image.bytes_transferred for image in manifest.disks] == [0, 0]
    assert lab.stats()["bytes_served"] <= PROBES
    assert_equal_to_the_guests_disks(lab, manifest, tmp_path / "tracked", tmp_path)


async def test_tracking_is_switched_on_only_where_that_is_allowed(lab, tmp_path):
    with pytest.raises(errors.TrackingOff, match="--enable-cbt"):
        await sync(lab, tmp_path, "untracked")
    manifest = await sync(lab, tmp_path, "untracked", enable_cbt=True)
    assert all(image.change_id for image in manifest.disks)
    write(lab, (MIB, 10), vm="untracked")
    again = await sync(lab, tmp_path, "untracked")
    assert sum(image.bytes_transferred for image in again.disks) == BLOCK
    assert_equal_to_the_guests_disks(lab, again, tmp_path / "untracked", tmp_path)
    assert_nothing_left(lab)


async def test_tracking_that_is_on_and_does_not_begin_is_named(new_lab, tmp_path):
    lab = new_lab(scenario=site([{"name": "deaf", "disks": DISKS[:1]}]))
    with faults(lab, cbt={"deaf": True}), pytest.raises(errors.TrackingOff, match=r"Hard disk 1.* has no changeId"):
        await sync(lab, tmp_path, "deaf", enable_cbt=True)
    assert_nothing_left(lab)


async def test_a_vm_that_has_snapshots_is_not_made_to_track(new_lab, tmp_path):
    lab = new_lab(scenario=site([{"name": "kept", "disks": DISKS[:1], "snapshots": [{"name": "somebody's"}]}]))
    with pytest.raises(errors.FenceClosed, match="below which"):
        await sync(lab, tmp_path, "kept", enable_cbt=True)


FALLBACKS = {
    "tracking reset": {"reset_cbt": True},
    "no answer": {"fail_method": {"method": "QueryChangedDiskAreas", "fault": "FileFault", "count": 0}},
    "areas beyond the disk": {"cbt": {"wrong": "beyond"}},
    "areas that overlap": {"cbt": {"wrong": "overlapping"}},
}


@pytest.mark.parametrize("trouble", FALLBACKS)
async def test_where_vsphere_cannot_tell_all_is_read_and_what_differs_is_written(lab, tmp_path, trouble):
    await sync(lab, tmp_path)
    write(lab, (MIB + 7, 100), (9 * MIB, 3 * BLOCK))
    with faults(lab, **FALLBACKS[trouble]):
        manifest = await sync(lab, tmp_path)
    assert manifest.disks[0].bytes_transferred == 16 * MIB
    assert_equal_to_the_guests_disks(lab, manifest, tmp_path / "tracked", tmp_path)
    write(lab, (5, 5))
    again = await sync(lab, tmp_path)
    assert [image.bytes_transferred for image in again.disks] == [BLOCK, 0]
    assert_equal_to_the_guests_disks(lab, again, tmp_path / "tracked", tmp_path)


async def test_answers_in_pages_and_answers_too_large_are_taken_whole(lab, tmp_path):
    await sync(lab, tmp_path)
    write(lab, *((number * 2 * MIB + 9, 1) for number in range(7)))
    with faults(lab, cbt={"page": 2}):
        manifest = await sync(lab, tmp_path)
    assert manifest.disks[0].bytes_transferred == 7 * BLOCK
    write(lab, (8 * MIB, 1))
    with faults(lab, cbt={"too_large": True}):
        manifest = await sync(lab, tmp_path)
    assert manifest.disks[0].bytes_transferred == 2 * MIB + BLOCK
    assert_equal_to_the_guests_disks(lab, manifest, tmp_path / "tracked", tmp_path)


async def test_rot_in_a_leaf_that_changed_in_part_is_found_and_made_good(lab, tmp_path):
    await sync(lab, tmp_path)
    image = tmp_path / "tracked" / "disk-0.raw"
    with image.open("r+b") as file:
        file.seek(2 * MIB + 3 * BLOCK)
        file.write(os.urandom(17))
    write(lab, (2 * MIB, 10))
    manifest = await sync(lab, tmp_path)
    assert manifest.disks[0].bytes_transferred == 4 * BLOCK
    assert_equal_to_the_guests_disks(lab, manifest, tmp_path / "tracked", tmp_path)


async def test_digests_that_are_not_the_manifests_are_no_ground_to_build_on(lab, tmp_path):
    await sync(lab, tmp_path)
    sidecar = tmp_path / "tracked" / "disk-0.digests"
    content = bytearray(sidecar.read_bytes())
    content[4096 + 32 * 9] ^= 1
    sidecar.write_bytes(content)
    write(lab, (2 * MIB, 10))
    manifest = await sync(lab, tmp_path)
    assert manifest.disks[0].bytes_transferred == 16 * MIB
    assert_equal_to_the_guests_disks(lab, manifest, tmp_path / "tracked", tmp_path)


async def test_an_export_is_a_base_too_and_what_is_none_is_refused_by_name(lab, tmp_path):
    await export(lab, tmp_path, "tracked", format="qcow2")
    write(lab, (2 * MIB, 10))
    manifest = await sync(lab, tmp_path)
    assert sum(image.bytes_transferred for image in manifest.disks) == BLOCK
    assert_equal_to_the_guests_disks(lab, manifest, tmp_path / "tracked", tmp_path)
    await export(lab, tmp_path / "vdi", "tracked", format="vdi")
    with pytest.raises(errors.CopyUnfit, match="is vdi"):
        await sync(lab, tmp_path / "vdi")
    (tmp_path / "tracked" / "disk-1.qcow2").unlink()
    with pytest.raises(errors.CopyUnfit, match=r"disk-1\.qcow2 is not there"):
        await sync(lab, tmp_path)
    assert_nothing_left(lab)


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
async def test_a_disk_that_grew_is_read_whole_and_its_image_grows(lab, tmp_path, image_format):
    before = (await sync(lab, tmp_path, "growing", format=image_format)).disks
    size = before[0].virtual_size + 3 * MIB
    lab.govc("vm.disk.change", "-vm", lab.vm("growing")["path"], "-disk.key", "2000", "-size", f"{size}B")
    write(lab, (size - 100, 100), (MIB, 10), vm="growing")
    write(lab, (MIB, 10), vm="growing", disk=1)
    manifest = await sync(lab, tmp_path, "growing")
    assert [image.virtual_size for image in manifest.disks] == [size, before[1].virtual_size]
    assert [image.bytes_transferred for image in manifest.disks] == [size, BLOCK]
    assert_equal_to_the_guests_disks(lab, manifest, tmp_path / "growing", tmp_path)
    write(lab, (size - 100, 100), vm="growing")
    again = await sync(lab, tmp_path, "growing")
    assert [image.bytes_transferred for image in again.disks] == [BLOCK, 0]
    assert_equal_to_the_guests_disks(lab, again, tmp_path / "growing", tmp_path)
    assert_nothing_left(lab)


async def test_a_source_that_was_reverted_is_what_it_was(lab, tmp_path):
    await sync(lab, tmp_path)
    path = lab.vm("tracked")["path"]
    write(lab, (MIB, 10))
    lab.govc("snapshot.create", "-vm", path, "-m=false", "somebody's")
    write(lab, (2 * MIB, 10), (3 * MIB, MIB))
    with pytest.raises(errors.FenceClosed):
        await sync(lab, tmp_path)
    lab.govc("snapshot.revert", "-vm", path, "somebody's")
    lab.govc("snapshot.remove", "-vm", path, "somebody's")
    write(lab, (5 * MIB, 10))
    manifest = await sync(lab, tmp_path)
    assert_equal_to_the_guests_disks(lab, manifest, tmp_path / "tracked", tmp_path)
    assert manifest.disks[0].bytes_transferred == 2 * BLOCK


async def test_what_is_not_the_same_vm_or_not_the_same_disks_is_refused_by_name(lab, tmp_path):
    await sync(lab, tmp_path)
    folder = tmp_path / "tracked"
    folder.rename(tmp_path / "other")
    with pytest.raises(errors.CopyUnfit, match="of another VM"):
        await sync(lab, tmp_path, "other")
    (tmp_path / "other").rename(folder)
    with pytest.raises(errors.UnsupportedDisk, match="independent"):
        await sync(lab, tmp_path, "mixed")
    assert_nothing_left(lab)


POINTS = {
    "snapshot taken, nothing changed here": "tasks.images.dirty:begin:before",
    "torn: written, not read back": "tasks.images.sync:verify_written:before",
    "all disks durable, before the manifest": "tasks.images.sync:write_manifest:before",
    "after the manifest, the snapshot still there": "tasks.images.sync:write_manifest:after",
}


async def test_killed_there_the_next_run_brings_the_copy_up_to_now(lab, tmp_path, api):
    """So it is after the hook of a killed run, which removes its snapshot and leaves the copy refused."""
    words = ("--vs-vm-name", "tracked", "--output-dir", str(tmp_path))
    environment = os.environ | lab.environment() | api
    folder = tmp_path / "tracked"
    await sync(lab, tmp_path)
    for moment, point in POINTS.items():
        write(lab, (MIB, 3 * BLOCK), (7 * MIB, 9))
        write(lab, (MIB, 3 * BLOCK), disk=1)
        argv = [sys.executable, "-m", "tests.integration.dying", point, *command(lab, "cbt-sync", *words)[3:]]
        died = await asyncio.to_thread(
            subprocess.run, argv, cwd=ROOT, env=environment, capture_output=True, timeout=120
        )
        assert died.returncode == -9, (moment, died.stderr)
        assert lab.stats()["open_snapshots"] == 1, moment
        lab.post("/faults", clear=True, expire_sessions=True)
        if point.startswith("tasks.images.sync:verify_written"):
            await clean_up_after(lab, folder)
            assert lab.stats()["open_snapshots"] == 0
            with pytest.raises(errors.InvalidInput, match="no point in time"):
                refuse_torn(folder)
        write(lab, (MIB + BLOCK, 5), (9 * MIB, 9))
        manifest = await sync(lab, tmp_path)
        assert_equal_to_the_guests_disks(lab, manifest, folder, tmp_path)
        assert lab.stats()["open_snapshots"] == 0, moment
    assert not [path for path in folder.iterdir() if path.suffix == ".dirty"]


async def clean_up_after(lab: Lab, folder: Path) -> None:
    """Do what Prefect does once it finds that a run crashed whose vCenter is a saved block."""
    run_id = json.loads((folder / ".hyper2kvm.lock").read_text())["flow_run_id"]
    block = await vcenter_of(lab).save("lab-of-a-sync", overwrite=True)
    async with get_client() as client:
        run = await client.read_flow_run(UUID(run_id))
    run.parameters["vcenter"] = {"$ref": {"block_document_id": str(block)}}
    await clean_up(cbt_sync, run, Crashed())
