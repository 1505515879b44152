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
    host, _, port = address.rpartition(":")
    connection = Connection(
        host=host, port=int(port), username="u", password="p", trust=Trust(ca_pem=Path(ca_file).read_text())
    )

    def fetch(name: str) -> None:
        download(connection, cookie, Path(folder), int(size), name, threads=4 if len(names) == 1 else 1)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        measured(lambda: list(pool.map(fetch, names)))


def download(connection: Connection, cookie: str, folder: Path, size: int, name: str, *, threads: int) -> None:
    disk = FolderDisk(
        connection=connection, datacenter_path="/DC", datastore_path=f"[datastore1] {name}.vmdk", capacity_bytes=size
    )
    target = folder / f"{Path(name).name}.raw"
    with (
        FolderReader(disk, cookie=lambda: cookie, renew=lambda stale: stale) as reader,
        RawWriter.create(target, size=size) as writer,
        Digests.create(target.with_suffix(".digests"), size=size) as digests,
    ):
        copy(reader, whole_disk(size), writer, digests=digests, limits=Limits(threads=threads))


if __name__ == "__main__":
    main(*sys.argv[1:])
