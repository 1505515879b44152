"""What the Python API takes for every mode, in the words of the source document."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    model_validator,
)

from tasks.errors import NotBuilt
from tasks.models.base import Value
from tasks.models.jobs import DownloadJob, ExportJob, SyncJob, VddkJob
from tasks.models.migration import WarmJob
from tasks.models.wishes import BootWishes, ExportTransport, JobOptions, OptionalText


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
