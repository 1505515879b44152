"""Step: what came of a run, as the manifest beside the images and as a report among the run's artifacts."""

from __future__ import annotations

from collections.abc import ItemsView, Iterator
from datetime import UTC, datetime
from pathlib import Path

from prefect import task
from prefect.artifacts import acreate_markdown_artifact
from prefect.cache_policies import NO_CACHE

from blocks import VCenter
from tasks.images.domain import UNKNOWN_FORMATS
from tasks.images.output import MANIFEST, land_all
from tasks.images.state import JobState
from tasks.models import DiskImage, Domain, Manifest, Snapshot
from tasks.steps import in_thread, quietly
from tasks.text import cell, one_line

MIB = 1024 * 1024


@task(name="manifest", task_run_name="manifest of {manifest.vm.name}", cache_policy=NO_CACHE)
async def commit(manifest: Manifest, folder: Path, domain_xml: str) -> None:
    """Give every verified file its final name, write `domain.xml`, then `manifest.json`: now the export counts.

    Raises OutputExists. Leaves the report among the run's artifacts.
    """
    await in_thread(land_all, None, folder, manifest, domain_xml)
    key, description = f"export-{manifest.vm.moref}", f"Export of {one_line(manifest.vm.name)}"
    await quietly(acreate_markdown_artifact(markdown(manifest, folder), key=key, description=description))


def manifest_of(
    vcenter: VCenter, state: JobState, images: tuple[DiskImage, ...], domain: Domain | None, *, quiesce: bool
) -> Manifest:
    """Return the manifest of a job whose disks are all here, of one point in time."""
    return Manifest(
        vcenter_uuid=state.vcenter_uuid,
        vm=state.vm,
        snapshot=state.snapshot,
        disks=images,
        domain=domain,
        consistent=True,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        warnings=(*_warnings(vcenter, state.snapshot, images, quiesce=quiesce), *_left_out(state)),
        skipped_roads=state.skipped_roads,
    )


def _warnings(
    vcenter: VCenter, snapshot: Snapshot | None, images: tuple[DiskImage, ...], *, quiesce: bool
) -> list[str]:
    warnings = []
    if not vcenter.verify and not vcenter.thumbprint:
        warnings.append("The vCenter's certificate was not verified: the operator turned it off.")
    if snapshot is None:
        warnings.append("No snapshot was taken: the licence allows none, and the VM was off.")
    elif quiesce and not snapshot.quiesced:
        warnings.append("The guest could not be quiesced: the copy is crash-consistent.")
    for unknown in sorted({image.format for image in images} & set(UNKNOWN_FORMATS)):
        warnings.append(f"There is no domain.xml: libvirt has no {unknown} disks.")
    if any(image.verified == "skipped" for image in images):
        warnings.append("The images were not read back: the operator skipped it.")
    if any(image.verified == "cached" for image in images):
        warnings.append("The images were read back through the page cache: the file system refuses O_DIRECT.")
    return warnings


def _left_out(state: JobState) -> list[str]:
    others = ", ".join(state.left_out)
    return [f"Copied was {state.selection}, and not: {others}."] if others else []


def markdown(manifest: Manifest, folder: Path) -> str:
    """Return the report of a run as GitHub markdown."""
    vm, snapshot = manifest.vm, manifest.snapshot
    lines = [
        f"# Export of {cell(vm.name)}",
        "",
        *(f"> **Note:** {warning}\n" for warning in manifest.warnings),
        "| | |",
        "| --- | --- |",
        f"| Inventory path | {cell(vm.inventory_path)} ({vm.moref}) |",
        f"| Host-system path | {cell(vm.host_path)} |",
        f"| libvirt URI | `{vm.vpx_uri}` |",  # percent-encoded: nothing in it ends a code span
        f"| Hardware | {vm.cpus} vCPU, {vm.memory_mib} MiB, {vm.firmware} |",
        f"| Power state at export | {vm.power_state} |",
        f"| Snapshot | {cell(snapshot.name)}, {snapshot.created} |" if snapshot else "| Snapshot | none |",
        f"| Output | {cell(str(folder))} |",
        f"| Consistent | {'all disks of one point in time' if manifest.consistent else 'no'} |",
        f"| Conversion | {_conversion(manifest)} |",
        *(f"| Network | {cell(source)} → {cell(target)} |" for source, target in _networks(manifest)),
        *(f"| Disk {image.index} | {cell(image.source)} |" for image in manifest.disks),
        *(f"| Digest {image.index} | {cell(image.digest)} |" for image in manifest.disks),
        "",
        # No wider: Prefect's older UI cuts off what does not fit.
        "| Disk | Image | Size | Transferred | MiB/s | Road | Read back |",
        "| ---: | --- | ---: | ---: | ---: | --- | --- |",
        *(_row(image) for image in manifest.disks),
        "",
        *(f"Road of disk {image.index}: {image.road}. {cell(image.road_reason)}\n" for image in manifest.disks),
        *(f"Road not taken: {skipped.road}. {cell(skipped.why)}\n" for skipped in manifest.skipped_roads),
        *(_of_the_domain(manifest.domain) if manifest.domain else ()),
        f"Manifest: `{MANIFEST}`, {manifest.created}",
    ]
    return "\n".join(lines)


def _networks(manifest: Manifest) -> ItemsView[str, str]:
    return (manifest.domain.networks if manifest.domain else {}).items()


def _of_the_domain(domain: Domain) -> Iterator[str]:
    yield f"Domain: `{domain.path}`, machine {domain.machine}, named {cell(domain.name)}\n"
    for title, lines in (("Otherwise than at the source", domain.changed), ("Not carried over", domain.not_carried)):
        if lines:
            yield f"{title}:\n"
            yield "\n".join(f"- {cell(line)}" for line in lines) + "\n"


def _conversion(manifest: Manifest) -> str:
    converted = [str(image.index) for image in manifest.disks if image.converted]
    return f"disks {', '.join(converted)}, after they arrived" if converted else "skipped: written as the bytes arrived"


def _row(image: DiskImage) -> str:
    rate = image.bytes_transferred / MIB / image.seconds if image.seconds else 0.0
    return (
        f"| {image.index} | {cell(image.path)} | {image.virtual_size / MIB:,.0f} MiB "
        f"| {image.bytes_transferred / MIB:,.0f} MiB | {rate:,.0f} | {image.road} | {image.verified} |"
    )
