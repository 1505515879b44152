"""Reading a raw image file of this machine: for tests, and for files that came here another way."""

from __future__ import annotations

import errno
import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Self

from tasks.errors import TransferInterrupted
from tasks.models import Extent
from tasks.reader import aligned_buffer

BUFFER_BYTES = 1024 * 1024


class FileReader:
    """A raw file as a disk. See `tasks.reader.Reader`; entering raises OSError where the file cannot be opened."""

    depth = 4
    preferred_extent_bytes = 32 * 1024 * 1024
    road, road_reason = "file", "it is here"

    def __init__(self, path: Path) -> None:
        self.size = path.stat().st_size
        self.source = str(path)
        self._fd = -1

    def __enter__(self) -> Self:
        self._fd = os.open(self.source, os.O_RDONLY)
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self._fd)

    def stream(self, extent: Extent) -> Generator[tuple[int, memoryview], None, None]:
        """Yield the bytes of `extent` in order. Raises TransferInterrupted where the file ends before it."""
        buffer = aligned_buffer(min(BUFFER_BYTES, extent.length))
        at = extent.start
        while at < extent.end:
            done = os.preadv(self._fd, [buffer[: extent.end - at]], at)
            if not done:
                raise TransferInterrupted(source=self.source, resumable_at=at, why="the file became shorter")
            yield at, buffer[:done]
            at += done

    def allocated(self) -> Iterator[Extent]:
        """Yield the parts that are not holes; what lies between them reads as zeros (lseek(2), SEEK_DATA)."""
        end = 0
        while end < self.size:
            try:
                start = os.lseek(self._fd, end, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    return
                raise
            end = os.lseek(self._fd, start, os.SEEK_HOLE)
            yield Extent(start=start, length=end - start)

    def interrupt(self) -> None:
        """Nothing waits here."""
