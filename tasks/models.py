"""The values that travel between steps: frozen, comparable, JSON and back; no connection and no live object.

Sizes and offsets are bytes. Which vSphere property each field comes from is said where it is filled
(`tasks.vsphere`), not here.
"""

from __future__ import annotations

import re
from datetime import datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AwareDatetime,
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
from tasks.text import for_xml

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


class FolderSettings(Value):
    """The road `folder` needs nothing but the connection to the vCenter."""

    road: Literal["folder"] = "folder"


class VddkSettings(Value):
    """Where VMware's VDDK lies here, and how it is to read.

    libdir: its distribution's root, or the folder of its libraries; None: looked for where it usually is.
    transport_modes: tried in that order. compression: of what goes over the network. large_buffers: sixteen times
    64 KiB, four of them, for each session with a host.
    """

    road: Literal["vddk"] = "vddk"
    libdir: Path | None = None
    transport_modes: str = VDDK_TRANSPORT_MODES
    compression: VddkCompression = "none"
    large_buffers: bool = False


NBD_BLANKS = (
    "host", "port", "user", "esxi", "moref", "snapshot", "path", "key", "number", "thumbprint", "socket",
    "password_fd", "secret_fd",
)  # fmt: skip
"""What may stand in braces in the URI or command of an NBD source; the last three in a command only."""
BLANK = re.compile(r"(?<!\$){([a-z_]+)}")  # `${name}` is a shell's
NBD_SCHEMES = ("nbd", "nbd+unix", "nbds")


class NbdSettings(Value):
    """An NBD server that there is, or a command that is one: exactly one of the two, with blanks to fill for a disk.

    command: words; it serves on stdin and stdout, or on the socket that `{socket}` names, and stays in the foreground.
    secret: what it may read from the file descriptor `{secret_fd}`. trust: of a server reached by TLS.
    """

    road: Literal["nbd"] = "nbd"
    uri: str = ""
    command: tuple[str, ...] = ()
    trust: Trust = Trust()
    secret: SecretStr | None = Field(default=None, exclude=True)

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if bool(self.uri) == bool(self.command):
            raise ValueError("give the URI of an NBD server, or a command that is one")
        if self.uri and self.uri.partition("://")[0] not in NBD_SCHEMES:
            raise ValueError(f"{self.uri!r} begins with none of {', '.join(f'{each}://' for each in NBD_SCHEMES)}")
        known = NBD_BLANKS if self.command else NBD_BLANKS[:-3]
        for word in (self.uri, *self.command):
            for blank in BLANK.findall(word):
                if blank not in known:
                    raise ValueError(f"{{{blank}}} is no blank: there are {', '.join(known)}")
        return self


class SshSettings(Value):
    """An account at an ESXi host that may log in by SSH.

    host_key: the host's, pinned: `SHA256:…` or `ssh-ed25519 AAAA…`. key: a private key in OpenSSH's or PEM form.
    password: of the account, or of the key where one is given.
    """

    road: Literal["ssh"] = "ssh"
    host: str
    port: int = 22
    user: str = "root"
    host_key: str
    key: SecretStr | None = Field(default=None, exclude=True)
    password: SecretStr | None = Field(default=None, exclude=True)

    @field_validator("host_key")
    @classmethod
    def _is_a_key(cls, text: str) -> str:
        return normalise_host_key(text)

    @model_validator(mode="after")
    def _has_a_secret(self) -> Self:
        if not (self.key or self.password):
            raise ValueError(f"give a key or a password of {self.user} at {self.host}")
        return self


def normalise_host_key(text: str) -> str:
    """Return `SHA256:…` or `<type> <base64>` out of a fingerprint, a public key or a line of known_hosts.

    Raises InvalidInput.
    """
    if match := re.search(r"\bSHA256:[A-Za-z0-9+/]{43}\b", text):
        return match[0]
    if match := re.search(r"\b((?:ssh|ecdsa)-[\w@.-]+) +(AAAA[A-Za-z0-9+/]+=*)", text):
        return f"{match[1]} {match[2]}"
    raise InvalidInput(
        what="SSH host key",
        why=f"{text!r} is neither SHA256:… nor a public key",
        remedy="Copy it at the host itself (ssh-keygen -lf /etc/ssh/ssh_host_rsa_key.pub)",
    )


class LeaseSettings(Value):
    """The road `nfc_lease` needs nothing but the connection to the vCenter."""

    road: Literal["nfc_lease"] = "nfc_lease"


RoadSettings = Annotated[
    FolderSettings | VddkSettings | NbdSettings | SshSettings | LeaseSettings, Field(discriminator="road")
]
"""What a road needs to know beside the disk, a class a road. A job's state holds it: a secret in it is not dumped."""


class SkippedRoad(Value):
    """A road that was not taken, and why."""

    road: str
    why: str


class Roads(Value):
    """The roads that a job may take, best first, and why others are not among them."""

    candidates: tuple[RoadSettings, ...] = (FolderSettings(),)
    skipped: tuple[SkippedRoad, ...] = ()


