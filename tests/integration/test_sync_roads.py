"""`cbt_sync` and `warm_migration` by the roads that seek: changes are read by the one asked for, and by no other."""

from __future__ import annotations

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
from pydantic import ValidationError

from flows.cbt_sync import cbt_sync
from flows.warm_migration import warm_migration
from tasks.images.job import last_holder
from tasks.images.state import read_state
from tasks.models import Manifest, Migration, SyncJob, WarmJob
from tasks.succession import clean_up
from tests.integration.test_roads import nbd_of, ssh_of
from tests.labs import ROOT, VDDK, Lab, running_lab
from tests.runs import assert_equal_to_the_guests_disks, assert_nothing_left, command, raw_sha256, vcenter_of
from tests.sshd import EsxiHost, esxi_host

pytestmark = [pytest.mark.anyio, pytest.mark.live, pytest.mark.usefixtures("prefect_api")]

MIB = 1024 * 1024
BLOCK = 64 * 1024  # what CBT tells apart
DISKS = [{"size": "16MiB", "data": "4MiB"}, {"size": "8MiB", "data": "1MiB"}]
BY_VDDK = {"transport": "vddk", "vddk_libdir": str(VDDK)}


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    vms: list[dict[str, Any]] = [
        {"name": "web", "cbt": True, "disks": DISKS, "shutdown_s": 0.3},
        {"name": "windows", "cbt": True, "vss": True, "disks": DISKS[1:]},
    ]
    with running_lab(scenario=site(vms)) as lab:
        yield lab


def site(vms: list[dict[str, Any]]) -> dict[str, Any]:
    return {"datacenters": [{"name": "DC", "clusters": [{"name": "c", "hosts": ["esx1"]}], "vms": vms}]}


@pytest.fixture(scope="module")
def esxi(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EsxiHost]:
    with esxi_host(tmp_path_factory.mktemp("esxi") / "sshd", Path(lab.state_dir)) as host:
        yield host


async def sync(
    lab: Lab, folder: Path, vm: str = "web", *, means: dict[str, Any] | None = None, **options: Any
) -> Manifest:
    job = SyncJob(vm_name=vm, output_dir=folder, **options)
    manifest: Manifest = await cbt_sync(vcenter=vcenter_of(lab), options=job, **(means or {}))
    return manifest


def write(lab: Lab, *places: tuple[int, int], vm: str = "web", disk: int = 0) -> None:
    for offset, length in places:
        lab.post(
            "/guest-write",
            vm=lab.vm(vm)["moref"],
            disk=disk,
            offset=offset,
            length=length,
            seed=random.getrandbits(32),
        )


@pytest.mark.parametrize("road", ["vddk", "nbd", "ssh"])
async def test_what_changed_of_a_running_vm_is_read_by_the_road_asked_for(lab, esxi, tmp_path, road):
    means = {"vddk": {}, "nbd": {"nbd_source": nbd_of(lab)}, "ssh": {"esxi_host": ssh_of(esxi)}}[road]
    options = BY_VDDK if road == "vddk" else {"transport": road}
    moref = lab.vm("web")["moref"]
    lab.post("/stats/reset")
    lab.post("/guest-load", vm=moref, disk=1, bytes_per_s=MIB, seed=3)
    first = await sync(lab, tmp_path, means=means, **options)
    assert_equal_to_the_guests_disks(lab, first, tmp_path / "web", tmp_path)
    lab.post("/guest-load", vm=moref, disk=1, stop=True)
    await sync(lab, tmp_path, means=means, **options)
    write(lab, (MIB + 5, 100), (9 * MIB, BLOCK))
    write(lab, (2 * MIB, 1), disk=1)
    again = await sync(lab, tmp_path, means=means, **options)
    assert [image.bytes_transferred for image in again.disks] == [2 * BLOCK, BLOCK]
    assert {image.road for manifest in (first, again) for image in manifest.disks} == {road}
    assert not any(path.startswith("/folder") for path in lab.stats()["http_requests"])
    assert_equal_to_the_guests_disks(lab, again, tmp_path / "web", tmp_path)
    assert_nothing_left(lab)


