"""What real vCenters hold, through the export: equal to qemu-img's reading of the frozen chain, or refused by name
before the first byte. The oracle is qemu-img, not the lab's own digest."""

from __future__ import annotations

import re
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from pyVmomi import vim

from tasks import errors
from tasks.images.state import JobState
from tasks.models import SECTOR_BYTES, DiskImage, Manifest
from tasks.probe import probe
from tasks.vsphere import lookup, machine
from tasks.vsphere.disks import disks_among
from tasks.vsphere.properties import retrieve
from tasks.vsphere.session import borrow
from tests.labs import Lab, running_lab
from tests.runs import assert_nothing_left, children, faults, raw_sha256, vcenter_of
from tests.runs import export as export_by

pytestmark = [pytest.mark.anyio, pytest.mark.live, pytest.mark.usefixtures("prefect_api")]

MIB = 1024 * 1024
export = partial(export_by, transport="folder")  # what the other roads read or refuse is in tests of their own
SMALL = {"size": "1MiB"}
# The device list's order is neither that of the buses nor that of the units.
SIXTEEN = [
    {"size": f"{number + 1}MiB", "controller": "pvscsi", "bus": (3, 0, 2, 1)[number % 4], "unit": 6 - number // 4}
    for number in range(16)
]
KINDS = {
    "keep_frozen": True,
    "datacenters": [
        {
            "name": "DC",
            "clusters": [{"name": "cluster", "hosts": ["esx1"]}],
            "datastores": ["fast", "slow", {"name": "objects", "type": "vsan"}, {"name": "vols", "type": "VVOL"}],
            "vms": [
                {"name": "bios on", "disks": [SMALL, {**SMALL, "controller": "ide"}]},
                {"name": "efi on", "firmware": "efi", "disks": [SMALL, {**SMALL, "controller": "nvme"}]},
                {"name": "bios off", "power": "off", "disks": [SMALL, {**SMALL, "controller": "lsilogic"}]},
                {"name": "efi off", "power": "off", "firmware": "efi", "disks": [{**SMALL, "controller": "ahci"}]},
                {"name": "sixteen", "disks": SIXTEEN},
                {
                    "name": "spread",
                    "datastore": "fast",
                    "disks": [{**SMALL, "datastore": each, "file": "data"} for each in ("slow", "fast")],
                },
                {"name": "odd size", "disks": [{"size": 3 * MIB + 512}]},
                {"name": "windows", "vss": True, "disks": [SMALL, SMALL]},
                {"name": "torn", "consolidation_needed": True, "disks": [SMALL]},
                {"name": "vsan", "disks": [SMALL, SMALL, {**SMALL, "backing": "vsan", "datastore": "objects"}]},
                {"name": "vvol", "disks": [SMALL, {**SMALL, "backing": "vvol", "datastore": "vols"}]},
                {"name": "sesparse", "disks": [SMALL, {**SMALL, "backing": "sesparse"}]},
                {"name": "rdm", "disks": [SMALL, {**SMALL, "backing": "rdm"}]},
                {"name": "rdmp", "disks": [SMALL, {**SMALL, "backing": "rdm_physical"}]},
                {"name": "indep", "disks": [SMALL, {**SMALL, "mode": "independent_persistent"}]},
                {"name": "lost", "disks": [SMALL, {**SMALL, "mode": "independent_nonpersistent"}]},
                {"name": "multi", "disks": [SMALL, {**SMALL, "sharing": "sharingMultiWriter"}]},
                {"name": "quorum", "disks": [SMALL, {**SMALL, "bus": 1, "bus_sharing": "physicalSharing"}]},
                {"name": "virtual quorum", "disks": [SMALL, {**SMALL, "bus": 1, "bus_sharing": "virtualSharing"}]},
                {"name": "secret", "disks": [{**SMALL, "encrypted": True}]},
            ],
        }
    ],
}
HISTORY = {
    "keep_frozen": True,
    "datacenters": [
        {
            "name": "DC",
            "clusters": [{"name": "cluster", "hosts": ["esx1"]}],
            "vms": [
                {
                    "name": "chain",
                    "disks": [SMALL, SMALL],
                    "snapshots": [{"name": "before update", "writes": "256KiB"}, {"name": "after", "writes": "256KiB"}],
                }
            ],
        }
    ],
}


def flags_inventory(**options) -> dict:
    """Return a scenario of options alone: the inventory is the one of the flags."""
    return {"keep_frozen": True, **options}


@pytest.fixture(scope="module")
def kinds():
    with running_lab(scenario=KINDS) as lab:
        yield lab


@pytest.fixture(scope="module")
def strict():
    with running_lab("-disks", "3", "-disk-size", "1MiB", scenario=flags_inventory(locks="strict")) as lab:
        yield lab


def assert_equal_to_qemu_imgs_reading(lab: Lab, manifest: Manifest, folder: Path, scratch: Path) -> None:
    """Compare every image with what qemu-img reads of the chain that the snapshot froze."""
    for image in manifest.disks:
        assert raw_sha256(folder / image.path, scratch) == raw_sha256(frozen(lab, manifest, image), scratch)


def frozen(lab: Lab, manifest: Manifest, image: DiskImage) -> Path:
    """Return the lab's copy of what `snapshot.config` names, as of the snapshot; of a VM that is off, the file."""
    datastore, name = re.fullmatch(r"\[(.+?)\] (.+)", image.source, re.DOTALL).groups()
    if manifest.snapshot is None:
        return Path(lab.state_dir) / datastore / name
    folder = Path(lab.state_dir) / "frozen" / manifest.snapshot.moref
    its_own = folder / f"disk-{image.disk_key}" / Path(name).name
    return its_own if its_own.exists() else folder / Path(name).name


@contextmanager
def refused_before_the_first_byte(lab: Lab, output_dir: Path, kind: type[Exception], match: str, *, probed: int = 0):
    """In the block an export is refused by that error; no byte but the probes' was served, and nothing is left."""
    before, there = children(), lab.stats()["open_snapshots"]
    lab.post("/stats/reset")
    with pytest.raises(kind, match=match) as caught:
        yield caught
    stats = lab.stats()
    assert stats["bytes_served"] == probed * SECTOR_BYTES
    assert (stats["open_snapshots"], stats["live_sessions"]) == (there, 0)
    assert not [*output_dir.rglob("disk-*"), *output_dir.rglob("manifest.json")]
    assert children() <= before


# ── what can be copied ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "power", "firmware"),
    [
        ("bios on", "poweredOn", "bios"),
        ("efi on", "poweredOn", "efi"),
        ("bios off", "poweredOff", "bios"),
        ("efi off", "poweredOff", "efi"),
    ],
)
async def test_firmware_and_power_state_are_recorded_and_the_bytes_equal(kinds, tmp_path, name, power, firmware):
    manifest = await export(kinds, tmp_path, name)
    assert (manifest.vm.power_state, manifest.vm.firmware) == (power, firmware)
    assert_equal_to_qemu_imgs_reading(kinds, manifest, tmp_path / name, tmp_path)
    assert_nothing_left(kinds)


