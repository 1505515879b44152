"""The /folder reader and the copy loop against a live lab, without a flow around them."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tasks.errors import FileLocked, SessionExpired, TransferInterrupted, UnsupportedDisk
from tasks.images import qemu
from tasks.images.copy import CopyResult, Limits, copy
from tasks.images.digests import Digests
from tasks.images.extents import whole_disk
from tasks.images.raw import RawWriter
from tasks.images.verify import verify
from tasks.models import Extent
from tasks.process import Stopped
from tasks.transports.folder import FolderDisk, FolderReader
from tasks.vsphere.session import borrow
from tests.labs import Lab

pytestmark = pytest.mark.live

MIB = 1024 * 1024
QUICK = Limits(attempts=5, first_wait_s=0.01, longest_wait_s=0.05)


@contextmanager
def snapshot(lab: Lab, vm: dict[str, Any]) -> Iterator[str]:
    """Hold a snapshot of a VM, made by govc; yield its moref."""
    lab.govc("snapshot.create", "-vm", vm["path"], "-m=false", "held")
    moref = lab.govc("snapshot.tree", "-vm", vm["path"], "-i").split()[0].strip("[]")
    try:
        yield moref
    finally:
        lab.govc("snapshot.remove", "-vm", vm["path"], "held")


@contextmanager
def reading(lab: Lab, *, disk: int = 0, datacenter: str = "DC", **more: Any) -> Iterator[FolderReader]:
    """Read a disk of the VM `demo` with a session of the product's own."""
    to, details = lab.connection(), lab.vm("demo")["disks"][disk]
    source = FolderDisk(
        connection=to,
        datacenter_path=datacenter,
        datastore_path=details["datastore_path"],
        capacity_bytes=details["capacity_bytes"],
    )
    with (
        borrow(to) as session,
        FolderReader(source, cookie=lambda: session.cookie, renew=session.renew, **more) as reader,
    ):
        yield reader


def copy_to(folder: Path, reader: FolderReader, **options: Any) -> CopyResult:
    size = reader.size
    with RawWriter.create(folder / "x.raw", size=size) as writer, Digests.create(folder / "x.d", size=size) as digests:
        return copy(reader, whole_disk(size), writer, digests=digests, **{"limits": QUICK, **options})


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def test_a_frozen_base_equals_the_guests_disk_while_the_guest_writes(lab: Lab, tmp_path: Path) -> None:
    vm = lab.vm("demo")
    with snapshot(lab, vm) as held:
        lab.post("/guest-write", vm=vm["moref"], disk=1, offset=0, length=MIB, seed=9)
        with reading(lab, disk=1) as reader:
            result = copy_to(tmp_path, reader)
        assert sha256(tmp_path / "x.raw") == lab.sha256(vm["moref"], 1, held)
    assert result.bytes_transferred == reader.size
    qemu.convert(tmp_path / "x.raw", tmp_path / "x.qcow2", source_format="raw", target_format="qcow2")
    with Digests.open(tmp_path / "x.d") as digests:
        verify(tmp_path / "x.qcow2", format="qcow2", digests=digests)
        assert digests.image_digest() == result.digest


def test_the_disk_of_a_running_vm_is_locked_and_the_remedy_named(lab: Lab) -> None:
    with pytest.raises(FileLocked, match=r"demo/demo.vmdk.*copy from a snapshot"), reading(lab):
        pass


def test_another_datacenter_has_no_such_file(lab: Lab) -> None:
    with pytest.raises(UnsupportedDisk, match="no flat file"), reading(lab, datacenter="elsewhere"):
        pass


@pytest.mark.parametrize(
    "fault",
    [{"folder_503": 2}, {"cut_after": 3 * MIB, "count": 2}, {"stall_s": 3, "count": 1}, {"expire_sessions": True}],
)
def test_a_fault_midway_is_survived(lab: Lab, tmp_path: Path, fault: dict[str, Any]) -> None:
    vm = lab.vm("demo")
    with snapshot(lab, vm) as held, reading(lab, timeout_s=1.0) as reader:
        lab.post("/faults", **fault)
        copy_to(tmp_path, reader)
        lab.post("/faults", clear=True)
        assert sha256(tmp_path / "x.raw") == lab.sha256(vm["moref"], 0, held)


def test_a_source_that_stays_away_interrupts_the_transfer(lab: Lab, tmp_path: Path) -> None:
    with snapshot(lab, lab.vm("demo")), reading(lab) as reader:
        lab.post("/faults", folder_503=100)
        try:
            with pytest.raises(TransferInterrupted, match="status 503") as raised:
                copy_to(tmp_path, reader)
        finally:
            lab.post("/faults", clear=True)
    assert raised.value.resumable_at == 0


def test_a_session_that_is_gone_for_good_has_expired(new_lab: Callable[..., Lab], tmp_path: Path) -> None:
    lab = new_lab()
    lab.govc("snapshot.create", "-vm", lab.vm("demo")["path"], "-m=false", "held")
    with reading(lab) as reader:
        lab.post("/faults", expire_forever=True)
        with pytest.raises(SessionExpired):
            copy_to(tmp_path, reader)


def test_stop_ends_a_slow_transfer_within_a_second(lab: Lab, tmp_path: Path) -> None:
    stop = threading.Event()
    with snapshot(lab, lab.vm("demo")):
        try:
            with reading(lab) as reader:
                lab.post("/faults", throttle_bytes_per_s=MIB)
                threading.Timer(0.5, stop.set).start()
                started = time.monotonic()
                with pytest.raises(Stopped):
                    copy_to(tmp_path, reader, stop=stop)
                assert time.monotonic() - started < 2
        finally:
            lab.post("/faults", clear=True)


def test_one_sector_is_all_that_entering_reads(lab: Lab) -> None:
    with snapshot(lab, lab.vm("demo")):
        before = lab.stats()["bytes_served"]
        with reading(lab) as reader:
            assert lab.stats()["bytes_served"] - before == 512
            assert sum(len(buffer) for _, buffer in reader.stream(Extent(start=MIB, length=MIB))) == MIB


@pytest.mark.parametrize("fault", ["", "first", "whole", "refused", "broken", "joined"])
def test_scattered_extents_come_whatever_a_server_makes_of_several_ranges(lab: Lab, tmp_path: Path, fault: str) -> None:
    scattered = [Extent(start=start, length=64 * 1024) for start in range(0, 3 * MIB, 128 * 1024)]
    with snapshot(lab, lab.vm("demo")), reading(lab) as reader:
        whole = {start: bytes(part) for each in scattered for start, part in reader.stream(each)}
        lab.post("/faults", **({"several_ranges": fault} if fault else {}))
        before = sum(lab.stats()["http_requests"].values())
        try:
            found = {start: bytes(part) for start, part in reader.stream_scattered(scattered)}
        finally:
            lab.post("/faults", clear=True)
        asked = sum(lab.stats()["http_requests"].values()) - before
    assert found == whole
    assert asked == (1 + len(scattered) if fault else 1)
    assert ("one range a request" in reader.road_reason) == bool(fault)
