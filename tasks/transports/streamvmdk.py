"""A stream-optimised VMDK taken apart as it arrives: header, markers, grains, tables, footer, all held to each other.

It inflates grains, and knows neither where they come from nor where they go. Rests on VMware's "Virtual Disk Format
5.0" ("Stream-Optimized Compressed Sparse Extents"), and on what qemu-img writes under that name: it can seek, puts
directory and tables before the grains, and ends without a footer.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator
from hashlib import blake2b
from typing import NamedTuple

from tasks.models import SECTOR_BYTES

RECEIVE_BYTES = 1024 * 1024
LONGEST_GRAIN_SECTORS = 2048  # a mebibyte; all known writers have 128
TABLE_ENTRIES = 512  # of a grain table: the format's only number
AT_THE_END = (1 << 64) - 1  # what a header says of its directory when a footer says it
MAGIC, DEFLATE = b"KDMV", 1
COMPRESSED, MARKERS = 1 << 16, 1 << 17
END_OF_STREAM, GRAIN_TABLE, GRAIN_DIRECTORY, FOOTER = range(4)

# magic, version, flags, capacity, grain size, descriptor's offset and length, entries of a table, offsets of redundant
# directory and directory, overhead, unclean, four kinds of line end, compression; sectors where nothing else is said
_HEADER = struct.Struct("<4sIIQQQQIQQQB4sH")
_MARKER = struct.Struct("<QI")  # sector of a grain on the disk, length of its data; or sectors of metadata, and 0
_KIND = struct.Struct("<I")  # of metadata
_ENTRY = struct.Struct("<I")
_LARGEST_HEAD = 1 << 32  # bytes before the first grain, tables of 64 TiB among them


class BadStream(Exception):
    """What arrives is no sound stream-optimised VMDK of the disk expected: where, and why."""


class CutShort(BadStream):
    """It ended before its end."""


class Grain(NamedTuple):
    """A grain as it arrives: at which byte of the disk, and its deflated content."""

    offset: int
    packed: bytes


class Source:
    """Bytes that come in order, by the piece that is wanted. position: how many were taken."""

    def __init__(self, read_into: Callable[[memoryview], int]) -> None:
        """`read_into`: fills some of a buffer and returns how much; 0 at the end."""
        self.position = 0
        self._read_into = read_into
        self._memory = memoryview(bytearray(RECEIVE_BYTES))
        self._rest = self._memory[:0]

    def take(self, length: int) -> bytes:
        """Return the next `length` bytes. Raises CutShort."""
        parts, wanted = [], length
        while wanted:
            part = self._some(wanted)
            if not part:
                raise CutShort(f"it ends at byte {self.position} of its own, where more must come")
            parts.append(part)
            wanted -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def skip(self, length: int) -> None:
        """Pass over `length` bytes. Raises CutShort."""
        while length:
            length -= len(self.take(min(length, RECEIVE_BYTES)))

    def rest(self) -> Iterator[bytes]:
        """Yield what is left, to the end."""
        while part := self._some(RECEIVE_BYTES):
            yield part

    def _some(self, most: int) -> bytes:
        if not self._rest:
            self._rest = self._memory[: self._read_into(self._memory)]
        part, self._rest = bytes(self._rest[:most]), self._rest[most:]
        self.position += len(part)
        return part


class StreamVmdk:
    """One stream. grain_bytes: how much of the disk a grain is; the last one may be more than is left of it.

        vmdk = StreamVmdk(read_into, capacity_bytes=disk.capacity_bytes)
        for grain in vmdk.grains():
            content = vmdk.inflate(grain)

    What no grain is of reads as zeros; that, and that none is missing, is sure only once `grains` has come to its end.
    Raises BadStream for a header that is not one of a disk of `capacity_bytes`.
    """

    def __init__(self, read_into: Callable[[memoryview], int], *, capacity_bytes: int) -> None:
        self._source = Source(read_into)
        self._size = capacity_bytes
        self._header = self._source.take(SECTOR_BYTES)
        self._look_at_header()
        self._tables = _Tables()
        self._promised: dict[int, bytes] = {}  # digests of tables that came before their grains
        self._grains_to_come = 0  # as those say
        self._next = 0  # the first byte of the disk that a grain may be of now

    def grains(self) -> Iterator[Grain]:
        """Yield the grains, in the order of the disk, until the stream has come to a sound end. Raises BadStream."""
        if self._directory_at == AT_THE_END:
            self._source.skip(self._overhead_bytes - SECTOR_BYTES)
        else:
            self._read_tables()
        while self._directory_at == AT_THE_END or self._grains_to_come:
            at = self._source.position
            sector = self._source.take(SECTOR_BYTES)
            value, length = _MARKER.unpack_from(sector)
            if length:
                self._grains_to_come -= 1
                yield self._grain(at, value, length, sector)
            elif not self._metadata(at, sector, value):
                break
        self._end()

    def inflate(self, grain: Grain) -> bytes:
        """Return the content of a grain, to the end of the disk at most. Any thread may call. Raises BadStream."""
        inflater = zlib.decompressobj()
        try:
            content = inflater.decompress(grain.packed, self.grain_bytes + 1)
        except zlib.error as error:
            raise BadStream(f"the grain at byte {grain.offset} of the disk cannot be inflated: {error}") from error
        left = self._size - grain.offset
        if (
            not inflater.eof
            or inflater.unused_data
            or len(content) not in (self.grain_bytes, min(left, self.grain_bytes))
        ):
            raise BadStream(f"the grain at byte {grain.offset} of the disk holds {len(content)} bytes, or more")
        return content[:left]

    def _look_at_header(self) -> None:
        magic, version, flags, capacity, grain, _, _, entries, _, directory, overhead, *_, compression = (
            _HEADER.unpack_from(self._header)
        )
        if magic != MAGIC:
            raise BadStream("it does not begin as a VMDK does")
        if flags & (COMPRESSED | MARKERS) != COMPRESSED | MARKERS or compression != DEFLATE or entries != TABLE_ENTRIES:
            raise BadStream(f"it is a VMDK that is not stream-optimised: version={version} flags={flags:#x}")
        if not 0 < grain <= LONGEST_GRAIN_SECTORS or grain & grain - 1:
            raise BadStream(f"its grains have {grain} sectors")
        self.grain_bytes = int(grain) * SECTOR_BYTES
        self._sectors = -(-self._size // self.grain_bytes) * grain  # grains may end behind the disk
        if not -(-self._size // SECTOR_BYTES) <= capacity <= self._sectors:
            raise BadStream(f"it is of a disk of {capacity * SECTOR_BYTES} bytes, and {self._size} were expected")
        self._directory_at, self._overhead_bytes = directory, overhead * SECTOR_BYTES
        if not SECTOR_BYTES <= self._overhead_bytes <= _LARGEST_HEAD:
            raise BadStream(f"its first grain is at byte {self._overhead_bytes}")

    @property
    def _table_count(self) -> int:
        covered = self.grain_bytes * TABLE_ENTRIES
        return -(-self._size // covered)

    def _grain(self, at: int, sector: int, length: int, first: bytes) -> Grain:
        offset = sector * SECTOR_BYTES
        if sector % (self.grain_bytes // SECTOR_BYTES) or sector >= self._sectors:
            raise BadStream(
                f"a marker at byte {at} of its own is of sector {sector}, where no grain of the disk begins"
            )
        if offset < self._next:
            raise BadStream(f"the grain at byte {offset} of the disk comes twice, or out of order")
        if length > 2 * self.grain_bytes:
            raise BadStream(f"a marker at byte {at} of its own is of a grain of {length} bytes")
        self._next = offset + self.grain_bytes
        self._tables.put(offset // self.grain_bytes, at // SECTOR_BYTES)
        more = _MARKER.size + length - SECTOR_BYTES
        if more > 0:
            first += self._source.take(-(-more // SECTOR_BYTES) * SECTOR_BYTES)
        return Grain(offset, first[_MARKER.size : _MARKER.size + length])

    def _metadata(self, at: int, sector: bytes, sectors: int) -> bool:
        """Take what a marker without a grain announces; tell whether anything may follow."""
        (kind,) = _KIND.unpack_from(sector, _MARKER.size)
        if kind == END_OF_STREAM and not sectors:
            return False
        first, table_sectors = at // SECTOR_BYTES + 1, TABLE_ENTRIES * _ENTRY.size // SECTOR_BYTES
        directory_sectors = -(-self._table_count * _ENTRY.size // SECTOR_BYTES)
        if (kind, sectors) == (GRAIN_TABLE, table_sectors):
            self._tables.check(first, self._source.take(sectors * SECTOR_BYTES))
        elif (kind, sectors) == (GRAIN_DIRECTORY, directory_sectors):
            self._tables.check_directory(first, self._source.take(sectors * SECTOR_BYTES), self._table_count)
        elif (kind, sectors) == (FOOTER, 1):
            self._look_at_footer(self._source.take(SECTOR_BYTES))
        else:
            raise BadStream(f"the marker at byte {at} of its own is of no known kind ({kind}, {sectors} sectors)")
        return True

    def _look_at_footer(self, footer: bytes) -> None:
        """The footer is the header again, and says where the directory is."""
        of_footer, of_header = list(_HEADER.unpack_from(footer)), list(_HEADER.unpack_from(self._header))
        directory = of_footer[9]
        of_footer[8:10] = of_header[8:10]
        if of_footer != of_header or directory != self._tables.directory_at:
            raise BadStream("its footer is not that of its header and directory")
        self._tables.footer_seen = True

    def _read_tables(self) -> None:
        """Read directory and tables that come before the grains."""
        directory = self._at(self._directory_at, self._table_count * _ENTRY.size)
        for number, (at,) in enumerate(_ENTRY.iter_unpack(directory)):
            table = self._at(at, TABLE_ENTRIES * _ENTRY.size) if at else b""
            if not _is_zero(table):
                self._promised[number] = _digest(table)
                self._grains_to_come += sum(1 for (entry,) in _ENTRY.iter_unpack(table) if entry)
        if self._source.position > self._overhead_bytes:
            raise BadStream("its tables are longer than it says")
        self._source.skip(self._overhead_bytes - self._source.position)

    def _at(self, sector: int, length: int) -> bytes:
        """Return what lies at a sector ahead."""
        if not self._source.position <= sector * SECTOR_BYTES <= self._overhead_bytes:
            raise BadStream(f"a table or directory is said to be at sector {sector}")
        self._source.skip(sector * SECTOR_BYTES - self._source.position)
        return self._source.take(length)

    def _end(self) -> None:
        """Hold what has come to what was said to come; nothing but zeros may follow."""
        if self._directory_at == AT_THE_END:
            self._tables.check_end()
        elif self._tables.close() != self._promised:
            raise BadStream("its tables are not those of its grains")
        if not all(_is_zero(part) for part in self._source.rest()):
            raise BadStream("something follows its end")


class _Tables:
    """The grain tables that the grains make, each no more than a digest once it is full; and where the stream has them.

    directory_at: the sector of the directory; 0 until it has come. footer_seen: whether a footer has.
    """

    def __init__(self) -> None:
        self.directory_at, self.footer_seen = 0, False
        self._number, self._entries = -1, bytearray(TABLE_ENTRIES * _ENTRY.size)
        self._loose: dict[int, bytes] = {}  # digests of those that have not come
        self._where: dict[int, int] = {}
        self._empty: set[int] = set()

    def put(self, grain: int, sector: int) -> None:
        """Note where the stream has a grain. Raises BadStream for one whose table has come already."""
        number, place = divmod(grain, TABLE_ENTRIES)
        if number in self._where or self.directory_at:
            raise BadStream(f"grain {grain} of the disk comes behind its table")
        if number != self._number:
            self.close()
            self._number = number
        _ENTRY.pack_into(self._entries, place * _ENTRY.size, sector & 0xFFFFFFFF)

    def close(self) -> dict[int, bytes]:
        """Take no more grains into the last table; return the digests of those that have not come."""
        if self._number >= 0 and self._number not in self._where:
            self._loose[self._number] = _digest(self._entries)
        self._number, self._entries = -1, bytearray(len(self._entries))
        return self._loose

    def check(self, sector: int, table: bytes) -> None:
        """Take a table that has come. Raises BadStream where it is not that of grains before it."""
        if _is_zero(table):
            self._empty.add(sector)
            return
        if table == self._entries:
            number = self._number
            self.close()
        else:
            digest = _digest(table)
            number = next((number for number, each in self._loose.items() if each == digest), -1)
        if self._loose.pop(number, None) is None:
            raise BadStream(f"the table at sector {sector} of its own is not that of its grains")
        self._where[number] = sector

    def check_directory(self, sector: int, directory: bytes, count: int) -> None:
        """Take the directory. Raises BadStream where it has other tables, or a table has not come."""
        if self.close():
            raise BadStream("grains come without their table")
        entries = [entry for (entry,) in _ENTRY.iter_unpack(directory)]
        for number, entry in enumerate(entries):
            fits = entry == self._where.get(number, 0) or (number < count and entry in self._empty)
            if not fits:
                raise BadStream(f"its directory has table {number} at sector {entry}, where that is not")
        self.directory_at = sector

    def check_end(self) -> None:
        """Raise BadStream where the stream ends without directory or footer."""
        if not self.directory_at or not self.footer_seen:
            raise BadStream("it ends without directory and footer")


def _digest(table: bytes | bytearray) -> bytes:
    return blake2b(table, digest_size=16).digest()


def _is_zero(content: bytes) -> bool:
    return not content.strip(b"\0")
