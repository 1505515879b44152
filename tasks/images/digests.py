"""The digest tree of an image: a BLAKE3 record for each leaf of 256 KiB, in a sparse sidecar file.

It is of the guest-visible content, whatever the format of the image. An all-zero leaf has a record of zero
bytes, so a hole in the disk is a hole in the sidecar. Which leaves are hashed, and when, is not decided here.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from blake3 import blake3

from tasks.errors import InvalidInput
from tasks.images.files import naming_full_disk

Buffer = bytes | bytearray | memoryview

LEAF_BYTES = 256 * 1024
RECORD_BYTES = 32
ZERO_RECORD = bytes(RECORD_BYTES)
HEADER_BYTES = 4096  # a page, so that records begin on a block of the file system
FORMAT_VERSION = 1
DOMAIN = "hyper2kvm image digest v1"  # BLAKE3 key derivation context: no other hash can pass for one of ours

_MAGIC = b"H2KVMDIG"
_HEADER = struct.Struct("<8sIIQ")  # magic, format version, leaf size, image size
_ZERO_LEAF = bytes(LEAF_BYTES)
_RECORDS_AT_ONCE = 32 * 1024  # 1 MiB of them in memory, whatever the size of the image


def is_zero(buffer: Buffer) -> bool:
    """Tell whether at most a leaf of bytes is all zero: one memcmp (comparing memoryviews costs 70 times that)."""
    return _ZERO_LEAF.startswith(buffer)


def record_of(leaf: Buffer) -> bytes:
    """Return the record of one leaf's content."""
    return ZERO_RECORD if is_zero(leaf) else blake3(leaf).digest()


def leaf_count(size: int) -> int:
    """Return how many leaves an image of `size` bytes has; the last one may be short."""
    return -(-size // LEAF_BYTES)


class Digests:
    """The sidecar of one image: records by leaf number. `put` and `get` may be called by several threads at once."""

    def __init__(self, path: Path, fd: int, size: int) -> None:
        """Made by `create` and `open`; `size` is the image's, in bytes."""
        self.path = path
        self.size = size
        self._fd = fd

    @classmethod
    def create(cls, path: Path, *, size: int) -> Self:
        """Start a sidecar in which every leaf is zero; one that is there under this name is emptied."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o644)
        os.ftruncate(fd, HEADER_BYTES + leaf_count(size) * RECORD_BYTES)
        os.pwrite(fd, _HEADER.pack(_MAGIC, FORMAT_VERSION, LEAF_BYTES, size), 0)
        return cls(path, fd, size)

    @classmethod
    def open(cls, path: Path, *, writable: bool = False) -> Self:
        """Open a sidecar. Raises InvalidInput where it is none, of another version, or cut short."""
        fd = os.open(path, os.O_RDWR if writable else os.O_RDONLY)
        try:
            return cls(path, fd, _image_size(path, fd))
        except BaseException:
            os.close(fd)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self._fd)

    def put(self, first: int, records: bytes) -> None:
        """Record the digests of the leaves from `first` on; zeros are not written over zeros: the file stays sparse."""
        if not is_zero(records) or not is_zero(self.records(first, len(records) // RECORD_BYTES)):
            with naming_full_disk(self.path, need=len(records)):
                os.pwrite(self._fd, records, HEADER_BYTES + first * RECORD_BYTES)

    def get(self, leaf: int) -> bytes:
        """Return the record of a leaf."""
        return self.records(leaf, 1)

    def records(self, first: int, count: int) -> bytes:
        """Return `count` records from leaf `first` on, one after the other."""
        return os.pread(self._fd, count * RECORD_BYTES, HEADER_BYTES + first * RECORD_BYTES)

    def flush(self) -> None:
        """Return once every record is durable."""
        with naming_full_disk(self.path, need=0):
            os.fdatasync(self._fd)

    def image_digest(self) -> str:
        """Return `blake3:<hex>` over size, leaf size and every record, in that order."""
        whole = blake3(_HEADER.pack(_MAGIC, FORMAT_VERSION, LEAF_BYTES, self.size), derive_key_context=DOMAIN)
        for _, chunk in self.chunks():
            whole.update(chunk)
        return f"blake3:{whole.hexdigest()}"

    def chunks(self) -> Iterator[tuple[int, bytes]]:
        """Yield (first leaf, records) of all leaves, a bounded number at a time."""
        leaves = leaf_count(self.size)
        for first in range(0, leaves, _RECORDS_AT_ONCE):
            yield first, self.records(first, min(_RECORDS_AT_ONCE, leaves - first))


def _image_size(path: Path, fd: int) -> int:
    header = os.pread(fd, _HEADER.size, 0)
    if len(header) < _HEADER.size or not header.startswith(_MAGIC):
        raise _foreign(path, "it is no digest sidecar of ours")
    _, version, leaf_bytes, size = _HEADER.unpack(header)
    if (version, leaf_bytes) != (FORMAT_VERSION, LEAF_BYTES):
        raise _foreign(path, f"it has version {version} with leaves of {leaf_bytes} bytes")
    if os.fstat(fd).st_size != HEADER_BYTES + leaf_count(size) * RECORD_BYTES:
        raise _foreign(path, "it is cut short, or not of the image that it names")
    return int(size)


def _foreign(path: Path, why: str) -> InvalidInput:
    return InvalidInput(what=f"digests {path}", why=why, remedy="Take the ones that were written with the image")
