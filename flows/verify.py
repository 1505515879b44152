"""The `verify` mode: a copy that lies here, read again and compared with its manifest and digests."""

from __future__ import annotations

import time
from functools import partial

from prefect import flow

from tasks.images.job import nobody_at_work
from tasks.images.manifest import read_manifest
from tasks.images.prove import claims_of
from tasks.job import place_that_stays
from tasks.models import Verification, VerifyJob
from tasks.proof import prove_file, refuse_unequal, tell
from tasks.steps import side_by_side

AT_ONCE = 2


@flow(name="verify", flow_run_name="verify {options.folder}")
async def verify_copy(options: VerifyJob) -> Verification:
    """Prove again that a copy is what was copied.

    Every image is read through its own format, and every file of a download as it is, past the page cache where the
    file system lets us; what was read is compared with the digests beside it and with the manifest. Nothing is written,
    nothing is mended, and no vCenter is asked. The run fails with IntegrityMismatch unless everything is equal; its
    report says which file differs, and where.

    Args:
        options: Which copy to verify.
    """
    started, folder = time.monotonic(), place_that_stays(options.folder)
    with nobody_at_work(folder):
        manifest = read_manifest(folder)
        claims = claims_of(folder, manifest)
        calls = [partial(prove_file, claim, manifest.vm.moref, number) for number, claim in enumerate(claims)]
        files = await side_by_side(calls, at_once=AT_ONCE)
    found = Verification(
        folder=folder,
        vm=manifest.vm.name,
        moref=manifest.vm.moref,
        made=manifest.created,
        files=tuple(files),
        equal=all(file.verdict == "equal" for file in files),
        seconds=time.monotonic() - started,
    )
    await tell(found)
    refuse_unequal(found)
    return found
