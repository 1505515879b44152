"""What a snapshot of ours says of itself: whose it is, where its job is at work, until when it is kept.

Read back it proves nothing but that it is whole: whether the job's id belongs to it is reckoned anew.
"""

from __future__ import annotations

import re
import socket
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, NamedTuple, Self

from pydantic import AwareDatetime, ConfigDict, ValidationError

from tasks.images.job import LOCK, holder_and_whether_held, job_id, machine_id
from tasks.models import Value

LOST_BEATS_S = 600.0  # twenty heartbeats: a job on another machine, whose lock we may not see, has died
NAME = re.compile(r"hyper2kvm-([0-9a-f]{32})")


class Claim(Value):
    """The description of a snapshot. `machine`, `folder`: where its job's lock is; "" by versions that did not say."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    tool: Literal["hyper2kvm"] = "hyper2kvm"
    purpose: str
    flow_run: str | None
    expires: AwareDatetime
    machine: str = ""
    folder: str = ""

    @classmethod
    def read(cls, description: str) -> Self | None:
        """Return what a description says; None where it is not one of ours."""
        try:
            return cls.model_validate_json(description)
        except ValidationError:
            return None


class Judgement(NamedTuple):
    """Whether a snapshot may go, and why; `folder`: its job's, where that is known."""

    may_go: bool
    why: str
    folder: Path | None = None


def judge(
    *, name: str, description: str, vcenter_uuid: str, instance_uuid: str, now: datetime | None = None
) -> Judgement:
    """Say of a snapshot whether it is ours, its time is over and its job dead: only then it may go."""
    claim, wanted = Claim.read(description), NAME.fullmatch(name)
    if wanted is None or claim is None:
        return Judgement(False, "it is not ours: its name or its description is not as ours are")
    if not (claim.machine and claim.folder):
        return Judgement(False, "a version of ours made it that did not say where: remove it in vSphere")
    folder = Path(claim.folder)
    known = job_id(
        vcenter_uuid=vcenter_uuid, instance_uuid=instance_uuid, folder=folder, machine=claim.machine
    )  # which no description can make up for a job that it is not of
    if known != wanted[1]:
        return Judgement(False, "it is not ours: its name is not of the job that its description tells of")
    if claim.expires > (now or datetime.now(UTC)):
        return Judgement(False, f"it is kept until {claim.expires:%Y-%m-%d %H:%M %Z}", folder)
    return judge_job(folder, snapshot=name, machine=claim.machine)


def judge_job(folder: Path, *, snapshot: str, machine: str) -> Judgement:
    """Say whether the job of `folder` on `machine` is dead. Its lock decides, here; and its heartbeat, elsewhere."""
    lock = folder / LOCK
    if not lock.exists():
        where = "here" if machine == machine_id() else f"here, but on the machine {machine}"
        return Judgement(False, f"its job's folder {folder} is not {where}: it may be at work")
    who, held = holder_and_whether_held(folder)
    quiet_s = time.time() - lock.stat().st_mtime
    if held or (machine == machine_id() and beats_elsewhere(who, quiet_s)):
        return Judgement(False, f"its job is at work in {folder}", folder)
    if machine != machine_id() and (who.get("snapshot") != snapshot or quiet_s < LOST_BEATS_S):
        return Judgement(False, f"its job is of the machine {machine}, and nothing here says that it is dead", folder)
    return Judgement(True, "its time is over and its job is dead", folder)


def beats_elsewhere(holder: dict[str, str], silent_s: float) -> bool:
    """Tell whether a run on another host, whose lock we may not see, has touched its job's lock lately.

    Containers may share a machine id, and with it the job, and have a host name each.
    """
    return holder.get("host", socket.gethostname()) != socket.gethostname() and silent_s < LOST_BEATS_S
