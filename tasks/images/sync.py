"""One image from the point in time it is of to a later one, and back from wherever a run before was killed at that.

    counts ──dirty list──▶ torn ──fetched, written, durable, read back──▶ done ──manifest, for all disks──▶ counts

An image counts for what its manifest says, until a dirty list says that it is between two points in time; then only a
new manifest makes it count again. Killed while torn or done, the next run begins at the changeId of the manifest, which
tells all that was written since (for leaves that were done, at the one that they were done for), and fetches every leaf
whole that was in doubt. How vSphere is asked is not known here.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from tasks.errors import ChangeIdInvalid, InvalidInput
from tasks.images import dirty, qemu
from tasks.images.base import Base, Plan, same_tracking, sound
from tasks.images.changes import Changes
from tasks.images.copy import Limits
from tasks.images.digests import Digests, algorithm_of
from tasks.images.extents import merged, whole_disk, within, without
from tasks.images.layout import DiskFiles
from tasks.images.manifest import write_manifest
from tasks.images.patch import PatchResult, patch
from tasks.images.state import discard
from tasks.images.target import WRITERS
from tasks.images.written import Written, verify_written
from tasks.models import DiskImage, Extent, Manifest, ReadBack, Value
from tasks.rate import Rate
from tasks.reader import Reader

Changed = Callable[[str], tuple[Extent, ...]]
"""What was written since a changeId; raises ChangeIdInvalid where that cannot be told."""

log = logging.getLogger(__name__)


class Synced(Value):
    """An image as of a later point in time, which does not count yet, and what it took.

    read_here_bytes: of the image, to renew its digests. read_back_bytes: of it, once all was written.
    """

    image: DiskImage
    how: str
    why: str
    changed_bytes: int
    written_bytes: int
    read_here_bytes: int
    read_back_bytes: int
    leaves_in_doubt: int


def bring_up_to_date(
    reader: Reader,
    base: Base,
    folder: Path,
    changed: Changed,
    *,
    skip_readback: bool = False,
    limits: Limits | None = None,
    expect: Callable[[int], None] | None = None,
    progress: Callable[[int], None] | None = None,
    stop: threading.Event | None = None,
    rate: Rate | None = None,
    window_bytes: int = dirty.WINDOW_BYTES,
) -> Synced:
    """Fetch into the image of `base` what changed on its disk, by an entered reader of that; return once it is durable.

    What was written is read back, unless skipped. The image is torn from here on, until `count`. expect, progress: told
    how many bytes there are to do, and how many were done. Raises what `patch` raises.
    """
    files, path, form, size = base.files(folder), folder / base.image.path, base.format, base.disk.capacity_bytes
    torn = dirty.torn_of(files, size=size)
    if torn:
        qemu.check(path, format=form, mend_leaks=True, stop=stop)
    if torn or base.grown:
        torn = _of_its_size(files, path, base) or torn
    opened, lost = _digests(files, size, base.image.digest)
    with opened as digests:
        plan = _plan(base, digests, changed, torn=torn, lost=lost)
        torn = torn or dirty.Torn()
        changes, at = plan.changes(size, torn.leaves), base.disk.change_id or ""
        at_once = plan.changed is None
        todo = dirty.DirtyList(files, changes.leaves, torn, at=at, at_once=at_once, window_bytes=window_bytes)
        if expect:
            expect(sum(leaf.length for leaf in changes.leaves))
        written = Written(changes, whole=todo.done_before)
        with WRITERS[form].open(path) as image:
            result = patch(
                reader,
                image,
                changes,
                digests=digests,
                todo=todo,
                compare=at_once,
                written=written,
                limits=limits,
                progress=progress,
                stop=stop,
                rate=rate,
            )
        todo.settle()
        read_back: tuple[ReadBack, int] = ("skipped", 0)
        if not skip_readback:
            read_back = verify_written(path, todo.touched, written, format=form, digests=digests, stop=stop)
    return _synced(base, plan, changes, result, *read_back)


def count(folder: Path, manifest: Manifest, domain_xml: str = "") -> None:
    """Have the images of a folder count as of the point in time of `manifest`: all of them, at once.

    May be killed anywhere. Raises DiskFull, and then they are as torn as before.
    """
    write_manifest(folder, manifest, domain_xml)
    dirty.forget(folder)
    discard(folder)


def _of_its_size(files: DiskFiles, path: Path, base: Base) -> dirty.Torn | None:
    """Give an image the size that its disk has now, and say first that all of it is dirty; return that, if any.

    One that was killed while its disk was larger is made smaller: what lies beyond was never counted.
    """
    size = base.disk.capacity_bytes
    if not base.grown and qemu.virtual_size(path, format=base.format) == size:
        return None
    everything = dirty.Torn(leaves=whole_disk(size))
    dirty.begin(files, everything.leaves)
    qemu.resize(path, format=base.format, size=size)
    return everything


def _digests(files: DiskFiles, size: int, digest: str) -> tuple[Digests, str]:
    """Return the sidecar; where it cannot be used a new one, of which nothing is to be believed, and why."""
    try:
        found = Digests.open(files.digests, writable=True)
    except (FileNotFoundError, InvalidInput) as error:
        why = f"its digests could not be used: {error}"
    else:
        if found.size == size:
            return found, ""
        with found:
            why = f"its digests are of {found.size} bytes, and the disk has {size}"
    return Digests.create(files.digests, size=size, algorithm=algorithm_of(digest)), why


def _plan(base: Base, digests: Digests, changed: Changed, *, torn: dirty.Torn | None, lost: str) -> Plan:
    """torn: the digests as a whole are not the manifest's, and need not be. lost: see `_digests`."""
    since, now, done = base.image.change_id, base.disk.change_id, torn.done if torn else ()
    tracked = (same_tracking(at, now) for at in (since, *(each.at for each in done)))
    why = base.grown or lost or next(filter(None, tracked), "") or ("" if torn else sound(base, digests))
    if since and not why:
        try:
            return Plan(changed=_changed_since(since, done, changed), why="")
        except ChangeIdInvalid as error:
            why = str(error.reason)
    log.warning("all is read, and what differs is written path=%s why=%r", base.image.path, why)
    return Plan(changed=None, why=why)


def _changed_since(since: str, done: Sequence[dirty.Attempt], changed: Changed) -> tuple[Extent, ...]:
    """Return what was written since the manifest; of leaves that are of a later point, what was written since that."""
    found = changed(since)
    for attempt in done:
        if attempt.leaves:
            later = within(changed(attempt.at), attempt.leaves)
            found = merged([*without(found, attempt.leaves), *later])
    return found


def _synced(
    base: Base, plan: Plan, changes: Changes, result: PatchResult, verified: ReadBack, read_back: int
) -> Synced:
    now = {
        "change_id": base.disk.change_id,
        "source": base.disk.datastore_path,
        "virtual_size": base.disk.capacity_bytes,
        "digest": result.digest,
    }
    took = {"bytes_transferred": result.bytes_transferred, "seconds": result.seconds, "verified": verified}
    return Synced(
        image=base.image.model_copy(update=now | took),
        how=plan.how,
        why=plan.why,
        changed_bytes=changes.length,
        written_bytes=result.bytes_written,
        read_here_bytes=result.bytes_read_here,
        read_back_bytes=read_back,
        leaves_in_doubt=result.leaves_in_doubt,
    )
