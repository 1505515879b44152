"""`disk-<n>.dirty`: which leaves of an image a sync is about to change, written durably before it changes them.

While there is one, the image is of no point in time, and what is in those leaves, and their digests, is not known. The
leaves that were done are in it too, with the changeId that they are of: what was fetched is not fetched again. It goes
once a manifest says what the image is of.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterable
from pathlib import Path

from pydantic import ValidationError

from tasks.errors import DiskFull, InvalidInput
from tasks.images.extents import leaf_aligned, merged, pieces, whole_disk, without
from tasks.images.files import append_durably, sync, write_atomically
from tasks.images.layout import DiskFiles
from tasks.images.manifest import MANIFEST, read_manifest
from tasks.models import FORMAT_VERSION, Extent, Manifest, Value

WINDOW_BYTES = 32 * 1024 * 1024  # of leaves that are told at once, at least; a kill leaves a few of them in doubt
WINDOWS = 1024  # at most: each waits for the disk once

_log = logging.getLogger(__name__)


class Attempt(Value):
    """A sync that did not come to its end: `leaves` are as they were at the changeId `at`, and so are their digests."""

    at: str
    leaves: tuple[Extent, ...] = ()


class Torn(Value):
    """An image between points in time. leaves: of which it is not known what is in them. done: what was before that."""

    version: int = FORMAT_VERSION
    leaves: tuple[Extent, ...] = ()
    done: tuple[Attempt, ...] = ()


class _Line(Value):
    """What a window adds: `(start, length)` of leaves that are about to change, and of those that were done."""

    leaves: tuple[tuple[int, int], ...]
    done: tuple[tuple[int, int], ...]


def torn_of(files: DiskFiles, *, size: int) -> Torn | None:
    """Return what a sync left that did not come to its end, None where none did; all in doubt if that is unreadable."""
    try:
        return _read(files.dirty.read_bytes(), size=size)
    except FileNotFoundError:
        return None
    except (ValueError, ValidationError) as error:
        _log.warning("a dirty list is damaged: all is fetched path=%s error=%s", files.dirty, type(error).__name__)
        return Torn(leaves=whole_disk(size))


def _read(content: bytes, *, size: int) -> Torn:
    """Return what a list says. What follows its last end of a line is not of it: nothing was written for that yet."""
    head, *rest = content.split(b"\n")
    begun = Torn.model_validate_json(head)
    if begun.version != FORMAT_VERSION:
        raise ValueError(f"version {begun.version}")
    lines = [_Line.model_validate_json(line) for line in rest[:-1]]
    if lines and not begun.done:
        raise ValueError("windows of no attempt")
    told = [Extent(start=start, length=length) for line in lines for start, length in line.leaves]
    done = [Extent(start=start, length=length) for line in lines for start, length in line.done]
    doubt = leaf_aligned(without([*begun.leaves, *told], done), size=size)
    if not lines:
        return begun.model_copy(update={"leaves": doubt})
    *earlier, last = begun.done
    before = [each.model_copy(update={"leaves": without(each.leaves, told)}) for each in earlier]
    now = last.model_copy(update={"leaves": merged([*last.leaves, *done])})
    return begun.model_copy(update={"leaves": doubt, "done": (*before, now)})


def begin(files: DiskFiles, leaves: Iterable[Extent], done: Iterable[Attempt] = ()) -> None:
    """Say durably that `leaves` are about to change, in place of what was said before. Raises DiskFull."""
    attempts = [{"at": each.at, "leaves": _told(each.leaves)} for each in done]
    content = {"version": FORMAT_VERSION, "leaves": _told(leaves), "done": attempts}
    write_atomically(files.dirty, json.dumps(content) + "\n")


def distrust(folder: Path, manifest: Manifest) -> None:
    """Say durably that nothing in the images of a folder is to be believed: the next sync fetches all of it."""
    for image in manifest.disks:
        begin(DiskFiles(folder, image.index), whole_disk(image.virtual_size))


class DirtyList:
    """What a sync is about to change, told window by window, before it does; and what it has done. For several threads.

    planned: whole leaves, sorted. at: the changeId of the point that they are brought to. at_once: all of them are in
    doubt from the beginning. Made, it has said durably that the image is torn. Each window is a line more in the file,
    so that a long list costs what it is long, and not that again for every window.
    """

    def __init__(
        self,
        files: DiskFiles,
        planned: Iterable[Extent],
        before: Torn,
        *,
        at: str,
        at_once: bool,
        window_bytes: int = WINDOW_BYTES,
    ) -> None:
        self.planned = tuple(planned)
        self.done_before = merged(leaf for each in before.done for leaf in each.leaves)
        self._path = files.dirty
        self._window_bytes = max(window_bytes, sum(leaf.length for leaf in self.planned) // WINDOWS)
        told = self.planned if at_once else ()
        self._windows = iter(() if at_once else [*pieces(self.planned, self._window_bytes)])
        self._told_up_to = self._enough_up_to = told[-1].end if told else 0
        self._done: list[Extent] = []
        self._failure: OSError | DiskFull | None = None
        self._lock = threading.Lock()
        earlier = (each.model_copy(update={"leaves": without(each.leaves, told)}) for each in before.done)
        begin(files, merged([*before.leaves, *told]), [*earlier, Attempt(at=at)])

    @property
    def touched(self) -> tuple[Extent, ...]:
        """The leaves that this sync, or one before it that did not come to its end, changes."""
        return merged([*self.planned, *self.done_before])

    def ahead(self, end: int) -> None:
        """Return once it is durable that all that is planned before byte `end` is about to change. Raises DiskFull.

        Who comes to the last window that was told tells the next one, while the others go on in that.
        """
        if end <= self._enough_up_to or not self._lock.acquire(blocking=end > self._told_up_to):
            return
        try:
            while end > self._enough_up_to:
                if window := self._next_window(end):
                    self._append(window)
                self._enough_up_to = self._told_up_to
                self._told_up_to = window[-1].end if window else self._told_up_to
        finally:
            self._lock.release()

    def append(self, extents: Iterable[Extent]) -> None:
        """Take note that leaves and their digests are durable; written with the next window, or by `settle`."""
        with self._lock:
            self._done.extend(extents)

    def settle(self) -> None:
        """Say durably what was done. Raises DiskFull."""
        with self._lock:
            self._append(())

    def _next_window(self, end: int) -> list[Extent]:
        window, length = list[Extent](), 0
        for piece in self._windows:
            window.append(piece)
            length += piece.length
            if piece.end >= end and length >= self._window_bytes:
                break
        return window

    def _append(self, window: Iterable[Extent]) -> None:
        """Write, durably, a line more: `window` is in doubt from now on, and what was done before it is not."""
        if self._failure:
            raise self._failure  # what is left of a line would spoil the next one
        try:
            append_durably(self._path, json.dumps({"leaves": _pairs(window), "done": _pairs(self._done)}) + "\n")
        except (OSError, DiskFull) as error:
            self._failure = error
            raise
        self._done.clear()


def _told(leaves: Iterable[Extent]) -> list[dict[str, int]]:
    return [{"start": leaf.start, "length": leaf.length} for leaf in leaves]


def _pairs(leaves: Iterable[Extent]) -> list[tuple[int, int]]:
    return [(leaf.start, leaf.length) for leaf in leaves]


def forget(folder: Path) -> None:
    """Drop every dirty list of a folder, durably: its manifest says what its images are of."""
    for path in folder.glob("disk-*.dirty"):
        path.unlink(missing_ok=True)
    sync(folder)


def is_torn(folder: Path) -> bool:
    """Tell whether images of a folder are between two points in time."""
    return any(folder.glob("disk-*.dirty"))


def refuse_torn(folder: Path) -> None:
    """Raise InvalidInput where images of a folder are of no one point in time: nothing else may be made of them."""
    if is_torn(folder):
        raise _torn(folder, "a sync was killed in it, and its images are of no point in time")
    if (folder / MANIFEST).exists():
        manifest = read_manifest(folder)
        if isinstance(manifest, Manifest) and not manifest.consistent:
            raise _torn(folder, "its manifest says that its disks are of several points in time")


def _torn(folder: Path, why: str) -> InvalidInput:
    return InvalidInput(what=f"copy in {folder}", why=why, remedy="Run cbt-sync again, to its end")
