"""What a wave is, as an operator says it: which VMs, in which groups, how, when, and when to stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from tasks.errors import InvalidInput
from tasks.models import OptionalText
from tasks.wave.graph import ordered
from tasks.wave.window import parse_moment, zone

WaveMode = Literal["export", "download_only", "vddk_download", "cbt_sync", "warm_migration"]
KINDS = ("name", "path", "folder", "tag", "regex")  # of selectors: what may stand before the colon
CANARY = "canary"


class _Form(BaseModel):
    """Part of a form: frozen; an unknown field is an error, not noise."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def as_selector(given: Any) -> Any:
    """Return a selector as text: `{"folder": "/DC/vm/prod"}`, as YAML reads well, is `folder:/DC/vm/prod`."""
    if isinstance(given, dict) and len(given) == 1:
        ((kind, value),) = given.items()
        if kind not in KINDS:
            raise ValueError(f"a selector is one of {', '.join(KINDS)}, not {kind!r}")
        return f"{kind}:{value}"
    return given


def _selectors(given: Any) -> Any:
    return tuple(as_selector(each) for each in given) if isinstance(given, list | tuple) else given


_SELECT = (
    "VMs, each by name, inventory path, moref or UUID, or by a pattern of name or path (web-*, /DC/vm/prod/*); also "
    "folder:/DC/vm/prod, tag:migrate, regex:^web-[0-9]+$."
)


class Group(_Form):
    """VMs that belong together: what must be done before them, and how they are migrated."""

    name: str = Field(title="Name", description="Of the group.", examples=["database"], min_length=1)
    select: tuple[str, ...] = Field(default=(), title="VMs", description=_SELECT, examples=[["db-*"]])
    after: tuple[str, ...] = Field(
        default=(),
        title="After",
        description="Groups whose VMs must all be migrated before the first of this one starts.",
        examples=[["database"]],
    )
    approve: bool = Field(
        default=False,
        title="Ask before it starts",
        description="Have somebody approve, in the Prefect UI, before the first VM of the group starts.",
        examples=[True],
    )
    mode: Literal["", "export", "download_only", "vddk_download", "cbt_sync", "warm_migration"] = Field(
        default="", title="Mode", description="Of the group's VMs; empty: the wave's.", examples=["cbt_sync"]
    )
    options: dict[str, Any] = Field(
        default={},
        title="Options",
        description="Of the mode, for the VMs of the group, beside the wave's own.",
        examples=[{"format": "raw"}],
    )

    _as_text = field_validator("select", mode="before")(_selectors)


class Window(_Form):
    """When VMs may be started."""

    start: OptionalText = Field(
        default="",
        title="Start",
        description="When the first VM may start: 22:00, or 2026-11-28T22:00. Empty: at once.",
        examples=["22:00"],
    )
    stop: OptionalText = Field(
        default="",
        title="Hard stop",
        description="From then on nothing is started; what runs is finished. 06:00, or 2026-11-29T06:00. Empty: none.",
        examples=["06:00"],
    )
    timezone: str = Field(
        default="UTC", title="Time zone", description="Of both times, where they name none.", examples=["Europe/Berlin"]
    )

    @model_validator(mode="after")
    def _readable(self) -> Self:
        zone(self.timezone)
        for text in (self.start, self.stop):
            if text:
                parse_moment(text)
        return self


class FailurePolicy(_Form):
    """How many VMs may fail before nothing more is started, and whether what failed is tried again."""

    stop_after: int = Field(
        default=0,
        title="Stop after failures",
        description="Once so many VMs have failed, nothing more is started. 0: no such rule.",
        examples=[3],
        ge=0,
    )
    stop_share: float = Field(
        default=0.0,
        title="Stop at a share of failures",
        description="Once this share of the VMs that have ended (of ten at least) failed, nothing more is started. "
        "0: no such rule.",
        examples=[0.2],
        ge=0,
        le=1,
    )
    retry_failed: int = Field(
        default=0,
        title="Retries of what failed",
        description="How many more times a VM that failed is tried, after all others.",
        examples=[1],
        ge=0,
        le=10,
    )


class Limits(_Form):
    """What runs at once at most. While the wave runs these are global concurrency limits of Prefect: change them so."""

    runs: int = Field(
        default=4,
        title="VMs at once",
        description="Of the whole wave. A worker takes no more than its own limit; 2 to 4 on two cores with SQLite.",
        examples=[4],
        ge=1,
        le=1000,
    )
    vcenter: int = Field(
        default=200, title="Disks of a vCenter", description="At once, of the wave.", examples=[200], ge=1, le=10_000
    )
    host: int = Field(
        default=10, title="Disks of an ESXi host", description="At once, of each.", examples=[10], ge=1, le=1000
    )
    datastore: int = Field(
        default=32, title="Disks of a datastore", description="At once, of each.", examples=[32], ge=1, le=1000
    )


