"""A copy that is killed and gone on with. Children die by SIGKILL; what they wrote is all that is left of them."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tasks.images import checkpoints
from tasks.images.copy import CopyResult, Limits, copy
from tasks.images.digests import LEAF_BYTES, Buffer, Digests
from tasks.images.extents import merged, whole_disk, without
from tasks.images.journal import Journal
from tasks.images.layout import DiskFiles
from tasks.images.qemu import check
from tasks.images.target import Target, open_target
from tasks.images.verify import verify
from tasks.images.writer import Writer
from tasks.models import ArrivalFormat, Extent
from tasks.process import Stopped
from tasks.reader import Reader
from tasks.transports.file import FileReader
from tests.unit.images.dying import Counter, killed, killed_when
from tests.unit.images.fakes import FakeReader, leaves

MIB = 1024 * 1024
THREADS = 2
CONTENT = leaves("ab0c00defg0hijk0lmnopq0r", tail=1024)
BINDING: dict[str, str | int] = {"disk": "6000C29", "snapshot": "snapshot-57"}
LIMITS = Limits(threads=THREADS, attempts=3, first_wait_s=0.001, longest_wait_s=0.002)
WINDOW = 8 * LEAF_BYTES
ON_ITS_WAY = THREADS * 2 * LEAF_BYTES  # what each thread has received and not landed, or landed when it has to wait


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = LIMITS.model_copy(update={"checkpoint_bytes": WINDOW // 2})
    monkeypatch.setattr(sys.modules[__name__], "LIMITS", limits)


class CountedReader(FakeReader):
    """Counts what it gives, in memory that outlives a killed child."""

    counter: Counter

    def stream(self, extent: Extent) -> Generator[tuple[int, memoryview], None, None]:
        for offset, buffer in super().stream(extent):
            with self._lock:
                self.counter.add(len(buffer))
            yield offset, buffer


def counted(content: bytes = CONTENT, **options: int) -> CountedReader:
    reader = CountedReader(content, chunk=LEAF_BYTES // 2, preferred=6 * LEAF_BYTES, **options)  # type: ignore[arg-type]
    reader.counter = Counter()
    return reader


Change = Callable[[Target], Target]


def run(
    files: DiskFiles,
    reader: Reader,
    form: ArrivalFormat = "raw",
    *,
    binding: dict[str, str | int] = BINDING,
    change: Change = lambda target: target,
) -> tuple[CopyResult, Target]:
    """Copy all that is missing, as a step does."""
    with reader, open_target(files, size=reader.size, binding=binding, format=form) as opened:
        target = change(opened)
        result = copy(
            reader, target.missing, target.writer, digests=target.digests, limits=LIMITS, journal=target.journal
        )
        return result, target


def assert_complete(files: DiskFiles, form: ArrivalFormat = "raw", content: bytes = CONTENT) -> None:
    """Compare with what qemu-img reads, and with the digests; a qcow2 leaks nothing."""
    raw = files.folder / "compare"
    subprocess.run(["qemu-img", "convert", "-f", form, "-O", "raw", files.part(form), raw], check=True)
    assert raw.read_bytes() == content
    check(files.part(form), format=form)
    with Digests.open(files.digests_part) as digests:
        verify(files.part(form), format=form, digests=digests)


def covered(files: DiskFiles, form: ArrivalFormat = "raw", size: int = len(CONTENT)) -> tuple[Extent, ...]:
    with Journal.open(files.journal, binding={**BINDING, "size": size, "format": form, "digest": "blake3"}) as journal:
        return journal.covered


def half_done(files: DiskFiles, form: ArrivalFormat = "raw") -> None:
    """Leave what a run leaves that was killed in its third checkpoint, of three at least."""
    flushes = 3 if form == "raw" else 2  # of this process in a checkpoint; that of a qcow2 is qemu-nbd's
    assert killed(lambda: run(files, counted(), form), before=2 * flushes + 1, calls=("fdatasync",))
    assert covered(files, form)


@pytest.fixture
def files(tmp_path: Path) -> DiskFiles:
    return DiskFiles(tmp_path, 0)


@pytest.fixture(params=get_args(ArrivalFormat))
def form(request: pytest.FixtureRequest) -> ArrivalFormat:
    """The format that a disk arrives in."""
    return request.param  # type: ignore[no-any-return]


# ── kills ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("calls", [("fdatasync",), ("fsync", "ftruncate"), ("pwrite",)], ids=lambda calls: calls[0])
def test_killed_before_any_call_the_next_run_ends_with_an_equal_image(
    files: DiskFiles, form: ArrivalFormat, small_windows: None, calls: tuple[str, ...]
) -> None:
    step = 7 if "pwrite" in calls else 1
    number = 1
    while killed(lambda: run(files, counted(), form), before=number, calls=calls):
        reader = counted()
        _, target = run(files, reader, form)
        assert_complete(files, form)
        assert reader.counter.value == len(CONTENT) - target.kept_bytes
        for path in (files.part(form), files.digests_part, files.journal):
            path.unlink()
        number += step
    assert number > 3


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(deaths=st.lists(st.integers(1, 60), min_size=1, max_size=3))
def test_killed_again_and_again_no_kill_costs_more_than_a_window(
    tmp_path_factory: pytest.TempPathFactory, small_windows: None, deaths: list[int]
) -> None:
    files = DiskFiles(tmp_path_factory.mktemp("kills"), 0)
    reader = counted()
    kills = sum(killed(lambda: run(files, reader), before=death) for death in deaths)
    run(files, reader)
    assert_complete(files)
    again = reader.counter.value - len(CONTENT)
    assert again <= kills * (WINDOW + ON_ITS_WAY)


class SlowReader(FileReader):
    """Counts what it gives, and takes its time."""

    counter: Counter
    lock: threading.Lock

    def stream(self, extent: Extent) -> Generator[tuple[int, memoryview], None, None]:
        for offset, buffer in super().stream(extent):
            with self.lock:
                self.counter.add(len(buffer))
            time.sleep(0.002)
            yield offset, buffer


def test_killed_at_random_at_full_size_a_kill_costs_a_window_at_most(
    files: DiskFiles, form: ArrivalFormat, tmp_path: Path
) -> None:
    disk = tmp_path / "disk.raw"
    with disk.open("wb") as file:
        for at in range(0, 288, 3):
            file.seek(at * MIB)
            file.write(os.urandom(2 * MIB))
        file.truncate(288 * MIB)
    reader, chance = SlowReader(disk), random.Random()
    reader.counter, reader.lock = Counter(), threading.Lock()
    kills = 0
    for _ in range(3):
        until = reader.counter.value + chance.randrange(64, 160) * MIB
        kills += killed_when(lambda until=until: reader.counter.value >= until, lambda: run(files, reader, form))  # type: ignore[misc]
    run(files, reader, form)
    assert kills
    assert_complete(files, form, disk.read_bytes())
    again = reader.counter.value - reader.size
    assert again <= kills * (checkpoints.WINDOW_BYTES + THREADS * 2 * MIB)


# ── a power cut: what was not flushed is gone ────────────────────────────────────────────────────────────


class VolatileWriter:
    """Keeps writes in memory until they are flushed: a kill takes them along, as a power cut takes the page cache."""

    def __init__(self, writer: Writer) -> None:
        self.path, self._writer = writer.path, writer
        self._kept: dict[int, bytes | int] = {}
        self._guard = threading.Lock()

    def write(self, offset: int, buffer: Buffer) -> None:
        with self._guard:
            self._kept[offset] = bytes(buffer)

    def zero(self, offset: int, length: int) -> None:
        with self._guard:
            self._kept[offset] = length

    def flush(self) -> None:
        with self._guard:
            kept, self._kept = self._kept, {}
        for offset, what in kept.items():
            self._writer.zero(offset, what) if isinstance(what, int) else self._writer.write(offset, what)
        self._writer.flush()


class VolatileDigests(Digests):
    """The same for a sidecar."""

    _kept: dict[int, bytes]

    @classmethod
    def over(cls, path: Path) -> VolatileDigests:
        digests = cls.open(path, writable=True)
        digests._kept = {}
        return digests

    def put(self, leaf: int, record: bytes) -> None:
        self._kept[leaf] = record

    def flush(self) -> None:
        for leaf in list(self._kept):
            super().put(leaf, self._kept.pop(leaf))
        super().flush()


def volatile(target: Target) -> Target:
    return replace(
        target,
        writer=VolatileWriter(target.writer),  # type: ignore[arg-type]
        digests=VolatileDigests.over(target.digests.path),
    )


@pytest.mark.parametrize("call", range(1, 7))
def test_after_a_power_cut_what_the_journal_covers_is_there(
    files: DiskFiles, form: ArrivalFormat, small_windows: None, caplog: pytest.LogCaptureFixture, call: int
) -> None:
    assert killed(lambda: run(files, counted(), form, change=volatile), before=call, calls=("fdatasync",))
    kept = covered(files, form)
    reader = counted()
    _, target = run(files, reader, form)
    assert_complete(files, form)
    assert target.kept_bytes == sum(extent.length for extent in kept)
    assert "differ" not in caplog.text
    assert bool(kept) == (call >= (3 if form == "raw" else 2))


# ── what is kept, and what is not ────────────────────────────────────────────────────────────────────────


def test_a_rotten_leaf_that_was_kept_is_found_and_fetched_again(
    files: DiskFiles, form: ArrivalFormat, small_windows: None, caplog: pytest.LogCaptureFixture
) -> None:
    half_done(files, form)
    kept = covered(files, form)
    overwrite(files.part(form), form, kept[0].start)
    _, target = run(files, counted(), form)
    bad = Extent(start=kept[0].start, length=LEAF_BYTES)
    assert target.missing == merged([bad, *without(whole_disk(len(CONTENT)), kept)])
    assert target.kept_bytes == sum(extent.length for extent in kept) - LEAF_BYTES
    assert "fetched again" in caplog.text
    assert_complete(files, form)


def test_a_rotten_record_is_found_as_well(files: DiskFiles, form: ArrivalFormat, small_windows: None) -> None:
    half_done(files, form)
    with Digests.open(files.digests_part, writable=True) as digests:
        digests.put(0, b"r" * 32)
    _, target = run(files, counted(), form)
    assert target.missing[0] == Extent(start=0, length=LEAF_BYTES)
    assert_complete(files, form)


def test_of_another_point_in_time_nothing_is_kept(files: DiskFiles, small_windows: None) -> None:
    half_done(files)
    other = leaves("zy0x00wvut0srqp0onmlkj0i", tail=1024)
    _, target = run(files, counted(other), binding={**BINDING, "snapshot": "snapshot-58"})
    assert (target.kept_bytes, target.missing) == (0, whole_disk(len(CONTENT)))
    assert_complete(files, content=other)
    assert covered(files) == ()  # and back under the old one neither


def test_arriving_in_another_format_nothing_is_kept(files: DiskFiles, small_windows: None) -> None:
    half_done(files, "raw")
    _, target = run(files, counted(), "qcow2")
    assert target.kept_bytes == 0
    assert_complete(files, "qcow2")
    _, target = run(files, counted(), "raw")
    assert target.kept_bytes == 0
    assert_complete(files, "raw")


HARMS = [
    "raw gone",
    "raw longer",
    "raw sidecar gone",
    "raw sidecar cut",
    "raw sidecar foreign",
    "raw sidecar another's",
    "qcow2 gone",
    "qcow2 foreign",
    "qcow2 torn",
]


@pytest.mark.parametrize("harm", HARMS)
def test_a_journal_without_its_target_is_not_used(files: DiskFiles, small_windows: None, harm: str) -> None:
    form: ArrivalFormat = "raw" if harm.startswith("raw") else "qcow2"
    half_done(files, form)
    how = harm.split()[-1]
    path = files.digests_part if "sidecar" in harm else files.part(form)
    if how == "gone":
        path.unlink()
    elif how == "foreign":
        path.write_bytes(b"x" * path.stat().st_size)
    elif how == "another's":
        Digests.create(path, size=len(CONTENT) // 2).__exit__()
    elif how == "torn":
        with path.open("r+b") as file:  # the first entry of the L2 table: a cluster far outside of the file
            file.seek(4 * 65536)
            file.write((1 << 63 | 1 << 40).to_bytes(8, "big"))
    else:
        os.truncate(path, path.stat().st_size + (512 if how == "longer" else -32))
    with open_target(files, size=len(CONTENT), binding=BINDING, format=form) as target:
        assert target.kept_bytes == 0
        assert covered(files, form) == ()  # durably, before anything else is begun
    run(files, counted(), form)
    assert_complete(files, form)


def test_zeros_go_over_what_was_written_and_never_journaled(
    files: DiskFiles, form: ArrivalFormat, small_windows: None
) -> None:
    half_done(files, form)
    kept = covered(files, form)
    with Digests.open(files.digests_part, writable=True) as digests:
        for leaf in range(len(CONTENT) // LEAF_BYTES):
            if not any(extent.start <= leaf * LEAF_BYTES < extent.end for extent in kept):
                overwrite(files.part(form), form, leaf * LEAF_BYTES)
                digests.put(leaf, b"r" * 32)
    run(files, counted(), form)
    assert_complete(files, form)


def test_a_finished_disk_is_read_back_and_nothing_is_missing(files: DiskFiles) -> None:
    first, _ = run(files, counted())
    reader = counted()
    again, target = run(files, reader)
    assert (target.missing, target.kept_bytes, reader.counter.value) == ((), len(CONTENT), 0)
    assert again.digest == first.digest


@pytest.mark.parametrize("size", [0, 512, LEAF_BYTES + 512])
def test_odd_sizes_are_gone_on_with(files: DiskFiles, size: int) -> None:
    content = leaves("ab")[:size]
    run(files, FakeReader(content))
    run(files, FakeReader(content))
    assert files.raw_part.read_bytes() == content


def test_stop_ends_the_reading_back(files: DiskFiles, small_windows: None) -> None:
    half_done(files)
    before, stop = covered(files), threading.Event()
    stop.set()
    with pytest.raises(Stopped), open_target(files, size=len(CONTENT), binding=BINDING, stop=stop):
        pass
    assert covered(files) == before


def overwrite(path: Path, form: ArrivalFormat, offset: int) -> None:
    """Change a sector of what the guest would see."""
    subprocess.run(["qemu-io", "-f", form, "-c", f"write -q -P 0x5a {offset} 512", path], check=True)
