"""A disk copied into an image with its digests, and a way to spoil it."""

from __future__ import annotations

from pathlib import Path

from tasks.images import qemu
from tasks.images.copy import copy
from tasks.images.digests import Digests
from tasks.images.extents import whole_disk
from tasks.models import ImageFormat
from tests.unit.images.fakes import FakeReader, ShiftingWriter, leaves

CONTENT = leaves("ab0c" + 40 * "0" + "def0", tail=1024)


def copied(folder: Path, format: ImageFormat, *, shift: tuple[int, int] = (-1, 0), content: bytes = CONTENT) -> Path:
    """Copy `content` to an image of `format`, one write shifted; return its path."""
    raw = folder / "x.raw.part"
    writer = ShiftingWriter.create(raw, size=len(content))
    writer.shift = shift
    reader = FakeReader(content)
    with writer, Digests.create(folder / "x.digests", size=len(content)) as digests:
        copy(reader, whole_disk(reader.size), writer, digests=digests)
    if format == "raw":
        return raw
    qemu.convert(raw, folder / "x.part", source_format="raw", target_format=format)
    return folder / "x.part"


def flip(path: Path, offset: int) -> None:
    """Turn one bit of the byte at `offset` over."""
    with path.open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 1]))
