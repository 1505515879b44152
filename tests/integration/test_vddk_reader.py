"""The VDDK reader against a live lab, through the stand-in for VMware's library, which it sees as it would see that."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from tasks.errors import (
    CertificateUntrusted,
    FileLocked,
    ThumbprintMismatch,
    TransferInterrupted,
    VddkCrashed,
    VddkFailed,
    VddkOutOfMemory,
    VddkReadsZeros,
    VddkUnavailable,
)
from tasks.images.copy import CopyResult, Limits, copy
from tasks.images.digests import LEAF_BYTES, Digests
from tasks.images.extents import leaf_aligned
from tasks.images.raw import RawWriter
from tasks.models import Connection, Extent, Trust, VddkSettings
from tasks.process import Stopped
from tasks.reader import TransientFault
from tasks.transports import vddk, vddk_process
from tasks.transports.vddk import SLOT_BYTES, VddkDisk, VddkReader
from tests.labs import ROOT, VDDK, Lab, running_lab
from tests.runs import children

pytestmark = pytest.mark.live

SIZE = 24 * 1024 * 1024 + 512  # a part of a chunk at the end
WIDE = 130 * 1024**3 + 512  # more than one call of QueryAllocatedBlocks takes
QUICK = Limits(attempts=3, first_wait_s=0.001, longest_wait_s=0.002)


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    disks: list[dict[str, Any]] = [{"size": SIZE, "data": "6MiB"}]
    machines = [{"name": "web", "disks": disks}, {"name": "off", "power": "off", "disks": [{"size": "1MiB"}]}]
    machines.append({"name": "wide", "power": "off", "disks": [{"size": WIDE, "data": "1MiB"}]})
    site = {"datacenters": [{"name": "DC", "clusters": [{"name": "c", "hosts": ["esx1"]}], "vms": machines}]}
    with running_lab(scenario=site) as lab:
        yield lab


@pytest.fixture(scope="module")
def snapshot(lab: Lab) -> str:
    path = lab.vm("web")["path"]
    lab.govc("snapshot.create", "-vm", path, "frozen")
    return lab.govc("object.collect", "-s", path, "snapshot.currentSnapshot").strip().partition(":")[2]


@pytest.fixture
def disk(lab: Lab, snapshot: str) -> Iterator[VddkDisk]:
    """The VM's disk as of the snapshot. After the test no process of ours is left, and the VM is released."""
    before = children()
    trust = Trust(ca_pem=lab.ca_pem)
    yield VddkDisk(
        connection=Connection(
            host=lab.host, port=lab.port, username=lab.username, password=SecretStr(lab.password), trust=trust
        ),
        settings=VddkSettings(libdir=VDDK),
        vm_moref=lab.vm("web")["moref"],
        snapshot_moref=snapshot,
        datastore_path=lab.vm("web")["disks"][0]["datastore_path"],
        capacity_bytes=SIZE,
        identity="hyper2kvm-test-disk-0",
    )
    assert children() <= before
    assert lab.stats()["vddk_prepared"] == 0


def changed(disk: VddkDisk, **changes: Any) -> VddkDisk:
    """Return the disk with other fields, of its connection and settings too."""
    update = {}
    for part in ("connection", "settings"):
        value = getattr(disk, part)
        own = {name: changes.pop(name) for name in list(changes) if name in type(value).model_fields}
        update[part] = value.model_copy(update=own)
    return disk.model_copy(update=update | changes)


def copied(reader: VddkReader, folder: Path, limits: Limits = QUICK) -> CopyResult:
    """Copy what is allocated into `folder / "raw"`."""
    wanted = leaf_aligned(reader.allocated(), size=reader.size)
    with (
        RawWriter.create(folder / "raw", size=reader.size) as writer,
        Digests.create(folder / "digests", size=reader.size) as digests,
    ):
        return copy(reader, wanted, writer, digests=digests, limits=limits)


def assert_equal(lab: Lab, disk: VddkDisk, folder: Path) -> None:
    there = lab.sha256(disk.vm_moref, 0, disk.snapshot_moref)
    assert hashlib.sha256((folder / "raw").read_bytes()).hexdigest() == there


