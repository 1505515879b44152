"""Leases and their streams against a live lab: what is read, what is refused, what is left of one that ends badly."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tasks import errors
from tasks.images.copy import CopyResult, Limits, copy
from tasks.images.digests import LEAF_BYTES, Digests
from tasks.images.extents import whole_disk
from tasks.images.raw import RawWriter
from tasks.models import Extent, Snapshot, Trust, VirtualDisk, VirtualMachine
from tasks.transports.nfc_lease import BEGINNINGS, LeaseDisk, LeaseReader
from tasks.vsphere.disks import powered_off_disks, snapshot_disks
from tasks.vsphere.leases import Lease, Leases, _acquired
from tasks.vsphere.lookup import find_vm
from tasks.vsphere.machine import describe_vm
from tasks.vsphere.session import Session, borrow
from tasks.vsphere.snapshots import create_snapshot, drop_snapshot
from tests.labs import Lab, running_lab
from tests.runs import (
    assert_nothing_left,
    export,
    faults,
    raw_sha256,
)

pytestmark = pytest.mark.live

MIB = 1024 * 1024
QUICK = Limits(threads=1, attempts=5, first_wait_s=0.001, longest_wait_s=0.002)
SIZE = 40 * MIB + 512
SITE = {
    "datacenters": [
        {
            "name": "DC",
            "clusters": [{"name": "c", "hosts": ["esx1"]}],
            "vms": [
                {
                    "name": "off",
                    "power": "off",
                    "disks": [{"size": SIZE, "data": 6 * MIB}, {"size": 3 * MIB, "controller": "ahci", "unit": 1}],
                },
                {"name": "on", "disks": [{"size": SIZE, "data": 6 * MIB}, {"size": 3 * MIB, "controller": "ide"}]},
                {"name": "windows", "vss": True, "disks": [{"size": 2 * MIB}]},
                {"name": "kept out", "disks": [{"size": MIB}, {"size": MIB, "mode": "independent_persistent"}]},
            ],
        }
    ],
    "keep_frozen": True,
    "lease": {"timeout_s": 2},
}


@pytest.fixture(scope="module")
def module_lab() -> Iterator[Lab]:
    with running_lab(scenario=SITE) as lab:
        yield lab


@pytest.fixture
def site(module_lab: Lab) -> Iterator[Lab]:
    """The lab as it was, and no lease left on it."""
    module_lab.post("/faults", clear=True)
    module_lab.post("/stats/reset")
    yield module_lab
    assert module_lab.stats()["leases_open"] == 0
    assert_nothing_left(module_lab)


@dataclass
class Held:
    """A lease, and what it is of."""

    session: Session
    lease: Lease
    vm: VirtualMachine
    snapshot: Snapshot | None
    disks: tuple[VirtualDisk, ...]

    def source(self, number: int, **changes: Any) -> LeaseDisk:
        disk = self.disks[number]
        device = self.lease.device_of(disk, among=self.disks)
        fields = {
            "connection": self.session.connection,
            "url": device.url,
            "thumbprint": device.thumbprint,
            "datastore_path": disk.datastore_path,
            "capacity_bytes": disk.capacity_bytes,
        }
        return LeaseDisk(**(fields | changes))

    def reader(self, number: int, **options: Any) -> LeaseReader:
        return LeaseReader(self.source(number), alive=self.lease.check, progress=self.lease.add, **options)


@contextmanager
def held(lab: Lab, name: str, *, frozen: bool = True, quiesce: bool = False, **connection: Any) -> Iterator[Held]:
    """Hold a lease on a snapshot of a VM, or on the VM, which is off, for the block."""
    with borrow(lab.connection(**connection)) as session, ExitStack() as stack:
        vm = describe_vm(session, find_vm(session, name))
        snapshot = None
        if frozen:
            stack.callback(drop_snapshot, session, vm.moref, name="test")
            snapshot = create_snapshot(session, vm, name="test", description="", quiesce=quiesce)
        disks = snapshot_disks(session, snapshot) if snapshot else powered_off_disks(session, vm)
        leases = session.companion(Leases)
        lease = stack.enter_context(leases.held(session, vm, snapshot))
        yield Held(session, lease, vm, snapshot, disks)


def copied(reader: LeaseReader, folder: Path, name: str = "copy", **options: Any) -> CopyResult:
    """Copy a whole disk as a mode would."""
    with (
        reader,
        RawWriter.create(folder / name, size=reader.size) as writer,
        Digests.create(folder / f"{name}.digests", size=reader.size) as digests,
    ):
        return copy(reader, whole_disk(reader.size), writer, digests=digests, **({"limits": QUICK} | options))


def chain_of(lab: Lab, disk: VirtualDisk, snapshot: Snapshot | None = None) -> Path:
    """Return the file that qemu-img reads a disk by: in the datastore, or frozen as of a snapshot."""
    match = re.fullmatch(r"\[(.+?)\] (.+)", disk.datastore_path)
    assert match
    if snapshot:
        return Path(lab.state_dir) / "frozen" / snapshot.moref / Path(match[2]).name
    return Path(lab.state_dir) / match[1] / match[2]


def assert_equal(image: Path, chain: Path) -> None:
    argv = ["qemu-img", "compare", "-U", "-f", "raw", "-F", "vmdk", str(image), str(chain)]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_both_disks_of_a_vm_that_is_off_come_at_once_and_equal_qemus_reading(site: Lab, tmp_path: Path) -> None:
    with held(site, "off", frozen=False) as export_, ThreadPoolExecutor() as pool:
        copies = [pool.submit(copied, export_.reader(number), tmp_path, str(number)) for number in range(2)]
        results = [each.result() for each in copies]
        for disk in export_.disks:
            assert_equal(tmp_path / str(disk.index), chain_of(site, disk))
    assert site.stats()["lease_ends"] == {"completed": 1}
    assert results[0].bytes_written < SIZE / 2
    assert (tmp_path / "0").stat().st_blocks * 512 < SIZE / 2


def test_a_running_guests_disks_are_those_of_the_snapshot(site: Lab, tmp_path: Path) -> None:
    moref = site.vm("on")["moref"]
    site.post("/guest-load", vm=moref, disk=0, bytes_per_s=4 * MIB, seed=3)
    try:
        with held(site, "on") as export_:
            assert export_.snapshot
            for disk in export_.disks:
                copied(export_.reader(disk.index), tmp_path, str(disk.index))
                assert_equal(tmp_path / str(disk.index), chain_of(site, disk, export_.snapshot))
                assert raw_sha256(tmp_path / str(disk.index), tmp_path) == site.sha256(
                    moref, disk.index, export_.snapshot.moref
                )
    finally:
        site.post("/guest-load", vm=moref, disk=0, stop=True)


def test_the_second_redo_log_of_a_quiesced_windows_guest_is_read(site: Lab, tmp_path: Path) -> None:
    with held(site, "windows", quiesce=True) as export_:
        assert export_.snapshot and export_.disks[0].parents
        copied(export_.reader(0), tmp_path)
        assert_equal(tmp_path / "copy", chain_of(site, export_.disks[0], export_.snapshot))


LIES = [
    "capacity", "order", "twice", "beyond", "size", "marker", "deflate", "short", "dropped", "table", "directory",
    "footer", "trailing",
]  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_stream_that_lies_is_refused_and_its_lease_aborted(site: Lab, tmp_path: Path, lie: str) -> None:
    with (
        faults(site, lease_lie=lie),
        pytest.raises(errors.BadLeaseStream) as caught,
        held(site, "off", frozen=False) as export_,
    ):
        copied(export_.reader(0), tmp_path)
    assert "off.vmdk" in caught.value.source
    assert site.stats()["lease_ends"] == {"aborted": 1}


@pytest.mark.parametrize("lie", ["truncated", "eos"])
def test_a_stream_that_ends_too_early_each_time_is_an_interruption(site: Lab, tmp_path: Path, lie: str) -> None:
    with (
        faults(site, lease_lie=lie, count=0),
        pytest.raises(errors.TransferInterrupted, match="cannot seek"),
        held(site, "off", frozen=False) as export_,
    ):
        copied(export_.reader(0), tmp_path)
    assert streams(site) == BEGINNINGS


def streams(lab: Lab) -> int:
    return sum(count for path, count in lab.stats()["http_requests"].items() if path.startswith("/nfc/"))


def test_a_stream_that_is_cut_is_begun_anew_and_says_so(site: Lab, tmp_path: Path) -> None:
    with held(site, "off", frozen=False) as export_, faults(site, cut_after=3 * MIB):
        reader = export_.reader(0)
        copied(reader, tmp_path)
        assert_equal(tmp_path / "copy", chain_of(site, export_.disks[0]))
    assert (streams(site), "cannot seek: begun 2 times" in reader.road_reason) == (2, True)


def test_a_stream_that_stalls_is_an_interruption(site: Lab, tmp_path: Path) -> None:
    with (
        held(site, "off", frozen=False) as export_,
        faults(site, stall_s=60, count=0),
        pytest.raises(errors.TransferInterrupted, match="ReadTimeout"),
    ):
        copied(export_.reader(0, timeout_s=0.3), tmp_path)


def test_the_heartbeat_keeps_a_lease_for_longer_than_its_time(site: Lab, tmp_path: Path) -> None:
    with held(site, "off", frozen=False) as export_:
        beats = until(lambda: site.stats()["soap_calls"].get("HttpNfcLeaseProgress", 0) >= 8)
        assert beats  # five in a lease's time
        export_.lease.check()
        copied(export_.reader(1), tmp_path)
        assert_equal(tmp_path / "copy", chain_of(site, export_.disks[1]))


def until(condition: Any, *, within_s: float = 30.0) -> bool:
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def test_a_lease_that_nobody_renews_is_lost_and_the_vm_is_free_again(site: Lab) -> None:
    def lost() -> bool:
        try:
            lease.check()
        except errors.LeaseLost as error:
            return "Timedout" in error.reason
        return False

    with borrow(site.connection()) as session:
        vm = describe_vm(session, find_vm(session, "off"))
        lease = _acquired(session, vm, None)
        assert until(lost)
        with session.companion(Leases).held(session, vm, None) as another:
            another.check()


def test_a_second_lease_waits_until_the_first_has_ended(site: Lab) -> None:
    with borrow(site.connection()) as session:
        vm = describe_vm(session, find_vm(session, "off"))
        _acquired(session, vm, None)  # as one of a run that was killed
        with session.companion(Leases).held(session, vm, None) as another:
            another.check()
    assert site.stats()["lease_ends"] == {"failed": 1, "completed": 1}


def test_a_lease_that_ends_meanwhile_is_named(site: Lab, tmp_path: Path) -> None:
    def progress(count: int) -> None:
        site.post("/faults", fail_leases="InsufficientResourcesFault")

    with (
        faults(site, throttle_bytes_per_s=4 * MIB),
        pytest.raises(errors.LeaseLost, match="InsufficientResourcesFault"),
        held(site, "off", frozen=False) as export_,
    ):
        copied(LeaseReader(export_.source(0), alive=export_.lease.check, progress=progress), tmp_path)


def test_a_vm_that_is_on_is_not_exported_without_a_snapshot(site: Lab) -> None:
    with borrow(site.connection()) as session:
        vm = describe_vm(session, find_vm(session, "on"))
        with (
            pytest.raises(errors.LeaseRefused, match=r"InvalidPowerState.*power it off"),
            session.companion(Leases).held(session, vm, None),
        ):
            raise AssertionError("it is held")


def test_a_missing_privilege_is_named(site: Lab) -> None:
    with (
        faults(site, refuse_privilege="VApp.Export"),
        pytest.raises(errors.PermissionMissing, match=r"VApp\.Export"),
        held(site, "off"),
    ):
        raise AssertionError("it is held")


def test_the_hosts_certificate_is_the_one_that_the_lease_names(site: Lab) -> None:
    with faults(site, hosts="strange"), pytest.raises(errors.ThumbprintMismatch), held(site, "off") as export_:
        export_.reader(0).__enter__()
    with faults(site, hosts="unnamed"), pytest.raises(errors.CertificateUntrusted), held(site, "off") as export_:
        export_.reader(0).__enter__()
    with faults(site, hosts="down"), pytest.raises(errors.ConnectionFailed), held(site, "off") as export_:
        export_.reader(0).__enter__()
    assert site.stats()["lease_ends"] == {"aborted": 3}


def test_a_lone_host_is_the_star_of_its_urls_and_trusted_as_before(tmp_path: Path) -> None:
    with running_lab("-esx", "-disk-size", "3MiB") as lab, held(lab, "demo") as export_:
        assert "://*:" in export_.lease.devices[0].url.get_secret_value()
        assert export_.source(0).where().host == lab.host
        copied(export_.reader(0), tmp_path)
        assert raw_sha256(tmp_path / "copy", tmp_path) == lab.sha256(
            export_.vm.moref, 0, export_.snapshot.moref if export_.snapshot else None
        )
        stranger = export_.session.connection.model_copy(update={"trust": Trust(thumbprint="AA" * 32)})
        with pytest.raises(errors.ThumbprintMismatch):
            LeaseReader(export_.source(0, connection=stranger)).__enter__()


def test_what_is_asked_for_again_is_read_again_from_the_beginning(site: Lab, tmp_path: Path) -> None:
    """As after a kill: of what the journal has, not a byte is given again; what follows is as it was."""
    begin = 21 * LEAF_BYTES
    with held(site, "off", frozen=False) as export_:
        with export_.reader(0) as reader:
            image = bytearray(SIZE)
            for offset, buffer in reader.stream(Extent(start=begin, length=SIZE - begin)):
                assert offset >= begin
                if isinstance(buffer, memoryview):
                    image[offset : offset + len(buffer)] = buffer
        subprocess.run(
            ["qemu-img", "convert", "-U", "-O", "raw", str(chain_of(site, export_.disks[0])), str(tmp_path / "whole")],
            check=True,
        )
    assert bytes(image[begin:]) == (tmp_path / "whole").read_bytes()[begin:]
    assert "what was here already was read again" in reader.road_reason


def test_a_copy_that_ends_before_the_stream_does_sees_it_to_its_end(site: Lab) -> None:
    """What the stream's end would have told is not missed because nobody asked for the last bytes."""
    with (
        faults(site, lease_lie="directory"),
        pytest.raises(errors.BadLeaseStream, match="directory"),
        held(site, "off", frozen=False) as export_,
        export_.reader(0) as reader,
    ):
        assert sum(len(buffer) for _, buffer in reader.stream(Extent(start=0, length=LEAF_BYTES))) == LEAF_BYTES


