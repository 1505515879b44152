"""Steps of a verification: one file of a copy read again and judged, and the report of them all."""

from __future__ import annotations

import threading

from prefect import task
from prefect.artifacts import acreate_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from tasks.errors import IntegrityMismatch
from tasks.images.prove import AGAIN, Claim, in_words, prove, sample_in_words, wrong_leaves
from tasks.models import Verification, VerifiedFile
from tasks.steps import in_thread, metered, quietly
from tasks.text import cell, one_line

MIB = 1024 * 1024
ROWS = 200  # of a report


@task(name="prove", task_run_name="prove {claim.name}", cache_policy=NO_CACHE)
async def prove_file(claim: Claim, moref: str, number: int) -> VerifiedFile:
    """Read one file through its own format and say how it compares with manifest and digests; it never fails for that.

    number: of the file among all, for its progress. Cancelled, it returns only when no thread of it reads any more.
    """
    stop = threading.Event()
    async with metered(f"verify {claim.name}", claim.size_bytes, key=f"prove-{moref}-{number}") as meter:
        file = await in_thread(prove, stop, claim, progress=meter.add, stop=stop)
    get_run_logger().info(
        "verified path=%r verdict=%r bytes=%d %s", file.path, file.verdict, file.bytes_read, file.detail
    )
    return file


async def tell(found: Verification) -> None:
    """Leave the report among the run's artifacts."""
    key, description = f"verify-{found.moref}", f"Verification of {one_line(found.vm)}"
    await quietly(acreate_markdown_artifact(verification_report(found), key=key, description=description))


def refuse_unequal(found: Verification) -> None:
    """Raise IntegrityMismatch, with what was found as its field `found`, unless everything is equal."""
    wrong = [file for file in found.files if file.verdict != "equal"]
    if wrong:
        where = f"{len(wrong)} of {len(found.files)} files: {wrong[0].path}: {in_words(wrong[0])}"
        raise IntegrityMismatch(path=found.folder, where=where, remedy=wrong[0].remedy, found=found)
    for disk in found.source.disks if found.source else ():
        if disk.wrong:
            where = f"{disk.path}: {sample_in_words(disk)}"
            raise IntegrityMismatch(path=found.folder, where=where, remedy=AGAIN, found=found)


def verification_report(found: Verification) -> str:
    """Return the report of a verification as GitHub markdown."""
    wrong = [file for file in found.files if file.verdict != "equal"]
    lines = [
        f"# Verification of {cell(found.vm)}",
        "",
        "All files are equal to the manifest."
        if found.equal
        else f"**{len(wrong)} of {len(found.files)} files differ.**",
        "",
        "| | |",
        "| --- | --- |",
        f"| Folder | {cell(str(found.folder))} |",
        f"| Copied | {found.made} |",
        f"| Read | {sum(file.bytes_read for file in found.files):,} bytes in {found.seconds:.1f} s |",
        "",
        "| File | Format | Read | Wrong leaves | Verdict |",
        "| --- | --- | ---: | --- | --- |",
        *(_row(file) for file in (*wrong, *(file for file in found.files if file.verdict == "equal"))[:ROWS]),
        *_sample(found),
        *(f"\n**{cell(file.path)}**: {cell(in_words(file))}. {cell(file.remedy)}" for file in wrong[:ROWS]),
    ]
    return "\n".join(lines)


def _row(file: VerifiedFile) -> str:
    return (
        f"| {cell(file.path)} | {file.format} | {file.bytes_read / MIB:,.1f} MiB | {wrong_leaves(file)} "
        f"| {file.verdict} |"
    )


def _sample(found: Verification) -> list[str]:
    """Return the table of what the source said, if it was asked."""
    if not found.source:
        return []
    return [
        "",
        f"At the source, {cell(found.source.point)}; a random sample (seed {found.source.seed}) of each disk:",
        "",
        "| File | Source | Sample |",
        "| --- | --- | --- |",
        *(f"| {cell(disk.path)} | {cell(disk.source)} | {sample_in_words(disk)} |" for disk in found.source.disks),
    ]
