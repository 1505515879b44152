"""The journal of one disk on its way in: which extents of the target are durable, for the run after a kill.

It is believed only by the job that wrote it, for the same disk at the same point in time: its binding. It says
nothing of what the target holds: that is compared with the digests before it is kept (`tasks.images.target`).
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Self

from blake3 import blake3

from tasks.images.extents import merged
from tasks.images.files import BLOCK_BYTES, naming_full_disk, sync
from tasks.models import Extent

FORMAT_VERSION = 1
RECORD_BYTES = 32

_MAGIC = b"H2KVMJNL"
_HEADER = struct.Struct("<8sII16s")  # magic, format version, length of the binding, nonce
_CHECKSUM_BYTES = 32  # of all of the header, behind the binding
_EXTENT = struct.Struct("<QQ")  # start, length; then 16 bytes of BLAKE3 over the checksum before and these
_CHAIN_BYTES = 16
_RECORDS_AT_ONCE = 4096
_BINDING_BYTES = 64 * 1024  # more is none of ours


class Journal:
    """A file of records, each checked, chained to the one before it, and durable once `append` returns.

        with Journal.open(path, binding={"disk": uuid, "snapshot": moref, "size": size}) as journal:
            journal.covered   # what an earlier run has done
            journal.append([Extent(start=0, length=LEAF_BYTES)])

    covered: the extents in it, sorted, those that touch made one.
    """

    def __init__(self, path: Path, fd: int, binding: bytes) -> None:
        """Made by `open`."""
        self.path = path
        self.covered: tuple[Extent, ...] = ()
        self._fd, self._binding = fd, binding
        self._end, self._chain = 0, b""

    @classmethod
    def open(cls, path: Path, *, binding: Mapping[str, str | int]) -> Self:
        """Open the journal of that binding at its last good record; any other, or a damaged one, is begun anew.

        Raises DiskFull.
        """
        with naming_full_disk(path, need=BLOCK_BYTES):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            journal = cls(path, fd, json.dumps(dict(binding), sort_keys=True, separators=(",", ":")).encode())
            journal._load()
        except BaseException:
            os.close(fd)
            raise
        return journal

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self._fd)

    def append(self, extents: Iterable[Extent]) -> None:
        """Record extents (whole leaves) whose bytes and digests are durable. Raises DiskFull."""
        new = tuple(extents)
        records, chain = bytearray(), self._chain
        for extent in new:
            payload = _EXTENT.pack(extent.start, extent.length)
            chain = _next(chain, payload)
            records += payload + chain
        self._write(records)
        with naming_full_disk(self.path, need=len(records)):
            os.fdatasync(self._fd)
        self._chain = chain
        self.covered = merged([*self.covered, *new])

    def restart(self) -> None:
        """Forget every record, durably; none of them can come back, not even behind the same binding."""
        head = _HEADER.pack(_MAGIC, FORMAT_VERSION, len(self._binding), os.urandom(16)) + self._binding
        self._chain = blake3(head).digest()
        self._end, self.covered = 0, ()
        os.ftruncate(self._fd, 0)
        self._write(head + self._chain)
        with naming_full_disk(self.path, need=len(head)):
            os.fsync(self._fd)
        sync(self.path.parent)

    def _write(self, content: bytes | bytearray) -> None:
        rest, at = memoryview(content), self._end
        with naming_full_disk(self.path, need=len(rest)):
            while rest:
                done = os.pwrite(self._fd, rest, at)
                rest, at = rest[done:], at + done
        self._end = at

    def _load(self) -> None:
        head = os.pread(self._fd, _HEADER.size + _BINDING_BYTES + _CHECKSUM_BYTES, 0)
        checksum = self._checksum_in(head)
        if checksum is None:
            self.restart()
            return
        self._chain = checksum
        self._end = _HEADER.size + len(self._binding) + _CHECKSUM_BYTES
        while good := tuple(self._good_records()):
            self.covered = merged([*self.covered, *good])
            self._end += len(good) * RECORD_BYTES
        os.ftruncate(self._fd, self._end)

    def _checksum_in(self, head: bytes) -> bytes | None:
        """Return the checksum of a header that is whole and of our binding."""
        if len(head) < _HEADER.size:
            return None
        magic, version, length, _ = _HEADER.unpack_from(head)
        end = _HEADER.size + length
        checksum = head[end : end + _CHECKSUM_BYTES]
        ours = (magic, version, head[_HEADER.size : end]) == (_MAGIC, FORMAT_VERSION, self._binding)
        return checksum if ours and checksum == blake3(head[:end]).digest() else None

    def _good_records(self) -> Iterator[Extent]:
        """Yield the extents of the next records, up to the first bad or torn one; the chain goes along."""
        block = os.pread(self._fd, _RECORDS_AT_ONCE * RECORD_BYTES, self._end)
        for at in range(0, len(block) - RECORD_BYTES + 1, RECORD_BYTES):
            payload = block[at : at + _EXTENT.size]
            chain = _next(self._chain, payload)
            if block[at + _EXTENT.size : at + RECORD_BYTES] != chain:
                return
            self._chain = chain
            start, length = _EXTENT.unpack(payload)
            yield Extent(start=start, length=length)


def _next(chain: bytes, payload: bytes) -> bytes:
    return blake3(chain + payload).digest(length=_CHAIN_BYTES)