def test_another_program_exports_what_the_lab_leases(site: Lab, tmp_path: Path) -> None:
    """govc is the judge of the lab: its leases, streams and descriptors."""
    site.govc("export.ovf", "-vm", "off", str(tmp_path))
    for disk in site.vm("off")["disks"]:
        number = site.vm("off")["disks"].index(disk)
        chain = Path(site.state_dir) / disk["datastore_path"].replace("[", "").replace("] ", "/")
        compare = ["qemu-img", "compare", "-U", str(tmp_path / "off" / f"off-disk-{number}.vmdk"), str(chain)]
        subprocess.run(compare, check=True)
    assert 'capacity="3145728"' in (tmp_path / "off" / "off.ovf").read_text()
    site.govc("snapshot.create", "-vm", "on", "judge")
    try:
        site.govc("export.ovf", "-vm", "on", "-snapshot", "judge", str(tmp_path))
        moref = json.loads(site.govc("snapshot.tree", "-vm", "on", "-i", "-json"))
        assert moref
    finally:
        site.govc("snapshot.remove", "-vm", "on", "judge")
    assert site.stats()["lease_ends"] == {"completed": 2}


def left_in(folder: Path) -> list[Path]:
    return [*folder.rglob("disk-*"), *folder.rglob("manifest.json")]


