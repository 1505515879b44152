"""What each mode of a wave is: its options, its deployment, the road it takes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tasks.errors import InvalidInput, NotBuilt
from tasks.models import DownloadJob, ExportJob, JobOptions, SyncJob, VddkJob, WarmJob

JOBS: Mapping[str, type[JobOptions]] = {
    "export": ExportJob,
    "download_only": DownloadJob,
    "vddk_download": VddkJob,
    "cbt_sync": SyncJob,
    "warm_migration": WarmJob,
}


BESIDE = (
    *("toolkit", "nbd_source", "esxi_block"),  # names of saved blocks
    *("vddk_libdir", "nbd_uri", "nbd_command", "nbd_ca_file"),
    *("esxi_host", "esxi_user", "esxi_host_key", "esxi_key_file", "esxi_password_file"),
)
"""Options of a VM that say what its road needs, and are no options of its mode: parameters of their own of a flow."""


def deployment_of(mode: str) -> str:
    """Return flow and deployment of a mode, as Prefect names them: `export/export`."""
    name = mode.replace("_", "-")
    return f"{name}/{name}"


def job_of(mode: str, vm: str, output_dir: str | Path, options: Mapping[str, Any]) -> JobOptions:
    """Return the options of one VM's run. Raises InvalidInput, naming VM and field; NotBuilt for a mode to come."""
    if mode not in JOBS:
        raise NotBuilt(what=f"the mode {mode!r} of a wave", instead=" or ".join(map(repr, JOBS)))
    kind = JOBS[mode]
    beside = set(BESIDE) - kind.model_fields.keys()
    own = {key: value for key, value in options.items() if key not in beside}
    try:
        return kind.model_validate({"vm_name": vm, "output_dir": output_dir, **own})
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "options"
        known = ", ".join(sorted(set(kind.model_fields) - {"vm_name", "output_dir"}))
        raise InvalidInput(
            what=f"option {field} of {vm}",
            why=first["msg"].removeprefix("Value error, "),
            remedy=f"{mode} takes {known}",
        ) from error


def road_of(mode: str, job: JobOptions) -> str:
    """Return the road that the bytes of a run are expected to take; of `auto`, the one that needs nothing: `folder`."""
    asked = str(getattr(job, "transport", "auto"))
    return "vddk" if mode == "vddk_download" else "folder" if asked == "auto" else asked


def slots_of(job: JobOptions, disks: int) -> int:
    """Return how many disks (or files) a run copies at once."""
    return max(1, min(disks, getattr(job, "parallel_disks", getattr(job, "concurrency", 1))))
