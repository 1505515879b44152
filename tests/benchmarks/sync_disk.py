"""One sync of a VM's first disk as a process: `sync_disk <address> <CA file> <user> <moref> <folder> [<connections>]`.

What the steps of `cbt_sync` do with a disk, snapshot and manifest included, but without Prefect. The password comes
from VCENTER_PASSWORD. Without a manifest it makes a copy of all of it. Prints its figures as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tasks.images.base import GAP_BYTES, Base
from tasks.images.changes import closed_up
from tasks.images.copy import Limits, copy
from tasks.images.digests import Digests
from tasks.images.extents import whole_disk
from tasks.images.layout import DiskFiles
from tasks.images.manifest import MANIFEST, read_manifest, write_manifest
from tasks.images.raw import RawWriter
from tasks.images.sync import bring_up_to_date, count
from tasks.models import Connection, DiskImage, Extent, Manifest, VirtualDisk
from tasks.road import folder_reader
from tasks.transports.folder import FolderDisk, FolderReader
from tasks.vsphere.changes import changed_extents
from tasks.vsphere.disks import snapshot_disks
from tasks.vsphere.machine import describe_vm
from tasks.vsphere.session import Session, borrow
from tasks.vsphere.snapshots import drop_snapshot, take_snapshot
from tests.benchmarks.child import cpu_seconds, peak_rss_bytes, written_bytes
from tests.benchmarks.ours import connection_to

NAME = "hyper2kvm-bench"


def main(address: str, ca_file: str, user: str, moref: str, folder: str, connections: str = "4") -> None:
    given = {"username": user, "password": os.environ["VCENTER_PASSWORD"], "connections": int(connections)}
    to = Connection.model_validate(connection_to(address, ca_file).model_dump() | given)
    with borrow(to) as session:
        figures = synced(to, session, moref, Path(folder))
    json.dump(figures | {"peak_rss_bytes": peak_rss_bytes()}, sys.stdout)


def synced(to: Connection, session: Session, moref: str, folder: Path) -> dict[str, Any]:
    """Bring the copy in `folder` up to a new snapshot, or make it; return what that took."""
    vm = describe_vm(session, moref)
    snapshot = take_snapshot(session, vm, name=NAME, description="bench", quiesce=False, or_crash_consistent=True)
    try:
        disk = snapshot_disks(session, snapshot)[0]
        changed = partial(changed_extents, session, vm, snapshot, disk)
        with folder_reader(FolderDisk.of(disk, vm=vm, connection=to), session) as reader:
            if not (folder / MANIFEST).exists():
                image, took = timed(lambda: first_copy(reader, disk, folder))
                whole = Manifest(
                    vcenter_uuid="v", vm=vm, snapshot=snapshot, disks=(image,), consistent=True, created="now"
                )
                write_manifest(folder, whole)
                return took | {"fetched": image.bytes_transferred}
            base = Base(disk=disk, image=read_manifest(folder).disks[0])
            return again(reader, base, folder, lambda since: changed(since=since))
    finally:
        drop_snapshot(session, moref, name=NAME)


def first_copy(reader: FolderReader, disk: VirtualDisk, folder: Path) -> DiskImage:
    """Return the image of a disk that was copied from its beginning to its end, holes and all."""
    files, size = DiskFiles(folder, 0), disk.capacity_bytes
    with (
        RawWriter.create(files.final("raw"), size=size) as writer,
        Digests.create(files.digests, size=size) as digests,
    ):
        result = copy(reader, whole_disk(size), writer, digests=digests, limits=Limits(threads=reader.depth))
    return DiskImage(
        index=0,
        disk_key=disk.key,
        uuid=disk.uuid,
        change_id=disk.change_id,
        source=disk.datastore_path,
        path=files.final("raw").name,
        format="raw",
        virtual_size=size,
        digest=result.digest,
        bytes_transferred=result.bytes_transferred,
        road=reader.road,
        verified="skipped",
    )


def again(
    reader: FolderReader, base: Base, folder: Path, changed: Callable[[str], tuple[Extent, ...]]
) -> dict[str, Any]:
    """Sync, read back, have it count; return what that took. extents: of the merged plan."""
    told = list[Extent]()

    def noted(since: str) -> tuple[Extent, ...]:
        told.extend(changed(since))
        return tuple(told)

    synced, took = timed(lambda: bring_up_to_date(reader, base, folder, noted, limits=Limits(threads=reader.depth)))
    count(folder, read_manifest(folder).model_copy(update={"disks": (synced.image,)}))
    return took | {
        "how": synced.how,
        "extents": float(len(closed_up(told, gap_bytes=GAP_BYTES))),
        "fetching_s": synced.image.seconds,
        "fetched": synced.image.bytes_transferred,
        "written": synced.written_bytes,
        "read_here": synced.read_here_bytes,
        "read_back": synced.read_back_bytes,
    }


def timed(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """Return what the work returns, and its seconds, CPU-seconds, and bytes read and written by us and our children."""
    started, cpu_s, written, read = time.monotonic(), cpu_seconds(), written_bytes(), read_bytes()
    done = work()
    took = {"seconds": time.monotonic() - started, "cpu_s": cpu_seconds() - cpu_s}
    return done, took | {"disk_written": written_bytes() - written, "disk_read": read_bytes() - read}


def read_bytes() -> int:
    """Return what this process and the children it has waited for had the disks read: proc(5), io."""
    return int(Path("/proc/self/io").read_text().partition("\nread_bytes:")[2].split()[0])


if __name__ == "__main__":
    main(*sys.argv[1:])