def test_the_copy_is_the_guests_disk_at_the_snapshot_while_the_guest_writes(lab, disk, tmp_path, caplog):
    lab.post("/guest-load", vm=disk.vm_moref, disk=0, bytes_per_s=4 << 20)
    with VddkReader(disk) as reader:
        assert lab.stats()["vddk_prepared"] == 1
        result = copied(reader, tmp_path)
        assert "VDDK 8.0.0 (for vSphere 6.7 and newer), transport nbdssl, only what" in reader.road_reason
    lab.post("/guest-load", vm=disk.vm_moref, disk=0, stop=True)
    assert_equal(lab, disk, tmp_path)
    assert result.bytes_transferred < SIZE * 3 / 4
    assert "did not end well" not in caplog.text


def test_holes_between_what_is_allocated_cost_nothing(lab, disk, tmp_path):
    lab.post("/stats/reset")
    with VddkReader(disk) as reader:
        copied(reader, tmp_path)
        allocated = sum(extent.length for extent in reader.allocated())
    assert allocated < SIZE * 3 / 4
    assert lab.stats()["bytes_served"] <= allocated + 2 * LEAF_BYTES  # a sample, which is read before


@pytest.fixture
def asked(monkeypatch) -> list[Extent]:
    """What the worker was asked to read."""
    asked: list[Extent] = []
    ask = vddk_process.Worker.read
    monkeypatch.setattr(
        vddk_process.Worker, "read", lambda self, request, slot: asked.append(request) or ask(self, request, slot)
    )
    return asked


def test_a_thread_has_two_slots_under_way(disk, asked):
    with VddkReader(disk) as reader:
        whole = Extent(start=LEAF_BYTES, length=12 * 1024 * 1024)
        asked.clear()
        stream = reader.stream(whole)
        pieces = [(offset, len(buffer)) for offset, buffer in (next(stream),)]
        assert len(asked) == vddk.AHEAD == 2
        pieces += [(offset, len(buffer)) for offset, buffer in stream]
    assert sorted(pieces) == [(request.start, request.length) for request in asked]
    assert asked[0] == Extent(start=LEAF_BYTES, length=SLOT_BYTES - LEAF_BYTES)
    assert sum(request.length for request in asked) == whole.length
    assert max(request.length for request in asked) == SLOT_BYTES


