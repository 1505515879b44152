"""Decoding a stream-optimised VMDK as a process: `decode_stream <file> <size> <folder>`, hashed and copied as ever."""

from __future__ import annotations

import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any, Self

from tasks.images.copy import copy
from tasks.images.digests import Digests
from tasks.images.extents import whole_disk
from tasks.images.raw import RawWriter
from tasks.models import Extent
from tasks.reader import Buffer
from tasks.transports.inflate import Blocks
from tasks.transports.nfc_lease import PIECE_BYTES, THREADS
from tests.benchmarks.child import measured


class FileReader:
    """What `LeaseReader` is, of a stream that was downloaded."""

    road, road_reason, depth, preferred_extent_bytes = "nfc_lease", "", 1, PIECE_BYTES

    def __init__(self, stream: Path, size: int) -> None:
        self.source, self.size = str(stream), size

    def __enter__(self) -> Self:
        self._file: Any = Path(self.source).open("rb", buffering=0)
        self._blocks = Blocks(self._file.readinto, size=self.size, threads=THREADS)
        self._content = iter(self._blocks.__enter__())
        self._rest: tuple[int, Buffer] | None = None
        return self

    def __exit__(self, *exc: object) -> None:
        self._blocks.__exit__(*exc)
        self._file.close()

    def stream(self, extent: Extent) -> Generator[tuple[int, Buffer], None, None]:
        while True:
            offset, buffer = self._rest or next(self._content)
            part, rest = buffer[: extent.end - offset], buffer[extent.end - offset :]
            self._rest = (extent.end, rest) if rest else None
            yield offset, part
            if offset + len(part) == extent.end:
                return

    def interrupt(self) -> None:
        """A file does not keep anybody waiting."""


def main(stream: str, size: str, folder: str) -> None:
    """Copy what the stream holds, until it is durable."""
    with (
        FileReader(Path(stream), int(size)) as reader,
        RawWriter.create(Path(folder, "disk.raw"), size=reader.size) as writer,
        Digests.create(Path(folder, "disk.digests"), size=reader.size) as digests,
    ):
        measured(lambda: copy(reader, whole_disk(reader.size), writer, digests=digests))


if __name__ == "__main__":
    main(*sys.argv[1:])
