"""The digest tree of an image: a BLAKE3 or SHA-256 record for each leaf of 256 KiB, in a sparse sidecar file.

It is of the guest-visible content, whatever the format of the image. An all-zero leaf has a record of zero
bytes, so a hole in the disk is a hole in the sidecar. Which leaves are hashed, and when, is not decided here.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple, Self

from blake3 import blake3

from tasks.errors import InvalidInput
from tasks.images.files import naming_full_disk, new_file
from tasks.models import DigestName

Buffer = bytes | bytearray | memoryview

LEAF_BYTES = 256 * 1024
RECORD_BYTES = 32
ZERO_RECORD = bytes(RECORD_BYTES)
HEADER_BYTES = 4096  # a page, so that records begin on a block of the file system
FORMAT_VERSION = 1
DOMAIN = "hyper2kvm image digest v1"  # what the hash of the records begins with: no other can pass for one of ours

_MAGIC = b"H2KVMDIG"
_HEADER = struct.Struct("<8sIIQ")  # magic, format version, leaf size, image size
_ALGORITHM = struct.Struct("<I")  # behind it: the place in ALGORITHMS
_ZERO_LEAF = bytes(LEAF_BYTES)
_RECORDS_AT_ONCE = 32 * 1024  # 1 MiB of them in memory, whatever the size of the image


def is_zero(buffer: Buffer) -> bool:
    """Tell whether at most a leaf of bytes is all zero: one memcmp (comparing memoryviews costs 70 times that)."""
    return _ZERO_LEAF.startswith(buffer)


class Algorithm(NamedTuple):
    """A hash of 32 bytes: of one leaf, and begun over the records of an image."""

    leaf: Callable[[Buffer], bytes]
    whole: Callable[[], Any]


ALGORITHMS: dict[DigestName, Algorithm] = {
    "blake3": Algorithm(lambda leaf: blake3(leaf).digest(), lambda: blake3(derive_key_context=DOMAIN)),
    "sha256": Algorithm(lambda leaf: sha256(leaf).digest(), lambda: sha256(DOMAIN.encode())),
}


def record_of(leaf: Buffer, algorithm: DigestName = "blake3") -> bytes:
    """Return the record of one leaf's content."""
    return ZERO_RECORD if is_zero(leaf) else ALGORITHMS[algorithm].leaf(leaf)


def algorithm_of(digest: str) -> DigestName:
    """Return what an image's digest (`sha256:…`) is made by; `blake3` for what names nothing that we know."""
    return "sha256" if digest.startswith("sha256:") else "blake3"


def leaf_count(size: int) -> int:
    """Return how many leaves an image of `size` bytes has; the last one may be short."""
    return -(-size // LEAF_BYTES)


class Digests:
    """The sidecar of one image: records by leaf number. `put` and `get` may be called by several threads at once."""

    def __init__(self, path: Path, fd: int, size: int, algorithm: DigestName) -> None:
        """Made by `create` and `open`; `size` is the image's, in bytes."""
        self.path = path
        self.size = size
        self.algorithm: DigestName = algorithm
        self._fd = fd

    @classmethod
    def create(cls, path: Path, *, size: int, algorithm: DigestName = "blake3") -> Self:
        """Start a sidecar in which every leaf is zero; one of this name is emptied. Raises DiskFull."""
        with new_file(path, need=HEADER_BYTES) as fd:
            os.ftruncate(fd, HEADER_BYTES + leaf_count(size) * RECORD_BYTES)
            number = _ALGORITHM.pack(list(ALGORITHMS).index(algorithm))
            os.pwrite(fd, _HEADER.pack(_MAGIC, FORMAT_VERSION, LEAF_BYTES, size) + number, 0)
            return cls(path, fd, size, algorithm)

    @classmethod
    def open(cls, path: Path, *, writable: bool = False) -> Self:
        """Open a sidecar. Raises InvalidInput where it is none, of another version, or cut short."""
        fd = os.open(path, os.O_RDWR if writable else os.O_RDONLY)
        try:
            return cls(path, fd, *_header(path, fd))
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

    def record_of(self, leaf: Buffer) -> bytes:
        """Return the record of one leaf's content, as this sidecar makes them."""
        return record_of(leaf, self.algorithm)

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
        """Return `blake3:<hex>` or `sha256:<hex>` over size, leaf size and every record, in that order."""
        whole = ALGORITHMS[self.algorithm].whole()
        whole.update(_HEADER.pack(_MAGIC, FORMAT_VERSION, LEAF_BYTES, self.size))
        for _, chunk in self.chunks():
            whole.update(chunk)
        return f"{self.algorithm}:{whole.hexdigest()}"

    def chunks(self) -> Iterator[tuple[int, bytes]]:
        """Yield (first leaf, records) of all leaves, a bounded number at a time."""
        leaves = leaf_count(self.size)
        for first in range(0, leaves, _RECORDS_AT_ONCE):
            yield first, self.records(first, min(_RECORDS_AT_ONCE, leaves - first))


def _header(path: Path, fd: int) -> tuple[int, DigestName]:
    """Return the size of the image, and the algorithm."""
    header = os.pread(fd, _HEADER.size + _ALGORITHM.size, 0)
    if len(header) < _HEADER.size + _ALGORITHM.size or not header.startswith(_MAGIC):
        raise _foreign(path, "it is no digest sidecar of ours")
    _, version, leaf_bytes, size = _HEADER.unpack_from(header)
    (number,) = _ALGORITHM.unpack_from(header, _HEADER.size)
    if (version, leaf_bytes) != (FORMAT_VERSION, LEAF_BYTES) or number >= len(ALGORITHMS):
        raise _foreign(path, f"it has version {version} with leaves of {leaf_bytes} bytes and hash number {number}")
    if os.fstat(fd).st_size != HEADER_BYTES + leaf_count(size) * RECORD_BYTES:
        raise _foreign(path, "it is cut short, or not of the image that it names")
    return int(size), list(ALGORITHMS)[number]


def _foreign(path: Path, why: str) -> InvalidInput:
    return InvalidInput(what=f"digests {path}", why=why, remedy="Take the ones that were written with the image")
