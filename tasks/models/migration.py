"""What a warm migration measures, forecasts, and notes for its way back."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path
from typing import Literal, Self

from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    field_validator,
    model_validator,
)

from tasks.models.base import FORMAT_VERSION, Value
from tasks.models.jobs import SyncJob
from tasks.models.results import ImageFormat, Manifest
from tasks.models.wishes import OptionalText, StartableJob


class Round(Value):
    """What a round of a warm migration took. All `_s` are seconds.

    window_s: from the snapshot before this one's to its, in which `changed_bytes` were written. transfer_s: for
    fetching them. overhead_s: for the rest of the sync. taken: when its snapshot was, by the source's clock (ISO 8601).
    whole: whether the guest ran all through the window.
    """

    number: int
    taken: str
    window_s: float
    whole: bool = True
    changed_bytes: int
    snapshot_s: float
    transfer_s: float
    overhead_s: float
    sample_s: float
    consolidation_s: float = 0.0


class Estimate(Value):
    """A number that is not known yet: what is expected, and how far it may be off to either side."""

    expected: float
    off: float = 0.0

    @property
    def low(self) -> float:
        return max(0.0, self.expected - self.off)

    @property
    def high(self) -> float:
        return self.expected + self.off


ForecastVerdict = Literal["too early", "fits", "does not fit", "will not converge"]


class Forecast(Value):
    """How long the VM would be down if the cutover began now, in seconds, and how many bytes would have to be fetched.

    why: what the verdict rests on. parts: what the downtime is made of. guessed: parts that nothing was measured of.
    """

    downtime_s: Estimate
    pending_bytes: Estimate
    verdict: ForecastVerdict
    why: str = ""
    parts: dict[str, Estimate] = Field(default_factory=dict)
    guessed: tuple[str, ...] = ()


class NicState(Value):
    """Whether a network card is connected, and will be when the VM is powered on."""

    key: int
    connected: bool
    start_connected: bool


class Aside(Value):
    """What a cutover did to its source, each said before it was done: all that a rollback needs.

    name, renamed_to: as vSphere stores them; "" where it was not renamed. nics: as they were; whether they were
    `disconnected`.
    domain, libvirt_uri: what was defined where; "" where nothing was.
    """

    version: int = FORMAT_VERSION
    vcenter_uuid: str
    moref: str
    instance_uuid: str
    name: str
    shown_name: str
    was_on: bool
    renamed_to: str = ""
    nics: tuple[NicState, ...] = ()
    disconnected: bool = False
    domain: str = ""
    libvirt_uri: str = ""
    created: str


class Migration(Value):
    """What came of a warm migration. downtime_s: how long the source had been off, or on its way there, when the copy
    was ready to be started; None where there was no cutover.

    parts: what that was made of, in seconds. how: how the source went off. folder: where the images are that the domain
    starts from. removal_s: how long the last snapshot's removal took, beside all that. boot: the boot check's line.
    """

    version: int = FORMAT_VERSION
    mode: Literal["warm_migration"] = "warm_migration"
    manifest: Manifest
    rounds: tuple[Round, ...]
    forecast: Forecast | None
    downtime_s: float | None = None
    parts: dict[str, float] = Field(default_factory=dict)
    how: str = ""
    folder: Path | None = None
    removal_s: float | None = None
    notes: tuple[str, ...] = ()


Cutover = Literal["none", "auto", "at", "approval"]


class WarmJob(SyncJob, StartableJob):
    """Which VM to migrate while it runs, how long it may be down for that, and who says when."""

    downtime_budget: timedelta = Field(
        default=timedelta(minutes=1),
        title="Downtime budget",
        description="How long the VM may be down, from the shutdown of its guest until its copy is ready to be "
        "started: seconds, or ISO 8601 (PT90S).",
        examples=["PT90S"],
        gt=timedelta(0),
    )
    cutover: Cutover = Field(
        default="none",
        title="Cutover",
        description="none: rounds until the forecast fits the budget, and no more. auto: then the source is shut down, "
        "and the copy takes over. at: at a time. approval: once a person says so in Prefect's UI.",
        examples=["approval"],
    )
    cutover_at: OptionalText = Field(
        default="",
        title="Cutover at",
        description="With the cutover at a time: when, with its time zone (2026-05-01T02:00:00+02:00).",
        examples=["2026-05-01T02:00:00+02:00"],
    )
    shut_down_source: bool = Field(
        default=False,
        title="Shut the source down",
        description="A cutover shuts the source's guest down, and is refused unless this says so. VMware Tools must "
        "run in it.",
        examples=[True],
    )
    power_off_source: bool = Field(
        default=False,
        title="Power the source off",
        description="If the guest does not shut down in time, or has no VMware Tools that run, power the source off as "
        "if its plug were pulled.",
        examples=[False],
    )
    shutdown_timeout: timedelta = Field(
        default=timedelta(minutes=5),
        title="Shutdown time-out",
        description="How long the guest is given to shut down: seconds, or ISO 8601.",
        examples=["PT5M"],
        gt=timedelta(0),
    )
    expected_shutdown: timedelta = Field(
        default=timedelta(0),
        title="Expected shutdown",
        description="How long the guest takes to shut down, for the forecast. 0: as long as it took before, by the "
        "vCenter's events.",
        examples=["PT30S"],
        ge=timedelta(0),
    )
    rename_source: OptionalText = Field(
        default="",
        title="Rename the source",
        description="Suffix that the source's name gets at the cutover, such as -migrated. Empty: not renamed.",
        examples=["-migrated"],
    )
    disconnect_source: bool = Field(
        default=False,
        title="Disconnect the source",
        description="At the cutover, have the source's network cards not connect any more when it is powered on.",
        examples=[True],
    )
    pause: timedelta = Field(
        default=timedelta(minutes=1),
        title="Pause between rounds",
        description="From the end of a round to the next: seconds, or ISO 8601.",
        examples=["PT1M"],
        ge=timedelta(0),
    )
    convert_to: OptionalText = Field(
        default="",
        title="Convert to",
        description="What the domain starts from: a full copy as qcow2, raw, vmdk or vdi. Empty: an overlay (qcow2) on "
        "the copy, which takes no time.",
        examples=["qcow2"],
        pattern="^(qcow2|raw|vmdk|vdi)?$",
    )
    sample: int = Field(
        default=64,
        title="Sample",
        description="How many leaves of 256 KiB of each disk are read at the source again each round, and compared.",
        examples=[64],
        ge=1,
        le=1_000_000,
    )

    @property
    def delivered_format(self) -> ImageFormat:
        """Of the images that the domain starts from."""
        return TypeAdapter[ImageFormat](ImageFormat).validate_python(self.convert_to or "qcow2")

    @property
    def cutover_time(self) -> datetime | None:
        """When the cutover is to begin, where that was said."""
        return TypeAdapter[datetime](AwareDatetime).validate_python(self.cutover_at) if self.cutover_at else None

    @field_validator("cutover_at")
    @classmethod
    def _is_a_time_somewhere(cls, text: str) -> str:
        if text:
            TypeAdapter[datetime](AwareDatetime).validate_python(text)
        return text

    @model_validator(mode="after")
    def _said_in_words(self) -> Self:
        if self.cutover != "none" and not self.shut_down_source:
            raise ValueError("a cutover shuts the source's guest down, and nothing says that it may (shut_down_source)")
        if (self.cutover == "at") != bool(self.cutover_at):
            raise ValueError("the cutover at a time needs one (cutover_at), and no other cutover has one")
        if self.snapshot_moref:
            raise ValueError("rounds take snapshots of their own: an existing one has no place in them")
        return self


class RollbackJob(BaseModel):
    """Which migration to undo."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    folder: Path = Field(
        title="Folder",
        description="Folder of the VM on the worker's machine, in which a warm migration has left its rollback.json.",
        examples=["/data/copies/production-db"],
    )