@pytest.mark.anyio
@pytest.mark.usefixtures("prefect_api")
async def test_an_export_whose_stream_lies_leaves_no_lease_no_snapshot_and_no_image(site: Lab, tmp_path: Path) -> None:
    with faults(site, lease_lie="order"), pytest.raises(errors.BadLeaseStream, match="out of order"):
        await export(site, tmp_path, "on", transport="nfc_lease")
    assert site.stats()["lease_ends"] == {"aborted": 1}
    assert left_in(tmp_path) == []


@pytest.mark.anyio
@pytest.mark.usefixtures("prefect_api")
async def test_auto_takes_a_lease_where_nothing_else_reads_the_disks(site: Lab, tmp_path: Path) -> None:
    """The content of a VSS snapshot lies in two files, which `folder` refuses; one without a road is refused early."""
    manifest = await export(site, tmp_path, "windows", quiesce=True)
    assert manifest.snapshot and [image.road for image in manifest.disks] == ["nfc_lease"]
    assert {each.road for each in manifest.skipped_roads} == {"vddk", "nbd", "folder", "ssh"}
    frozen = Path(site.state_dir) / "frozen" / manifest.snapshot.moref / manifest.disks[0].source.rpartition("/")[2]
    assert raw_sha256(tmp_path / "windows" / manifest.disks[0].path, tmp_path) == raw_sha256(frozen, tmp_path)
    site.post("/stats/reset")
    with pytest.raises(errors.UnsupportedDisk, match="no snapshot holds it"):
        await export(site, tmp_path, "kept out")
    assert "CreateSnapshot_Task" not in site.stats()["soap_calls"]
