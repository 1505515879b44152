"""Our download as a process: `ours <address> <CA file> <cookie> <folder> <size> <name>…`, digests and all.

One file by as many connections as the reader has by itself; several files, two at a time, a connection each.
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tasks.images.copy import Limits, copy
from tasks.images.digests import Digests
from tasks.images.extents import whole_disk
from tasks.images.raw import RawWriter
from tasks.models import Connection, Trust
from tasks.transports.folder import FolderDisk, FolderReader
from tests.benchmarks.child import measured

AT_ONCE = 2


def main(address: str, ca_file: str, cookie: str, folder: str, size: str, *names: str) -> None:
    def fetch(name: str) -> None:
        reader = reader_of(address, ca_file, cookie, size=int(size), name=name)
        download(reader, Path(folder) / f"{Path(name).name}.raw", threads=4 if len(names) == 1 else 1)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        measured(lambda: list(pool.map(fetch, names)))


def reader_of(address: str, ca_file: str, cookie: str, *, size: int, name: str) -> FolderReader:
    """Return the reader, not entered yet, of a file of `size` bytes of the server at `address`."""
    host, _, port = address.rpartition(":")
    trust = Trust(ca_pem=Path(ca_file).read_text())
    disk = FolderDisk(
        connection=Connection(host=host, port=int(port), username="u", password="p", trust=trust),
        datacenter_path="/DC",
        datastore_path=f"[datastore1] {name}.vmdk",
        capacity_bytes=size,
    )
    return FolderReader(disk, cookie=lambda: cookie, renew=lambda stale: stale)


def download(source: FolderReader, target: Path, *, threads: int) -> None:
    with (
        source as reader,
        RawWriter.create(target, size=reader.size) as writer,
        Digests.create(target.with_suffix(".digests"), size=reader.size) as digests,
    ):
        copy(reader, whole_disk(reader.size), writer, digests=digests, limits=Limits(threads=threads))


if __name__ == "__main__":
    main(*sys.argv[1:])