async def test_sixteen_disks_on_four_controllers_arrive_in_the_order_of_the_device_list(kinds, tmp_path):
    manifest = await export(kinds, tmp_path, "sixteen", parallel_disks=4)
    expected = [(disk["key"], disk["capacity_bytes"]) for disk in kinds.vm("sixteen")["disks"]]
    assert [(image.disk_key, image.virtual_size) for image in manifest.disks] == expected
    assert [image.path for image in manifest.disks] == [f"disk-{number}.qcow2" for number in range(16)]
    assert len([each for each in manifest.vm.controllers if each.model == "ParaVirtualSCSIController"]) == 4
    assert_equal_to_qemu_imgs_reading(kinds, manifest, tmp_path / "sixteen", tmp_path)
    assert_nothing_left(kinds)


async def test_disks_of_one_file_name_on_two_datastores_stay_two(kinds, tmp_path):
    vm = kinds.vm("spread")["moref"]
    kinds.post("/guest-load", vm=vm, disk=0, bytes_per_s=MIB, seed=3)
    manifest = await export(kinds, tmp_path, "spread")
    kinds.post("/guest-load", vm=vm, disk=0, stop=True)
    sources = [image.source for image in manifest.disks]
    assert [source.partition("]")[0] for source in sources] == ["[slow", "[fast"]
    assert len({source.rpartition("/")[2] for source in sources}) == 1
    assert len({image.digest for image in manifest.disks}) == 2
    assert_equal_to_qemu_imgs_reading(kinds, manifest, tmp_path / "spread", tmp_path)
    assert_nothing_left(kinds)


