"""What dead runs leave in the folders of copies: a name in a lock, journals, parts. A complete copy is none of it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from tasks.images.claim import beats_elsewhere
from tasks.images.dirty import is_torn
from tasks.images.job import LOCK, holder_and_whether_held, job_lock
from tasks.images.layout import left_overs
from tasks.images.manifest import MANIFEST
from tasks.images.mirror import PARTS, forget
from tasks.images.state import STATE, JobState, discard, read_state
from tasks.models import Value


class LeftJob(Value):
    """The folder of a job. holder: whose name is in its lock.

    held: whether a run is at work on it now, or may be on another machine: we see its heartbeat, if not its lock.
    silent_s: since the lock was last touched. idle_s: since anything of what arrives was, None where nothing is there.
    finished: why what is there must stay, "" where nothing says so.
    """

    folder: Path
    holder: dict[str, str]
    held: bool
    silent_s: float
    idle_s: float | None
    finished: str
    state: JobState | None


def left_jobs(root: Path) -> Iterator[LeftJob]:
    """Yield the jobs whose folder is `root`, or lies in it."""
    for folder in (root, *sorted(path for path in root.glob("*/") if not path.is_symlink())):
        if (folder / LOCK).is_file():
            yield left_job(folder)


def left_job(folder: Path) -> LeftJob:
    """Return what is to be known of the job of a folder that has a lock."""
    holder, held = holder_and_whether_held(folder)
    state, now = read_state(folder), time.time()
    silent_s = now - (folder / LOCK).stat().st_mtime
    arriving = [path.stat().st_mtime for path in _arriving(folder)]
    return LeftJob(
        folder=folder,
        holder=holder,
        held=held or beats_elsewhere(holder, silent_s),
        silent_s=silent_s,
        idle_s=now - max(arriving) if arriving else None,
        finished=_finished(folder, state),
        state=state,
    )


def _arriving(folder: Path) -> Iterator[Path]:
    yield from left_overs(folder)
    yield from (path for path in (folder / STATE, folder / PARTS) if path.exists())
    yield from (folder / PARTS).glob("*")


def _finished(folder: Path, state: JobState | None) -> str:
    if is_torn(folder):
        return "a sync was cut off there, which the next one makes good"
    if (folder / MANIFEST).exists():
        return "a finished copy is there"
    if state and state.all_arrived:
        return "every disk has arrived, and needs nothing of the source any more: run the job again"
    return ""


def clear_lock(folder: Path, holder: dict[str, str]) -> None:
    """Take the name of a dead run out of the lock. Raises JobLocked where a run is at work there."""
    with job_lock(folder, holder):
        pass


def drop_parts(folder: Path, holder: dict[str, str]) -> None:
    """Drop journals and parts of a job that nobody goes on with; see `discard`. Raises JobLocked."""
    with job_lock(folder, holder):
        give_up = forget if (folder / PARTS).is_dir() else discard
        give_up(folder)
