"""Blocks of a new file, asked for before they are written: only then can a file system take several writes at once.

ext4 lets one O_DIRECT write into a hole at a time into a file, and any number into blocks that it has set aside, which
still read as zeros (fallocate(2)). What was set aside and never written is a hole again at the end; after a kill it
takes room until it is written.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import threading

KEEP_SIZE = 0x01  # linux/falloc.h
PUNCH_HOLE = 0x02
REGION_BYTES = 64 * 1024 * 1024  # set aside at once: each time the writes that are under way are waited for
SPARE_REGIONS = 16  # that the file system must have room for, or none is set aside: it may be needed elsewhere

_log = logging.getLogger(__name__)
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """Do what fallocate(2) does (`os` has nothing that punches). Raises OSError."""
    if _libc.fallocate(fd, mode, offset, length):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


class BlocksAhead:
    """Which regions of a sparse file, of `size` bytes, its blocks were set aside in. Safe to use from several threads.

    Nothing is, until a region's length was written with no zeros among it: a disk that is half empty has no use for it.
    """

    def __init__(self, fd: int, *, size: int) -> None:
        self._fd, self._size = fd, size
        self._dense_bytes = 0
        self._regions: set[int] = set()
        self._refused = False
        self._lock = threading.Lock()

    def about_to_write(self, offset: int, length: int) -> None:
        """Set aside the region that a write begins in, where that is worth it."""
        region = offset // REGION_BYTES
        with self._lock:
            self._dense_bytes += length
            if self._dense_bytes < REGION_BYTES or region in self._regions or self._refused:
                return
            self._regions.add(region)
        try:
            if self._has_room():
                fallocate(self._fd, KEEP_SIZE, *self._bounds(region))
        except OSError as error:  # it was but a hint: the write itself finds out whether there is room
            _log.info("no blocks are set aside errno=%s", error.errno)
            self._refused = True

    def zeros(self) -> None:
        """Take note that something is left unwritten."""
        with self._lock:
            self._dense_bytes = 0

    def give_back(self) -> None:
        """Make holes of what was set aside and never written; nothing is being written meanwhile."""
        regions, self._regions = self._regions, set()
        try:
            for region in sorted(regions):
                self._make_holes(*self._bounds(region))
        except OSError as error:  # it reads as zeros in any case
            _log.info("blocks that were set aside stay so errno=%s", error.errno)

    def _make_holes(self, start: int, length: int) -> None:
        """Give back what lseek(2) calls a hole: what was never written, set aside or not."""
        at, end = start, start + length
        while at < end and (hole := os.lseek(self._fd, at, os.SEEK_HOLE)) < end:
            at = min(self._data_after(hole), end)
            fallocate(self._fd, PUNCH_HOLE | KEEP_SIZE, hole, at - hole)

    def _bounds(self, region: int) -> tuple[int, int]:
        """Return offset and length of a region."""
        start = region * REGION_BYTES
        return start, min(REGION_BYTES, self._size - start)

    def _has_room(self) -> bool:
        there = os.fstatvfs(self._fd)
        return there.f_bavail * there.f_frsize >= SPARE_REGIONS * REGION_BYTES

    def _data_after(self, offset: int) -> int:
        try:
            return os.lseek(self._fd, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return self._size
