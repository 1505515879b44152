"""The decoder of stream-optimised VMDKs against qemu-img's own encoding of them, whole and spoiled."""

from __future__ import annotations

import io
import random
import struct
import subprocess
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tasks.models import SECTOR_BYTES
from tasks.transports.streamvmdk import AT_THE_END, BadStream, CutShort, Source, StreamVmdk

GRAIN = 64 * 1024
DIRECTORY_AT = 9  # among the header's fields
DESCRIPTOR = b"""# Disk DescriptorFile
version=1
CID=12345678
parentCID=ffffffff
createType="streamOptimized"
RW %d SPARSE "host.vmdk"
"""
HEADER = struct.Struct("<4sIIQQQQIQQQB4sH")


def decoded(stream: bytes, size: int, *, at_once: int = 1 << 20) -> bytes:
    """Return what a stream holds of a disk, once it has come to a sound end; so many bytes of it come at once."""
    file = io.BytesIO(stream)
    vmdk = StreamVmdk(lambda view: file.readinto(view[:at_once]), capacity_bytes=size)
    disk = bytearray(size)
    for grain in vmdk.grains():
        content = vmdk.inflate(grain)
        disk[grain.offset : grain.offset + len(content)] = content
    return bytes(disk)


def encoded(raw: bytes, folder: Path) -> bytes:
    """Return qemu-img's encoding of a disk."""
    (folder / "x.raw").write_bytes(raw)
    argv = ["qemu-img", "convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized", "x.raw", "x.vmdk"]
    subprocess.run(argv, cwd=folder, check=True)
    return (folder / "x.vmdk").read_bytes()


def sectors(*parts: bytes) -> bytes:
    content = b"".join(parts)
    return content + bytes(-len(content) % SECTOR_BYTES)


