"""Whole exports by the roads `nbd` and `ssh`, and by the one that `auto` finds."""

from __future__ import annotations

import json
import os
import random
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from blocks import ESXiHost, NbdSource, VddkToolkit
from flows.export import export_vm
from flows.means import saved_blocks
from tasks import errors
from tasks.models import ExportJob, ExportOptions, Manifest
from tests.labs import ROOT, VDDK, Lab, running_lab
from tests.runs import (
    assert_nothing_left,
    chance_of_this_run,
    children,
    command,
    faults,
    raw_sha256,
    run_command,
    vcenter_of,
)
from tests.sshd import EsxiHost, esxi_host, make_key

pytestmark = [pytest.mark.anyio, pytest.mark.live, pytest.mark.usefixtures("prefect_api")]

MIB = 1024 * 1024


@pytest.fixture(scope="module")
def site() -> Iterator[Lab]:
    machines: list[dict[str, Any]] = [
        {"name": "web", "disks": [{"size": "16MiB"}, {"size": "8MiB"}]},
        {"name": "windows", "vss": True, "disks": [{"size": "4MiB"}]},
        {"name": "large", "disks": [{"size": "80MiB", "data": "70MiB"}, {"size": "4MiB"}]},
    ]
    center = {"name": "DC", "clusters": [{"name": "c", "hosts": ["esx1"]}], "vms": machines}
    with running_lab(scenario={"datacenters": [center], "keep_frozen": True}) as lab:
        yield lab


@pytest.fixture(scope="module")
def strict() -> Iterator[Lab]:
    """A lab whose hosts lock frozen bases too."""
    vm = {"name": "web", "disks": [{"size": "4MiB"}, {"size": "2MiB"}]}
    center = {"name": "DC", "clusters": [{"name": "c", "hosts": ["esx1"]}], "vms": [vm]}
    with running_lab(scenario={"datacenters": [center], "keep_frozen": True, "locks": "strict"}) as lab:
        yield lab


@pytest.fixture(scope="module")
def esxi(site: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EsxiHost]:
    with esxi_host(tmp_path_factory.mktemp("esxi") / "sshd", Path(site.state_dir)) as host:
        yield host


@pytest.fixture(autouse=True)
def nothing_of_ours_is_left() -> Iterator[None]:
    before = children()
    yield
    assert children() <= before


def nbd_command(lab: Lab) -> str:
    """Return a command that serves a disk of the lab's by qemu-nbd, which reads whole chains."""
    options = "-f vmdk --read-only -e 4 --persistent"
    script = f'exec qemu-nbd {options} -k "$1" "{lab.state_dir}/datastore1/${{2#*] }}"'
    return shlex.join(["sh", "-c", script, "sh", "{socket}", "{path}"])


def nbd_of(lab: Lab) -> NbdSource:
    return NbdSource(command=nbd_command(lab))


def ssh_of(host: EsxiHost, **changes: Any) -> ESXiHost:
    fields = host.settings().model_dump(exclude={"road"}) | {"key": (host.folder / "user").read_text()}
    return ESXiHost(**(fields | changes))


async def export(
    lab: Lab, folder: Path, name: str, transport: str, *, means: dict[str, Any], **options: Any
) -> Manifest:
    job = ExportJob(vm_name=name, output_dir=folder, transport=transport, **options)
    manifest: Manifest = await export_vm(vcenter=vcenter_of(lab), options=job, **means)
    return manifest


def assert_equal_to_the_frozen_chain(lab: Lab, folder: Path, scratch: Path) -> None:
    """Compare every image with what qemu-img reads in a copy of the chain as of the snapshot."""
    manifest = json.loads((folder / "manifest.json").read_text())
    frozen = Path(lab.state_dir) / "frozen" / manifest["snapshot"]["moref"]
    for image in manifest["disks"]:
        source = frozen / image["source"].rpartition("/")[2]
        assert raw_sha256(folder / image["path"], scratch) == raw_sha256(source, scratch), image["path"]


@pytest.mark.parametrize("road", ["nbd", "ssh"])
async def test_two_disks_of_a_running_vm_are_the_guests_at_the_snapshot_while_it_writes(site, esxi, tmp_path, road):
    moref = site.vm("web")["moref"]
    for disk in (0, 1):
        site.post("/guest-load", vm=moref, disk=disk, bytes_per_s=MIB, seed=disk)
    means = {"nbd": {"nbd_source": nbd_of(site)}, "ssh": {"esxi_host": ssh_of(esxi)}}[road]
    manifest = await export(site, tmp_path, "web", road, means=means)
    for disk in (0, 1):
        site.post("/guest-load", vm=moref, disk=disk, stop=True)
    assert [(image.path, image.road, image.verified) for image in manifest.disks] == [
        ("disk-0.qcow2", road, "direct"),
        ("disk-1.qcow2", road, "direct"),
    ]
    assert manifest.skipped_roads == ()
    assert_equal_to_the_frozen_chain(site, tmp_path / "web", tmp_path)
    assert_nothing_left(site)


