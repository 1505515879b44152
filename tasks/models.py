"""The values that travel between steps: frozen, comparable, JSON and back; no connection and no live object.

Sizes and offsets are bytes. Which vSphere property each field comes from is said where it is filled
(`tasks.vsphere`), not here.
"""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    SecretStr,
    TypeAdapter,
    field_validator,
    model_validator,
)

from tasks.errors import InvalidInput, NotBuilt

SECTOR_BYTES = 512
FORMAT_VERSION = 1


class Value(BaseModel):
    """A frozen value; an unknown field is an error, not noise."""

    model_config = ConfigDict(frozen=True, extra="forbid")


# ── where and who ────────────────────────────────────────────────────────────────────────────────────


class Trust(Value):
    """Why the certificate of a server is believed: a pinned thumbprint, else CAs, else (in words) nothing.

    `thumbprint` is hex digits in upper case without colons: 40 for SHA-1, 64 for SHA-256.
    `ca_pem` is PEM text; None is the system's own CAs.
    """

    ca_pem: str | None = None
    thumbprint: str | None = None
    verify: bool = True

    @field_validator("thumbprint", mode="before")
    @classmethod
    def _normalised(cls, value: str | None) -> str | None:
        return normalise_thumbprint(value) if value else None


CONNECTIONS = 4  # of a disk: one gave 445 Mbit/s from an ESXi host, eight 730


class Connection(Value):
    """Everything needed to log in to one vCenter or ESXi host, and to read from it.

    connections: HTTPS connections that a disk or file is read over. host_tickets: whether large files may come from
    the ESXi hosts themselves.
    """

    host: str
    port: int = 443
    username: str
    password: SecretStr
    trust: Trust = Trust()
    connections: int = Field(default=CONNECTIONS, ge=1, le=32)
    host_tickets: bool = True

    @property
    def address(self) -> str:
        """`host:port`, the host in brackets where it is an IPv6 address."""
        return f"{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"


def normalise_thumbprint(text: str) -> str:
    """Read a SHA-1 or SHA-256 thumbprint in any usual spelling; return upper-case hex without separators.

    Colons, spaces, dashes and a leading `sha1`/`sha256` with `:` or `=` (also openssl's `sha256 Fingerprint=`)
    may stand or be left out. Raises InvalidInput.
    """
    stripped = re.sub(r"^\s*sha-?(1|256)(\s*fingerprint)?\s*[:=]\s*", "", text, flags=re.IGNORECASE)
    digits = re.sub(r"[\s:-]", "", stripped).upper()
    if len(digits) not in (40, 64) or re.search(r"[^0-9A-F]", digits):
        raise InvalidInput(
            what="thumbprint",
            why=f"{text!r} has not the 40 hex digits of SHA-1 nor the 64 of SHA-256",
            remedy="Copy it whole: openssl x509 -noout -fingerprint -sha256 prints it",
        )
    return digits


def split_address(text: str) -> tuple[str, int | None]:
    """Split `host`, `host:port`, `[v6]:port` or an `https://host:port/sdk` URL into host and port (None: not said)."""
    bare = re.sub(r"^https?://", "", text.strip()).partition("/")[0]
    match = re.fullmatch(r"(?:\[(?P<v6>[0-9A-Fa-f:.%\w]+)\]|(?P<name>[^:\s\[\]]+))(?::(?P<port>\d{1,5}))?", bare)
    if match:
        return match["v6"] or match["name"], int(match["port"]) if match["port"] else None
    if re.fullmatch(r"[0-9A-Fa-f:.]+", bare) and bare.count(":") > 1:
        return bare, None
    raise InvalidInput(
        what="vCenter address",
        why=f"{text!r} is neither a host nor host:port",
        remedy="Give a name or an address, with the port after a colon where it is not 443",
    )


VDDK_TRANSPORT_MODES = "nbdssl:nbd:hotadd:san"
VddkCompression = Literal["none", "zlib", "fastlz", "skipz"]


class VddkSettings(Value):
    """Where VMware's VDDK lies here, and how it is to read.

    libdir: its distribution's root, or the folder of its libraries; None: looked for where it usually is.
    transport_modes: tried in that order. compression: of what goes over the network. large_buffers: sixteen times
    64 KiB, four of them, for each session with a host.
    """

    libdir: Path | None = None
    transport_modes: str = VDDK_TRANSPORT_MODES
    compression: VddkCompression = "none"
    large_buffers: bool = False


class ServiceTicket(Value):
    """What opens one URL by one method, once, at an ESXi host whose certificate has `thumbprint` (None: not said)."""

    id: SecretStr
    host: str
    port: int
    thumbprint: str | None


class VCenterInfo(Value):
    """Which server answered: `ServiceContent.about`. `uuid`: vCenter's instance, or a lone ESXi host's hardware."""

    uuid: str
    name: str
    version: str
    build: str
    is_vcenter: bool


