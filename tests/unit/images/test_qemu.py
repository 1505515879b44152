import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tasks.errors import DiskFull, IntegrityMismatch, ToolFailed, UnsupportedDisk
from tasks.images import qemu
from tasks.models import Compression
from tasks.nbd import NbdClient
from tasks.process import Stopped
from tests.unit.images.fakes import leaves

MIB = 1024 * 1024
SERVING = """
import sys, time
from pathlib import Path
from tasks.images.qemu import qemu_nbd
with qemu_nbd(Path(sys.argv[1]), format="qcow2", read_only=False) as address:
    print(address, flush=True)
    time.sleep(60)
"""


def qcow2(path: Path, *options: str, size: int = MIB) -> Path:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *options, str(path), str(size)], check=True)
    return path


def test_convert_keeps_the_content_and_the_holes(tmp_path: Path) -> None:
    raw, target, seen = tmp_path / "x.raw", tmp_path / "x.qcow2.part", []
    raw.write_bytes(leaves("a0b0", tail=512))
    qemu.convert(raw, target, source_format="raw", target_format="qcow2", progress=seen.append)
    qemu.check(target)
    assert qemu.virtual_size(target, format="qcow2") == raw.stat().st_size
    assert seen[-1] == 100
    with qemu.qemu_nbd(target, format="qcow2") as address, NbdClient(address) as client:
        content = bytearray(client.size)
        client.read_into(0, memoryview(content))
        assert content == raw.read_bytes()
        assert any(flags & 2 for _, flags in client.block_status(0, client.size))


def test_convert_stops(tmp_path: Path) -> None:
    (tmp_path / "x.raw").write_bytes(leaves("a"))
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped):
        qemu.convert(tmp_path / "x.raw", tmp_path / "x", source_format="raw", target_format="qcow2", stop=stop)


def test_a_source_that_is_not_there_fails_with_what_the_tool_said(tmp_path: Path) -> None:
    with pytest.raises(ToolFailed, match="No such file") as raised:
        qemu.convert(tmp_path / "none", tmp_path / "x", source_format="raw", target_format="qcow2")
    assert raised.value.tool == "qemu-img"


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
def test_compressed_it_is_smaller_and_equal(tmp_path: Path, compression: Compression) -> None:
    raw, target = tmp_path / "x.raw", tmp_path / "x.qcow2"
    raw.write_bytes(b"a row of a database\n" * 52428 + b"end.")
    qemu.convert(raw, target, source_format="raw", target_format="qcow2", compression=compression)
    assert target.stat().st_size < raw.stat().st_size / 2
    info = subprocess.run(["qemu-img", "info", "--output=json", target], stdout=subprocess.PIPE, check=True)
    assert json.loads(info.stdout)["format-specific"]["data"]["compression-type"] == compression
    subprocess.run(["qemu-img", "compare", "-q", raw, target], check=True)


def test_a_full_disk_is_named(tmp_path: Path, small_disk: Path) -> None:
    (tmp_path / "x.raw").write_bytes(leaves("abcdefghijklmnopqrstuvwxyz"))
    with pytest.raises(DiskFull) as raised:
        qemu.convert(tmp_path / "x.raw", small_disk / "x.part", source_format="raw", target_format="qcow2")
    assert raised.value.need == 26 * 256 * 1024
    assert raised.value.have < 4 * MIB
    assert not (small_disk / "x.part").exists()


def test_a_disk_that_fills_up_meanwhile_is_named(tmp_path: Path, small_disk: Path) -> None:
    (tmp_path / "x.raw").write_bytes(leaves("abcdefgh"))

    def fill(_: float) -> None:
        with suppress(OSError), (small_disk / "other").open("ab", buffering=0) as other:
            while True:
                other.write(bytes(4096))

    with pytest.raises(DiskFull) as raised:
        qemu.convert(tmp_path / "x.raw", small_disk / "x", source_format="raw", target_format="qcow2", progress=fill)
    assert isinstance(raised.value.__cause__, ToolFailed)


def test_damaged_metadata_is_an_integrity_mismatch(tmp_path: Path) -> None:
    path = tmp_path / "x.qcow2"
    (tmp_path / "raw").write_bytes(leaves("ab"))
    qemu.convert(tmp_path / "raw", path, source_format="raw", target_format="qcow2")
    with path.open("r+b") as file:
        (table,) = struct.unpack(">Q", (file.seek(48), file.read(8))[1])  # refcount table offset
        file.seek(table)
        (block,) = struct.unpack(">Q", file.read(8))
        file.seek(block)
        file.write(bytes(64))
    with pytest.raises(IntegrityMismatch, match="qemu-img check"):
        qemu.check(path)