def test_small_extents_are_under_way_together(disk, asked):
    small = [Extent(start=at, length=LEAF_BYTES) for at in range(0, SIZE, SIZE // 16)]
    with VddkReader(disk) as reader:
        alone = [(offset, bytes(buffer)) for extent in small for offset, buffer in reader.stream(extent)]
        asked.clear()
        stream = reader.stream_scattered(small)
        together = [(offset, bytes(buffer)) for offset, buffer in (next(stream),)]
        assert asked == small[: vddk.AHEAD]
        together += [(offset, bytes(buffer)) for offset, buffer in stream]
    assert sorted(together) == alone


@pytest.mark.parametrize("number", [2, 3])  # the first one is of the sample
def test_a_slot_fails_with_any_of_its_requests(disk, monkeypatch, number):
    monkeypatch.setenv("VIXLAB_FAIL_READ", f"{number}:16000")
    slot = Extent(start=0, length=SLOT_BYTES)
    with VddkReader(disk) as reader:
        with pytest.raises(VddkFailed, match="VIX error 16000"):
            list(reader.stream(slot))
        assert [(offset, len(buffer)) for offset, buffer in reader.stream(slot)] == [(0, SLOT_BYTES)]


def test_what_comes_for_one_who_did_not_wait_is_not_taken_by_the_next(disk, monkeypatch):
    monkeypatch.setenv("VIXLAB_LATENCY_MS", "20")
    with VddkReader(disk) as reader:
        whole = {offset: bytes(buffer) for offset, buffer in reader.stream(Extent(start=0, length=SIZE))}
        for number in range(3 * vddk.DEPTH):
            # a lane's turn comes again after all the others', with another place
            part = Extent(start=number // vddk.DEPTH * 6 * 1024 * 1024, length=8 * 1024 * 1024)
            with closing(reader.stream(part)) as stream:
                for offset, buffer in islice(stream, 1 if number % 3 else None):
                    start = offset // SLOT_BYTES * SLOT_BYTES
                    assert bytes(buffer) == whole[start][offset - start :][: len(buffer)]


@pytest.mark.parametrize("setting", ["VIXLAB_NO_ASYNC", "VIXLAB_SHORT_BLOCKS"])
def test_other_manners_of_a_library_give_the_same_bytes(lab, disk, tmp_path, monkeypatch, setting):
    with VddkReader(disk) as reader:
        usual = reader.allocated()
    monkeypatch.setenv(setting, "1")
    with VddkReader(disk) as reader:
        assert reader.allocated() == usual
        copied(reader, tmp_path)
    assert_equal(lab, disk, tmp_path)


def test_where_what_is_allocated_is_not_told_everything_counts_and_the_reason_says_so(lab, disk, tmp_path, monkeypatch):
    monkeypatch.setenv("VIXLAB_FAIL_BLOCKS", "6")
    with VddkReader(disk) as reader:
        assert reader.allocated() == (Extent(start=0, length=SIZE),)
        assert "all of it: what is allocated is not known: not supported" in reader.road_reason
        copied(reader, tmp_path)
    assert_equal(lab, disk, tmp_path)


def test_settings_reach_the_library(lab, disk, caplog):
    caplog.set_level("DEBUG", logger=vddk_process.__name__)
    with VddkReader(changed(disk, transport_modes="san:nbd", compression="skipz", large_buffers=True)) as reader:
        assert "transport nbd," in reader.road_reason
    assert "config /" in caplog.text


def without_a_snapshot(lab: Lab, disk: VddkDisk, name: str) -> VddkDisk:
    """Return the disk of a VM that is off."""
    vm = lab.vm(name)
    where = {name: vm["disks"][0][name] for name in ("datastore_path", "capacity_bytes")}
    return changed(disk, vm_moref=vm["moref"], snapshot_moref="", **where)


def test_a_vm_that_is_off_is_read_without_a_snapshot(lab, disk):
    off = without_a_snapshot(lab, disk, "off")
    with VddkReader(off) as reader:
        content = b"".join(bytes(buffer) for _, buffer in reader.stream(Extent(start=0, length=1 << 20)))
    assert hashlib.sha256(content).hexdigest() == lab.sha256(off.vm_moref, 0)


def test_what_is_allocated_of_a_wide_disk_is_asked_for_in_several_calls_and_its_tail_counts(lab, disk):
    lab.post("/stats/reset")
    with VddkReader(without_a_snapshot(lab, disk, "wide")) as reader:
        allocated = reader.allocated()
    assert (allocated[0].start, allocated[-1].end) == (0, WIDE)
    assert sum(extent.length for extent in allocated) < WIDE / 100
    assert lab.stats()["http_requests"]["/vixdisklib/allocated"] == 2


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"snapshot_moref": ""}, FileLocked, "is locked by a running VM"),
        ({"snapshot_moref": "snapshot-999"}, VddkFailed, "Open failed.*no such snapshot.*VIX error 13003"),
        ({"vm_moref": "vm-999"}, VddkFailed, "no such VM.*VIX error 4000"),
        ({"datastore_path": "[datastore1] web/x.vmdk"}, VddkFailed, "no such file.*VIX error 4"),
        ({"password": SecretStr("wrong")}, VddkFailed, "user name or password are wrong.*VIX error 3014"),
        ({"transport_modes": "san:hotadd"}, VddkFailed, "none of the transport modes works"),
        ({"capacity_bytes": SIZE + 512}, VddkFailed, f"it says {SIZE} bytes"),
        ({"trust": Trust(thumbprint="AB" * 20)}, ThumbprintMismatch, "expected AB:AB"),
        ({"trust": Trust(thumbprint="AB" * 32)}, ThumbprintMismatch, "expected AB:AB"),
        ({"trust": Trust()}, CertificateUntrusted, "is not trusted"),
    ],
)
def test_what_is_refused_is_refused_by_name(disk, changes, error, words):
    with pytest.raises(error, match=words):
        with VddkReader(changed(disk, **changes)):
            pass


@pytest.mark.parametrize("spelling", ["thumbprint_sha1", "thumbprint_sha256", ""])
def test_the_thumbprint_is_given_in_any_spelling_or_taken_from_the_server(lab, disk, spelling):
    trust = Trust(thumbprint=lab.ready[spelling].lower()) if spelling else Trust(verify=False)
    with VddkReader(changed(disk, trust=trust)) as reader:
        assert reader.allocated()


def test_the_library_itself_refuses_another_thumbprint(lab, disk):
    path = VDDK / "lib64" / "libvixDiskLib.so.8"
    words = [str(path), lab.host, str(lab.port), lab.username, "AB:CD", disk.vm_moref, disk.snapshot_moref]
    done = subprocess.run(
        [str(VDDK / "judge"), "copy", *words, disk.datastore_path],
        env={"LD_LIBRARY_PATH": str(path.parent), "VIXLAB_PASSWORD": lab.password},
        capture_output=True,
    )
    assert (done.returncode, done.stderr) == (1, b"Open: 1\n")


