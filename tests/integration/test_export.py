"""The export flow against a live lab: what it lands, what it refuses, what it leaves behind."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import time

import pytest

from tasks import errors
from tasks.steps import METER_LISTENER, Meter
from tests.runs import (
    assert_equal_to_the_guests_disks,
    assert_nothing_left,
    children,
    export,
    faults,
)

pytestmark = [pytest.mark.anyio, pytest.mark.live, pytest.mark.usefixtures("prefect_api")]

TWO_SITES = {
    "datacenters": [
        {
            "name": "DC%2fone",
            "folder": "europe/north",
            "clusters": [{"name": "blue cluster", "folder": "racks", "hosts": ["esx1"]}],
            "standalone_hosts": ["esx9"],
            "vms": [
                {"name": "wéb säge", "folder": "prod/eu", "host": "esx1", "disks": [{"size": "4MiB"}]},
                {"name": "alone", "host": "esx9", "power": "off", "disks": [{"size": "4MiB"}]},
                {"name": "50%25 a%2fb", "folder": "prod", "host": "esx1", "disks": [{"size": "4MiB"}]},
                {"name": "twin", "folder": "a", "disks": [{"size": "1MiB"}]},
                {"name": "twin", "folder": "b", "disks": [{"size": "1MiB"}]},
                {"name": "bare", "disks": []},
                {"name": "stubborn", "quiesce": "fail", "disks": [{"size": "1MiB"}]},
                {"name": "kept out", "disks": [{"size": "1MiB"}, {"size": "1MiB", "mode": "independent_persistent"}]},
            ],
        }
    ]
}


@pytest.fixture(scope="module")
def sites():
    from tests.labs import running_lab

    with running_lab(scenario=TWO_SITES) as lab:
        yield lab


@pytest.mark.parametrize(
    ("image_format", "compression"),
    [("qcow2", "none"), ("raw", "none"), ("qcow2", "zstd"), ("vmdk", "none"), ("vdi", "none"), ("vhdx", "none")],
)
async def test_a_running_vm_lands_as_its_guest_saw_it_at_the_snapshot(lab, tmp_path, image_format, compression):
    before, vm = children(), lab.vm("demo")
    lab.post("/guest-load", vm=vm["moref"], disk=0, bytes_per_s=1 << 20, seed=3)
    manifest = await export(lab, tmp_path, "demo", format=image_format, compression=compression)
    in_one_pass = image_format in ("qcow2", "raw") and compression == "none"
    assert [image.converted for image in manifest.disks] == [not in_one_pass] * 2
    lab.post("/guest-load", vm=vm["moref"], disk=0, stop=True)
    folder = tmp_path / "demo"
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    domain = {"domain.xml"} if image_format != "vhdx" else set()
    assert names == {f"disk-{n}.{end}" for n in (0, 1) for end in (image_format, "digests")} | domain | {
        "manifest.json"
    }
    assert_equal_to_the_guests_disks(lab, manifest, folder, tmp_path)
    assert_nothing_left(lab, before)


async def test_all_disks_together_keep_to_the_rate_asked_for(lab, tmp_path):
    rate, on_its_way = 8 * 1024 * 1024, 2 * 4 * 1024 * 1024  # a mebibyte a connection before anybody waits
    started = time.monotonic()
    manifest = await export(lab, tmp_path, "demo", format="raw", limit_rate="8MiB")
    moved = sum(image.bytes_transferred for image in manifest.disks)
    assert moved > on_its_way
    assert time.monotonic() - started >= (moved - on_its_way) / rate  # a slow machine takes longer


async def test_the_manifest_says_what_was_copied_and_holds_no_secret(lab, tmp_path):
    manifest = await export(lab, tmp_path, "demo", format="raw")
    text = (tmp_path / "demo" / "manifest.json").read_text()
    said = json.loads(text)
    vm = lab.vm("demo")
    assert said["version"] == 1
    assert said["consistent"] is True
    assert (said["vm"]["name"], said["vm"]["moref"]) == ("demo", vm["moref"])
    assert said["vm"]["inventory_path"] == vm["path"]
    assert said["vm"]["host_path"] == "/DC/host/cluster/esx1"
    assert said["vm"]["vpx_uri"] == f"vpx://hyper@{lab.address}/DC/cluster/esx1"
    assert said["snapshot"]["moref"] == manifest.snapshot.moref
    for index, disk in enumerate(said["disks"]):
        expected = vm["disks"][index]
        assert disk["path"] == f"disk-{index}.raw"
        assert (disk["disk_key"], disk["source"]) == (expected["key"], expected["datastore_path"])
        assert (disk["virtual_size"], disk["road"]) == (expected["capacity_bytes"], "folder")
        assert disk["digest"].startswith("blake3:")
        assert disk["uuid"]
    assert lab.password not in text


async def test_both_formats_of_one_content_have_one_digest(sites, tmp_path):
    as_qcow2 = await export(sites, tmp_path / "a", "alone", format="qcow2")
    as_raw = await export(sites, tmp_path / "b", "alone", format="raw")
    assert as_qcow2.disks[0].digest == as_raw.disks[0].digest


@pytest.mark.parametrize(
    ("name", "folder", "host_path", "uri_end"),
    [
        ("wéb säge", "wéb säge", "racks/blue cluster/esx1", "racks/blue%20cluster/esx1"),
        ("alone", "alone", "esx9/esx9", "esx9"),
        ("50% a/b", None, "racks/blue cluster/esx1", "racks/blue%20cluster/esx1"),
    ],
)
async def test_folders_hosts_and_names_of_every_kind(sites, tmp_path, name, folder, host_path, uri_end):
    manifest = await export(sites, tmp_path, name)
    datacenter = "/europe/north/DC%2fone"
    assert manifest.vm.name == name
    assert manifest.vm.host_path == f"{datacenter}/host/{host_path}"
    assert manifest.vm.vpx_uri == f"vpx://hyper@{sites.address}/europe/north/DC%252fone/{uri_end}"
    (made,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert folder is None or made.name == folder
    assert_equal_to_the_guests_disks(sites, manifest, made, tmp_path)
    assert_nothing_left(sites)


async def test_a_vm_is_found_by_path_moref_and_both_uuids(lab, tmp_path):
    by_name = await export(lab, tmp_path / "name", "demo")
    vm = by_name.vm
    for number, wanted in enumerate((vm.inventory_path, vm.moref, vm.instance_uuid, vm.bios_uuid.upper())):
        found = await export(lab, tmp_path / str(number), wanted, format="raw", skip_readback=True)
        assert found.vm.moref == vm.moref
    assert_nothing_left(lab)


async def test_a_wrong_password_is_tried_once(lab, tmp_path):
    lab.post("/stats/reset")
    with pytest.raises(errors.AuthenticationFailed, match="wrong user name or password"):
        await export(lab, tmp_path, "demo", vcenter={"password": "wrong"})
    assert lab.stats()["login_attempts"] == 1
    assert_nothing_left(lab)


async def test_a_wrong_thumbprint_is_refused_with_both(lab, tmp_path):
    wrong = "AB" * 32
    with pytest.raises(errors.ThumbprintMismatch) as caught:
        await export(lab, tmp_path, "demo", vcenter={"thumbprint": wrong})
    assert caught.value.expected.replace(":", "") == wrong
    assert caught.value.actual == lab.thumbprint_sha256


@pytest.mark.parametrize("which", ["thumbprint_sha1", "thumbprint_sha256"])
async def test_a_pinned_thumbprint_is_enough(lab, tmp_path, which):
    pin = getattr(lab, which).lower().replace(":", " ")
    manifest = await export(lab, tmp_path, "demo", format="raw", vcenter={"thumbprint": pin, "ca_bundle": None})
    assert manifest.consistent


async def test_an_unknown_ca_is_refused_with_the_thumbprint_to_pin(lab, tmp_path):
    with pytest.raises(errors.CertificateUntrusted, match=lab.thumbprint_sha256):
        await export(lab, tmp_path, "demo", vcenter={"ca_bundle": None})


async def test_verification_turned_off_works_and_is_said(lab, tmp_path):
    manifest = await export(lab, tmp_path, "demo", vcenter={"ca_bundle": None, "verify": False})
    assert any("not verified" in warning for warning in manifest.warnings)


async def test_an_unknown_vm_is_refused_with_what_is_near(sites, tmp_path):
    with pytest.raises(errors.VmNotFound, match="near it: twin"):
        await export(sites, tmp_path, "twinn")
    assert_nothing_left(sites)


async def test_a_name_that_two_vms_have_is_refused_with_both(sites, tmp_path):
    with pytest.raises(errors.AmbiguousVmName) as caught:
        await export(sites, tmp_path, "twin")
    paths = [path for path, _ in caught.value.candidates]
    assert paths == ["/europe/north/DC%2fone/vm/a/twin", "/europe/north/DC%2fone/vm/b/twin"]
    assert (await export(sites, tmp_path, paths[1])).vm.inventory_path == paths[1]


async def test_a_vm_without_disks_is_refused(sites, tmp_path):
    with pytest.raises(errors.UnsupportedDisk, match="no disk"):
        await export(sites, tmp_path, "bare")
    assert_nothing_left(sites)


async def test_a_disk_that_no_snapshot_holds_is_refused_before_the_first_byte(sites, tmp_path):
    sites.post("/stats/reset")
    with pytest.raises(errors.UnsupportedDisk, match="independent_persistent"):
        await export(sites, tmp_path, "kept out")
    assert sites.stats()["bytes_served"] == 0
    assert_nothing_left(sites)


async def test_a_guest_that_will_not_quiesce_is_refused_or_said(sites, tmp_path):
    with pytest.raises(errors.SnapshotFailed, match="ApplicationQuiesceFault"):
        await export(sites, tmp_path, "stubborn", quiesce=True)
    manifest = await export(sites, tmp_path, "stubborn", quiesce=True, allow_crash_consistent=True)
    assert any("crash-consistent" in warning for warning in manifest.warnings)
    assert_nothing_left(sites)


async def test_a_refused_snapshot_names_the_privilege(lab, tmp_path):
    with (
        faults(lab, refuse_privilege="VirtualMachine.State.CreateSnapshot"),
        pytest.raises(errors.PermissionMissing, match=r"VirtualMachine\.State\.CreateSnapshot"),
    ):
        await export(lab, tmp_path, "demo")
    assert_nothing_left(lab)


async def test_a_snapshot_that_fails_names_the_fault(lab, tmp_path):
    fault = {"method": "CreateSnapshot_Task", "fault": "InsufficientResourcesFault", "count": 1, "in_task": True}
    with faults(lab, fail_method=fault), pytest.raises(errors.SnapshotFailed, match="InsufficientResourcesFault"):
        await export(lab, tmp_path, "demo")
    assert_nothing_left(lab)


async def test_a_cut_transfer_goes_on_where_it_was_cut(lab, tmp_path):
    lab.post("/stats/reset")
    with faults(lab, cut_after=1 << 20, count=5):
        manifest = await export(lab, tmp_path, "demo", format="raw")
    size = sum(image.virtual_size for image in manifest.disks)
    assert size <= lab.stats()["bytes_served"] <= size + 5 * (1 << 20)
    assert_equal_to_the_guests_disks(lab, manifest, tmp_path / "demo", tmp_path)
    assert_nothing_left(lab)


async def test_a_busy_server_is_asked_again(lab, tmp_path):
    with faults(lab, folder_503=3):
        manifest = await export(lab, tmp_path, "demo", format="raw")
    assert_equal_to_the_guests_disks(lab, manifest, tmp_path / "demo", tmp_path)


async def test_a_session_that_expires_mid_run_is_renewed_once(lab, tmp_path):
    lab.post("/stats/reset")
    with faults(lab, throttle_bytes_per_s=8 << 20):
        running = asyncio.create_task(export(lab, tmp_path, "demo", format="raw"))
        await bytes_flow(lab, 4 << 20)
        lab.post("/faults", expire_sessions=True, throttle_bytes_per_s=0)
        manifest = await running
    assert lab.stats()["logins"] == 2
    assert_equal_to_the_guests_disks(lab, manifest, tmp_path / "demo", tmp_path)
    assert_nothing_left(lab)


async def test_cancelled_mid_transfer_it_leaves_nothing(lab, tmp_path):
    before = children()
    lab.post("/stats/reset")
    with faults(lab, throttle_bytes_per_s=2 << 20):
        running = asyncio.create_task(export(lab, tmp_path, "demo"))
        await bytes_flow(lab, 1 << 20)
        started = time.monotonic()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    assert time.monotonic() - started < 15
    assert not list(tmp_path.glob("demo/disk-?.qcow2"))
    assert_nothing_left(lab, before)


async def test_an_existing_snapshot_is_copied_from_and_left_alone(lab, tmp_path, govc):
    vm = lab.vm("demo")
    govc("snapshot.create", "-vm", vm["path"], "theirs")
    try:
        moref = re.search(r"\[(snapshot-\d+)\]", govc("snapshot.tree", "-i", "-vm", vm["path"]))[1]
        lab.post("/guest-write", vm=vm["moref"], disk=0, offset=0, length=65536, seed=99)
        with pytest.raises(errors.FenceClosed, match="runs on a snapshot already"):
            await export(lab, tmp_path, "demo", transport="folder")  # auto would take a lease, which reads chains
        with pytest.raises(errors.InvalidInput, match=f"It has: {moref}"):
            await export(lab, tmp_path, "demo", snapshot_moref="snapshot-0")
        manifest = await export(lab, tmp_path, "demo", snapshot_moref=moref)
        assert lab.stats()["open_snapshots"] == 1
        assert manifest.snapshot.ours is False
        assert_equal_to_the_guests_disks(lab, manifest, tmp_path / "demo", tmp_path)
    finally:
        govc("snapshot.remove", "-vm", vm["path"], "*")
    assert_nothing_left(lab)


async def test_a_snapshot_removed_by_somebody_mid_copy_discards_the_copy(lab, tmp_path, govc):
    vm = lab.vm("demo")
    lab.post("/stats/reset")
    with faults(lab, throttle_bytes_per_s=8 << 20):
        running = asyncio.create_task(export(lab, tmp_path, "demo"))
        await bytes_flow(lab, 4 << 20)
        await asyncio.to_thread(govc, "snapshot.remove", "-vm", vm["path"], "*")
        lab.post("/faults", throttle_bytes_per_s=0)
        with pytest.raises((errors.SnapshotChanged, errors.FileLocked, errors.TransferInterrupted)):
            await running
    assert not list(tmp_path.glob("demo/disk-?.qcow2"))
    assert_nothing_left(lab)


async def test_a_finished_copy_is_never_overwritten(lab, tmp_path):
    await export(lab, tmp_path, "demo", format="raw")
    lab.post("/stats/reset")
    with pytest.raises(errors.OutputExists, match=r"manifest\.json"):
        await export(lab, tmp_path, "demo")
    assert lab.stats()["bytes_served"] == 0
    assert_nothing_left(lab)


async def test_a_second_run_of_a_job_is_refused_and_names_the_first(lab, tmp_path):
    lab.post("/stats/reset")
    with faults(lab, throttle_bytes_per_s=2 << 20):
        running = asyncio.create_task(export(lab, tmp_path, "demo"))
        await bytes_flow(lab, 1 << 20)
        with pytest.raises(errors.JobLocked, match=str(os.getpid())):
            await export(lab, tmp_path, "demo")
        lab.post("/faults", throttle_bytes_per_s=0)
        await running
    assert_nothing_left(lab)


async def test_a_bit_that_flips_in_the_target_is_found_before_the_final_name(lab, tmp_path):
    lab.post("/stats/reset")
    with faults(lab, throttle_bytes_per_s=4 << 20):
        running = asyncio.create_task(export(lab, tmp_path, "demo", format="raw", parallel_disks=1))
        part = tmp_path / "demo" / "disk-0.raw.part"
        await bytes_flow(lab, 6 << 20)
        with part.open("r+b") as file:
            file.seek(100)
            byte = file.read(1)
            file.seek(100)
            file.write(bytes([byte[0] ^ 1]))
        lab.post("/faults", throttle_bytes_per_s=0)
        with pytest.raises(errors.IntegrityMismatch, match="the first at byte 0"):
            await running
    assert {path.name for path in (tmp_path / "demo").iterdir()} == {".hyper2kvm.lock"}
    assert_nothing_left(lab)
    assert (await export(lab, tmp_path, "demo", format="raw")).consistent


@pytest.mark.parametrize("step", ["convert", "verify"])
async def test_cancelled_after_the_last_byte_it_leaves_nothing(lab, tmp_path, step):
    def cancel_in(meter: Meter) -> None:
        if meter.label.startswith(step):
            running.cancel()

    METER_LISTENER.set(cancel_in)
    running = asyncio.create_task(export(lab, tmp_path, "demo", compression="zstd"))
    with pytest.raises(asyncio.CancelledError):
        await running
    assert {path.name for path in (tmp_path / "demo").iterdir()} == {".hyper2kvm.lock"}
    assert_nothing_left(lab)


@pytest.fixture
def small(tmp_path):
    """A file system with room for 4 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


async def test_a_thin_disk_that_fills_the_target_is_named_and_leaves_nothing(lab, small):
    with pytest.raises(errors.DiskFull, match="not enough room"):
        await export(lab, small, "demo")
    assert {path.name for path in (small / "demo").iterdir()} == {".hyper2kvm.lock"}
    assert_nothing_left(lab)


async def bytes_flow(lab, count: int, timeout_s: float = 30) -> None:
    """Wait until the lab has served `count` bytes of disks."""
    deadline = time.monotonic() + timeout_s
    while lab.stats()["bytes_served"] < count:
        assert time.monotonic() < deadline, "no bytes flow"
        await asyncio.sleep(0.05)
