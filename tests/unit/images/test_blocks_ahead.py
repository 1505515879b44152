"""Blocks that are set aside ahead of dense writes, and given back: as the file system counts them."""

import os
from pathlib import Path

import pytest

from tasks.images import blocks_ahead
from tasks.images.blocks_ahead import REGION_BYTES, BlocksAhead
from tasks.images.files import allocated_bytes
from tasks.images.raw import RawWriter
from tasks.reader import aligned_buffer

MIB = 1024 * 1024
SLACK = 64 * 1024  # of the file system's own records


@pytest.fixture
def content() -> memoryview:
    buffer = aligned_buffer(MIB)
    buffer[:] = os.urandom(MIB)
    return buffer


def write(writer: RawWriter, content: memoryview, *, start: int, end: int) -> None:
    for at in range(start, end, len(content)):
        writer.write(at, content)


def test_a_dense_file_gets_its_blocks_ahead_and_keeps_what_was_written(tmp_path: Path, content: memoryview) -> None:
    path = tmp_path / "x.part"
    with RawWriter.create(path, size=4 * REGION_BYTES) as writer:
        write(writer, content, start=0, end=REGION_BYTES)
        write(writer, content, start=2 * REGION_BYTES + MIB, end=2 * REGION_BYTES + 2 * MIB)
        assert 2 * REGION_BYTES <= allocated_bytes(path) <= 2 * REGION_BYTES + SLACK
    assert allocated_bytes(path) <= REGION_BYTES + MIB + SLACK
    with path.open("rb") as file:
        assert all(file.read(MIB) == content for _ in range(REGION_BYTES // MIB))
        file.seek(2 * REGION_BYTES)
        assert file.read(3 * MIB) == bytes(MIB) + content + bytes(MIB)
    assert path.stat().st_size == 4 * REGION_BYTES


def test_what_ends_inside_a_region_stays_as_long_as_it_is(tmp_path: Path, content: memoryview) -> None:
    path = tmp_path / "x.part"
    with RawWriter.create(path, size=REGION_BYTES + 512) as writer:
        write(writer, content, start=0, end=REGION_BYTES)
        writer.write(REGION_BYTES, content[:512])
        writer.flush()
    assert path.stat().st_size == REGION_BYTES + 512
    with path.open("rb") as file:
        file.seek(REGION_BYTES)
        assert file.read() == content[:512]


def test_a_file_with_holes_gets_none(tmp_path: Path, content: memoryview) -> None:
    path = tmp_path / "x.part"
    with RawWriter.create(path, size=4 * REGION_BYTES) as writer:
        for half in (0, 1):
            start = half * 2 * REGION_BYTES
            write(writer, content, start=start, end=start + REGION_BYTES - MIB)
            writer.zero(start + REGION_BYTES - MIB, MIB)
        assert allocated_bytes(path) <= 2 * (REGION_BYTES - MIB) + SLACK


def test_none_are_set_aside_on_a_file_system_that_is_nearly_full(
    tmp_path: Path, content: memoryview, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks_ahead, "SPARE_REGIONS", 2**40)
    path = tmp_path / "x.part"
    with RawWriter.create(path, size=4 * REGION_BYTES) as writer:
        write(writer, content, start=0, end=REGION_BYTES + MIB)
        assert allocated_bytes(path) <= REGION_BYTES + MIB + SLACK


def test_where_they_cannot_be_set_aside_nothing_is_lost() -> None:
    with Path("/dev/full").open("wb") as device:
        ahead = BlocksAhead(device.fileno(), size=4 * REGION_BYTES)
        ahead.about_to_write(0, REGION_BYTES)
        ahead.about_to_write(2 * REGION_BYTES, MIB)
        ahead.give_back()