def test_a_program_in_c_reads_the_same_through_all_22_symbols(lab, disk):
    path = VDDK / "lib64" / "libvixDiskLib.so.8"
    thumbprint = lab.thumbprint_sha1
    words = [str(path), lab.host, str(lab.port), lab.username, thumbprint, disk.vm_moref, disk.snapshot_moref]
    done = subprocess.run(
        [str(VDDK / "judge"), "copy", *words, disk.datastore_path],
        env={"LD_LIBRARY_PATH": str(path.parent), "VIXLAB_PASSWORD": lab.password},
        capture_output=True,
        check=True,
    )
    assert hashlib.sha256(done.stdout).hexdigest() == lab.sha256(disk.vm_moref, 0, disk.snapshot_moref)


def test_a_file_that_is_no_library_and_one_without_the_calls_are_named(lab, disk, tmp_path):
    (tmp_path / "libvixDiskLib.so.9").write_bytes(bytes(4096))
    with pytest.raises(VddkUnavailable, match=r"VDDK 9 \(for vSphere 7\.0 and newer\) does not start: .*invalid ELF"):
        with VddkReader(changed(disk, libdir=tmp_path)):
            pass
    other = next(Path("/lib").glob("*/libm.so.6"), Path("/lib64/libm.so.6"))
    shutil.copy(other, tmp_path / "libvixDiskLib.so.9")
    with pytest.raises(VddkUnavailable, match=r"has no VixDiskLib_InitEx, .*looked in"):
        with VddkReader(changed(disk, libdir=tmp_path)):
            pass


def test_a_crash_of_the_library_is_an_error_that_names_it_and_the_vm_is_released(disk, tmp_path, monkeypatch):
    monkeypatch.setenv("VIXLAB_CRASH_READ", "4")
    with pytest.raises(VddkCrashed, match="signal 11") as caught:
        with VddkReader(disk) as reader:
            copied(reader, tmp_path)
    assert any("stand-in, version" in line for line in caught.value.last_lines)


def test_a_broken_calling_rule_would_be_seen(disk, tmp_path, monkeypatch):
    monkeypatch.setattr(
        vddk_process, "environment_for", lambda _: {**os.environ, "PYTHONPATH": str(ROOT), "LD_LIBRARY_PATH": ""}
    )
    with pytest.raises(VddkCrashed, match="signal 6") as caught:
        with VddkReader(disk):
            pass
    assert any("calling rule broken: LD_LIBRARY_PATH" in line for line in caught.value.last_lines)


@pytest.mark.parametrize("code", [2, 36, 14011])
def test_after_a_lost_connection_the_disk_is_opened_anew_and_the_copy_goes_on(lab, disk, tmp_path, monkeypatch, code):
    monkeypatch.setenv("VIXLAB_FAIL_READ", f"4:{code}:3")
    monkeypatch.setattr(vddk, "MEMORY_WAIT_S", 0.01)
    with VddkReader(disk) as reader:
        copied(reader, tmp_path)
        assert reader._generation >= 2
    assert_equal(lab, disk, tmp_path)


def test_a_connection_that_stays_lost_ends_the_copy_by_name(disk, tmp_path, monkeypatch):
    monkeypatch.setenv("VIXLAB_FAIL_READ", "4:14011:1000000")
    with pytest.raises(TransferInterrupted, match=r"the connection to the host was lost.*VIX error 14011"):
        with VddkReader(disk) as reader:
            copied(reader, tmp_path)


def test_an_error_of_the_disk_is_named_at_once(disk, tmp_path, monkeypatch):
    monkeypatch.setenv("VIXLAB_FAIL_READ", "4:16000")
    with pytest.raises(VddkFailed, match=r"ReadAsync failed for \[datastore1\] web/web.vmdk: .*VIX error 16000"):
        with VddkReader(disk) as reader:
            copied(reader, tmp_path)


def test_a_host_without_memory_for_a_session_is_asked_again_then_named(disk, monkeypatch):
    monkeypatch.setattr(vddk, "MEMORY_WAIT_S", 0.01)
    monkeypatch.setattr(vddk, "MEMORY_ATTEMPTS", 2)
    monkeypatch.setenv("VIXLAB_FAIL_OPEN", "2")
    asked: list[None] = []
    with pytest.raises(VddkOutOfMemory, match=r"out of memory.*VIX error 2"):
        with VddkReader(disk, when_full=lambda: asked.append(None)):
            pass
    assert len(asked) == 1


