"""What came of a job: images, manifests, verdicts."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import (
    Field,
)

from tasks.models.base import FORMAT_VERSION, Value
from tasks.models.inventory import Extent, Snapshot, VirtualDisk, VirtualMachine
from tasks.models.roads import SkippedRoad

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
    networks: dict[str, str] = Field(default_factory=dict)
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