async def test_a_disk_whose_size_is_no_multiple_of_a_mebibyte_is_whole(kinds, tmp_path):
    manifest = await export(kinds, tmp_path, "odd size")
    assert manifest.disks[0].virtual_size == 3 * MIB + 512
    assert_equal_to_qemu_imgs_reading(kinds, manifest, tmp_path / "odd size", tmp_path)


async def test_a_windows_guest_is_copied_crash_consistent(kinds, tmp_path):
    manifest = await export(kinds, tmp_path, "windows")
    assert_equal_to_qemu_imgs_reading(kinds, manifest, tmp_path / "windows", tmp_path)
    assert_nothing_left(kinds)


async def test_the_disks_of_a_vm_that_is_off_are_readable_where_locks_are_strict(strict, tmp_path):
    vm = strict.vm("demo")
    strict.govc("vm.power", "-off", vm["path"])
    try:
        manifest = await export(strict, tmp_path, "demo")
    finally:
        strict.govc("vm.power", "-on", vm["path"])
    assert_equal_to_qemu_imgs_reading(strict, manifest, tmp_path / "demo", tmp_path)
    assert_nothing_left(strict)


async def test_the_oldest_of_somebodys_snapshots_can_be_copied_from_and_stays(tmp_path):
    with running_lab(scenario=HISTORY) as lab:
        path = lab.vm("chain")["path"]
        tree = lab.govc("snapshot.tree", "-i", "-vm", path)
        oldest, newest = dict.fromkeys(re.findall(r"\[(snapshot-\d+)\]", tree))
        manifest = await export(lab, tmp_path, "chain", snapshot_moref=oldest)
        assert manifest.snapshot.name == "before update"
        assert_equal_to_qemu_imgs_reading(lab, manifest, tmp_path / "chain", tmp_path)
        assert (lab.stats()["open_snapshots"], lab.stats()["live_sessions"]) == (2, 0)
        refused = tmp_path / "refused"
        with refused_before_the_first_byte(lab, refused, errors.UnsupportedDisk, "oldest snapshot"):
            await export(lab, refused, "chain", snapshot_moref=newest)
        with refused_before_the_first_byte(lab, refused, errors.FenceClosed, "Hard disk 1 runs on a snapshot already"):
            await export(lab, refused, "chain")


# ── what cannot, and is named ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("rdm", "Hard disk 2 .*raw device mapping.*Map the LUN on the KVM side"),
        ("rdmp", "Hard disk 2 .*raw device mapping.*Map the LUN on the KVM side"),
        ("indep", "Hard disk 2 .*independent_persistent, so no snapshot holds it.*Make it dependent"),
        ("lost", "Hard disk 2 .*independent_nonpersistent, so no snapshot holds it"),
        ("multi", "Hard disk 2 .*shared with other VMs.*make the disk unshared"),
        ("quorum", "Hard disk 2 .*shared with other VMs.*make the disk unshared"),
        ("virtual quorum", "Hard disk 2 .*shared with other VMs"),
        ("secret", "Hard disk 1 .*encrypted by vSphere.*Decrypt the VM"),
    ],
)
async def test_a_disk_that_no_road_reads_is_named_before_a_snapshot_is_taken(kinds, tmp_path, name, what):
    with refused_before_the_first_byte(kinds, tmp_path, errors.UnsupportedDisk, what):
        await export(kinds, tmp_path, name)
    assert "CreateSnapshot_Task" not in kinds.stats()["soap_calls"]


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("vsan", r"Hard disk 3 \(\[objects\] .*it is a vSAN or vVol object.*\. Move it to a VMFS or NFS datastore"),
        ("vvol", r"Hard disk 2 \(\[vols\] .*it is a vSAN or vVol object \(rfc4122\..*Move it to a VMFS"),
        ("sesparse", r"Hard disk 2 .*SeSparseBackingInfo without a flat file.*The roads vddk and nbd read it"),
    ],
)
async def test_a_disk_that_the_road_cannot_read_is_named_and_none_of_the_vm_is_copied(kinds, tmp_path, name, what):
    with refused_before_the_first_byte(kinds, tmp_path, errors.UnsupportedDisk, what):
        await export(kinds, tmp_path, name)