def test_a_read_that_never_ends_interrupts_the_transfer(disk, monkeypatch):
    monkeypatch.setenv("VIXLAB_STALL_READ", "2")
    monkeypatch.setattr(vddk_process, "LEAVE_TIMEOUT_S", 0.5)
    with pytest.raises(TransferInterrupted, match="VDDK does not answer"):
        with VddkReader(disk, read_timeout_s=0.5) as reader:
            list(reader.stream(Extent(start=0, length=LEAF_BYTES)))


def test_where_reads_that_were_given_up_never_end_the_next_one_does_not_wait_forever(disk):
    with VddkReader(disk, read_timeout_s=0.5) as reader:
        for _ in range(vddk.DEPTH):
            lane = reader._lanes.get()
            lane.free.clear()
            reader._lanes.put(lane)
        with pytest.raises(TransferInterrupted, match="VDDK does not answer"):
            list(reader.stream(Extent(start=0, length=LEAF_BYTES)))


def test_who_waits_for_a_disk_to_open_is_stopped(disk, monkeypatch):
    monkeypatch.setenv("VIXLAB_STALL_OPEN", "1")
    monkeypatch.setattr(vddk_process, "LEAVE_TIMEOUT_S", 0.5)
    stop = threading.Event()
    threading.Timer(0.5, stop.set).start()
    with pytest.raises(Stopped):
        with VddkReader(disk, stop=stop):
            pass


def test_an_interrupt_wakes_who_waits(disk, monkeypatch):
    monkeypatch.setenv("VIXLAB_LATENCY_MS", "500")
    with VddkReader(disk) as reader:
        stream = reader.stream(Extent(start=0, length=SIZE))
        next(stream)
        reader.interrupt()
        with pytest.raises(TransientFault, match="interrupted"):
            list(stream)


def test_nothing_but_zeros_where_something_is_allocated_is_an_error(disk, monkeypatch):
    monkeypatch.setenv("VIXLAB_ZERO_READS", "1")
    with pytest.raises(VddkReadsZeros, match=r"VDDK 8\.0\.0 reads nothing but zeros"):
        with VddkReader(disk):
            pass


def test_a_first_sector_of_zeros_is_none(lab, disk, tmp_path):
    lab.post("/guest-write", vm=disk.vm_moref, disk=0, offset=0, length=512, zero=True)
    path = lab.vm("web")["path"]
    lab.govc("snapshot.create", "-vm", path, "zero")
    moref = lab.govc("object.collect", "-s", path, "snapshot.currentSnapshot").strip().partition(":")[2]
    backing = disk.datastore_path.replace(".vmdk", "-000001.vmdk")
    with VddkReader(changed(disk, snapshot_moref=moref, datastore_path=backing)) as reader:
        assert not any(next(bytes(buffer[:512]) for _, buffer in reader.stream(Extent(start=0, length=512))))


def test_the_password_is_neither_in_the_workers_arguments_nor_in_its_environment(lab, disk, monkeypatch):
    monkeypatch.setenv("VCENTER_PASSWORD", lab.password)
    before = children()
    with VddkReader(disk):
        (worker,) = children() - before
        seen = Path(f"/proc/{worker}/cmdline").read_bytes() + Path(f"/proc/{worker}/environ").read_bytes()
    assert b"vddk_worker" in seen
    assert b"LD_LIBRARY_PATH=" in seen
    assert lab.password.encode() not in seen
    assert "LD_LIBRARY_PATH" not in os.environ


def test_the_worker_dies_with_us(lab, disk):
    """A parent that is killed leaves nobody who reads on."""
    program = (
        "import sys, time; from tasks.transports.vddk import VddkDisk, VddkReader\n"
        "from pydantic import SecretStr\n"
        "disk = VddkDisk.model_validate_json(sys.stdin.readline())\n"
        "secret = SecretStr(sys.stdin.readline().strip())\n"
        "disk = disk.model_copy(update={'connection': disk.connection.model_copy(update={'password': secret})})\n"
        "with VddkReader(disk) as reader:\n"
        "    print(reader._worker._process.pid, flush=True); time.sleep(60)\n"
    )
    argv = [sys.executable, "-c", program]
    parent = subprocess.Popen(argv, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert parent.stdin
    assert parent.stdout
    print(disk.model_dump_json(), lab.password, sep="\n", file=parent.stdin, flush=True)
    worker = int(parent.stdout.readline())
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{worker}/cmdline").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not Path(f"/proc/{worker}").exists()
    with VddkReader(disk):
        pass  # under the same identity: what the dead one left is ended
