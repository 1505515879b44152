"""One disk or file, by its road, into a part with digests and journal; for any mode."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

from tasks.images.copy import CopyResult, Limits, copy
from tasks.images.extents import leaf_aligned, within
from tasks.images.layout import DiskFiles
from tasks.images.target import open_target
from tasks.models import ArrivalFormat, DigestName, Extent
from tasks.rate import RATE
from tasks.reader import KnowsAllocated, Reader
from tasks.steps import Meter


class Fetched(CopyResult):
    """What a copy did, the road that it took, and why that one."""

    road: str
    road_reason: str


def fetch(
    source: AbstractContextManager[Reader],
    files: DiskFiles,
    *,
    binding: Mapping[str, str | int],
    format: ArrivalFormat = "raw",
    algorithm: DigestName,
    allocated: Callable[[], Sequence[Extent] | None] = lambda: None,
    meter: Meter,
    stop: threading.Event,
) -> Fetched:
    """Copy what is missing of a disk into the part of `files` in `format`; what an earlier run left is gone on with.

    source: yields the disk's entered reader. binding: what the bytes are of, down to the point in time. Where the
    reader, or else `allocated`, knows what is allocated, nothing else is asked for: a target that began empty reads as
    zeros there. Keeps to the run's rate.
    Raises what `copy`, `open_target` and entering `source` raise.
    """
    with (
        source as reader,
        open_target(files, size=reader.size, binding=binding, format=format, algorithm=algorithm, stop=stop) as target,
    ):
        wanted, there = target.missing, reader.allocated() if isinstance(reader, KnowsAllocated) else allocated()
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
