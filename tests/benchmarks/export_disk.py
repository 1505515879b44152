"""One disk to a verified or unverified qcow2, as a process: `export_disk one|two read-back|as-it-is <address> <CA file>
<cookie> <folder> <size> <name>`; `one` writes as the bytes arrive, `two` downloads to raw and converts."""

from __future__ import annotations

import sys
from pathlib import Path

from tasks.images import qemu
from tasks.images.copy import copy
from tasks.images.digests import Digests
from tasks.images.layout import DiskFiles
from tasks.images.target import open_target
from tasks.images.verify import verify
from tasks.transports.folder import FolderReader
from tests.benchmarks.child import measured
from tests.benchmarks.ours import connection_to, reader_of


def main(passes: str, check: str, address: str, ca_file: str, cookie: str, folder: str, size: str, name: str) -> None:
    source = reader_of(connection_to(address, ca_file), cookie, size=int(size), name=name)
    files = DiskFiles(Path(folder), 0)
    measured(lambda: land(source, files, one_pass=passes == "one", read_back=check == "read-back"))


def land(source: FolderReader, files: DiskFiles, *, one_pass: bool, read_back: bool) -> None:
    """Do what the export's steps do with a disk, but for its final name."""
    arriving, image = ("qcow2", files.part("qcow2")) if one_pass else ("raw", files.converted)
    with source as reader, open_target(files, size=reader.size, binding={}, format=arriving) as target:
        copy(reader, target.missing, target.writer, digests=target.digests, journal=target.journal)
    if not one_pass:
        qemu.convert(files.raw_part, image, source_format="raw", target_format="qcow2")
        files.raw_part.unlink()
    if read_back:
        with Digests.open(files.digests_part) as digests:
            verify(image, format="qcow2", digests=digests)


if __name__ == "__main__":
    main(*sys.argv[1:])