async def test_a_second_redo_log_of_vss_is_read_by_nbd_and_refused_by_ssh(site, esxi, tmp_path):
    with pytest.raises(errors.UnsupportedDisk, match=r"second redo log.*VSS.*the road ssh reads flat files only"):
        await export(site, tmp_path, "windows", "ssh", means={"esxi_host": ssh_of(esxi)}, quiesce=True)
    assert_nothing_left(site)
    manifest = await export(site, tmp_path, "windows", "nbd", means={"nbd_source": nbd_of(site)}, quiesce=True)
    assert manifest.snapshot.quiesced
    assert "windows-00000" in manifest.disks[0].source
    assert_equal_to_the_frozen_chain(site, tmp_path / "windows", tmp_path)


async def test_sixteen_disks_below_eleven_snapshots_of_somebody_else_are_all_copied_or_refused_by_name(tmp_path):
    disks = [{"size": "512KiB", "bus": number // 4} for number in range(16)]
    snapshots = [{"name": str(number), "writes": "64KiB"} for number in range(11)]
    vm = {"name": "busy", "disks": disks, "snapshots": snapshots}
    center = {"name": "DC", "clusters": [{"name": "c", "hosts": ["esx1"]}], "vms": [vm]}
    with running_lab(scenario={"datacenters": [center], "keep_frozen": True}) as lab:
        host = ESXiHost(host="127.0.0.1", host_key=f"SHA256:{'A' * 43}", password="not asked")
        with pytest.raises(errors.FenceClosed, match="snapshot"):
            await export(lab, tmp_path, "busy", "ssh", means={"esxi_host": host})
        manifest = await export(lab, tmp_path, "busy", "nbd", means={"nbd_source": nbd_of(lab)}, parallel_disks=4)
        assert [image.source[-11:] for image in manifest.disks] == ["000011.vmdk"] * 16
        assert_equal_to_the_frozen_chain(lab, tmp_path / "busy", tmp_path)
        assert lab.stats()["open_snapshots"] == 11


async def test_auto_prefers_vddk_then_nbd_then_folder_and_says_why_not(site, esxi, tmp_path, monkeypatch):
    everything = {"nbd_source": nbd_of(site), "esxi_host": ssh_of(esxi)}
    monkeypatch.setenv("VDDK_LIBDIR", str(VDDK))
    manifest = await export(site, tmp_path / "a", "web", "auto", means=everything)
    assert ({image.road for image in manifest.disks}, manifest.skipped_roads) == ({"vddk"}, ())
    monkeypatch.delenv("VDDK_LIBDIR")
    nowhere = VddkToolkit(libdir=str(tmp_path))
    manifest = await export(site, tmp_path / "b", "web", "auto", means=everything | {"toolkit": nowhere})
    assert {image.road for image in manifest.disks} == {"nbd"}
    assert [(each.road, each.why[:33]) for each in manifest.skipped_roads] == [
        ("vddk", "VDDK cannot be used: there is no ")
    ]
    manifest = await export(site, tmp_path / "c", "web", "auto", means={"esxi_host": ssh_of(esxi)})
    assert {image.road for image in manifest.disks} == {"folder"}
    assert [each.road for each in manifest.skipped_roads] == ["vddk", "nbd"]
    assert manifest.skipped_roads[1].why == "transport nbd: no NBD source is given"


async def test_auto_goes_past_roads_that_cannot_read_a_disk(strict, tmp_path):
    broken = NbdSource(command="sh -c 'echo no licence >&2; exit 3'")
    with esxi_host(tmp_path / "sshd", Path(strict.state_dir)) as host:
        means = {"nbd_source": broken, "esxi_host": ssh_of(host)}
        manifest = await export(strict, tmp_path / "out", "web", "auto", means=means)
        assert {image.road for image in manifest.disks} == {"ssh"}
        assert [each.road for each in manifest.skipped_roads] == ["vddk", "nbd", "folder"]
        assert "exit status 3" in manifest.skipped_roads[1].why
        assert "is locked by a running VM" in manifest.skipped_roads[2].why
        assert_equal_to_the_frozen_chain(strict, tmp_path / "out" / "web", tmp_path)
        lacking = r"vddk: .*nbd: .*folder: .*ssh: .*is locked.*nfc_lease: .*VApp\.Export"
        with (
            host.trouble("busy"),
            faults(strict, refuse_privilege="VApp.Export"),
            pytest.raises(errors.NoRoad, match=lacking),
        ):
            await export(strict, tmp_path / "none", "web", "auto", means=means)
    assert_nothing_left(strict)
    assert not list((tmp_path / "none" / "web").glob("disk-*"))


async def test_what_a_named_road_lacks_is_said_before_anything_is_connected(site, tmp_path):
    site.post("/stats/reset")
    for road, words in (("nbd", "no NBD source is given"), ("ssh", "no ESXi host is given")):
        with pytest.raises(errors.InvalidInput, match=words):
            await export(site, tmp_path, "web", road, means={})
    assert site.stats()["soap_total"] == 0


async def test_a_fault_of_a_road_ends_the_run_by_name_and_leaves_nothing(site, esxi, tmp_path):
    make_key(tmp_path / "other")
    other = (tmp_path / "other.pub").read_text()
    wrong_size = "qemu-nbd -f raw -r -k {socket} " + shlex.quote(str(tmp_path / "small"))
    (tmp_path / "small").write_bytes(bytes(MIB))
    for road, means, error, words in (
        ("nbd", {"nbd_source": NbdSource(uri="nbd://127.0.0.1:1/")}, errors.NbdFailed, "refused"),
        ("nbd", {"nbd_source": NbdSource(command="false")}, errors.NbdCommandEnded, "exit status 1"),
        ("nbd", {"nbd_source": NbdSource(command=wrong_size)}, errors.NbdFailed, "serves 1048576 bytes"),
        ("ssh", {"esxi_host": ssh_of(esxi, host_key=other)}, errors.HostKeyChanged, "not the pinned one"),
        ("ssh", {"esxi_host": ssh_of(esxi, key=SecretStr("no key"))}, errors.SshFailed, "check user, key"),
    ):
        with pytest.raises(error, match=words):
            await export(site, tmp_path / "out", "web", road, means=means)
        assert_nothing_left(site)
    with esxi.trouble("busy"), pytest.raises(errors.FileLocked, match="power the VM off"):
        await export(site, tmp_path / "out", "web", "ssh", means={"esxi_host": ssh_of(esxi)})
    assert_nothing_left(site)
    assert not list((tmp_path / "out" / "web").glob("disk-*"))


@pytest.mark.parametrize("road", ["nbd", "ssh"])
def test_killed_at_random_it_is_gone_on_with_from_the_command_line(site, esxi, tmp_path, road, api):
    where = {
        "nbd": ["--nbd-command", nbd_command(site)],
        "ssh": [
            *("--esxi-host", f"127.0.0.1:{esxi.port}", "--esxi-user", esxi.settings().user),
            *("--esxi-host-key", esxi.host_key, "--esxi-key-file", str(esxi.folder / "user")),
        ],
    }[road]
    words = ["--vs-vm-name", "large", "--output-dir", str(tmp_path), "--transport", road, *where, "--json"]
    written = random.Random(chance_of_this_run()).randrange(8, 60)
    point = f"tasks.images.qcow2:Qcow2Writer.write:after:{written}"
    argv = [sys.executable, "-m", "tests.integration.dying", point, *command(site, "export-vm", *words)[3:]]
    died = subprocess.run(argv, cwd=ROOT, env=os.environ | site.environment() | api, capture_output=True, timeout=120)
    assert died.returncode == -9, died.stderr
    site.post("/faults", expire_sessions=True)
    left = json.loads((tmp_path / "large" / ".hyper2kvm.job.json").read_text())
    assert left["road"]["road"] == road
    assert not {"key", "password", "secret"} & set(left["road"])
    site.post("/guest-write", vm=site.vm("large")["moref"], disk=0, offset=MIB, length=4 * MIB, seed=written)
    done = run_command(site, "export-vm", *words, env=api)
    assert done.returncode == 0, done.stderr
    assert {disk["road"] for disk in json.loads(done.stdout)["disks"]} == {road}
    assert_equal_to_the_frozen_chain(site, tmp_path / "large", tmp_path)
    assert_nothing_left(site)


async def test_saved_blocks_are_found_by_their_names(site, esxi):
    await nbd_of(site).asave("of-the-lab", overwrite=True)
    await ssh_of(esxi).asave("of-the-lab", overwrite=True)
    options = ExportOptions(vm_name="web", output_dir="/data", nbd_source="of-the-lab", esxi_block="of-the-lab")
    found = await saved_blocks(options)
    assert found["nbd_source"].settings() == nbd_of(site).settings()
    assert found["esxi_host"].settings() == ssh_of(esxi).settings()
    with pytest.raises(errors.InvalidInput, match="nbd-source 'nowhere': no such block is saved"):
        await saved_blocks(options.model_copy(update={"nbd_source": "nowhere"}))
