"""A qcow2 image written through qemu-nbd, and read by qemu-img."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tasks.errors import DiskFull, ToolFailed
from tasks.images import qemu
from tasks.images.qcow2 import Qcow2Writer
from tests.runs import children

MIB = 1024 * 1024
SIZE = 16 * MIB


def content(path: Path) -> bytes:
    raw = path.with_name("content")
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, raw], check=True)
    return raw.read_bytes()


def noise(length: int) -> bytes:
    return os.urandom(length)


def test_what_many_threads_wrote_is_there_once_flushed(tmp_path: Path) -> None:
    pieces = [noise(MIB) for _ in range(SIZE // MIB)]
    with Qcow2Writer.create(tmp_path / "x.part", size=SIZE) as writer, ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: writer.write(number * MIB, pieces[number]), range(len(pieces))))
        writer.flush()
    assert content(tmp_path / "x.part") == b"".join(pieces)
    qemu.check(tmp_path / "x.part")


def test_zeros_take_no_room_in_an_empty_image_and_go_over_what_another_holds(tmp_path: Path) -> None:
    path = tmp_path / "x.part"
    with Qcow2Writer.create(path, size=SIZE) as writer:
        writer.zero(0, SIZE)
        writer.flush()
    assert path.stat().st_size < MIB
    with Qcow2Writer.open(path) as writer:
        writer.write(0, noise(2 * MIB))
        writer.zero(0, MIB)
        writer.write(MIB, bytes(MIB // 2))
        writer.flush()
    read = content(path)
    assert (read[: MIB + MIB // 2].count(0), read[2 * MIB :].count(0)) == (MIB + MIB // 2, SIZE - 2 * MIB)
    assert read[MIB + MIB // 2 : 2 * MIB].count(0) < MIB // 4


def test_a_left_over_of_the_name_goes(tmp_path: Path) -> None:
    path, elsewhere = tmp_path / "x.part", tmp_path / "elsewhere"
    elsewhere.write_bytes(b"not ours")
    path.symlink_to(elsewhere)
    with Qcow2Writer.create(path, size=SIZE):
        pass
    assert elsewhere.read_bytes() == b"not ours"
    assert content(path) == bytes(SIZE)


def test_a_full_disk_is_named(small_disk: Path) -> None:
    def fill(writer: Qcow2Writer) -> None:
        for offset in range(0, SIZE, MIB):
            writer.write(offset, noise(MIB))
        writer.flush()

    with pytest.raises(DiskFull) as raised, Qcow2Writer.create(small_disk / "x.part", size=SIZE) as writer:
        fill(writer)
    assert (raised.value.need, Path(raised.value.path).name) == (MIB, "x.part")


def test_a_server_that_dies_is_named_with_how_it_ended(tmp_path: Path) -> None:
    before = children()
    with pytest.raises(ToolFailed, match="qemu-nbd"), Qcow2Writer.create(tmp_path / "x", size=SIZE) as writer:
        (server,) = children() - before
        os.kill(server, signal.SIGKILL)
        writer.write(0, noise(MIB))
    assert children() <= before


def test_closed_and_closed_again_it_leaves_no_server(tmp_path: Path) -> None:
    before = children()
    writer = Qcow2Writer.create(tmp_path / "x", size=SIZE)
    assert children() - before
    writer.close()
    writer.close()
    assert children() <= before


def test_the_server_of_a_thread_that_ended_is_gone(tmp_path: Path) -> None:
    before, made = children(), []
    thread = threading.Thread(target=lambda: made.append(Qcow2Writer.create(tmp_path / "x", size=SIZE)))
    thread.start()
    thread.join()
    with pytest.raises(OSError):
        for _ in range(1000):
            made[0].write(0, noise(MIB))
    made[0].close()
    assert children() <= before
