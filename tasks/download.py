"""Step: one file of a VM, byte for byte, into its part; what an earlier run left of it is gone on with."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from blocks import VCenter
from tasks.errors import FileMissing
from tasks.fetch import Fetched, fetch
from tasks.images.digests import Digests
from tasks.images.layout import DiskFiles
from tasks.images.mirror import parts_of, still_here
from tasks.images.raw import RawWriter
from tasks.images.verify import verify
from tasks.models import (
    Connection,
    DatastoreFile,
    DigestName,
    DownloadedFile,
    ReadBack,
    Snapshot,
    Value,
    VirtualMachine,
)
from tasks.road import from_folder
from tasks.steps import Meter, connection_of, in_thread, metered
from tasks.transports.folder import FolderFile


class Place(Value):
    """Whose files are downloaded, as of when, and where to."""

    vcenter_uuid: str
    vm: VirtualMachine
    snapshot: Snapshot | None
    folder: Path
    digest: DigestName = "blake3"

    @property
    def point(self) -> str:
        """The point in time, for the journals and for later runs."""
        if self.snapshot:
            return f"{self.snapshot.moref} of {self.snapshot.created}"
        return f"off, {self.vm.change_version}" if self.vm.power_state == "poweredOff" else "live"

    def binding(self, file: DatastoreFile) -> dict[str, str | int]:
        """Return what a journal must be of, to be gone on with: this file as it is now."""
        identity = {"vcenter": self.vcenter_uuid, "vm": self.vm.instance_uuid, "point": self.point}
        return {**identity, "file": file.datastore_path, "modified": file.modified, "bytes": file.size_bytes}


class Wanted(Value):
    """One file to download. `number`: among all, for its progress. `known`: what an earlier run wrote of it.

    `needed`: there is nothing to download without it.
    """

    file: DatastoreFile
    number: int
    known: DownloadedFile | None
    needed: bool


@task(name="download", task_run_name="download {place.vm.name} {wanted.file.path}", cache_policy=NO_CACHE)
async def download(vcenter: VCenter, place: Place, wanted: Wanted) -> DownloadedFile | None:
    """Copy one file into its part, read that back and compare, unless it is here and unchanged.

    None where it is gone from the source and not needed. Cancelled, it returns only when no thread of it reads or
    writes any more. Raises FileLocked, FileMissing, FileUnfit, TransferInterrupted, DiskFull, IntegrityMismatch, ….
    """
    look, stop, started = threading.Event(), threading.Event(), time.monotonic()
    file, known = wanted.file, wanted.known
    label, key = f"download {place.vm.name} {file.path}", f"download-{place.vm.moref}-{wanted.number}"
    async with metered(label, file.size_bytes, key=key) as meter:
        unchanged = known is not None and await in_thread(_unchanged, look, place, file, known, look)
        if known and unchanged:
            get_run_logger().info("unchanged vm=%s path=%r", place.vm.moref, file.path)
            return known.model_copy(update={"bytes_transferred": 0, "seconds": 0.0, "point": place.point})
        try:
            result, verified = await in_thread(_fetched, stop, connection_of(vcenter), place, file, meter, stop)
        except FileMissing as error:
            if wanted.needed:
                raise
            get_run_logger().warning("gone vm=%s: %s", place.vm.moref, error.cause)
            return None
    seconds = time.monotonic() - started
    get_run_logger().info(
        "downloaded vm=%s path=%r bytes=%d seconds=%.1f road=%s reason=%r",
        *(place.vm.moref, file.path, result.bytes_transferred, seconds, result.road, result.road_reason),
    )
    return DownloadedFile(
        **file.model_dump(),
        digest=result.digest,
        point=place.point,
        bytes_transferred=result.bytes_transferred,
        road=result.road,
        road_reason=result.road_reason,
        verified=verified,
        seconds=seconds,
    )


def _unchanged(place: Place, file: DatastoreFile, known: DownloadedFile, stop: threading.Event) -> bool:
    if not still_here(place.folder, file, known=known, point=place.point, stop=stop):
        return False
    parts_of(place.folder, file).raw_part.unlink(missing_ok=True)
    return True


def _fetched(
    connection: Connection, place: Place, file: DatastoreFile, meter: Meter, stop: threading.Event
) -> tuple[Fetched, ReadBack]:
    parts = parts_of(place.folder, file)
    if file.size_bytes == 0:
        return _empty(parts, place.digest), "direct"
    result = _copied(connection, place, file, parts, meter, stop)
    with Digests.open(parts.digests_part) as digests:
        return result, verify(parts.raw_part, format="raw", digests=digests, stop=stop)


def _copied(
    connection: Connection, place: Place, file: DatastoreFile, parts: DiskFiles, meter: Meter, stop: threading.Event
) -> Fetched:
    source = FolderFile(
        connection=connection,
        datacenter_path=place.vm.datacenter_path,
        datastore_path=file.datastore_path,
        capacity_bytes=file.size_bytes,
        host_name=place.vm.host_name,
        begun=parts.journal.exists(),
    )
    reader, binding = from_folder(source), place.binding(file)
    return fetch(reader, parts, binding=binding, algorithm=place.digest, meter=meter, stop=stop)


def _empty(parts: DiskFiles, algorithm: DigestName) -> Fetched:
    """Make the part of a file without a byte, for which there is nothing to ask."""
    with (
        RawWriter.create(parts.raw_part, size=0),
        Digests.create(parts.digests_part, size=0, algorithm=algorithm) as digests,
    ):
        digest = digests.image_digest()
    return Fetched(
        bytes_transferred=0, bytes_written=0, seconds=0.0, digest=digest, road="none", road_reason="no byte in it"
    )
