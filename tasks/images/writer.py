"""What a writer of a disk image is; raw files and qcow2 over NBD have this shape."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, Self

from tasks.images.digests import Buffer


class Writer(Protocol):
    """One image as a target of bytes; a context manager whose end closes it, fatally where that fails.

    `write` and `zero` may be called by several threads at once, on ranges that do not overlap.
    path: the file that is written, for messages.
    """

    @property
    def path(self) -> Path: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None: ...

    def write(self, offset: int, buffer: Buffer) -> None:
        """Write all of `buffer` at `offset`. Raises DiskFull."""
        ...

    def zero(self, offset: int, length: int) -> None:
        """Make the range read as zeros. Raises DiskFull."""
        ...

    def flush(self) -> None:
        """Return once everything written is durable."""
        ...

    def close(self) -> None:
        """Give the image up; not flushed. May be called twice."""
        ...


class Image(Writer, Protocol):
    """A writer of an image that can be read as well; `read_into` may be called by several threads at once."""

    def read_into(self, offset: int, target: memoryview) -> None:
        """Fill `target` with what the image holds at `offset`, written by anybody before."""
        ...