async def test_a_vm_that_needs_consolidation_is_refused_before_a_snapshot(kinds, tmp_path):
    with refused_before_the_first_byte(kinds, tmp_path, errors.FenceClosed, "need consolidation.*Consolidate it in"):
        await export(kinds, tmp_path, "torn")
    assert "CreateSnapshot_Task" not in kinds.stats()["soap_calls"]


async def test_a_second_redo_log_is_refused_with_the_roads_that_will_read_it_and_what_works_today(kinds, tmp_path):
    words = "second redo log.*VSS.*--transport vddk.*Run again without --quiesce"
    with refused_before_the_first_byte(kinds, tmp_path, errors.UnsupportedDisk, words):
        await export(kinds, tmp_path, "windows", quiesce=True)


async def test_a_base_that_is_locked_under_its_snapshot_is_refused_with_what_works_today(strict, tmp_path):
    words = r"demo/demo\.vmdk \(its flat file\) is locked.*power it off"
    with refused_before_the_first_byte(strict, tmp_path, errors.FileLocked, words):
        await export(strict, tmp_path, "demo")


async def test_one_disk_whose_bytes_cannot_be_had_keeps_the_others_from_being_copied(tmp_path):
    with running_lab("-disks", "3", "-disk-size", "1MiB") as lab:
        flat = Path(lab.state_dir) / "datastore1" / "demo" / "demo_2-flat.vmdk"
        flat.rename(flat.with_name("away"))
        with refused_before_the_first_byte(lab, tmp_path, errors.UnsupportedDisk, "demo_2.*no flat file", probed=2):
            await export(lab, tmp_path, "demo", parallel_disks=1)


async def test_a_host_that_ignores_ranges_is_refused_before_the_whole_file_comes(tmp_path):
    scenario = flags_inventory(host_ignores_range=True)
    with running_lab("-disk-size", "64MiB", scenario=scenario) as lab:
        with pytest.raises(errors.UnsupportedDisk, match="ignores Range requests"):
            await export(lab, tmp_path, "demo")
        assert lab.stats()["bytes_served"] < 16 * MIB  # what sockets hold until we have seen the status and hung up
        assert not [*tmp_path.rglob("disk-*")]
        assert_nothing_left(lab)


# ── the probe ────────────────────────────────────────────────────────────────────────────────────────


def job_of(lab: Lab, name: str) -> JobState:
    """Return a job of a VM and its disks as they are now, without a snapshot."""
    with borrow(lab.connection()) as live:
        vm = machine.describe_vm(live, lookup.find_vm(live, name))
        entity, path = live.entity(vim.VirtualMachine, vm.moref), "config.hardware.device"
        disks = disks_among(retrieve(live, [entity], (path,))[entity][path])
    return JobState(job_id="j", flow_run_id="", vcenter_uuid="", vm=vm, snapshot=None, disks=disks)


async def test_the_probe_reads_one_sector_of_each_disk(kinds):
    job = job_of(kinds, "bios off")
    kinds.post("/stats/reset")
    await probe(vcenter_of(kinds), job)
    assert kinds.stats()["bytes_served"] == len(job.disks) * SECTOR_BYTES
    assert_nothing_left(kinds)


async def test_the_probe_outlives_a_busy_server_and_a_dead_session(kinds):
    job = job_of(kinds, "bios off")
    with borrow(kinds.connection()):
        with faults(kinds, folder_503=2, expire_sessions=True):
            await probe(vcenter_of(kinds), job)
    assert_nothing_left(kinds)
