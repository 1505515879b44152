import errno
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.errors import DiskFull
from tasks.images.files import naming_full_disk
from tasks.images.raw import RawWriter

MIB = 1024 * 1024


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 200_000), st.integers(1, 100_000)), max_size=8))
def test_an_existing_image_equals_a_plain_one(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[bool, int, int]]
) -> None:
    path = tmp_path_factory.mktemp("raw") / "x"
    plain = bytearray(b"\xaa" * 300_000)
    path.write_bytes(plain)
    with RawWriter.open(path) as writer:
        for number, (zero, offset, length) in enumerate(steps):
            content = bytes(length) if zero else bytes([number + 1]) * length
            writer.zero(offset, length) if zero else writer.write(offset, content)
            plain[offset : offset + length] = content
        writer.flush()
    assert path.read_bytes() == plain


def test_a_new_image_is_sparse_and_a_left_over_is_emptied(tmp_path: Path) -> None:
    path = tmp_path / "x.part"
    path.write_bytes(b"old" * MIB)
    with RawWriter.create(path, size=1024 * MIB) as writer:
        writer.write(512 * MIB, b"new")
        writer.zero(0, 256 * MIB)
    assert path.stat().st_size == 1024 * MIB
    assert path.stat().st_blocks * 512 < MIB
    with path.open("rb") as file:
        assert file.read(9) == bytes(9)


def test_zeros_are_punched_out_of_an_existing_image(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"x" * 4 * MIB)
    os.sync()
    with RawWriter.open(path) as writer:
        writer.zero(MIB, 2 * MIB)
    assert path.stat().st_blocks * 512 <= 2 * MIB + 65536


def test_zeros_are_written_where_nothing_can_be_punched() -> None:
    """/dev/full cannot be punched, and says so when it is written to."""
    with RawWriter.open(Path("/dev/full")) as writer, pytest.raises(DiskFull):
        writer.zero(0, 4096)


def test_short_writes_are_carried_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, buffer, offset: pwrite(fd, buffer[:1000], offset))
    with RawWriter.create(tmp_path / "x", size=10_000) as writer:
        writer.write(1, bytes(range(250)) * 20)
    assert (tmp_path / "x").read_bytes()[:5002] == b"\0" + bytes(range(250)) * 20 + b"\0"


def test_a_full_disk_is_named_with_need_and_have() -> None:
    with RawWriter.open(Path("/dev/full")) as writer, pytest.raises(DiskFull) as raised:
        writer.write(0, bytes(4096))
    assert raised.value.need == 4096
    assert raised.value.path == "/dev/full"
    assert isinstance(raised.value.__cause__, OSError)


def test_another_error_of_the_disk_stays_what_it_is() -> None:
    with pytest.raises(OSError, match="broken"), naming_full_disk(Path("/x"), need=1):
        raise OSError(errno.EIO, "broken")


def broken_close(writer: RawWriter) -> RawWriter:
    """Let the descriptor be gone already, so that closing it fails."""
    os.close(writer._fd)
    return writer


def test_a_failing_close_is_fatal(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="Bad file descriptor"), broken_close(RawWriter.create(tmp_path / "x", size=1)):
        pass


def test_a_failing_close_does_not_mask_the_first_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), broken_close(RawWriter.create(tmp_path / "x", size=1)):
        _ = 1 / 0


def test_a_symbolic_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "x.part").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="symbolic"):
        RawWriter.create(tmp_path / "x.part", size=1)
