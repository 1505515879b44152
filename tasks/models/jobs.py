"""What an operator asks for: a class a job, checked before anything is done."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from tasks.models.results import ArrivalFormat, Compression, ImageFormat
from tasks.models.wishes import DiskJob, ExportTransport, JobOptions, OptionalText, RoutedJob, StartableJob


class ExportJob(StartableJob, RoutedJob):
    """Which VM to export, where to, and how."""

    # The form that the Prefect UI shows is made of this; it shows neither examples nor comments.

    format: ImageFormat = Field(
        default="qcow2",
        title="Image format",
        description="qcow2 (thin, what libvirt prefers) or raw (sparse file), written as the bytes arrive; vmdk, vdi "
        "and vhdx are converted from raw afterwards, which takes room for both.",
        examples=["qcow2"],
    )
    compression: Compression = Field(
        default="none",
        title="Compression",
        description="Of qcow2, in a second pass over what arrived, which takes room for both: zstd (QEMU 5.1 or newer) "
        "or zlib. none: written in one pass.",
        examples=["none"],
    )

    @property
    def image_format(self) -> ImageFormat:
        return self.format

    @property
    def image_compression(self) -> Compression:
        return self.compression

    @property
    def arrival_format(self) -> ArrivalFormat:
        """The one asked for, where one pass can write that."""
        return "qcow2" if self.format == "qcow2" and self.compression == "none" else "raw"

    @model_validator(mode="after")
    def _definable(self) -> Self:
        if self.define and self.format == "vhdx":
            raise ValueError("libvirt has no vhdx disks, so there is no domain to define: choose another format")
        return self

    @model_validator(mode="after")
    def _compressible(self) -> Self:
        if self.compression != "none" and self.format != "qcow2":
            raise ValueError(f"compression {self.compression} is of qcow2 images, and the format is {self.format}")
        if self.boot_check and self.format == "vhdx":
            raise ValueError("libvirt starts nothing from vhdx, so there is no boot to check")
        return self


class VddkJob(DiskJob):
    """Which disk of which VM to read through VDDK, and where to: raw, not converted."""

    disk: OptionalText = Field(
        default="",
        title="Disk",
        description="Key (2000), label (Hard disk 1) or number (0, in the order of the VM's device list). Empty: the "
        "only one, or the first of several, and the report says so.",
        examples=["Hard disk 1"],
    )
    all_disks: bool = Field(default=False, title="All disks", description="Read every disk of the VM.", examples=[True])

    @model_validator(mode="after")
    def _one_choice(self) -> Self:
        if self.disk and self.all_disks:
            raise ValueError(f"all disks and disk {self.disk} exclude each other")
        return self


class DownloadJob(JobOptions):
    """Whose files to download, which of them, and where to."""

    include_glob: tuple[str, ...] = Field(
        default=(),
        title="Only these",
        description="Patterns such as *.vmx or *.vmdk, of the path inside the VM's folder (* also matches /): only "
        "files that match one are downloaded. None: all.",
        examples=[["*.vmx", "*.vmdk"]],
    )
    exclude_glob: tuple[str, ...] = Field(
        default=(),
        title="Not these",
        description="Patterns such as *.iso: files that match one are left out. Lock, swap and log files of a VM that "
        "is not powered off are left out in any case, and the report names them.",
        examples=[["*.iso"]],
    )
    max_files: int = Field(
        default=1000,
        title="Most files",
        description="If there are more files than this to download, the run is refused before the first byte.",
        examples=[1000],
        ge=1,
    )
    concurrency: int = Field(
        default=3,
        title="Files at once",
        description="How many files are downloaded side by side, each over up to 4 connections.",
        examples=[3],
        ge=1,
        le=16,
    )
    fail_on_missing: bool = Field(
        default=False,
        title="Fail on missing files",
        description="Fail if a disk's file that the VM's configuration names is not there, or any file goes while the "
        "run lasts. Off: the report names it; only a file that a disk is made of must not go.",
        examples=[False],
    )
    snapshot: bool = Field(
        default=False,
        title="Snapshot a running VM",
        description="Freeze a VM that runs by a snapshot, removed at the end: its frozen disks are downloaded, its "
        "live deltas are not. Without it a VM that runs is refused, since its host locks the disks. No effect on one "
        "that is powered off.",
        examples=[True],
    )


class VerifyJob(BaseModel):
    """Which copy to verify."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    folder: Path = Field(
        title="Folder",
        description="Folder of one VM on the worker's machine, in which an export or a download has left its "
        "manifest.json, such as /data/exports/production-web.",
        examples=["/data/exports/production-web"],
    )
    against_source: bool = Field(
        default=False,
        title="Against the source",
        description="Also read a random sample of each disk at the source (which needs the vCenter): while the "
        "snapshot that was copied still exists, or the VM is off and its disks were not written to since.",
        examples=[False],
    )
    sample: int = Field(
        default=64,
        title="Sample",
        description="How many leaves of 256 KiB of each disk are read at the source.",
        examples=[64],
        ge=1,
        le=1_000_000,
    )
    seed: int = Field(
        default=0,
        title="Seed",
        description="Of the sample, to read the same one again; 0: another each time, and the report says which.",
        examples=[0],
        ge=0,
    )


class SyncJob(RoutedJob):
    """Which VM to copy once, and then only what changed of it, and how."""

    format: ArrivalFormat = Field(
        default="raw",
        title="Image format",
        description="Of the first copy: raw (sparse file) or qcow2. Later runs keep to what is there.",
        examples=["raw"],
    )
    enable_cbt: bool = Field(
        default=False,
        title="Switch on changed block tracking",
        description="Where the VM does not track its changed blocks, switch that on: one snapshot, no reboot. Off: "
        "such a VM is refused.",
        examples=[True],
    )

    @property
    def image_format(self) -> ImageFormat:
        return self.format

    @property
    def arrival_format(self) -> ArrivalFormat:
        return self.format

    @field_validator("transport")
    @classmethod
    def _seeks(cls, transport: ExportTransport) -> ExportTransport:
        if not transport.seeks:
            others = ", ".join(each for each in ExportTransport if each.seeks)
            raise ValueError(f"{transport} reads a disk only from its beginning to its end: choose among {others}")
        return transport

    @property
    def tracked(self) -> bool:
        return True

    @property
    def seeking(self) -> bool:
        return True