@pytest.mark.parametrize("options", [["-b", "/etc/passwd", "-F", "raw"], ["-o", "data_file=OTHER"]])
def test_an_image_that_names_another_file_is_refused(tmp_path: Path, options: list[str]) -> None:
    options = [option.replace("OTHER", str(tmp_path / "other")) for option in options]
    path = qcow2(tmp_path / "x.qcow2", *options)
    with pytest.raises(UnsupportedDisk, match=r"backing file|data file"):
        qemu.virtual_size(path, format="qcow2")
    with pytest.raises(UnsupportedDisk), qemu.qemu_nbd(path, format="qcow2"):
        pass


def test_a_raw_file_that_claims_to_be_qcow2_stays_raw(tmp_path: Path) -> None:
    """A guest can write a qcow2 header into its raw disk; the format is never guessed."""
    path = qcow2(tmp_path / "x", "-b", "/etc/passwd", "-F", "raw")
    with qemu.qemu_nbd(path, format="raw") as address, NbdClient(address) as client:
        assert client.size == -(-path.stat().st_size // 512) * 512
    with pytest.raises(IntegrityMismatch, match="no qcow2 header"):
        (tmp_path / "y").write_bytes(bytes(4096))
        qemu.virtual_size(tmp_path / "y", format="qcow2")


def test_qemu_nbd_ends_with_the_block_and_removes_its_socket(tmp_path: Path) -> None:
    with qemu.qemu_nbd(qcow2(tmp_path / "x"), format="qcow2", read_only=False) as address:
        with NbdClient(address) as client:
            assert not client.read_only
        (pid,) = _servers_of(tmp_path / "x")
    assert not address.parent.exists()
    assert not Path(f"/proc/{pid}").exists()


def test_an_image_that_it_cannot_serve_is_named(tmp_path: Path) -> None:
    path = qcow2(tmp_path / "x")
    with path.open("r+b") as file:
        file.seek(40)
        file.write(b"\xff" * 8)  # the L1 table, far outside of the file
    with pytest.raises(ToolFailed, match="qemu-nbd failed with exit status 1: "), qemu.qemu_nbd(path, format="qcow2"):
        pass


def test_a_successor_waits_for_the_lock_of_one_that_dies(tmp_path: Path) -> None:
    path = qcow2(tmp_path / "x")
    argv = [sys.executable, "-c", SERVING, str(path)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout
        assert holder.stdout.readline()
        (server,) = _servers_of(path)
        os.kill(server, signal.SIGSTOP)  # it holds the lock while it is dying slowly
        threading.Timer(0.5, os.kill, (server, signal.SIGKILL)).start()
        started = time.monotonic()
        with qemu.qemu_nbd(path, format="qcow2", read_only=False) as address, NbdClient(address):
            assert 0.3 < time.monotonic() - started < 5
        holder.kill()


def test_a_killed_parent_takes_qemu_nbd_with_it(tmp_path: Path) -> None:
    path = qcow2(tmp_path / "x")
    with subprocess.Popen([sys.executable, "-c", SERVING, str(path)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        assert parent.stdout.readline()
        assert _servers_of(path)
        parent.kill()
    _until(lambda: not _servers_of(path))


def test_two_readers_share_an_image(tmp_path: Path) -> None:
    path = qcow2(tmp_path / "x")
    with (
        qemu.qemu_nbd(path, format="qcow2"),
        qemu.qemu_nbd(path, format="qcow2") as address,
        NbdClient(address) as client,
    ):
        assert client.read_only


def test_what_refuses_direct_is_known() -> None:
    assert not qemu.takes_direct(Path("/proc/version"))
    assert not qemu.takes_direct(Path("/proc"))


def test_a_name_that_qemu_would_read_as_a_protocol_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("nbd:x").write_bytes(leaves("a"))
    qemu.convert(Path("nbd:x"), Path('json:{"x"}'), source_format="raw", target_format="qcow2")
    qemu.check(Path('json:{"x"}'))
    assert json.dumps(sorted(path.name for path in tmp_path.iterdir())) == '["json:{\\"x\\"}", "nbd:x"]'


def _servers_of(path: Path) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            argv = entry.read_bytes().split(b"\0")
        except OSError:
            continue
        if argv[0] == b"qemu-nbd" and os.fsencode(path) in argv:
            found.append(int(entry.parent.name))
    return found


def _until(true: object, timeout_s: float = 5) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.02)