# ── what there is ────────────────────────────────────────────────────────────────────────────────────


class Nic(Value):
    """A network card as the guest sees it, and the network it is on."""

    key: int
    label: str
    model: str
    mac: str | None
    network: str | None


class Controller(Value):
    """A storage controller; `model` is its vSphere type (`ParaVirtualSCSIController`)."""

    key: int
    model: str
    bus: int


class VirtualMachine(Value):
    """One VM, where it lies, and what it is made of. Names are shown decoded (`%2f` is `/`)."""

    moref: str
    name: str
    instance_uuid: str
    bios_uuid: str
    inventory_path: str
    datacenter_path: str
    host_path: str
    host_name: str
    vpx_uri: str
    power_state: Literal["poweredOn", "poweredOff", "suspended"]
    firmware: Literal["bios", "efi"]
    cpus: int
    memory_mib: int
    vmx_path: str
    guest_id: str = ""
    guest_addresses: tuple[str, ...] = ()
    controllers: tuple[Controller, ...] = ()
    nics: tuple[Nic, ...] = ()
    cbt_enabled: bool = False
    change_version: str = ""


class VirtualDisk(Value):
    """One disk of a snapshot. `index` is its place in the device list: the `<n>` of every `disk-<n>`.

    `datastore_path` is `[datastore] folder/x.vmdk`; `parents` the same of the backings below it, nearest first.
    `object_id` names the vSAN or vVol object that the disk is; None for one that lies in files.
    `problem` and `remedy` say why no road of ours can copy it; None if one can.
    """

    index: int
    key: int
    label: str
    controller_key: int | None
    unit_number: int | None = None
    datastore_path: str
    capacity_bytes: int
    backing: str
    object_id: str | None = None
    thin: bool = False
    uuid: str | None = None
    change_id: str | None = None
    parents: tuple[str, ...] = ()
    problem: str | None = None
    remedy: str | None = None

    @property
    def title(self) -> str:
        """What errors call it: `Hard disk 1 ([datastore1] web/web.vmdk)`."""
        return f"{self.label} ({self.datastore_path or self.backing})"


class Snapshot(Value):
    """A snapshot by reference; `ours` is false for one that existed and must be left alone."""

    moref: str
    name: str
    created: str
    quiesced: bool
    ours: bool


class Extent(Value):
    """Bytes [start, start + length) of a disk, both multiples of 512 except at the end of an odd-sized image."""

    start: int = Field(ge=0)
    length: int = Field(gt=0)

    @property
    def end(self) -> int:
        return self.start + self.length


# ── what came of it ──────────────────────────────────────────────────────────────────────────────────


ImageFormat = Literal["qcow2", "raw", "vmdk", "vdi", "vhdx"]
ArrivalFormat = Literal["raw", "qcow2"]
Compression = Literal["none", "zlib", "zstd"]
ReadBack = Literal["direct", "cached", "skipped"]


class Arrival(Value):
    """One disk as it arrived: a part in `format` and its digests, not yet verified, not yet under a final name."""

    disk: VirtualDisk
    format: ArrivalFormat = "raw"
    digest: str
    bytes_transferred: int
    road: str
    road_reason: str = ""
    seconds: float


class DiskImage(Value):
    """One disk as it lies here. `digest` is of the guest-visible content, whatever the format.

    `path` is relative to the manifest's folder. `converted`: by a second pass, not
    as the bytes arrived. `verified` says how it was read back: `direct` past the page
    cache, `cached` where the file system refuses that, `skipped` where the operator said so.
    """

    index: int
    disk_key: int
    uuid: str | None
    change_id: str | None
    source: str
    path: str
    format: ImageFormat
    virtual_size: int
    digest: str
    bytes_transferred: int
    road: str
    road_reason: str = ""
    converted: bool = False
    verified: ReadBack
    seconds: float = 0.0


class Manifest(Value):
    """One VM at one point in time: enough for a later sync or verification to need nothing else."""

    version: int = FORMAT_VERSION
    vcenter_uuid: str
    vm: VirtualMachine
    snapshot: Snapshot | None
    disks: tuple[DiskImage, ...]
    consistent: bool
    created: str
    warnings: tuple[str, ...] = ()


class DatastoreFile(Value):
    """One file of a VM as the datastore browser lists it. `path` is where it goes, below the download's folder.

    `modified` is ISO 8601, "" where the browser does not say.
    """

    datastore_path: str
    path: str
    size_bytes: int
    modified: str = ""


class LeftOut(Value):
    """A file of the VM that was not downloaded, and why."""

    path: str
    why: str


class DownloadedFile(DatastoreFile):
    """One file as it lies here, byte for byte. `point`: the point in time it was read at. `digest`: BLAKE3 tree."""

    digest: str
    point: str
    bytes_transferred: int
    road: str
    road_reason: str = ""
    verified: ReadBack
    seconds: float = 0.0