async def test_below_somebodys_snapshots_all_is_read_and_what_differs_is_written(new_lab, tmp_path, caplog):
    vm = {"name": "kept", "cbt": True, "disks": DISKS[1:], "snapshots": [{"name": "somebody's"}]}
    lab = new_lab(scenario=site([vm]))
    means = {"nbd_source": nbd_of(lab)}
    await sync(lab, tmp_path, "kept", means=means, transport="nbd")
    write(lab, (5 * MIB, BLOCK), vm="kept")
    again = await sync(lab, tmp_path, "kept", means=means, transport="nbd")
    assert again.disks[0].bytes_transferred > BLOCK
    assert "the VM has other snapshots below" in caplog.text
    assert_equal_to_the_guests_disks(lab, again, tmp_path / "kept", tmp_path)
    assert lab.stats()["open_snapshots"] == 1  # somebody's


async def test_what_vss_wrote_into_its_second_redo_log_is_among_what_changed(lab, tmp_path):
    for _ in range(2):
        manifest = await sync(lab, tmp_path, "windows", quiesce=True, **BY_VDDK)
        assert manifest.snapshot and manifest.snapshot.quiesced
        assert_equal_to_the_guests_disks(lab, manifest, tmp_path / "windows", tmp_path)
        write(lab, (3 * MIB, BLOCK), vm="windows")


def test_a_lease_which_cannot_seek_is_refused_by_name(tmp_path):
    with pytest.raises(ValidationError, match="nfc_lease reads a disk only from its beginning to its end"):
        SyncJob(vm_name="web", output_dir=tmp_path, transport="nfc_lease")


async def test_a_sync_that_was_killed_under_vddk_leaves_neither_its_access_nor_its_snapshot(lab, tmp_path, api):
    await sync(lab, tmp_path, **BY_VDDK)
    write(lab, (MIB, BLOCK))
    words = ["--vs-vm-name", "web", "--output-dir", str(tmp_path), "--parallel-disks", "1"]
    words += ["--transport", "vddk", "--vddk-libdir", str(VDDK)]
    point = "tasks.images.dirty:DirtyList.settle:before"
    argv = [sys.executable, "-m", "tests.integration.dying", point, *command(lab, "cbt-sync", *words)[3:]]
    died = subprocess.run(argv, cwd=ROOT, env=os.environ | lab.environment() | api, capture_output=True, text=True)
    assert died.returncode == -9, died.stderr
    lab.post("/faults", expire_sessions=True)
    stats, holder, state = lab.stats(), last_holder(tmp_path / "web"), read_state(tmp_path / "web")
    assert (stats["open_snapshots"], stats["vddk_prepared"]) == (1, 1)
    assert holder and state and not state.resumable
    block = await vcenter_of(lab).save("roads", overwrite=True)
    async with get_client() as client:
        run = await client.read_flow_run(UUID(holder["flow_run_id"]))
    run.parameters |= {"vcenter": {"$ref": {"block_document_id": str(block)}}}
    await clean_up(cbt_sync, run, Crashed())
    assert_nothing_left(lab)
    assert_equal_to_the_guests_disks(lab, await sync(lab, tmp_path), tmp_path / "web", tmp_path)


async def test_a_migration_by_vddk_reads_rounds_last_sync_and_sample_by_it(lab, tmp_path):
    moref = lab.vm("web")["moref"]
    lab.post("/stats/reset")
    lab.post("/guest-load", vm=moref, disk=0, bytes_per_s=1 << 20, burst_s=0.2, block=65536, seed=7)
    job = WarmJob(
        vm_name="web",
        output_dir=tmp_path,
        pause=0,
        sample=4,
        expected_shutdown=1,
        cutover="auto",
        shut_down_source=True,
        **BY_VDDK,
    )
    made: Migration = await warm_migration(vcenter=vcenter_of(lab), options=job)
    lab.post("/guest-load", vm=moref, disk=0, stop=True)
    assert made.folder
    for image in made.manifest.disks:
        assert raw_sha256(made.folder / image.path, tmp_path) == lab.sha256(moref, image.index)
        assert image.road == "vddk"
    assert not any(path.startswith("/folder") for path in lab.stats()["http_requests"])
    assert_nothing_left(lab)