class Wave(_Form):
    """Which VMs to migrate, in which order, how and when."""

    name: str = Field(
        default="wave",
        title="Name",
        description="Of the wave: letters, digits, dot, dash and underscore.",
        examples=["finance-1"],
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,60}$",
    )
    file: OptionalText = Field(
        default="",
        title="File",
        description="A YAML or CSV file on the worker's machine that describes the wave; what it says takes the place "
        "of what stands here.",
        examples=["/etc/hyper2kvm/finance-1.yaml"],
    )
    output_dir: OptionalText = Field(
        default="",
        title="Output folder",
        description="Folder on the worker's machine in which each VM gets a folder of its own.",
        examples=["/data/exports"],
    )
    mode: WaveMode = Field(
        default="export", title="Mode", description="What is done with each VM.", examples=["export"]
    )
    options: dict[str, Any] = Field(
        default={},
        title="Options",
        description="Of the mode, for every VM, named as in the mode's own form.",
        examples=[{"format": "qcow2", "quiesce": True}],
    )
    select: tuple[str, ...] = Field(default=(), title="VMs", description=_SELECT, examples=[["/DC/vm/prod/*"]])
    exclude: tuple[str, ...] = Field(
        default=(), title="Not these", description="VMs that are left out, named likewise.", examples=[["*-test"]]
    )
    overrides: dict[str, dict[str, Any]] = Field(
        default={},
        title="Exceptions",
        description="By VM (name, inventory path or moref): options of the mode, mode or output_dir of this one alone.",
        examples=[{"web-7": {"format": "raw"}}],
    )
    groups: tuple[Group, ...] = Field(
        default=(),
        title="Groups",
        description="VMs that wait for others. VMs above that are in no group wait for none.",
        examples=[[{"name": "application", "select": ["app-*"], "after": ["database"]}]],
    )
    canary: tuple[str, ...] = Field(
        default=(),
        title="Canaries",
        description="VMs of the wave that go first: if one of them fails, no other starts.",
        examples=[["web-1"]],
    )
    approve_plan: bool = Field(
        default=False,
        title="Ask before the first",
        description="Have somebody approve the plan in the Prefect UI before anything starts.",
        examples=[True],
    )
    approve_after_canary: bool = Field(
        default=False,
        title="Ask after the canaries",
        description="Have somebody approve in the Prefect UI once the canaries are done.",
        examples=[True],
    )
    window: Window = Field(
        default=Window(), title="Window", description="When VMs may be started.", examples=[{"stop": "06:00"}]
    )
    failure: FailurePolicy = Field(
        default=FailurePolicy(), title="Failures", description="When to stop.", examples=[{"stop_after": 3}]
    )
    limits: Limits = Field(
        default=Limits(), title="Limits", description="What runs at once at most.", examples=[{"runs": 4}]
    )
    dry_run: bool = Field(
        default=False,
        title="Plan only",
        description="Check every VM, show the plan, and start nothing.",
        examples=[True],
    )

    _as_text = field_validator("select", "exclude", "canary", mode="before")(_selectors)

    @model_validator(mode="after")
    def _groups_in_order(self) -> Self:
        names = [group.name for group in self.groups]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"there are two groups {name!r}")
        ordered({group.name: group.after for group in self.groups})
        return self

    def folder(self) -> Path:
        """Return the output folder. Raises InvalidInput where none is given."""
        if not self.output_dir:
            raise InvalidInput(what="output_dir", why="the wave has none", remedy="Name a folder for its copies")
        return Path(self.output_dir)


class PreflightJob(_Form):
    """Which VMs to check, and for what."""

    select: tuple[str, ...] = Field(title="VMs", description=_SELECT, examples=[["/DC/vm/prod/*"]], min_length=1)
    output_dir: Path = Field(
        title="Output folder",
        description="Folder on the worker's machine that the copies are to go to: its room is looked at.",
        examples=["/data/exports"],
    )
    mode: WaveMode = Field(
        default="export", title="Mode", description="What is to be done with each VM.", examples=["export"]
    )
    options: dict[str, Any] = Field(
        default={},
        title="Options",
        description="Of the mode, named as in the mode's own form.",
        examples=[{"quiesce": True}],
    )

    _as_text = field_validator("select", mode="before")(_selectors)
