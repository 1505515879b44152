"""`.hyper2kvm.job.json`: how far the job of a folder is, for the run that follows one that was killed."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from pydantic import ValidationError

from tasks.images.files import part_of, sync, write_atomically
from tasks.images.layout import left_overs
from tasks.models import (
    FORMAT_VERSION,
    Arrival,
    DigestName,
    FolderSettings,
    RoadSettings,
    SkippedRoad,
    Snapshot,
    Value,
    VirtualDisk,
    VirtualMachine,
)

STATE = ".hyper2kvm.job.json"

_log = logging.getLogger(__name__)


class JobState(Value):
    """What a job copies, from which point in time, and which of its disks are here already.

    digest: the hash that content is told by. tracked: vSphere is asked what of the disks is allocated. selection: which
    of the VM's disks were asked for, in words; "": all. left_out: the others' titles. resumable: whether the next run
    goes on with it; not with a sync, nor with a copy before its first byte, of which this says only whose access VDDK
    is to end. road: how they are read, and skipped_roads: why not otherwise. A run killed on `vddk` leaves the VM
    prepared for access, under identities made of the job's id and the disks' numbers (`tasks.road`), until the next run
    ends that.
    """

    version: int = FORMAT_VERSION
    job_id: str
    flow_run_id: str
    vcenter_uuid: str
    vm: VirtualMachine
    snapshot: Snapshot | None
    disks: tuple[VirtualDisk, ...]
    resumable: bool = True
    arrivals: tuple[Arrival, ...] = ()
    digest: DigestName = "blake3"
    tracked: bool = False
    selection: str = ""
    left_out: tuple[str, ...] = ()
    road: RoadSettings = FolderSettings()
    skipped_roads: tuple[SkippedRoad, ...] = ()

    @property
    def all_arrived(self) -> bool:
        """Whether nothing is needed from the source any more."""
        return bool(self.disks) and {disk.index for disk in self.disks} == {each.disk.index for each in self.arrivals}


def read_state(folder: Path) -> JobState | None:
    """Return the state of the job of `folder`; None where there is none, or none that this version can use."""
    path = folder / STATE
    try:
        text = path.read_bytes()
        if (version := json.loads(text).get("version")) != FORMAT_VERSION:
            _log.warning("job state of another version is not used path=%s version=%s", path, version)
            return None
        return JobState.model_validate_json(text)
    except FileNotFoundError:
        return None
    except (ValueError, AttributeError, ValidationError) as error:
        _log.warning("damaged job state is not used path=%s error=%s", path, type(error).__name__)
        return None


def resumable(folder: Path) -> bool:
    """Tell whether the job of `folder` is one that the next run goes on with."""
    state = read_state(folder)
    return bool(state and state.resumable)


def write_state(folder: Path, state: JobState) -> None:
    """Replace the state of the job of `folder`, whole and durable, or leave it as it was."""
    write_atomically(folder / STATE, state.model_dump_json(indent=2) + "\n")


def discard(folder: Path) -> None:
    """Forget the job of `folder`: its state first, durably, then journals and parts.

    A file under a final name stays, and so does whatever is not named as we name things. May be cut short anywhere,
    and called again.
    """
    for path in (folder / STATE, part_of(folder / STATE)):
        path.unlink(missing_ok=True)
    sync(folder)
    for path in left_overs(folder):
        path.unlink(missing_ok=True)
    sync(folder)