def metadata(kind: int, content: bytes = b"") -> bytes:
    return sectors(struct.pack("<QII", len(content) // SECTOR_BYTES, 0, kind)) + content


class Host:
    """Makes an encoding from front to back, as an ESXi host does: tables behind their grains, a footer, an end.

    Made here a second time (the lab has its own), so that each of its parts can be spoiled.
    """

    def __init__(self, raw: bytes) -> None:
        self.size = len(raw)
        fields = [b"KDMV", 3, 1 | 1 << 16 | 1 << 17, -(-self.size // 512), 128, 1, 20, 512, 0, AT_THE_END, 128, 0]
        self.fields: list[object] = [*fields, b"\n \r\n", 1]
        self.grains = {
            at // SECTOR_BYTES: zlib.compress(raw[at : at + GRAIN], 1)
            for at in range(0, self.size, GRAIN)
            if raw[at : at + GRAIN].strip(b"\0")
        }
        self.order = list(self.grains)
        self.parts = {"directory": True, "footer": True, "end": True}
        self.spoil_table: Callable[[bytearray], object] = lambda table: None

    def stream(self) -> bytes:
        out = bytearray(sectors(HEADER.pack(*self.fields)) + DESCRIPTOR % (self.size // 512))
        out += bytes(128 * SECTOR_BYTES - len(out))
        directory: list[int] = []
        for number in range(-(-self.size // (512 * GRAIN))):
            mine = [lba for lba in self.order if lba // 128 // 512 == number]
            directory.append(self._table(out, mine) if mine else 0)
        at = len(out) // SECTOR_BYTES + 1
        if self.parts["directory"]:
            out += metadata(2, sectors(struct.pack(f"<{len(directory)}I", *directory)))
        if self.parts["footer"]:
            footer = [*self.fields[:DIRECTORY_AT], at, *self.fields[DIRECTORY_AT + 1 :]]
            out += metadata(3, sectors(HEADER.pack(*footer)))
        if self.parts["end"]:
            out += metadata(0)
        return bytes(out)

    def _table(self, out: bytearray, lbas: list[int]) -> int:
        table = bytearray(2048)
        for lba in lbas:
            struct.pack_into("<I", table, lba // 128 % 512 * 4, len(out) // SECTOR_BYTES)
            out += sectors(struct.pack("<QI", lba, len(self.grains[lba])), self.grains[lba])
        self.spoil_table(table)
        out += metadata(1, bytes(table))
        return (len(out) - len(table)) // SECTOR_BYTES


def disk_of(chance: random.Random, *, size: int, share: float) -> bytes:
    """Return a disk of which that share of its 16 KiB blocks is random, half of them compressible, the rest zeros."""
    parts = []
    for at in range(0, size, 16384):
        length = min(16384, size - at)
        kind = chance.random()
        noise = chance.randbytes(length)
        parts.append(noise if kind < share / 2 else noise[:64].ljust(length, b"x") if kind < share else bytes(length))
    return b"".join(parts)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 1 << 32),
    sectors_=st.one_of(st.integers(1, 600), st.integers(65536 - 3, 65536 + 300)),
    share=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    at_once=st.sampled_from([1, 511, 4096, 1 << 20]),
)
def test_a_disk_comes_out_of_either_encoding_as_it_went_in(
    tmp_path: Path, seed: int, sectors_: int, share: float, at_once: int
) -> None:
    at_once = at_once if sectors_ < 1000 else 1 << 20
    share = share if sectors_ < 1000 else share / 10
    raw = disk_of(random.Random(seed), size=sectors_ * SECTOR_BYTES, share=share)
    assert decoded(encoded(raw, tmp_path), len(raw), at_once=at_once) == raw
    assert decoded(Host(raw).stream(), len(raw), at_once=at_once) == raw


def test_qemu_reads_what_the_tests_host_makes(tmp_path: Path) -> None:
    raw = disk_of(random.Random(1), size=40 * 1024 * 1024 + 512, share=0.2)
    (tmp_path / "host.vmdk").write_bytes(Host(raw).stream())
    (tmp_path / "x.raw").write_bytes(raw)
    subprocess.run(["qemu-img", "compare", "-F", "raw", "-f", "vmdk", "host.vmdk", "x.raw"], cwd=tmp_path, check=True)


SMALL = disk_of(random.Random(7), size=GRAIN * 20 + 512, share=1.0)
LARGE = disk_of(random.Random(8), size=GRAIN * 512 + GRAIN * 9, share=0.02)


@pytest.mark.parametrize("raw", [SMALL, LARGE], ids=["one table", "two tables"])
@pytest.mark.parametrize("encode", [lambda raw, _: Host(raw).stream(), encoded], ids=["host", "qemu"])
def test_a_stream_that_ends_anywhere_before_its_end_is_named(
    tmp_path: Path, raw: bytes, encode: Callable[[bytes, Path], bytes]
) -> None:
    stream, chance = encode(raw, tmp_path), random.Random(3)
    needed = len(stream.rstrip(b"\0")) - 1 if encode is encoded else len(stream) - 1
    for _ in range(100 if raw is SMALL else 20):
        with pytest.raises(CutShort):
            decoded(stream[: chance.randrange(needed)], len(raw))
    with pytest.raises(CutShort):
        decoded(stream[: needed // SECTOR_BYTES * SECTOR_BYTES], len(raw))


@pytest.mark.parametrize("raw", [SMALL, LARGE], ids=["one table", "two tables"])
@pytest.mark.parametrize("encode", [lambda raw, _: Host(raw).stream(), encoded], ids=["host", "qemu"])
def test_no_flipped_bit_changes_what_is_read(
    tmp_path: Path, raw: bytes, encode: Callable[[bytes, Path], bytes]
) -> None:
    stream, chance = bytearray(encode(raw, tmp_path)), random.Random(4)
    for _ in range(300 if raw is SMALL else 30):
        at, bit = chance.randrange(len(stream)), 1 << chance.randrange(8)
        stream[at] ^= bit
        with suppress(BadStream):
            assert decoded(bytes(stream), len(raw)) == raw  # it was of the descriptor, or of padding
        stream[at] ^= bit


def _swap(host: Host) -> None:
    host.order[3], host.order[4] = host.order[4], host.order[3]


def _beyond(host: Host) -> None:
    host.grains[128 * 400] = host.grains[0]
    host.order.append(128 * 400)


def _between(host: Host) -> None:
    host.grains[64] = host.grains[0]
    host.order.insert(1, 64)


def _without(part: str) -> Callable[[Host], None]:
    def spoil(host: Host) -> None:
        host.parts[part] = False

    return spoil


def _in_table(spoil: Callable[[bytearray], object]) -> Callable[[Host], None]:
    def apply(host: Host) -> None:
        host.spoil_table = spoil

    return apply


def _holds(content: bytes) -> Callable[[Host], None]:
    def spoil(host: Host) -> None:
        host.grains[host.order[2]] = content

    return spoil


def _field(place: int, value: object) -> Callable[[Host], None]:
    def spoil(host: Host) -> None:
        host.fields[place] = value

    return spoil


LIES = {
    "two grains in the wrong order": (_swap, "out of order"),
    "a grain twice": (lambda host: host.order.insert(3, host.order[2]), "twice"),
    "a grain beyond the end": (_beyond, "no grain of the disk begins"),
    "a grain where none begins": (_between, "no grain of the disk begins"),
    "a table with a grain that did not come": (_in_table(lambda table: table.__setitem__(1200, 9)), "table"),
    "a table with another place": (_in_table(lambda table: table.__setitem__(0, 0xFF)), "table"),
    "no directory": (_without("directory"), "footer"),
    "no footer": (_without("footer"), "without directory and footer"),
    "a grain too short": (_holds(zlib.compress(bytes(GRAIN - 512))), "holds"),
    "a grain too long": (_holds(zlib.compress(bytes(GRAIN + 1))), "holds"),
    "a grain that inflates without an end": (_holds(zlib.compress(bytes(1 << 24))), "holds"),
    "more behind a grain": (_holds(zlib.compress(bytes(GRAIN)) + b"x"), "holds"),
    "a grain that is no zlib": (_holds(b"nonsense" * 20), "cannot be inflated"),
    "a grain of an impossible length": (_holds(bytes(3 * GRAIN)), "of a grain of"),
    "no VMDK": (_field(0, b"COWD"), "does not begin"),
    "no markers": (_field(2, 1 | 1 << 16), "not stream-optimised"),
    "another compression": (_field(13, 2), "not stream-optimised"),
    "a larger disk": (_field(3, 2 * len(SMALL) // 512), "were expected"),
    "a smaller disk": (_field(3, len(SMALL) // 512 - 1), "were expected"),
    "grains of an odd size": (_field(4, 100), "its grains"),
    "a first grain nowhere": (_field(10, 1 << 40), "its first grain"),
    "a directory nowhere": (_field(9, 1 << 30), "table or directory"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_named(lie: str) -> None:
    spoil, words = LIES[lie]
    host = Host(SMALL)
    spoil(host)
    with pytest.raises(BadStream, match=words):
        decoded(host.stream(), len(SMALL))


def test_tables_before_the_grains_are_held_to_them(tmp_path: Path) -> None:
    """qemu-img's encoding: an entry of another place, and one of a grain that does not come."""
    stream = bytearray(encoded(SMALL, tmp_path))
    (directory,) = struct.unpack_from("<Q", stream, 56)
    (table,) = struct.unpack_from("<I", stream, directory * SECTOR_BYTES)
    for entry, error in ((0, BadStream), (300, CutShort)):
        spoiled = bytearray(stream.rstrip(b"\0")) if entry else bytearray(stream)
        spoiled += bytes(-len(spoiled) % SECTOR_BYTES)
        spoiled[table * SECTOR_BYTES + 4 * entry] ^= 1
        with pytest.raises(error):
            decoded(bytes(spoiled), len(SMALL))


def test_what_follows_the_end_is_named() -> None:
    stream = Host(SMALL).stream()
    assert decoded(stream + bytes(5 * SECTOR_BYTES), len(SMALL)) == SMALL
    with pytest.raises(BadStream, match="follows its end"):
        decoded(stream + bytes(700) + b"x", len(SMALL))


def test_tables_may_come_behind_all_grains_and_grains_end_behind_the_disk() -> None:
    """Not what hosts were seen to do, but what the format allows."""
    raw = SMALL[: GRAIN * 3 + 512]
    host = Host(raw)
    host.grains[128 * 3] = zlib.compress(raw[-512:].ljust(GRAIN, b"\0"))
    host.fields[3] = 4 * 128
    assert decoded(host.stream(), len(raw)) == raw


def test_a_source_gives_what_is_asked_for_whatever_comes_at_once() -> None:
    file = io.BytesIO(b"abcdefghij")
    source = Source(lambda view: file.readinto(view[:3]))
    assert (source.take(4), source.position) == (b"abcd", 4)
    source.skip(2)
    assert source.take(3) == b"ghi"
    with pytest.raises(CutShort, match="byte 10 "):
        source.take(2)
