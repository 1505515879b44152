"""Step: what came of a download: every file under its name, the manifest beside them, a report among the artifacts."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from prefect import task
from prefect.artifacts import acreate_markdown_artifact
from prefect.cache_policies import NO_CACHE

from blocks import VCenter
from tasks.images.manifest import MANIFEST
from tasks.images.mirror import land_files
from tasks.models import DownloadedFile, DownloadManifest, LeftOut
from tasks.steps import in_thread, quietly
from tasks.text import cell, one_line

ROWS = 200  # of a report; the manifest has all


@task(name="manifest", task_run_name="manifest of {manifest.vm.name}", cache_policy=NO_CACHE)
async def commit_download(manifest: DownloadManifest, folder: Path, known: Mapping[str, DownloadedFile]) -> None:
    """Give every file its name, then write `manifest.json`: from then on the download counts. Raises OutputExists."""
    await in_thread(land_files, None, folder, manifest, known)
    key, description = f"download-{manifest.vm.moref}", f"Download of {one_line(manifest.vm.name)}"
    await quietly(acreate_markdown_artifact(download_report(manifest, folder), key=key, description=description))


def now() -> str:
    """Return the time, as manifests have it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def download_warnings(
    vcenter: VCenter, *, left_out: tuple[LeftOut, ...], missing: tuple[str, ...], running: bool, frozen: bool
) -> tuple[str, ...]:
    """Return what an operator must know of a download beyond its files."""
    warnings = []
    if not vcenter.verify and not vcenter.thumbprint:
        warnings.append("The vCenter's certificate was not verified: the operator turned it off.")
    if frozen:
        warnings.append("The VM ran: its .vmx names a delta that is not here; the frozen base of each disk is.")
    elif running:
        warnings.append("The VM was not powered off and no snapshot was asked for: the files are not of one time.")
    if running and left_out:
        warnings.append(f"Left out: {', '.join(each.path for each in left_out)}.")
    warnings += [f"Missing at the source: {path}." for path in missing]
    return tuple(warnings)


def download_report(manifest: DownloadManifest, folder: Path) -> str:
    """Return the report of a download as GitHub markdown."""
    vm, snapshot, files = manifest.vm, manifest.snapshot, manifest.files
    lines = [
        f"# Download of {cell(vm.name)}",
        "",
        *(f"> **Note:** {cell(warning)}\n" for warning in manifest.warnings),
        "| | |",
        "| --- | --- |",
        f"| Inventory path | {cell(vm.inventory_path)} ({vm.moref}) |",
        f"| Power state | {vm.power_state} |",
        f"| Snapshot | {cell(snapshot.name)}, {snapshot.created} |" if snapshot else "| Snapshot | none |",
        f"| Output | {cell(str(folder))} |",
        f"| Files | {len(files)}, {sum(file.size_bytes for file in files):,} bytes |",
        f"| Transferred now | {sum(file.bytes_transferred for file in files):,} bytes |",
        *(f"| Left out | {cell(each.path)}: {cell(each.why)} |" for each in manifest.left_out[:ROWS]),
        "",
        "| File | Bytes | Transferred | Read back |",
        "| --- | ---: | ---: | --- |",
        *(
            f"| {cell(file.path)} | {file.size_bytes:,} | {file.bytes_transferred:,} | {file.verified} |"
            for file in files[:ROWS]
        ),
        "",
        f"Manifest: `{MANIFEST}`, {manifest.created}",
    ]
    return "\n".join(lines)
