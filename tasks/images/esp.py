"""Whether a disk starts by itself under new firmware: the fallback loader on its EFI system partition.

The partition table is read by util-linux' partx, the file system by mtools, both from copies that QEMU cuts out of the
image, whatever its format; nothing is mounted, and the image is only read. Source: UEFI Specification, 3.5.1.1.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from tasks import process
from tasks.errors import ToolFailed
from tasks.images.qemu import PACKAGE
from tasks.models import SECTOR_BYTES, Extent, ImageFormat

LOADER = r"\EFI\BOOT\BOOTX64.EFI"
TABLE_BYTES = 1024 * 1024  # GPT or MBR, from the disk's start: what is before the first partition of today's tools
LARGEST_BYTES = 4 * 1024**3  # of a partition that is looked into; usual ones have 100 MiB to 1 GiB

_SYSTEM_PARTITION = ("c12a7328-f81f-11d2-ba4b-00a0c93ec93b", "0xef")  # of GPT, of MBR
_MTOOLS = ["env", "MTOOLSRC=/dev/null", "MTOOLS_SKIP_CHECK=1"]  # nobody's settings; odd geometries are common


def has_fallback_loader(
    image: Path, *, format: ImageFormat, virtual_size: int, stop: threading.Event | None = None
) -> bool:
    r"""Tell whether an EFI system partition of `image` has `\EFI\BOOT\BOOTX64.EFI`.

    Raises ToolFailed where a tool is missing or the image cannot be read; Stopped once `stop` is set.
    """
    with tempfile.TemporaryDirectory(prefix="hyper2kvm-esp-") as scratch:
        table, partition = Path(scratch, "table"), Path(scratch, "partition")
        _cut(image, format, Extent(start=0, length=min(TABLE_BYTES, virtual_size)), table, stop)
        os.truncate(table, virtual_size)  # the table says how far it goes, and is not believed beyond the end
        for extent in _system_partitions(table, virtual_size):
            _cut(image, format, extent, partition, stop)
            if _succeeds([*_MTOOLS, "mdir", "-b", "-i", str(partition), "::" + LOADER.replace("\\", "/")]):
                return True
    return False


def _system_partitions(table: Path, virtual_size: int) -> Iterator[Extent]:
    argv = ["partx", "--raw", "--noheadings", "--output", "START,SECTORS,TYPE", str(table)]
    try:
        lines = process.run(argv, package="util-linux").splitlines()
    except ToolFailed as error:
        if error.status == process.MISSING:
            raise
        return  # no partitions
    for line in lines:
        start, sectors, *kind = line.split()
        extent = Extent(start=int(start) * SECTOR_BYTES, length=int(sectors) * SECTOR_BYTES)
        if kind[:1] and kind[0] in _SYSTEM_PARTITION and extent.length <= LARGEST_BYTES and extent.end <= virtual_size:
            yield extent


def _cut(image: Path, format: ImageFormat, extent: Extent, target: Path, stop: threading.Event | None) -> None:
    """Copy a part of what the guest sees into a sparse file."""
    below = {"driver": format, "file": {"driver": "file", "filename": str(image)}}
    part = {"driver": "raw", "offset": extent.start, "size": extent.length, "file": below}
    argv = ["qemu-img", "convert", "-O", "raw", f"json:{json.dumps(part)}", str(target)]
    process.run(argv, stop=stop, package=PACKAGE)


def _succeeds(argv: list[str]) -> bool:
    """Tell whether a tool says yes. Raises ToolFailed where there is no such tool."""
    try:
        process.run(argv, package="mtools")
    except ToolFailed as error:
        if error.status == process.MISSING:
            raise
        return False
    return True
