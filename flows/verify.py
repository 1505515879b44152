"""The `verify` mode: a copy that lies here, read again and compared with its manifest and digests."""

from __future__ import annotations

import secrets
import time
from functools import partial
from pathlib import Path

from prefect import flow

from blocks import VCenter
from tasks.connect import connected
from tasks.disks import Choice, check_flat, copyable_disks
from tasks.errors import InvalidInput, SnapshotChanged, SourceChanged
from tasks.images.dirty import refuse_torn
from tasks.images.job import nobody_at_work
from tasks.images.manifest import read_manifest
from tasks.images.prove import claims_of
from tasks.images.state import JobState
from tasks.job import place_that_stays
from tasks.models import DownloadManifest, Manifest, Snapshot, SourceSample, Verification, VerifyJob
from tasks.proof import prove_file, refuse_unequal, tell
from tasks.resolve import resolve
from tasks.snapshot import check_snapshot
from tasks.source import sample_disk, snapshot_of_copy, source_disks
from tasks.steps import side_by_side

AT_ONCE = 2
SEED_BITS = 32


@flow(name="verify", flow_run_name="verify {options.folder}")
async def verify_copy(options: VerifyJob, vcenter: VCenter | None = None) -> Verification:
    """Prove again that a copy is what was copied.

    Every image is read through its own format, and every file of a download as it is, past the page cache where the
    file system lets us; what was read is compared with the digests beside it and with the manifest. Nothing is written
    and nothing is mended. The run fails with IntegrityMismatch unless everything is equal; its report says which file
    differs, and where.

    Args:
        options: Which copy to verify.
        vcenter: Where it came from; only to compare with the source.
    """
    started, folder = time.monotonic(), place_that_stays(options.folder)
    with nobody_at_work(folder):
        refuse_torn(folder)
        manifest = read_manifest(folder)
        source = _asked(options, vcenter, manifest)
        claims = claims_of(folder, manifest)
        calls = [partial(prove_file, claim, manifest.vm.moref, number) for number, claim in enumerate(claims)]
        files = await side_by_side(calls, at_once=AT_ONCE)
        equal = all(file.verdict == "equal" for file in files)
        sample = await _sample(*source, folder, options) if source and equal else None
    found = Verification(
        folder=folder,
        vm=manifest.vm.name,
        moref=manifest.vm.moref,
        made=manifest.created,
        files=tuple(files),
        source=sample,
        equal=equal and not (sample and any(disk.wrong for disk in sample.disks)),
        seconds=time.monotonic() - started,
    )
    await tell(found)
    refuse_unequal(found)
    return found


def _asked(
    options: VerifyJob, vcenter: VCenter | None, manifest: Manifest | DownloadManifest
) -> tuple[VCenter, Manifest] | None:
    """Return which source to ask about what; None where nobody is to be asked. Raises InvalidInput."""
    if not options.against_source:
        return None
    if isinstance(manifest, DownloadManifest):
        raise InvalidInput(
            what="--against-source",
            why="the folder is a download, which has no digests of leaves",
            remedy="Run download-vm again: it compares size, time and digest of each file with the source",
        )
    if vcenter is None:
        raise InvalidInput(what="vcenter", why="comparing with the source needs it", remedy="Choose a vCenter")
    return vcenter, manifest


async def _sample(vcenter: VCenter, manifest: Manifest, folder: Path, options: VerifyJob) -> SourceSample:
    """Return what a random sample of each disk at the source says, one disk after the other."""
    seed = options.seed or 1 + secrets.randbits(SEED_BITS)
    async with connected(vcenter) as server:
        if server.uuid != manifest.vcenter_uuid:
            raise SourceChanged(vm=manifest.vm.name, reason=f"it was copied from another server than {vcenter.host}")
        vm = await resolve(vcenter, manifest.vm.instance_uuid)
        snapshot = await snapshot_of_copy(vcenter, vm, manifest)
        try:
            disks = await copyable_disks(vcenter, server, vm, snapshot, Choice())
            check_flat(disks, snapshot)
            disks = await source_disks(vcenter, vm, manifest, snapshot, disks)
            job = JobState(job_id="", flow_run_id="", vcenter_uuid=server.uuid, vm=vm, snapshot=snapshot, disks=disks)
            sampled = [
                await sample_disk(vcenter, job, image, folder, count=options.sample, seed=seed)
                for image in manifest.disks
            ]
            await check_snapshot(vcenter, vm, snapshot, disks)
        except SnapshotChanged as error:
            raise SourceChanged(vm=vm.name, reason=error.reason) from error
    return SourceSample(point=_point(snapshot), seed=seed, disks=tuple(sampled))


def _point(snapshot: Snapshot | None) -> str:
    if snapshot:
        return f"the snapshot {snapshot.name} ({snapshot.moref}) still exists"
    return "the VM is off, and its disks were not written to since"
