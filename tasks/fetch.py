"""One disk or file, by its road, into a part with digests and journal; for any mode."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

from tasks.images.copy import CopyResult, Limits, copy
from tasks.images.extents import leaf_aligned, within
from tasks.images.layout import DiskFiles
from tasks.images.target import open_target
from tasks.models import ArrivalFormat, DigestName, Extent
from tasks.rate import RATE
from tasks.slots import one_of
from tasks.steps import Meter
from tasks.transports.bulk import Shared
from tasks.transports.folder import FolderDisk, FolderReader
from tasks.transports.vddk import VddkDisk, VddkReader
from tasks.vsphere import tickets
from tasks.vsphere.session import Session, borrow

VDDK_DISKS_A_HOST = 10  # the NFC memory of an ESXi host is for some 50 sessions, and others want some


class Fetched(CopyResult):
    """What a copy did, the road that it took, and why that one."""

    road: str
    road_reason: str


def fetch(
    source: FolderDisk | VddkDisk,
    files: DiskFiles,
    *,
    binding: Mapping[str, str | int],
    format: ArrivalFormat = "raw",
    algorithm: DigestName,
    allocated: Callable[[], Sequence[Extent] | None] = lambda: None,
    meter: Meter,
    stop: threading.Event,
) -> Fetched:
    """Copy what is missing of `source` into the part of `files` in `format`; what an earlier run left is gone on with.

    binding: what the bytes are of, down to the point in time. Borrows the process's session, keeps to the run's rate.
    Where the reader, or else `allocated`, knows what is allocated, nothing else is asked for: a target that began empty
    reads as zeros there.
    Raises what `copy`, `open_target` and entering the reader raise.
    """
    with (
        opened(source, stop=stop) as reader,
        open_target(files, size=reader.size, binding=binding, format=format, algorithm=algorithm, stop=stop) as target,
    ):
        wanted, there = target.missing, reader.allocated() if isinstance(reader, VddkReader) else allocated()
        if there is not None:
            wanted = within(wanted, leaf_aligned(there, size=reader.size))
        meter.expect(sum(extent.length for extent in wanted))
        result = copy(
            reader,
            wanted,
            target.writer,
            digests=target.digests,
            journal=target.journal,
            progress=meter.add,
            stop=stop,
            rate=RATE.get(),
            limits=Limits(threads=reader.depth),
        )
        return Fetched(**result.model_dump(), road=reader.road, road_reason=reader.road_reason)


@contextmanager
def opened(
    source: FolderDisk | VddkDisk, *, stop: threading.Event, probing: bool = False
) -> Iterator[FolderReader | VddkReader]:
    """Yield an entered reader of `source`. probing: it is only to be seen whether it can be read.

    Through VDDK it waits its turn, where many disks of that ESXi host are open on this machine.
    """
    if isinstance(source, VddkDisk):
        turn = one_of(VDDK_DISKS_A_HOST, f"vddk-{source.host_name}", stop=stop)
        with turn, VddkReader(source, stop=stop) as through_vddk:
            yield through_vddk
        return
    with borrow(source.connection) as session:
        depth = 1 if probing else None
        with reader_of(source, session, depth=depth, by_ticket=not probing) as reader:
            yield reader


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