class ServiceTicket(Value):
    """What opens one URL by one method, once, at an ESXi host whose certificate has `thumbprint` (None: not said)."""

    id: SecretStr
    host: str
    port: int
    thumbprint: str | None


class LeasedDevice(Value):
    """What an export lease gives of a VM: a device by its key, behind a URL that opens it without a login.

    thumbprint: of the certificate of the host that the URL names; "" where the lease does not say.
    """

    key: str
    url: SecretStr
    thumbprint: str = ""


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
    connected: bool = True  # when the VM starts


class Controller(Value):
    """A storage controller; `model` is its vSphere type (`ParaVirtualSCSIController`)."""

    key: int
    model: str
    bus: int


class Device(Value):
    """Another device that a VM has by choice; `model`: its vSphere type (`VirtualCdrom`), `backing`: what is in it."""

    key: int
    label: str
    model: str
    backing: str = ""
    controller_key: int | None = None
    unit_number: int | None = None


class VirtualMachine(Value):
    """One VM, where it lies, and what it is made of. Names are shown decoded (`%2f` is `/`).

    `boot_keys`: keys of the disks and network cards that it was told to boot from, first first. `cores_per_socket`: 0
    where vSphere chooses. `devices`: what is neither disk, controller nor network card, and not on every board.
    """

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
    secure_boot: bool = False
    boot_keys: tuple[int, ...] = ()
    cpus: int
    cores_per_socket: int = 0
    memory_mib: int
    video_ram_kib: int = 0
    vmx_path: str
    guest_id: str = ""
    guest_addresses: tuple[str, ...] = ()
    controllers: tuple[Controller, ...] = ()
    nics: tuple[Nic, ...] = ()
    devices: tuple[Device, ...] = ()
    cbt_enabled: bool = False
    change_version: str = ""


