"""Our download as a process: `ours <address> <CA file> <cookie> <folder> <size> <name>…`, digests and all.

One file by as many connections as the reader has by itself; several files, four at a time as the peers have them, each
by one connection.
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
from tasks.tls import context_for
from tasks.transports.bulk import Shared
from tasks.transports.folder import FolderFile, FolderReader
from tests.benchmarks.child import measured

AT_ONCE = 4  # as many as each peer


def main(address: str, ca_file: str, cookie: str, folder: str, size: str, *names: str) -> None:
    to = connection_to(address, ca_file)
    shared = Shared(context_for(to))

    def fetch(name: str) -> None:
        reader = reader_of(to, cookie, size=int(size), name=name, shared=shared)
        download(reader, Path(folder) / f"{Path(name).name}.raw", threads=4 if len(names) == 1 else 1)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        measured(lambda: list(pool.map(fetch, names)))


def connection_to(address: str, ca_file: str) -> Connection:
    host, _, port = address.rpartition(":")
    trust = Trust(ca_pem=Path(ca_file).read_text())
    return Connection(host=host, port=int(port), username="u", password="p", trust=trust)


def reader_of(to: Connection, cookie: str, *, size: int, name: str, shared: Shared | None = None) -> FolderReader:
    """Return the reader, not entered yet, of a file of `size` bytes of the server at the end of `to`."""
    disk = FolderFile(
        connection=to,
        datacenter_path="/DC",
        datastore_path=f"[datastore1] {name}-flat.vmdk",
        capacity_bytes=size,
    )
    return FolderReader(disk, cookie=lambda: cookie, renew=lambda stale: stale, shared=shared)


def download(source: FolderReader, target: Path, *, threads: int) -> None:
    with (
        source as reader,
        RawWriter.create(target, size=reader.size) as writer,
        Digests.create(target.with_suffix(".digests"), size=reader.size) as digests,
    ):
        copy(reader, whole_disk(reader.size), writer, digests=digests, limits=Limits(threads=threads))


if __name__ == "__main__":
    main(*sys.argv[1:])
