"""What the janitor is asked, and what it found."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
)

from tasks.models.base import Value


class JanitorJob(BaseModel):
    """What the janitor looks at, and whether it may remove what dead runs left."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    remove: bool = Field(
        default=False,
        title="Remove",
        description="Remove what is ours, whose job is dead and whose time is over. Off: only say what there is.",
        examples=[True],
    )
    folders: tuple[Path, ...] = Field(
        default=(),
        title="Folders",
        description="Output folders on the worker's machine, such as /data/exports, to look through for what dead runs "
        "left. Those that snapshots name are looked at in any case.",
        examples=[["/data/exports"]],
    )
    locks_after_h: float = Field(
        default=24.0,
        title="Locks after",
        description="Hours after which the name of a dead run is taken out of the lock of its job.",
        examples=[24],
        gt=0,
    )
    journals_after_days: float = Field(
        default=7.0,
        title="Journals after",
        description="Days after which journals and parts of a job that nobody went on with are removed. A complete "
        "copy never is.",
        examples=[7],
        gt=0,
    )


LeftoverKind = Literal["snapshot", "consolidation", "vddk", "lock", "journal", "slots"]


class Leftover(Value):
    """Something that a run left. where: vCenter, or folder; done: what came of it, and `why`. age_s: 0 if not known."""

    kind: LeftoverKind
    where: str
    what: str
    done: Literal["removed", "would be removed", "left", "failed"]
    why: str
    age_s: float = 0.0
    room: str = ""


class JanitorReport(Value):
    """What a janitor found. looked_at: vCenters and folders; troubles: what could not be looked at."""

    removed: bool
    looked_at: tuple[str, ...]
    troubles: tuple[str, ...]
    leftovers: tuple[Leftover, ...]
