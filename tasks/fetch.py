"""One file of a datastore, by the road `folder`, into a raw part with digests and journal; for any mode."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from functools import partial

from tasks.images.copy import CopyResult, Limits, copy
from tasks.images.layout import DiskFiles
from tasks.images.target import open_target
from tasks.models import ArrivalFormat
from tasks.rate import RATE
from tasks.steps import Meter
from tasks.transports.bulk import Shared
from tasks.transports.folder import FolderDisk, FolderReader
from tasks.vsphere import tickets
from tasks.vsphere.session import Session, borrow


class Fetched(CopyResult):
    """What a copy did, the road that it took, and why that one."""

    road: str
    road_reason: str


def fetch(
    source: FolderDisk,
    files: DiskFiles,
    *,
    binding: Mapping[str, str | int],
    format: ArrivalFormat = "raw",
    meter: Meter,
    stop: threading.Event,
) -> Fetched:
    """Copy what is missing of `source` into the part of `files` in `format`; what an earlier run left is gone on with.

    binding: what the bytes are of, down to the point in time. Borrows the process's session, keeps to the run's rate.
    Raises what `copy`, `open_target` and entering a `FolderReader` raise.
    """
    with (
        borrow(source.connection) as session,
        reader_of(source, session) as reader,
        open_target(files, size=reader.size, binding=binding, format=format, stop=stop) as target,
    ):
        meter.expect(sum(extent.length for extent in target.missing))
        result = copy(
            reader,
            target.missing,
            target.writer,
            digests=target.digests,
            journal=target.journal,
            progress=meter.add,
            stop=stop,
            rate=RATE.get(),
            limits=Limits(threads=reader.depth),
        )
        return Fetched(**result.model_dump(), road=reader.road, road_reason=reader.road_reason)


def reader_of(
    source: FolderDisk, session: Session, *, depth: int | None = None, by_ticket: bool = True
) -> FolderReader:
    """Return a reader with the session's cookie, trust and connections, and tickets where hosts may be asked."""
    by_ticket = by_ticket and session.info.is_vcenter and source.connection.host_tickets
    return FolderReader(
        source,
        cookie=lambda: session.cookie,
        renew=session.renew,
        acquire=partial(tickets.acquire, session) if by_ticket else None,
        shared=session.companion(Shared),
        depth=depth,
    )
