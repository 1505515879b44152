"""Whole exports by each road, and by the one that `auto` finds: their content, their kills, their faults."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from blocks import ESXiHost, NbdSource, VddkToolkit
from flows.export import export_vm
from flows.means import saved_blocks
from tasks import errors
from tasks import road as roads
from tasks.images.copy import Limits
from tasks.images.state import read_state
from tasks.models import ExportJob, ExportOptions, Manifest, VddkSettings
from tasks.steps import METER_LISTENER
from tasks.succession import release
from tests.labs import ROOT, VDDK, Lab, running_lab
from tests.runs import (
    assert_nothing_left,
    chance_of_this_run,
    children,
    command,
    faults,
    held,
    raw_sha256,
    run_command,
    vcenter_of,
)
from tests.sshd import EsxiHost, esxi_host, make_key
from tests.waits import await_that

pytestmark = [pytest.mark.anyio, pytest.mark.live, pytest.mark.usefixtures("prefect_api")]

MIB = 1024 * 1024


ROADS = ("vddk", "nbd", "folder", "ssh", "nfc_lease")


@pytest.fixture(scope="module")
def module_site() -> Iterator[Lab]:
    machines: list[dict[str, Any]] = [
        {"name": "web", "disks": [{"size": "16MiB"}, {"size": "8MiB"}]},
        {"name": "windows", "vss": True, "disks": [{"size": "4MiB"}]},
        {"name": "large", "disks": [{"size": "80MiB", "data": "70MiB"}, {"size": "4MiB"}]},
    ]
    center = {"name": "DC", "clusters": [{"name": "c", "hosts": ["esx1"]}], "vms": machines}
    scenario = {"datacenters": [center], "keep_frozen": True, "lease": {"timeout_s": 2}}
    with running_lab(scenario=scenario) as lab:
        yield lab


@pytest.fixture
def site(module_site: Lab) -> Lab:
    """The lab without the faults of a test before, and without the sessions of processes that were killed."""
    module_site.post("/faults", clear=True, expire_sessions=True)
    return module_site


@pytest.fixture(scope="module")
def strict() -> Iterator[Lab]:
    """A lab whose hosts lock frozen bases too."""
    vm = {"name": "web", "disks": [{"size": "4MiB"}, {"size": "2MiB"}]}
    center = {"name": "DC", "clusters": [{"name": "c", "hosts": ["esx1"]}], "vms": [vm]}
    with running_lab(scenario={"datacenters": [center], "keep_frozen": True, "locks": "strict"}) as lab:
        yield lab


@pytest.fixture(scope="module")
def esxi(module_site: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EsxiHost]:
    with esxi_host(tmp_path_factory.mktemp("esxi") / "sshd", Path(module_site.state_dir)) as host:
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


def means_of(road: str, lab: Lab, host: EsxiHost) -> dict[str, Any]:
    """Return what an operator gives for a road."""
    return {
        "vddk": {"toolkit": VddkToolkit(libdir=str(VDDK))},
        "nbd": {"nbd_source": nbd_of(lab)},
        "ssh": {"esxi_host": ssh_of(host)},
    }.get(road, {})


async def export(
    lab: Lab, folder: Path, name: str, transport: str, *, means: dict[str, Any], pin: str = "", **options: Any
) -> Manifest:
    """Run the export flow; pin: the vCenter's thumbprint, where it is not known by its CA."""
    job = ExportJob(vm_name=name, output_dir=folder, transport=transport, **options)
    vcenter = vcenter_of(lab, **({"thumbprint": pin, "ca_bundle": None} if pin else {}))
    manifest: Manifest = await export_vm(vcenter=vcenter, options=job, **means)
    return manifest


def assert_equal_to_the_frozen_chain(lab: Lab, folder: Path, scratch: Path) -> None:
    """Compare every image with what qemu-img reads in a copy of the chain as of the snapshot."""
    manifest = json.loads((folder / "manifest.json").read_text())
    frozen = Path(lab.state_dir) / "frozen" / manifest["snapshot"]["moref"]
    for image in manifest["disks"]:
        source = frozen / image["source"].rpartition("/")[2]
        assert raw_sha256(folder / image["path"], scratch) == raw_sha256(source, scratch), image["path"]