class DownloadManifest(Value):
    """The files of one VM. `consistent`: all of one point in time. `earlier`: of runs before, gone from the source."""

    version: int = FORMAT_VERSION
    mode: Literal["download_only"] = "download_only"
    vcenter_uuid: str
    vm: VirtualMachine
    snapshot: Snapshot | None
    files: tuple[DownloadedFile, ...]
    left_out: tuple[LeftOut, ...] = ()
    missing: tuple[str, ...] = ()
    earlier: tuple[DownloadedFile, ...] = ()
    consistent: bool
    created: str
    warnings: tuple[str, ...] = ()


# ── what an operator asks for ────────────────────────────────────────────────────────────────────────


class ExportTransport(StrEnum):
    """Roads out of vSphere that `export` can take."""

    auto = "auto"
    folder = "folder"
    vddk = "vddk"


SLOWEST_BYTES_PER_S = 64 * 1024

OptionalText = Annotated[str, BeforeValidator(lambda value: str(value) if isinstance(value, Path) else value or "")]
"""Text that may be left out, or a path as text. None is read as "": a field `str | None` becomes two tabs, "str" and
"None", in a form."""


def _bytes_of(rate: str) -> int:
    """Return what `60MiB` or `60MiB/s` is in bytes. Raises pydantic.ValidationError."""
    return int(TypeAdapter(ByteSize).validate_python(rate.removesuffix("/s")))


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


class DiskJob(JobOptions):
    """How the disks of a VM are frozen, copied and checked, in every mode that makes images of them.

    image_format, image_compression: of the images; arrival_format: in which the bytes are written as they arrive.
    chains: whether the road reads what lies in chains of redo logs, not in flat files alone.
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
    def chains(self) -> bool:
        return True


class ExportJob(DiskJob):
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
    def image_format(self) -> ImageFormat:
        return self.format

    @property
    def image_compression(self) -> Compression:
        return self.compression

    @property
    def arrival_format(self) -> ArrivalFormat:
        """The one asked for, where one pass can write that."""
        return "qcow2" if self.format == "qcow2" and self.compression == "none" else "raw"

    @property
    def chains(self) -> bool:
        return self.transport is ExportTransport.vddk

    @model_validator(mode="after")
    def _compressible(self) -> Self:
        if self.compression != "none" and self.format != "qcow2":
            raise ValueError(f"compression {self.compression} is of qcow2 images, and the format is {self.format}")
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
        description="Fail if a disk's file that the VM's configuration names is not there. Off: the report names it.",
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


class SnapshotWishes(Value):
    """How a snapshot is to be taken, where a mode has no options of its own for that."""

    snapshot_moref: str = ""
    quiesce: bool = False
    allow_crash_consistent: bool = False
    chains: bool = False


MODES = ("export", "download_only", "vddk_download")


class ExportOptions(BaseModel):
    """The source document's options: one flat value for every mode. `job()` turns them into the mode's own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    vm_name: str = Field(min_length=1)
    output_dir: Path
    export_mode: str = "export"
    transport: str = "auto"
    vddk_libdir: OptionalText = ""
    limit_rate: str = ""
    format: str = "qcow2"
    compression: str = "none"
    quiesce: bool = False
    allow_crash_consistent: bool = False
    snapshot_moref: str | None = None
    parallel_disks: int = 2
    skip_readback: bool = False
    include_glob: tuple[str, ...] = ()
    exclude_glob: tuple[str, ...] = ()
    max_files: int = 1000
    download_only_concurrency: int = 3
    fail_on_missing: bool = False
    snapshot: bool = False
    disk: str = ""
    all_disks: bool = False

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, values: Any) -> Any:
        unknown = sorted(set(values) - set(cls.model_fields)) if isinstance(values, dict) else []
        if unknown:
            raise NotBuilt(what=f"the option {', '.join(unknown)}", instead=f"one of {', '.join(cls.model_fields)}")
        return values

    def job(self) -> ExportJob | DownloadJob | VddkJob:
        """Return the mode's options; raise NotBuilt for a mode or transport of the source that is not built yet."""
        if self.export_mode not in MODES:
            raise NotBuilt(what=f"the export mode {self.export_mode!r}", instead=" or ".join(map(repr, MODES)))
        if self.transport not in list(ExportTransport):
            raise NotBuilt(
                what=f"the transport {self.transport!r}", instead=" or ".join(map(repr, map(str, ExportTransport)))
            )
        if self.export_mode == "download_only":
            return DownloadJob(concurrency=self.download_only_concurrency, **self._those_of(DownloadJob))
        if self.export_mode == "vddk_download":
            return VddkJob(**self._those_of(VddkJob))
        return ExportJob(**self._those_of(ExportJob))

    def _those_of(self, mode: type[JobOptions]) -> dict[str, Any]:
        return self.model_dump(include=set(mode.model_fields))
