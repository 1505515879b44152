"""What jobs have in common: the options that several of them take, and how they are checked."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    TypeAdapter,
    field_validator,
)

from tasks.models.results import ArrivalFormat, Compression, DigestName, ImageFormat
from tasks.text import for_xml


class ExportTransport(StrEnum):
    """Roads out of vSphere."""

    auto = "auto"
    vddk = "vddk"
    nbd = "nbd"
    folder = "folder"
    ssh = "ssh"
    nfc_lease = "nfc_lease"

    @property
    def seeks(self) -> bool:
        """Whether it reads a disk here and there, and not only all of it in a row."""
        return self is not ExportTransport.nfc_lease


SLOWEST_BYTES_PER_S = 64 * 1024

OptionalText = Annotated[str, BeforeValidator(lambda value: str(value) if isinstance(value, Path) else value or "")]
"""Text that may be left out, or a path as text. None is read as "": a field `str | None` becomes two tabs, "str" and
"None", in a form."""


def _bytes_of(rate: str) -> int:
    """Return what `60MiB` or `60MiB/s` is in bytes. Raises pydantic.ValidationError."""
    return int(TypeAdapter(ByteSize).validate_python(rate.removesuffix("/s")))


def split_network(entry: str) -> tuple[str, str]:
    """Return what `VM Network:lan` maps, and to which; the last colon counts. Raises ValueError."""
    source, _, target = entry.rpartition(":")
    if not (source and target.strip() and target.isprintable() and "/" not in target):
        raise ValueError(f"{entry!r} is not a network of vSphere, a colon, and a network of libvirt (VM Network:lan)")
    return source, target.strip()


class JobOptions(BaseModel):
    """Which VM, and where to."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    vm_name: str = Field(
        title="VM",
        description="Name (production-web), inventory path (/DC0/vm/production/web), moref (vm-1042) or UUID. "
        "A name that several VMs have is refused.",
        examples=["/DC0/vm/production/web", "vm-1042", "production-web"],
        min_length=1,
    )
    output_dir: Path = Field(
        title="Output folder",
        description="Folder on the worker's machine, such as /data/exports; one named after the VM is made in it.",
        examples=["/data/exports"],
    )

    limit_rate: OptionalText = Field(
        default="",
        title="Rate limit",
        description="Bytes a second that all disks and files of this run take together at most: 60MiB, 1GB, 500K. "
        "Empty: as fast as it goes.",
        examples=["60MiB"],
    )

    digest: DigestName = Field(
        default="blake3",
        title="Digest",
        description="Of what was read, leaf by leaf: blake3, or sha256 for those who must, at four times its cost.",
        examples=["blake3"],
    )
    overcommit: bool = Field(
        default=False,
        title="Begin although it may not fit",
        description="Thick disks count with their capacity, and the run is refused where that is not free here. On: it "
        "begins, since what is zero takes no room, and fails if it does not fit.",
        examples=[False],
    )

    @property
    def bytes_per_s(self) -> int | None:
        """The rate limit; None where there is none."""
        return _bytes_of(self.limit_rate) if self.limit_rate else None

    @field_validator("limit_rate")
    @classmethod
    def _is_a_rate(cls, text: str) -> str:
        if text and _bytes_of(text) < SLOWEST_BYTES_PER_S:
            raise ValueError(f"{text} is less than {SLOWEST_BYTES_PER_S // 1024} KiB a second: servers hang up on that")
        return text


class BootWishes(BaseModel):
    """How long a copy is given to boot, and what proves that it has."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    timeout_s: int = Field(
        default=0,
        title="Time-out (s)",
        description="Seconds that the guest is given. 0: 120 under KVM, 300 where QEMU must emulate the processor.",
        examples=[120],
        ge=0,
    )
    expect: OptionalText = Field(
        default="",
        title="Expected text",
        description="Regular expression of what the guest says on its serial port, or shows in text mode, once it is "
        "up. Empty: a login prompt, systemd's multi-user target, or Windows' serial console.",
        examples=["app server ready"],
    )
    accelerator: Literal["auto", "kvm", "tcg"] = Field(
        default="auto",
        title="Accelerator",
        description="auto: KVM where it works, else TCG, which emulates the processor and is slow.",
        examples=["auto"],
    )

    @field_validator("expect")
    @classmethod
    def _is_a_pattern(cls, text: str) -> str:
        try:
            re.compile(text)
        except re.error as error:
            raise ValueError(f"{text!r} is no regular expression: {error}") from error
        return text


class BootJob(BaseModel):
    """Which copy to start, and what proves that it boots."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    folder: Path = Field(
        title="Folder of the copy",
        description="Folder on the worker's machine that an export has written, with domain.xml in it.",
        examples=["/data/exports/production-web"],
    )
    scratch: OptionalText = Field(
        default="",
        title="Scratch folder",
        description="Where what the guest writes lies meanwhile. Empty: beside the images.",
        examples=["/var/tmp"],
    )
    boot: BootWishes = Field(
        default=BootWishes(),
        title="Boot check",
        description="How long the copy is given, and what proves that it has started.",
        examples=[{"timeout_s": 120}],
    )