@pytest.mark.parametrize("road", ROADS)
async def test_two_disks_of_a_running_vm_are_the_guests_at_the_snapshot_while_it_writes(site, esxi, tmp_path, road):
    moref = site.vm("web")["moref"]
    for disk in (0, 1):
        site.post("/guest-load", vm=moref, disk=disk, bytes_per_s=MIB, seed=disk)
    manifest = await export(site, tmp_path, "web", road, means=means_of(road, site, esxi))
    for disk in (0, 1):
        site.post("/guest-load", vm=moref, disk=disk, stop=True)
    assert [(image.path, image.road, image.verified) for image in manifest.disks] == [
        ("disk-0.qcow2", road, "direct"),
        ("disk-1.qcow2", road, "direct"),
    ]
    assert manifest.skipped_roads == ()
    assert_equal_to_the_frozen_chain(site, tmp_path / "web", tmp_path)
    assert_nothing_left(site)


async def test_where_the_licence_allows_no_snapshot_two_disks_of_a_vm_that_is_off_are_read_as_they_are(tmp_path):
    vms = [{"name": "off", "power": "off", "disks": [{"size": "4MiB"}, {"size": "2MiB"}]}, {"name": "on"}]
    center = {"name": "DC", "clusters": [{"name": "c", "hosts": ["esx1"]}], "vms": vms}
    with (
        running_lab("-esx", scenario={"datacenters": [center], "free_licence": True}) as lab,
        esxi_host(tmp_path / "sshd", Path(lab.state_dir)) as host,
    ):
        for name, road, words in (("on", "folder", "Power the VM off"), ("off", "nfc_lease", "another road")):
            with pytest.raises(errors.LicenceForbids, match=words):
                await export(lab, tmp_path, name, road, means={})
            assert_nothing_left(lab)
        for road in ("vddk", "nbd", "folder", "ssh"):
            manifest = await export(lab, tmp_path / road, "off", road, means=means_of(road, lab, host))
            assert (manifest.snapshot, {image.road for image in manifest.disks}) == (None, {road})
            assert any("No snapshot was taken" in warning for warning in manifest.warnings)
            for image, disk in zip(manifest.disks, lab.vm("off")["disks"], strict=True):
                source = Path(lab.state_dir) / disk["datastore_path"].replace("[", "").replace("] ", "/")
                assert raw_sha256(tmp_path / road / "off" / image.path, tmp_path) == raw_sha256(source, tmp_path)
            assert_nothing_left(lab)


async def test_a_second_redo_log_of_vss_is_read_or_refused(site, esxi, tmp_path):
    for road in ("ssh", "folder"):
        words = rf"second redo log.*VSS.*the road {road} reads flat files only"
        with pytest.raises(errors.UnsupportedDisk, match=words):
            await export(site, tmp_path, "windows", road, means=means_of(road, site, esxi), quiesce=True)
        assert_nothing_left(site)
    for road in ("vddk", "nbd", "nfc_lease"):
        means = means_of(road, site, esxi)
        manifest = await export(site, tmp_path / road, "windows", road, means=means, quiesce=True)
        assert manifest.snapshot.quiesced
        assert "windows-0000" in manifest.disks[0].source
        assert_equal_to_the_frozen_chain(site, tmp_path / road / "windows", tmp_path)
        assert_nothing_left(site)


