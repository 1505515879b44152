"""Writing a sparse raw file, past the page cache where that can be: a copy of terabytes evicts nothing from it."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Self

from tasks.errors import DiskFull
from tasks.images.blocks_ahead import KEEP_SIZE, PUNCH_HOLE, BlocksAhead, fallocate
from tasks.images.digests import Buffer
from tasks.images.files import naming_full_disk, new_file

ZEROS = bytes(1024 * 1024)
DIRECT_BYTES = 1024 * 1024
BLOCK_BYTES = 4096  # what O_DIRECT wants offset, length and memory to be a multiple of, at most

_log = logging.getLogger(__name__)


class RawWriter:
    """A raw image file; holes where nothing or zeros were written. See `tasks.images.writer.Writer`."""

    def __init__(self, path: Path, fd: int, *, ahead: BlocksAhead | None) -> None:
        """Made by `create` and `open`. `ahead`: of an empty file, which reads as zeros; each range is written once."""
        self.path = path
        self._fd = fd
        self._direct = _direct(fd)
        self._ahead = ahead

    @classmethod
    def create(cls, path: Path, *, size: int) -> Self:
        """Start an empty sparse file of `size` bytes; a left-over of that name is emptied first. Raises DiskFull."""
        with new_file(path) as fd:
            os.ftruncate(fd, size)
            return cls(path, fd, ahead=BlocksAhead(fd, size=size))

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open an image that holds something: zeros are punched out of it, never left unwritten."""
        return cls(path, os.open(path, os.O_RDWR | os.O_NOFOLLOW), ahead=None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        try:
            self.close()
        except (OSError, DiskFull) as error:
            if kind is None:
                raise
            _log.warning("closing a target failed as well path=%s error=%s", self.path, error)

    def write(self, offset: int, buffer: Buffer) -> None:
        """Write all of `buffer` at `offset`. Raises DiskFull.

        Whole blocks in memory that begins on a page go past the page cache; but of an image that holds something small
        ones do not: each would wait for its place in the file, and that costs four times what `flush` takes for many.
        """
        rest = memoryview(buffer)
        direct = self._direct if self._ahead or len(rest) >= DIRECT_BYTES else None
        with naming_full_disk(self.path, need=len(rest)):
            if direct is not None and not (offset % BLOCK_BYTES or len(rest) % BLOCK_BYTES):
                if self._ahead:
                    self._ahead.about_to_write(offset, len(rest))
                done = _past_the_cache(os.pwritev, direct, rest, offset)
                rest, offset = rest[done:], offset + done
            while rest:
                done = os.pwrite(self._fd, rest, offset)
                rest, offset = rest[done:], offset + done

    def zero(self, offset: int, length: int) -> None:
        """Make the range read as zeros: left unwritten in an empty file, else punched, else written."""
        if self._ahead:
            self._ahead.zeros()
        elif not self._punched(offset, length):
            for at in range(offset, offset + length, len(ZEROS)):
                self.write(at, memoryview(ZEROS)[: offset + length - at])

    def read_into(self, offset: int, target: memoryview) -> None:
        """Fill `target` with the bytes at `offset`. Raises OSError where the file ends before it does."""
        if self._direct is not None and not (offset % BLOCK_BYTES or len(target) % BLOCK_BYTES):
            done = _past_the_cache(os.preadv, self._direct, target, offset)
            target, offset = target[done:], offset + done
        while target:
            done = os.preadv(self._fd, [target], offset)
            if not done:
                raise OSError(errno.EIO, "the image became shorter", str(self.path))
            target, offset = target[done:], offset + done

    def flush(self) -> None:
        """Return once everything written is durable."""
        with naming_full_disk(self.path, need=0):
            os.fdatasync(self._fd)
        if not self._ahead:
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)  # what was read and written here a while ago

    def close(self) -> None:
        """Close the file; an error of delayed writing that shows only now is raised."""
        if self._ahead:
            self._ahead.give_back()
        fd, self._fd = self._fd, -1
        direct, self._direct = self._direct, None
        if direct is not None:
            os.close(direct)
        if fd >= 0:
            with naming_full_disk(self.path, need=0):
                os.close(fd)

    def _punched(self, offset: int, length: int) -> bool:
        try:
            fallocate(self._fd, PUNCH_HOLE | KEEP_SIZE, offset, length)
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV):
                return False
            raise
        return True


def _direct(fd: int) -> int | None:
    """Open the file of `fd` once more, for going past the page cache; None where its file system refuses that."""
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_DIRECT)
    except OSError as error:
        _log.info("written through the page cache errno=%s", error.errno)
        return None


def _past_the_cache(
    transfer: Callable[[int, list[memoryview], int], int], fd: int, buffer: memoryview, offset: int
) -> int:
    """Return how much of `buffer` was transferred; nothing where its memory does not begin where O_DIRECT wants it."""
    try:
        return transfer(fd, [buffer], offset)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return 0
        raise