class VirtualDisk(Value):
    """One disk of a snapshot. `index` is its place in the device list: the `<n>` of every `disk-<n>`.

    `datastore_path` is `[datastore] folder/x.vmdk`; `parents` the same of the backings below it, nearest first.
    `object_id` names the vSAN or vVol object that the disk is; None for one that lies in files.
    `problem` and `remedy` say why no road of ours can copy it, `problem_kind` in a word; None if one can.
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
    problem_kind: str | None = None
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
DigestName = Literal["blake3", "sha256"]


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
    controller_key: int | None = None
    unit_number: int | None = None
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


class Domain(Value):
    """What `path` (relative to the manifest's folder) has libvirt start, and how that differs from the source.

    `networks`: libvirt's by the source's. `changed`: what is otherwise than it was. `not_carried`: what is not there.
    """

    path: str
    name: str
    uuid: str
    machine: Literal["pc", "q35"]
    networks: dict[str, str] = {}
    changed: tuple[str, ...] = ()
    not_carried: tuple[str, ...] = ()


class Manifest(Value):
    """One VM at one point in time: enough for a later sync or verification to need nothing else."""

    version: int = FORMAT_VERSION
    vcenter_uuid: str
    vm: VirtualMachine
    snapshot: Snapshot | None
    disks: tuple[DiskImage, ...]
    domain: Domain | None = None
    consistent: bool
    created: str
    warnings: tuple[str, ...] = ()
    skipped_roads: tuple[SkippedRoad, ...] = ()


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


Verdict = Literal[
    "equal",
    "content differs",
    "digests differ",
    "both differ",
    "manifest differs",
    "missing",
    "damaged",
    "unreadable",
    "in use",
]


class VerifiedFile(Value):
    """What verifying says of one file of an export or a download.

    `bytes_read`: the rest are holes. `wrong_leaves`: how many of its leaves are not as their digests say, None where
    there are none to compare with; `first_wrong`: the first of them, those that touch made one.
    """

    path: str
    format: ImageFormat | Literal["file"]
    size_bytes: int
    bytes_read: int = 0
    read: ReadBack = "skipped"
    wrong_leaves: int | None = None
    first_wrong: tuple[Extent, ...] = ()
    verdict: Verdict
    detail: str = ""
    remedy: str = ""


class SampledDisk(Value):
    """What a random sample of a disk at the source says: how many leaves were read, and which of them differ."""

    path: str
    source: str
    leaves: int
    wrong: tuple[int, ...]


class SourceSample(Value):
    """What the source said of a copy. `point`: why it still holds what was copied. The `seed` chooses the leaves."""

    point: str
    seed: int
    disks: tuple[SampledDisk, ...]


class Verification(Value):
    """What verifying a folder says. `made`: when its manifest was. `equal`: every file is as the manifest says, and
    so was the sample of the `source`, where one was taken."""

    folder: Path
    vm: str
    moref: str
    made: str
    files: tuple[VerifiedFile, ...]
    source: SourceSample | None = None
    equal: bool
    seconds: float


BootVerdict = Literal["boots", "fails", "unknown"]
Accelerator = Literal["kvm", "tcg"]


class BootCheck(Value):
    """What came of starting a domain aside. `recognised`: the line that the verdict rests on, or why there is none.

    `serial_tail` and `screen_text` are the last lines of either; `notes` say what of the machine was not the domain's.
    """

    version: int = FORMAT_VERSION
    domain: str
    verdict: BootVerdict
    recognised: str
    accelerator: Accelerator
    seconds: float
    serial_tail: tuple[str, ...] = ()
    screen_text: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    created: str


# ── warm migration ───────────────────────────────────────────────────────────────────────────────────


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
    parts: dict[str, Estimate] = {}
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
    parts: dict[str, float] = {}
    how: str = ""
    folder: Path | None = None
    removal_s: float | None = None
    notes: tuple[str, ...] = ()


# ── what an operator asks for ────────────────────────────────────────────────────────────────────────


class ExportTransport(StrEnum):
    """Roads out of vSphere that `export` can take."""

    auto = "auto"
    vddk = "vddk"
    nbd = "nbd"
    folder = "folder"
    ssh = "ssh"
    nfc_lease = "nfc_lease"


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


class ExportJob(StartableJob):
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


class SyncJob(DiskJob):
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

    @property
    def tracked(self) -> bool:
        return True


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


class SnapshotWishes(Value):
    """How a snapshot is to be taken, where a mode has no options of its own for that."""

    snapshot_moref: str = ""
    quiesce: bool = False
    allow_crash_consistent: bool = False


EXPORT_MODES = ("export", "download_only", "vddk_download", "cbt_sync", "warm_migration")


class ExportOptions(BaseModel):
    """The source document's options: one flat value for every mode. `job()` turns them into the mode's own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    vm_name: str = Field(min_length=1)
    output_dir: Path
    export_mode: str = "export"
    transport: str = "auto"
    vddk_libdir: OptionalText = ""
    nbd_uri: str = ""
    nbd_command: str = ""
    nbd_ca_file: OptionalText = ""
    nbd_source: str = ""
    esxi_host: str = ""
    esxi_user: str = "root"
    esxi_host_key: str = ""
    esxi_key_file: Path | None = None
    esxi_password_file: Path | None = None
    esxi_block: str = ""
    limit_rate: str = ""
    overcommit: bool = False
    digest: str = "blake3"
    format: str | None = None
    compression: str = "none"
    quiesce: bool = False
    allow_crash_consistent: bool = False
    snapshot_moref: str | None = None
    parallel_disks: int = 2
    skip_readback: bool = False
    network_map: tuple[str, ...] = ()
    define: bool = False
    libvirt_uri: str = "qemu:///system"
    define_while_source_runs: bool = False
    include_glob: tuple[str, ...] = ()
    exclude_glob: tuple[str, ...] = ()
    max_files: int = 1000
    download_only_concurrency: int = 3
    fail_on_missing: bool = False
    snapshot: bool = False
    boot_check: bool = False
    boot_timeout_s: int = 0
    boot_expect: str = ""
    boot_accelerator: str = "auto"
    enable_cbt: bool = False
    downtime_budget: timedelta = timedelta(minutes=1)
    cutover: str = "none"
    cutover_at: str = ""
    shut_down_source: bool = False
    power_off_source: bool = False
    shutdown_timeout: timedelta = timedelta(minutes=5)
    expected_shutdown: timedelta = timedelta(0)
    rename_source: str = ""
    disconnect_source: bool = False
    pause: timedelta = timedelta(minutes=1)
    convert_to: str = ""
    sample: int = 64
    disk: str = ""
    all_disks: bool = False

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, values: Any) -> Any:
        unknown = sorted(set(values) - set(cls.model_fields)) if isinstance(values, dict) else []
        if unknown:
            raise NotBuilt(what=f"the option {', '.join(unknown)}", instead=f"one of {', '.join(cls.model_fields)}")
        return values

    def job(self) -> ExportJob | DownloadJob | SyncJob | VddkJob | WarmJob:
        """Return the mode's options; raise NotBuilt for a mode or transport of the source that is not built yet."""
        if self.export_mode not in EXPORT_MODES:
            raise NotBuilt(what=f"the export mode {self.export_mode!r}", instead=" or ".join(map(repr, EXPORT_MODES)))
        if self.transport not in list(ExportTransport):
            raise NotBuilt(
                what=f"the transport {self.transport!r}", instead=" or ".join(map(repr, map(str, ExportTransport)))
            )
        if self.export_mode == "download_only":
            return DownloadJob(concurrency=self.download_only_concurrency, **self._those_of(DownloadJob))
        if self.export_mode == "vddk_download":
            return VddkJob(**self._those_of(VddkJob))
        if self.export_mode == "cbt_sync":
            return SyncJob(**self._those_of(SyncJob))
        if self.export_mode == "warm_migration":
            return WarmJob(boot=self.boot(), **self._those_of(WarmJob))
        return ExportJob(boot=self.boot(), **self._those_of(ExportJob))

    def boot(self) -> BootWishes:
        """Return how a boot check is to be done."""
        wishes = {"timeout_s": self.boot_timeout_s, "expect": self.boot_expect, "accelerator": self.boot_accelerator}
        return BootWishes.model_validate(wishes)

    def _those_of(self, mode: type[JobOptions]) -> dict[str, Any]:
        return self.model_dump(include=set(mode.model_fields), exclude_none=True)


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
