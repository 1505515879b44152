"""One disk to a verified or unverified qcow2, as a process: `export_disk one|two read-back|as-it-is <address> <CA file>
<cookie> <folder> <size> <name>`; `one` writes as the bytes arrive, `two` downloads to raw and converts."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

from tasks.images import qemu
from tasks.images.copy import copy
from tasks.images.layout import DiskFiles
from tasks.images.target import open_target
from tasks.images.verify import verify
from tasks.models import ArrivalFormat, Connection, Trust
from tasks.transports.folder import FolderDisk, FolderReader
from tests.benchmarks.child import measured


def main(passes: str, check: str, address: str, ca_file: str, cookie: str, folder: str, size: str, name: str) -> None:
    host, _, port = address.rpartition(":")
    trust = Trust(ca_pem=Path(ca_file).read_text())
    disk = FolderDisk(
        connection=Connection(host=host, port=int(port), username="u", password="p", trust=trust),
        datacenter_path="/DC",
        datastore_path=f"[datastore1] {name}.vmdk",
        capacity_bytes=int(size),
    )
    files = DiskFiles(Path(folder), 0)
    measured(
        lambda: land(disk, files, cookie, arriving="qcow2" if passes == "one" else "raw", back=check == "read-back")
    )


def land(disk: FolderDisk, files: DiskFiles, cookie: str, *, arriving: ArrivalFormat, back: bool) -> None:
    """Do what the export's steps do with a disk, but for its final name."""
    stop, image = threading.Event(), files.part(arriving)
    with (
        FolderReader(disk, cookie=lambda: cookie, renew=lambda stale: stale) as reader,
        open_target(files, size=reader.size, binding={"disk": "bench"}, format=arriving, stop=stop) as target,
    ):
        copy(reader, target.missing, target.writer, digests=target.digests, journal=target.journal, stop=stop)
        digests = target.digests
        if arriving == "raw":
            image = files.converted
            qemu.convert(files.raw_part, image, source_format="raw", target_format="qcow2")
            files.raw_part.unlink()
    if back:
        with type(digests).open(files.digests_part) as sidecar:
            verify(image, format="qcow2", digests=sidecar)


if __name__ == "__main__":
    main(*sys.argv[1:])
