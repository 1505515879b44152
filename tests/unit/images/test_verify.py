import threading
from pathlib import Path
from typing import get_args

import pytest

from tasks.errors import IntegrityMismatch
from tasks.images import qemu
from tasks.images.digests import LEAF_BYTES, ZERO_RECORD, Digests
from tasks.images.raw import RawWriter
from tasks.images.verify import verify
from tasks.models import ImageFormat
from tasks.process import Stopped
from tests.unit.images.copies import CONTENT, copied, flip
from tests.unit.images.fakes import leaves

FORMATS = pytest.mark.parametrize("format", get_args(ImageFormat))


def read_back(path: Path, format: ImageFormat, **options: object) -> str:
    with Digests.open(path.parent / "x.digests") as digests:
        return verify(path, format=format, digests=digests, **options)  # type: ignore[arg-type]


@FORMATS
def test_what_was_copied_passes_and_progress_adds_up(tmp_path: Path, format: ImageFormat) -> None:
    done: list[int] = []
    how = read_back(copied(tmp_path, format), format, progress=done.append)
    assert how == ("direct" if qemu.takes_direct(tmp_path) else "cached")
    assert sum(done) == len(CONTENT)


@FORMATS
@pytest.mark.parametrize("by", [512, LEAF_BYTES, 20 * LEAF_BYTES])
def test_a_write_at_a_wrong_offset_is_found(tmp_path: Path, format: ImageFormat, by: int) -> None:
    with pytest.raises(IntegrityMismatch, match=f"the first at byte {LEAF_BYTES}"):
        read_back(copied(tmp_path, format, shift=(LEAF_BYTES, by)), format)


@pytest.mark.parametrize("offset", [0, LEAF_BYTES + 5, 20 * LEAF_BYTES, len(CONTENT) - 1])
def test_a_flipped_bit_in_a_raw_target_is_found(tmp_path: Path, offset: int) -> None:
    """In data, in a hole (whose record says zero), and in the last byte."""
    path = copied(tmp_path, "raw")
    flip(path, offset)
    with pytest.raises(IntegrityMismatch) as raised:
        read_back(path, "raw")
    assert (
        raised.value.where == f"1 leaves of 262144 bytes differ, the first at byte {offset // LEAF_BYTES * LEAF_BYTES}"
    )


def test_a_flipped_bit_in_a_qcow2_target_is_found(tmp_path: Path) -> None:
    path = copied(tmp_path, "qcow2")
    flip(path, path.read_bytes().index(CONTENT[LEAF_BYTES : LEAF_BYTES + 64]))
    with pytest.raises(IntegrityMismatch, match=f"the first at byte {LEAF_BYTES}"):
        read_back(path, "qcow2")


@FORMATS
def test_data_that_was_never_written_is_found(tmp_path: Path, format: ImageFormat) -> None:
    """A hole where the record is not zero."""
    path = copied(tmp_path, format)
    with Digests.open(tmp_path / "x.digests", writable=True) as digests:
        digests.put(20, b"r" * 32)
    with pytest.raises(IntegrityMismatch, match=f"the first at byte {20 * LEAF_BYTES}"):
        read_back(path, format)


def test_data_where_the_record_says_zero_is_found(tmp_path: Path) -> None:
    path = copied(tmp_path, "qcow2")
    with Digests.open(tmp_path / "x.digests", writable=True) as digests:
        digests.put(0, ZERO_RECORD)
        digests.put(1, ZERO_RECORD)
    with pytest.raises(IntegrityMismatch, match="2 leaves of 262144 bytes differ, the first at byte 0"):
        read_back(path, "qcow2")


@FORMATS
def test_an_image_of_another_size_is_found(tmp_path: Path, format: ImageFormat) -> None:
    path = copied(tmp_path, format)
    with Digests.create(tmp_path / "x.digests", size=len(CONTENT) + LEAF_BYTES):
        pass
    with pytest.raises(IntegrityMismatch, match=f"a disk of {len(CONTENT)} bytes"):
        read_back(path, format)


def test_written_zeros_and_holes_are_the_same(tmp_path: Path) -> None:
    path = copied(tmp_path, "raw")
    with path.open("r+b") as file:
        file.seek(20 * LEAF_BYTES)
        file.write(bytes(LEAF_BYTES))
    read_back(path, "raw")


@pytest.mark.parametrize("size", [1, 512, LEAF_BYTES - 1, LEAF_BYTES + 513])
def test_odd_sizes_pass(tmp_path: Path, size: int) -> None:
    read_back(copied(tmp_path, "raw", content=leaves("ab")[:size]), "raw")


def test_a_cut_qcow2_is_found(tmp_path: Path) -> None:
    """Reading past the end of the file, QEMU gives zeros, and the digests know better."""
    path = copied(tmp_path, "qcow2")
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 3 * LEAF_BYTES)
    with pytest.raises(IntegrityMismatch):
        read_back(path, "qcow2")


def test_stop_ends_it(tmp_path: Path) -> None:
    path, stop = copied(tmp_path, "raw"), threading.Event()
    stop.set()
    with pytest.raises(Stopped):
        read_back(path, "raw", stop=stop)


def test_bad_leaves_are_counted_over_all_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.images.verify.PIECE_BYTES", 2 * LEAF_BYTES)
    path = copied(tmp_path, "raw")
    for leaf in (46, 3, 20):
        flip(path, leaf * LEAF_BYTES)
    with pytest.raises(IntegrityMismatch, match=f"3 leaves of 262144 bytes differ, the first at byte {3 * LEAF_BYTES}"):
        read_back(path, "raw")


def test_stop_ends_it_among_holes(tmp_path: Path) -> None:
    path, stop = hole(tmp_path, 2**43), threading.Event()
    with pytest.raises(Stopped):
        read_back(path, "raw", progress=lambda _: stop.set(), stop=stop)


def test_holes_are_not_read(tmp_path: Path) -> None:
    """A quarter of a tebibyte of hole takes no time."""
    read_back(hole(tmp_path, 2**38), "raw")


def hole(folder: Path, size: int) -> Path:
    """Return an image that is all hole, with its digests beside it."""
    path = folder / "x"
    with (
        RawWriter.create(path, size=size) as writer,
        Digests.create(folder / "x.digests", size=size),
    ):
        writer.flush()
    return path