class DiskJob(JobOptions):
    """How the disks of a VM are frozen, copied and checked, in every mode that makes images of them.

    image_format, image_compression: of the images; arrival_format: in which the bytes are written as they arrive.
    tracked: whether vSphere tracks the VM's changed blocks, and is asked what is allocated at all.
    """

    quiesce: bool = Field(
        default=False,
        title="Quiesce the guest",
        description="Ask VMware Tools to flush file systems before the snapshot (Windows: VSS).",
        examples=[True],
    )
    allow_crash_consistent: bool = Field(
        default=False,
        title="Allow crash-consistent",
        description="If quiescing fails, take a crash-consistent snapshot instead, and say so in the report.",
        examples=[False],
    )
    snapshot_moref: OptionalText = Field(
        default="",
        title="Existing snapshot",
        description="Moref of a snapshot to copy from (snapshot-57), which is left alone. "
        "Empty: one is made, and removed.",
        examples=["snapshot-57"],
        pattern=r"^\S*$",
    )
    parallel_disks: int = Field(
        default=2,
        title="Disks at once",
        description="How many disks of the VM are copied side by side.",
        examples=[2],
        ge=1,
        le=16,
    )
    skip_readback: bool = Field(
        default=False,
        title="Skip reading back",
        description="Do not read the target again to verify it. The report says that it was skipped.",
        examples=[False],
    )
    network_map: tuple[str, ...] = Field(
        default=(),
        title="Networks",
        description="Which network of libvirt takes the place of one of vSphere's, each as VM Network:lan. A network "
        "that is not named becomes libvirt's default.",
        examples=[["VM Network:lan"]],
    )

    @property
    def networks(self) -> dict[str, str]:
        """libvirt's networks by vSphere's."""
        return dict(split_network(each) for each in self.network_map)

    @field_validator("network_map")
    @classmethod
    def _maps_networks(cls, entries: tuple[str, ...]) -> tuple[str, ...]:
        for each in entries:
            split_network(each)
        return entries

    @field_validator("output_dir")
    @classmethod
    def _fits_xml(cls, folder: Path) -> Path:
        if for_xml(str(folder)) != str(folder):
            raise ValueError(
                f"domain.xml cannot name images in {str(folder)!r}: choose a folder without such characters"
            )
        return folder

    @property
    def image_format(self) -> ImageFormat:
        return "raw"

    @property
    def image_compression(self) -> Compression:
        return "none"

    @property
    def arrival_format(self) -> ArrivalFormat:
        return "raw"

    @property
    def tracked(self) -> bool:
        return False


class RoutedJob(DiskJob):
    """Which road the disks' bytes take. seeking: it must be one that seeks."""

    transport: ExportTransport = Field(
        default=ExportTransport.auto,
        title="Transport",
        description="The road that the disks' bytes take. auto takes the best one that works, and says which.",
        examples=["auto"],
    )
    vddk_libdir: OptionalText = Field(
        default="",
        title="VDDK folder",
        description="With the transport vddk: VMware's unpacked vmware-vix-disklib-distrib on the worker's machine. "
        "Empty: looked for where it usually is.",
        examples=["/usr/lib/vmware-vix-disklib"],
    )

    @property
    def seeking(self) -> bool:
        return False


class StartableJob(DiskJob):
    """What else becomes of a copy that libvirt can start: defined there, and seen to boot."""

    define: bool = Field(
        default=False,
        title="Define in libvirt",
        description="Put the exported domain into libvirt, not started. Refused before the first byte while the "
        "source VM is powered on.",
        examples=[True],
    )
    libvirt_uri: str = Field(
        default="qemu:///system",
        title="libvirt",
        description="URI of the libvirt that the domain is defined in.",
        examples=["qemu:///system"],
        min_length=1,
    )
    define_while_source_runs: bool = Field(
        default=False,
        title="Define while the source runs",
        description="Define the domain although its source is powered on: whoever starts it then has the same MACs, "
        "addresses and identity twice.",
        examples=[False],
    )
    boot_check: bool = Field(
        default=False,
        title="Check that it boots",
        description="Start the finished copy aside, on overlays and without a network, and see that it boots. The copy "
        "is kept whatever comes of that; the run fails if it does not.",
        examples=[True],
    )
    boot: BootWishes = Field(
        default=BootWishes(),
        title="Boot check",
        description="How long the copy is given, and what proves that it has started.",
        examples=[{"timeout_s": 120}],
    )
