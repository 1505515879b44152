from pathlib import Path

import pytest

from tasks.errors import TransferInterrupted
from tasks.models import Extent
from tasks.transports.file import FileReader

MIB = 1024 * 1024


def test_an_extent_comes_in_order_and_whole(tmp_path: Path) -> None:
    content = bytes(range(256)) * 12_000
    (tmp_path / "x").write_bytes(content)
    with FileReader(tmp_path / "x") as reader:
        assert reader.size == len(content)
        extent = Extent(start=1000, length=3_000_000)
        parts = [(offset, bytes(buffer)) for offset, buffer in reader.stream(extent)]
    assert parts[0][0] == 1000
    assert b"".join(part for _, part in parts) == content[1000:3_001_000]


def test_only_data_is_allocated(tmp_path: Path) -> None:
    with (tmp_path / "x").open("wb") as file:
        file.seek(4 * MIB)
        file.write(b"x" * MIB)
        file.truncate(16 * MIB)
    with FileReader(tmp_path / "x") as reader:
        assert list(reader.allocated()) == [Extent(start=4 * MIB, length=MIB)]


@pytest.mark.parametrize("size", [0, 5])
def test_a_file_without_holes_is_one_extent_or_none(tmp_path: Path, size: int) -> None:
    (tmp_path / "x").write_bytes(b"x" * size)
    with FileReader(tmp_path / "x") as reader:
        assert [extent.length for extent in reader.allocated()] == [size][: size and 1]


def test_a_file_that_became_shorter_is_said_to(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"x" * 100)
    with FileReader(tmp_path / "x") as reader:
        (tmp_path / "x").write_bytes(b"x" * 10)
        with pytest.raises(TransferInterrupted) as raised:
            list(reader.stream(Extent(start=0, length=100)))
    assert raised.value.resumable_at == 10