async def test_sixteen_disks_below_eleven_snapshots_of_somebody_else_are_all_copied_or_refused_by_name(tmp_path):
    disks = [{"size": "512KiB", "bus": number // 4} for number in range(16)]
    snapshots = [{"name": str(number), "writes": "64KiB"} for number in range(11)]
    vm = {"name": "busy", "disks": disks, "snapshots": snapshots}
    center = {"name": "DC", "clusters": [{"name": "c", "hosts": ["esx1"]}], "vms": [vm]}
    with (
        running_lab(scenario={"datacenters": [center], "keep_frozen": True}) as lab,
        esxi_host(tmp_path / "sshd", Path(lab.state_dir)) as host,
    ):
        for road in ("ssh", "folder"):
            with pytest.raises(errors.FenceClosed, match="snapshot"):
                await export(lab, tmp_path, "busy", road, means=means_of(road, lab, host))
        for road in ("vddk", "nbd", "nfc_lease"):
            means = means_of(road, lab, host)
            manifest = await export(lab, tmp_path / road, "busy", road, means=means, parallel_disks=4)
            assert [image.source[-11:] for image in manifest.disks] == ["000011.vmdk"] * 16
            assert len({image.digest for image in manifest.disks}) == 16
            assert_equal_to_the_frozen_chain(lab, tmp_path / road / "busy", tmp_path)
        assert held(lab) == {"open_snapshots": 11, "live_sessions": 0, "vddk_prepared": 0, "leases_open": 0}


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


@dataclass
class Scene:
    """A run by one road, and what its operator gives: for a deed to spoil."""

    lab: Lab
    host: EsxiHost
    folder: Path
    patch: pytest.MonkeyPatch
    means: dict[str, Any]
    stack: ExitStack
    pin: str = ""


Deed = Callable[[Scene], object]


def given(**changes: Any) -> Deed:
    """What the operator gives is another thing: a value, or what makes one of the scene."""
    return lambda scene: scene.means.update(
        {name: value(scene) if callable(value) else value for name, value in changes.items()}
    )


def vixlab(**variables: str) -> Deed:
    """The stand-in for VDDK misbehaves."""
    return lambda scene: [scene.patch.setenv(f"VIXLAB_{name}", value) for name, value in variables.items()]


def on_the_lab(**body: Any) -> Deed:
    return lambda scene: scene.stack.enter_context(faults(scene.lab, **body))


def once_it_is_read(**body: Any) -> Deed:
    """The lab misbehaves from the moment when the first disk is about to be read."""

    def deed(scene: Scene) -> None:
        token = METER_LISTENER.set(lambda meter: scene.lab.post("/faults", **body))
        scene.stack.callback(METER_LISTENER.reset, token)

    return deed


def at_the_host(trouble: str) -> Deed:
    """The ESXi host's `dd` misbehaves."""
    return lambda scene: scene.stack.enter_context(scene.host.trouble(trouble))


def impatient(reader: str, **timeouts: float) -> Deed:
    """What stalls is given up soon."""

    def deed(scene: Scene) -> None:
        scene.patch.setattr(f"tasks.road.{reader}", partial(getattr(roads, reader), **timeouts))
        scene.patch.setattr("tasks.fetch.Limits", partial(Limits, attempts=2, longest_wait_s=0.1))
        scene.patch.setattr("tasks.transports.vddk_process.LEAVE_TIMEOUT_S", 0.5)

    return deed


def a_broken_library(scene: Scene) -> VddkToolkit:
    (scene.folder / "libvixDiskLib.so.9").write_bytes(bytes(4096))
    return VddkToolkit(libdir=str(scene.folder))


def another_disk(scene: Scene) -> NbdSource:
    (scene.folder / "small").write_bytes(bytes(MIB))
    return NbdSource(command=shlex.join(["qemu-nbd", "-f", "raw", "-r", "-k", "{socket}", str(scene.folder / "small")]))


def served_until(deed: str) -> Callable[[Scene], NbdSource]:
    """A command that serves a frozen base, and at its fourth MiB does that deed."""

    def made(scene: Scene) -> NbdSource:
        flat = f'"{scene.lab.state_dir}/datastore1/$(echo "{{path}}" | sed "s/.*] //; s/.vmdk$//")-flat.vmdk"'
        dd = f"dd if={flat} iflag=skip_bytes,count_bytes skip=$4 count=$3 status=none"
        pread = f"[ $4 -lt {4 * MIB} ] || {deed}; {dd}"
        words = ["nbdkit", "-f", "-r", "-U", "{socket}", "eval", f"get_size=stat -c %s {flat}", f"pread={pread}"]
        return NbdSource(command=shlex.join(words))

    return made


def another_key(scene: Scene) -> ESXiHost:
    make_key(scene.folder / "other")
    return ssh_of(scene.host, host_key=(scene.folder / "other.pub").read_text())


STALLED = errors.TransferInterrupted
BUSY = {"method": "ExportSnapshot", "fault": "TaskInProgress", "count": 0}
ILLS: list[tuple[str, str, type[Exception], str, list[Deed]]] = [
    (
        "vddk",
        "wrong thumbprint",
        errors.ThumbprintMismatch,
        "expected AB:AB",
        [lambda scene: setattr(scene, "pin", "AB" * 20)],
    ),
    ("vddk", "no library", errors.VddkUnavailable, "no libvixDiskLib", [given(toolkit=VddkToolkit(libdir="/none"))]),
    ("vddk", "broken library", errors.VddkUnavailable, "invalid ELF", [given(toolkit=a_broken_library)]),
    ("vddk", "crash", errors.VddkCrashed, "signal 11", [vixlab(CRASH_READ="3")]),
    ("vddk", "bad disk", errors.VddkFailed, "VIX error 16000", [vixlab(FAIL_READ="3:16000")]),
    ("vddk", "port shut", errors.VddkFailed, "port 902 of the ESXi host", [vixlab(FAIL_OPEN="14009")]),
    ("vddk", "zeros", errors.VddkReadsZeros, "nothing but zeros", [vixlab(ZERO_READS="1")]),
    ("vddk", "lock", errors.FileLocked, "is locked by a running VM", [vixlab(FAIL_OPEN="13")]),
    ("vddk", "stall", STALLED, "not answer", [vixlab(STALL_READ="3"), impatient("VddkReader", read_timeout_s=1.0)]),
    ("nbd", "nobody", errors.NbdFailed, "refused", [given(nbd_source=NbdSource(uri="nbd://127.0.0.1:1/"))]),
    ("nbd", "no server", errors.NbdCommandEnded, "exit status 1", [given(nbd_source=NbdSource(command="false"))]),
    ("nbd", "another disk", errors.NbdFailed, "serves 1048576 bytes", [given(nbd_source=another_disk)]),
    ("nbd", "crash", errors.NbdCommandEnded, "signal 9", [given(nbd_source=served_until("kill -9 $PPID"))]),
    (
        *("nbd", "stall", STALLED, "does not answer"),
        [given(nbd_source=served_until("exec sleep 1000")), impatient("NbdReader", read_timeout_s=2.0)],
    ),
    (
        *("folder", "stall", STALLED, "ReadTimeout"),
        [on_the_lab(stall_s=600, count=0), impatient("FolderReader", timeout_s=1.0)],
    ),
    ("ssh", "host key changed", errors.HostKeyChanged, "not the pinned one", [given(esxi_host=another_key)]),
    (
        "ssh",
        "no key",
        errors.SshFailed,
        "check user, key",
        [given(esxi_host=lambda scene: ssh_of(scene.host, key="no"))],
    ),
    ("ssh", "lock", errors.FileLocked, "power the VM off", [at_the_host("busy")]),
    ("ssh", "lock while it is read", errors.FileLocked, "power the VM off", [at_the_host("taken")]),
    ("ssh", "stall", STALLED, "no byte for", [at_the_host("stall"), impatient("SshReader", read_timeout_s=1.0)]),
    ("nfc_lease", "wrong thumbprint", errors.ThumbprintMismatch, "expected", [on_the_lab(hosts="strange")]),
    ("nfc_lease", "host down", errors.ConnectionFailed, "refused", [on_the_lab(hosts="down")]),
    ("nfc_lease", "lies", errors.BadLeaseStream, "out of order", [on_the_lab(lease_lie="order")]),
    ("nfc_lease", "expired", errors.LeaseLost, "Timedout", [once_it_is_read(fail_leases="Timedout")]),
    (
        *("nfc_lease", "stall", STALLED, "ReadTimeout"),
        [on_the_lab(stall_s=600, count=0), impatient("LeaseReader", timeout_s=1.0)],
    ),
    (
        *("nfc_lease", "lock", errors.LeaseRefused, "TaskInProgress"),
        [on_the_lab(fail_method=BUSY), lambda scene: scene.patch.setattr("tasks.vsphere.leases.BUSY_TIMEOUT_S", 0.0)],
    ),
]


@pytest.mark.parametrize(("by", "ill"), [pytest.param(ill[0], ill[1:], id=f"{ill[0]}: {ill[1]}") for ill in ILLS])
async def test_what_goes_wrong_is_named_and_nothing_is_left_or_a_job_to_go_on_with(
    site, esxi, tmp_path, monkeypatch, by, ill
):
    _, error, words, deeds = ill
    with ExitStack() as stack:
        patch = stack.enter_context(monkeypatch.context())
        scene = Scene(site, esxi, tmp_path, patch, means_of(by, site, esxi), stack)
        for deed in deeds:
            deed(scene)
        with pytest.raises(error, match=words):
            await export(site, tmp_path / "out", "web", by, means=scene.means, pin=scene.pin)
    left = {path.name for path in tmp_path.glob("out/web/*")} - {".hyper2kvm.lock"}
    if error is not STALLED:
        assert (left, set(held(site).values())) == (set(), {0})
        return
    assert {".hyper2kvm.job.json", "disk-0.qcow2.part", "disk-0.journal"} <= left
    assert held(site) == {"open_snapshots": 1, "live_sessions": 0, "vddk_prepared": 0, "leases_open": 0}
    await export(site, tmp_path / "out", "web", by, means=means_of(by, site, esxi))
    assert_equal_to_the_frozen_chain(site, tmp_path / "out" / "web", tmp_path)
    assert_nothing_left(site)


OF_ITS_OWN = {"vddk": "vddk_worker", "nbd": "--read-only", "ssh": "ssh", "nfc_lease": "qemu-nbd"}


@pytest.mark.parametrize("road", OF_ITS_OWN)
def test_killed_at_random_it_is_gone_on_with_from_the_command_line(site, esxi, tmp_path, road, api):
    where = {
        "vddk": ["--vddk-libdir", str(VDDK)],
        "nbd": ["--nbd-command", nbd_command(site)],
        "ssh": [
            *("--esxi-host", f"127.0.0.1:{esxi.port}", "--esxi-user", esxi.settings().user),
            *("--esxi-host-key", esxi.host_key, "--esxi-key-file", str(esxi.folder / "user")),
        ],
    }.get(road, [])
    words = ["--vs-vm-name", "large", "--output-dir", str(tmp_path), "--transport", road, *where, "--json"]
    site.post("/stats/reset")
    written = random.Random(chance_of_this_run()).randrange(8, 30)
    point = f"tasks.images.qcow2:Qcow2Writer.write:after:{written}"
    argv = [sys.executable, "-m", "tests.integration.dying", point, *command(site, "export-vm", *words)[3:]]
    died = subprocess.run(argv, cwd=ROOT, env=os.environ | site.environment() | api, capture_output=True, timeout=120)
    assert died.returncode == -9, died.stderr
    family = json.loads(died.stdout.splitlines()[-1])
    assert any(OF_ITS_OWN[road] in line for line in family.values()), family
    await_that(lambda: not any(Path(f"/proc/{pid}").exists() for pid in family), otherwise=lambda: f"left of {family}")
    assert held(site)["vddk_prepared"] in ((1, 2) if road == "vddk" else (0,))  # a disk each; the small one may be done
    site.post("/faults", expire_sessions=True)
    left = json.loads((tmp_path / "large" / ".hyper2kvm.job.json").read_text())
    assert (left["road"]["road"], left["resumable"]) == (road, True)
    assert not {"key", "password", "secret"} & set(left["road"])
    site.post("/guest-write", vm=site.vm("large")["moref"], disk=0, offset=MIB, length=4 * MIB, seed=written)
    done = run_command(site, "export-vm", *words, env=api)
    assert done.returncode == 0, done.stderr
    manifest = json.loads(done.stdout)
    assert ({disk["road"] for disk in manifest["disks"]}, manifest["snapshot"]) == ({road}, left["snapshot"])
    assert site.stats()["lease_ends"] == ({"failed": 1, "completed": 1} if road == "nfc_lease" else {})
    assert_equal_to_the_frozen_chain(site, tmp_path / "large", tmp_path)
    assert_nothing_left(site)


async def test_a_vm_that_a_run_was_trying_by_vddk_is_released_by_one_of_another_road(site, tmp_path, api, caplog):
    point = "tasks.transports.vddk:VddkReader.__exit__:before"
    words = ["--vs-vm-name", "web", "--output-dir", str(tmp_path), "--transport", "vddk", "--vddk-libdir", str(VDDK)]
    argv = [sys.executable, "-m", "tests.integration.dying", point, *command(site, "export-vm", *words)[3:]]
    environment = os.environ | site.environment() | api
    died = await asyncio.to_thread(subprocess.run, argv, cwd=ROOT, env=environment, capture_output=True, timeout=120)
    assert died.returncode == -9, died.stderr
    site.post("/faults", expire_sessions=True)
    left = read_state(tmp_path / "web")
    assert left
    assert (left.road.road, left.resumable, held(site)["vddk_prepared"]) == ("vddk", False, 1)
    gone = left.model_copy(update={"road": VddkSettings(libdir=tmp_path)})
    await release(vcenter_of(site), gone)
    assert "Storage vMotion may still be switched off" in caplog.text
    manifest = await export(site, tmp_path, "web", "folder", means={})
    assert manifest.snapshot != left.snapshot
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
