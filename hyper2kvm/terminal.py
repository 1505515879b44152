"""What a person at a terminal, or a log file, is shown of a run: bars, lines, the summary, an error."""

from __future__ import annotations

import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Self

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import TransferSpeedColumn as SpeedColumn
from rich.table import Table

from tasks.errors import Hyper2KvmError
from tasks.images.files import safe_name
from tasks.images.prove import in_words, sample_in_words, wrong_leaves
from tasks.models import (
    BootCheck,
    DiskImage,
    Domain,
    DownloadManifest,
    ExportJob,
    JobOptions,
    Manifest,
    Migration,
    StartableJob,
    SyncJob,
    Verification,
    VirtualMachine,
)
from tasks.text import one_line

if TYPE_CHECKING:
    from tasks.steps import Meter

PLAIN_EVERY_S = 5.0
REFRESH_S = 0.25
FILES_SHOWN = 20
MIB = 1024 * 1024


class Board:
    """Shows meters while the block runs: bars on a terminal, elsewhere at most one plain line in 5 s.

    `listen` is the listener that a meter is announced to.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._meters: dict[Meter, TaskID] = {}
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            SpeedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
        self._shown_at = time.monotonic()

    def __enter__(self) -> Self:
        self._bars.start()
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        self._thread.join()
        self._refresh()
        self._bars.stop()

    def listen(self, meter: Meter) -> None:
        """Show one more meter."""
        with self._lock:
            self._meters[meter] = self._bars.add_task(escape(one_line(meter.label)), total=meter.total_bytes)

    def say(self, text: str) -> None:
        """Show a line above the bars."""
        self._console.print(one_line(text), markup=False, highlight=False, soft_wrap=True)

    def _run(self) -> None:
        while not self._ended.wait(REFRESH_S):
            self._refresh()
            if not self._console.is_terminal and time.monotonic() - self._shown_at >= PLAIN_EVERY_S:
                self._plain_line()

    def _refresh(self) -> None:
        with self._lock:
            for meter, bar in self._meters.items():
                self._bars.update(bar, completed=meter.total_bytes if meter.complete else meter.done_bytes)

    def _plain_line(self) -> None:
        with self._lock:
            running = [meter for meter in self._meters if not meter.ended]
        if running:
            self._shown_at = time.monotonic()
            self.say("; ".join(f"{meter.label} {100 * meter.fraction:.0f} %, {_pace(meter)}" for meter in running))


def _pace(meter: Meter) -> str:
    seconds = time.monotonic() - meter.started_at
    rate = meter.done_bytes / seconds if seconds else 0.0
    left = f", {(meter.total_bytes - meter.done_bytes) / rate:.0f} s left" if rate else ""
    return f"{rate / MIB:.0f} MiB/s{left}"


def vm_of(result: Manifest | DownloadManifest | Migration) -> VirtualMachine:
    """Return the VM that a run was about."""
    return (result.manifest if isinstance(result, Migration) else result).vm


def summary(manifest: Manifest | DownloadManifest | Migration, job: JobOptions, seconds: float) -> list[str]:
    """Return the lines that end a successful run."""
    output_dir = job.output_dir
    if isinstance(manifest, Migration):
        return list(_migration_summary(manifest, job))
    if isinstance(manifest, DownloadManifest):
        return _download_summary(manifest, output_dir, seconds)
    moved = sum(image.bytes_transferred for image in manifest.disks)
    done = "Synced" if isinstance(job, SyncJob) else "Exported"
    lines = [f"{done} {manifest.vm.name} ({manifest.vm.moref}) to {output_dir / safe_name(manifest.vm.name)}"]
    for image in manifest.disks:
        what = f"{image.virtual_size / MIB:,.0f} MiB, {image.format} {_passes(image)}"
        lines.append(f"  {image.path}  {what}, read back: {image.verified}, {image.digest}")
    if manifest.domain:
        lines += _domain_lines(manifest.domain)
        if isinstance(job, ExportJob) and job.define:
            lines.append(f"  defined: virsh -c {job.libvirt_uri} start {shlex.quote(manifest.domain.name)}")
    lines += [f"  note: {warning}" for warning in manifest.warnings]
    lines.append(f"{moved:,} bytes in {seconds:.1f} s ({moved / MIB / seconds:,.0f} MiB/s), verified")
    return lines


def _migration_summary(migration: Migration, job: JobOptions) -> Iterator[str]:
    made, said = migration.manifest, migration.forecast
    copy = job.output_dir / safe_name(made.vm.name)
    done = "Migrated" if migration.folder else "Copied"
    yield f"{done} {made.vm.name} ({made.vm.moref}) to {migration.folder or copy}"
    yield f"  rounds: {len(migration.rounds)}"
    for image in made.disks:
        yield f"  {image.path}  {image.virtual_size / MIB:,.0f} MiB, {image.format}, {image.digest}"
    if made.domain:
        yield from _domain_lines(made.domain)
        if isinstance(job, StartableJob) and job.define and migration.folder:
            yield f"  defined: virsh -c {job.libvirt_uri} start {shlex.quote(made.domain.name)}"
    yield from (f"  note: {note}" for note in (*made.warnings, *migration.notes))
    if migration.downtime_s is not None:
        forecast = f", forecast {said.downtime_s.low:.1f} to {said.downtime_s.high:.1f} s" if said else ""
        yield f"  the source: {migration.how}; to put it back: --vs-action rollback {copy}"
        yield f"downtime {migration.downtime_s:.1f} s{forecast}"


def _domain_lines(domain: Domain) -> Iterator[str]:
    yield f"  {domain.path}  {domain.name}, machine {domain.machine}"
    yield from (f"  network: {source} -> {target}" for source, target in domain.networks.items())
    yield from (f"  changed: {each}" for each in domain.changed)
    yield from (f"  not carried over: {each}" for each in domain.not_carried)


def _passes(image: DiskImage) -> str:
    return "converted" if image.converted else "in one pass"


def _download_summary(manifest: DownloadManifest, output_dir: Path, seconds: float) -> list[str]:
    moved = sum(file.bytes_transferred for file in manifest.files)
    size = sum(file.size_bytes for file in manifest.files)
    lines = [f"Downloaded {manifest.vm.name} ({manifest.vm.moref}) to {output_dir / safe_name(manifest.vm.name)}"]
    lines += [f"  {file.path}  {file.size_bytes:,} bytes, {file.digest}" for file in manifest.files[:FILES_SHOWN]]
    if len(manifest.files) > FILES_SHOWN:
        lines.append(f"  and {len(manifest.files) - FILES_SHOWN} more: see manifest.json")
    lines += [f"  note: {warning}" for warning in manifest.warnings]
    lines.append(f"{len(manifest.files)} files, {size:,} bytes; {moved:,} bytes moved in {seconds:.1f} s, verified")
    return lines


def boot_line(check: BootCheck) -> str:
    """Return the line that says what proves that a copy boots."""
    return one_line(f"{check.domain} boots ({check.accelerator}, {check.seconds:.0f} s): {check.recognised}")


def show_verification(found: Verification, console: Console) -> None:
    """Show a table, a row a file that differs or is a disk, and what each that differs calls for."""
    wrong = [file for file in found.files if file.verdict != "equal"]
    right = [file for file in found.files if file.verdict == "equal"]
    table = Table("File", "Format", "Bytes read", "Leaves wrong", "Verdict", box=SIMPLE, pad_edge=False)
    for file in (*wrong, *right[:FILES_SHOWN]):
        words = (file.path, file.format, f"{file.bytes_read:,}", wrong_leaves(file), file.verdict)
        table.add_row(*map(one_line, words))
    console.print(f"{found.vm} ({found.moref}), copied {found.made}: {one_line(str(found.folder))}")
    console.print(table)
    if len(right) > FILES_SHOWN:
        console.print(f"and {len(right) - FILES_SHOWN} more that are equal")
    for file in wrong:
        console.print(one_line(f"{file.path}: {in_words(file)}. {file.remedy}"))
    if found.source:
        console.print(one_line(f"At the source, {found.source.point}; seed {found.source.seed}:"))
        for disk in found.source.disks:
            console.print(one_line(f"  {disk.path}  {disk.source}: {sample_in_words(disk)}"))
    read = sum(file.bytes_read for file in found.files)
    said = "all equal" if found.equal else f"{len(wrong)} of {len(found.files)} differ" if wrong else "not the source's"
    console.print(f"{read:,} bytes read in {found.seconds:.1f} s ({read / MIB / found.seconds:,.0f} MiB/s): {said}")


def show_error(error: Hyper2KvmError, *, say: Callable[[str], None]) -> None:
    """Show a failure: the cause in one line, then what to do, then what the tool itself said last."""
    say(f"Error: {error.cause}")
    if error.remedy:
        say(error.remedy)
    for line in getattr(error, "__notes__", ()):
        say(line)
    for line in error.detail:
        say(f"  | {line}")


def stdout() -> Console:
    """Return the console of the result: lines as long as they are, nothing in them taken for markup."""
    return Console(soft_wrap=True, highlight=False, markup=False, emoji=False)


def stderr() -> Console:
    """Return the console of everything that is not the result itself."""
    return Console(file=sys.stderr, emoji=False)
