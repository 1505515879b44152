"""An ext4 that is really full: whatever is begun on it ends in DiskFull, with its descriptor closed."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tasks.errors import DiskFull
from tasks.images.digests import Digests
from tasks.images.files import write_atomically
from tasks.images.job import job_lock
from tasks.images.journal import Journal
from tasks.images.mirror import land_files
from tasks.images.qemu import create
from tasks.images.raw import RawWriter
from tests.unit.images.test_manifest import VM
from tests.unit.images.test_mirror import arrived, download_of

MIB = 1024 * 1024


def locked(folder: Path) -> None:
    with job_lock(folder / "vm", {"flow_run": "x"}):
        pass


BEGUN: dict[str, Callable[[Path], object]] = {
    "raw": lambda folder: RawWriter.create(folder / "x.part", size=MIB),
    "digests": lambda folder: Digests.create(folder / "x.digests", size=MIB),
    "journal": lambda folder: Journal.open(folder / "x.journal", binding={"vm": VM.moref}),
    "manifest": lambda folder: write_atomically(folder / "manifest.json", "{}" * 1000),
    "qcow2": lambda folder: create(folder / "x.qcow2", size=MIB),
    "lock": locked,
}


def fill_blocks(folder: Path) -> None:
    with (folder / "ballast").open("wb", buffering=0) as file:
        for step in (64 * 1024, 1024):
            with no_space():
                while True:
                    file.write(bytes(step))


def fill_inodes(folder: Path) -> None:
    with no_space():
        for number in range(1 << 20):
            (folder / str(number)).touch()


@contextmanager
def no_space() -> Iterator[None]:
    with pytest.raises(OSError, match="space") as raised:
        yield
    assert raised.value.errno == errno.ENOSPC


@contextmanager
def no_descriptor_left() -> Iterator[None]:
    before = set(Path("/proc/self/fd").iterdir())
    yield
    assert set(Path("/proc/self/fd").iterdir()) <= before


@pytest.mark.parametrize("what", [name for name in BEGUN if name != "raw"])
def test_without_a_block_left_it_is_named(small_disk: Path, what: str) -> None:
    fill_blocks(small_disk)
    with no_descriptor_left(), pytest.raises(DiskFull) as raised:
        BEGUN[what](small_disk)
    assert raised.value.need > raised.value.have == 0


@pytest.mark.parametrize("what", [name for name in BEGUN if name != "qcow2"])
def test_without_a_name_left_it_is_named(small_disk: Path, what: str) -> None:
    fill_inodes(small_disk)
    with no_descriptor_left(), pytest.raises(DiskFull):
        BEGUN[what](small_disk)


def test_a_file_larger_than_the_file_system_has_them_leaves_no_descriptor(small_disk: Path) -> None:
    for begin in (RawWriter.create, Digests.create):
        with no_descriptor_left(), pytest.raises(OSError, match="too large"):
            begin(small_disk / "x", size=1 << 60)


def test_a_download_that_cannot_land_can_be_gone_on_with(small_disk: Path, tmp_path: Path) -> None:
    manifest = download_of(tmp_path)
    folder = arrived(small_disk / "web", manifest)
    fill_blocks(small_disk)
    with no_descriptor_left(), pytest.raises(DiskFull):
        land_files(folder, manifest, {})
    (small_disk / "ballast").unlink()
    land_files(folder, manifest, {})
    assert (folder / "manifest.json").exists()
