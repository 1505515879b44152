import errno
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.errors import FileLocked, IntegrityMismatch, TransferInterrupted
from tasks.images.copy import CopyResult, Limits, copy
from tasks.images.digests import LEAF_BYTES, Digests, record_of
from tasks.images.extents import whole_disk
from tasks.images.raw import RawWriter
from tasks.images.writer import Writer
from tasks.models import Extent
from tasks.process import Stopped
from tasks.reader import Hole, TransientFault
from tests.unit.images.fakes import FakeReader, FakeWriter, TellingDigests, TellingJournal, leaves

QUICK = Limits(threads=2, attempts=3, first_wait_s=0.001, longest_wait_s=0.002)
CONTENT = leaves("ab0c00defg0h", tail=1024)


@contextmanager
def sidecar(folder: Path, size: int) -> Iterator[Digests]:
    with Digests.create(folder / "x.digests", size=size) as digests:
        yield digests


def run(folder: Path, reader: FakeReader, writer: Writer, **options: object) -> CopyResult:
    """Copy all of a disk as a mode would: entered, copied, closed."""
    options = {"limits": QUICK, **options}
    with reader, writer, sidecar(folder, reader.size) as digests:
        return copy(reader, whole_disk(reader.size), writer, digests=digests, **options)  # type: ignore[arg-type]


@given(
    kinds=st.text("0ab", max_size=6),
    tail=st.sampled_from([0, 512, LEAF_BYTES - 512]),
    chunk=st.sampled_from([4096, 65536, 100_000, LEAF_BYTES, 3 * LEAF_BYTES + 7]),
    shuffled=st.booleans(),
)
def test_the_raw_file_equals_the_disk_and_is_as_sparse(
    tmp_path_factory: pytest.TempPathFactory, kinds: str, tail: int, chunk: int, shuffled: bool
) -> None:
    content, folder = leaves(kinds, tail=tail), tmp_path_factory.mktemp("copy")
    with RawWriter.create(folder / "x", size=len(content)) as writer:
        result = run(folder, FakeReader(content, chunk=chunk, shuffled=shuffled), writer)
    assert (folder / "x").read_bytes() == content
    assert result.bytes_transferred == len(content)
    assert result.bytes_written == len(content) - kinds.count("0") * LEAF_BYTES
    assert (folder / "x").stat().st_blocks * 512 <= result.bytes_written + 4096
    with Digests.open(folder / "x.digests") as digests:
        assert digests.image_digest() == result.digest
        for leaf in range(len(kinds)):
            assert digests.get(leaf) == record_of(content[leaf * LEAF_BYTES : (leaf + 1) * LEAF_BYTES])


def test_only_the_planned_extents_are_read(tmp_path: Path) -> None:
    planned = [Extent(start=LEAF_BYTES, length=LEAF_BYTES), Extent(start=6 * LEAF_BYTES, length=2 * LEAF_BYTES)]
    reader, writer = FakeReader(CONTENT), FakeWriter(len(CONTENT))
    with sidecar(tmp_path, len(CONTENT)) as digests:
        result = copy(reader, planned, writer, digests=digests, limits=QUICK)
    assert sorted(reader.asked, key=lambda extent: extent.start) == planned
    assert result.bytes_transferred == 3 * LEAF_BYTES
    assert writer.content.count(0) >= len(CONTENT) - 3 * LEAF_BYTES


def test_progress_adds_up(tmp_path: Path) -> None:
    done: list[int] = []
    run(tmp_path, FakeReader(CONTENT), FakeWriter(len(CONTENT)), progress=done.append)
    assert sum(done) == len(CONTENT)


def test_the_journal_comes_after_the_digests_and_these_after_the_data(tmp_path: Path) -> None:
    writer = FakeWriter(len(CONTENT))
    with (
        TellingDigests.create(tmp_path / "x.digests", size=len(CONTENT)) as digests,
        TellingJournal.open(tmp_path / "x.journal", binding={}) as journal,
    ):
        digests.calls = journal.calls = writer.calls
        copy(FakeReader(CONTENT), whole_disk(len(CONTENT)), writer, digests=digests, journal=journal)
        assert journal.covered == whole_disk(len(CONTENT))
    assert writer.calls[-3:] == ["flush", "flush digests", "append"]


# ── faults of the source ─────────────────────────────────────────────────────────────────────────────────


def test_after_a_fault_only_missing_leaves_are_asked_for(tmp_path: Path) -> None:
    fault = (2 * LEAF_BYTES + 100_000, TransientFault("reset"))
    reader, writer = FakeReader(CONTENT, faults=[fault]), FakeWriter(len(CONTENT))
    run(tmp_path, reader, writer)
    assert writer.content == CONTENT
    again = Extent(start=2 * LEAF_BYTES, length=2 * LEAF_BYTES)
    assert again in reader.asked
    assert sum(extent.length for extent in reader.asked) == len(CONTENT) + again.length
    assert len(writer.written) == len({offset for offset, _ in writer.written})


def test_a_fault_in_shuffled_chunks_resumes_with_the_holes(tmp_path: Path) -> None:
    faults = [(leaf * LEAF_BYTES, TransientFault("reset")) for leaf in range(12)]
    reader, writer = FakeReader(CONTENT, faults=faults, shuffled=True), FakeWriter(len(CONTENT))
    run(tmp_path, reader, writer, limits=QUICK.model_copy(update={"attempts": 20}))
    assert writer.content == CONTENT


@given(
    faults=st.lists(st.integers(0, len(CONTENT) - 1), max_size=8),
    chunk=st.sampled_from([30_000, 65536, LEAF_BYTES]),
    preferred=st.integers(1, 13),
    shuffled=st.booleans(),
)
def test_whatever_fails_the_image_is_right_and_no_leaf_is_written_twice(
    tmp_path_factory: pytest.TempPathFactory, faults: list[int], chunk: int, preferred: int, shuffled: bool
) -> None:
    reader = FakeReader(
        CONTENT,
        chunk=chunk,
        preferred=preferred * LEAF_BYTES,
        shuffled=shuffled,
        faults=[(offset, TransientFault("reset")) for offset in faults],
    )
    writer = FakeWriter(len(CONTENT))
    run(tmp_path_factory.mktemp("copy"), reader, writer, limits=QUICK.model_copy(update={"attempts": 9}))
    assert writer.content == CONTENT
    assert len(writer.written) == len(set(writer.written))


def test_the_budget_starts_anew_with_each_progress(tmp_path: Path) -> None:
    """Twelve faults with three attempts: each comes a leaf further."""
    faults = [(leaf * LEAF_BYTES + 1, TransientFault(f"reset {leaf}")) for leaf in range(1, 12)]
    reader, writer = FakeReader(CONTENT, faults=faults, depth=1, preferred=64 * LEAF_BYTES), FakeWriter(len(CONTENT))
    run(tmp_path, reader, writer)
    assert writer.content == CONTENT


def test_an_exhausted_budget_says_where_and_why(tmp_path: Path) -> None:
    faults = [(5 * LEAF_BYTES, TransientFault(f"status 503, time {time}")) for time in range(3)]
    reader, writer = FakeReader(CONTENT, faults=faults, depth=1, preferred=64 * LEAF_BYTES), FakeWriter(len(CONTENT))
    with pytest.raises(TransferInterrupted) as raised:
        run(tmp_path, reader, writer)
    assert raised.value.resumable_at == 5 * LEAF_BYTES
    assert raised.value.source == reader.source
    assert raised.value.why == "status 503, time 2"
    assert isinstance(raised.value.__cause__, TransientFault)
    assert "flush" not in writer.calls


def test_a_wait_that_the_source_asked_for_is_kept(tmp_path: Path) -> None:
    reader = FakeReader(CONTENT, faults=[(0, TransientFault("busy", wait_s=0.3))])
    started = time.monotonic()
    run(tmp_path, reader, FakeWriter(len(CONTENT)))
    assert time.monotonic() - started >= 0.3


@pytest.mark.parametrize("what", ["omit", "twice"])
def test_what_the_reader_leaves_out_or_gives_twice_never_passes(tmp_path: Path, what: str) -> None:
    """The chunk left out is one of a zero leaf: nothing but the count could tell."""
    reader = FakeReader(CONTENT, **{what: [2 * LEAF_BYTES + 65536]})  # type: ignore[arg-type]
    with pytest.raises(IntegrityMismatch, match=r"left out|twice"):
        run(tmp_path, reader, FakeWriter(len(CONTENT)))


def test_a_plan_of_half_leaves_is_a_mistake_of_the_caller(tmp_path: Path) -> None:
    with sidecar(tmp_path, len(CONTENT)) as digests, pytest.raises(ValueError, match="leaf"):
        copy(FakeReader(CONTENT), [Extent(start=0, length=512)], FakeWriter(len(CONTENT)), digests=digests)


# ── failures in each place: the first error, and nothing left ───────────────────────────────────────────


@pytest.mark.parametrize("verb", ["write", "zero", "flush", "close"])
def test_a_failing_target_ends_it_with_its_own_error(tmp_path: Path, verb: str) -> None:
    broken = OSError(errno.EIO, f"{verb} is broken")
    reader = FakeReader(CONTENT)
    with pytest.raises(OSError, match=f"{verb} is broken") as raised:
        run(tmp_path, reader, FakeWriter(len(CONTENT), fails={verb: broken}))
    assert raised.value is broken
    assert reader.closed


def test_a_reader_that_cannot_be_entered_is_named(tmp_path: Path) -> None:
    locked = FileLocked(path="[ds] x.vmdk", remedy="power it off")
    with pytest.raises(FileLocked):
        run(tmp_path, FakeReader(CONTENT, on_enter=locked), FakeWriter(len(CONTENT)))


def test_the_first_error_is_the_one_that_is_raised(tmp_path: Path) -> None:
    """One worker fails for good; the other, waiting for the source, fails because it was interrupted."""
    reader = FakeReader(CONTENT, faults=[(LEAF_BYTES, ValueError("first"))], stalls_at=4 * LEAF_BYTES)
    with pytest.raises(ValueError, match="first"):
        run(tmp_path, reader, FakeWriter(len(CONTENT)), progress=lambda _: reader.stalling.wait(10))
    assert reader.interrupted.is_set()


def test_an_error_midway_is_not_retried(tmp_path: Path) -> None:
    reader = FakeReader(CONTENT, faults=[(0, FileLocked(path="x", remedy="y"))], depth=1)
    with pytest.raises(FileLocked):
        run(tmp_path, reader, FakeWriter(len(CONTENT)))
    assert len(reader.asked) == 1


def test_an_error_in_the_callers_progress_ends_it(tmp_path: Path) -> None:
    def progress(_: int) -> None:
        raise KeyError("progress")

    with pytest.raises(KeyError, match="progress"):
        run(tmp_path, FakeReader(CONTENT), FakeWriter(len(CONTENT)), progress=progress)


# ── stop ─────────────────────────────────────────────────────────────────────────────────────────────────


def stopped_after(when: threading.Event, action: Callable[[threading.Event], object]) -> float:
    """Set the stop event once `when` is set; return how long `action` then took to raise Stopped."""
    stop, at = threading.Event(), [0.0]

    def set_it() -> None:
        when.wait(10)
        at[0] = time.monotonic()
        stop.set()

    setter = threading.Thread(target=set_it)
    setter.start()
    with pytest.raises(Stopped):
        action(stop)
    setter.join()
    return time.monotonic() - at[0]


def test_stop_ends_a_copy_whose_source_stalls(tmp_path: Path) -> None:
    reader = FakeReader(CONTENT, stalls_at=LEAF_BYTES)
    took = stopped_after(reader.stalling, lambda stop: run(tmp_path, reader, FakeWriter(len(CONTENT)), stop=stop))
    assert took < 1


def test_stop_ends_the_wait_between_two_tries(tmp_path: Path) -> None:
    reader = FakeReader(CONTENT, faults=[(0, TransientFault("busy", wait_s=30))], depth=1)
    asked = threading.Event()
    writer = FakeWriter(len(CONTENT))
    reader.stream = _telling(asked, reader.stream)  # type: ignore[method-assign]
    assert stopped_after(asked, lambda stop: run(tmp_path, reader, writer, stop=stop)) < 1
    assert "flush" not in writer.calls


def _telling(event: threading.Event, stream: Callable[[Extent], object]) -> Callable[[Extent], object]:
    def told(extent: Extent) -> object:
        event.set()
        return stream(extent)

    return told


def test_ctrl_c_ends_every_thread_first(tmp_path: Path) -> None:
    reader = FakeReader(CONTENT, stalls_at=LEAF_BYTES)
    main = threading.get_ident()

    def interrupt() -> None:
        reader.stalling.wait(10)
        signal.pthread_kill(main, signal.SIGINT)

    keys = threading.Thread(target=interrupt)
    keys.start()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, reader, FakeWriter(len(CONTENT)))
    keys.join()
    assert reader.closed


def test_a_stop_that_comes_first_reads_nothing(tmp_path: Path) -> None:
    stop = threading.Event()
    stop.set()
    reader = FakeReader(CONTENT, stalls_at=0)
    with pytest.raises(Stopped):
        run(tmp_path, reader, FakeWriter(len(CONTENT)), stop=stop)


class HolesReader(FakeReader):
    """Gives what is zero as holes, of any length, some of them a part of a leaf."""

    def stream(self, extent: Extent) -> Iterator[tuple[int, memoryview | Hole]]:  # type: ignore[override]
        at = extent.start
        while at < extent.end:
            end = at + 4096
            zero = not any(self.content[at:end])
            while end < extent.end and zero == (not any(self.content[end : end + 4096])):
                end += 4096
            end = min(end, extent.end)
            yield at, Hole(end - at) if zero else memoryview(self.content)[at:end]
            at = end


@pytest.mark.parametrize("empty", [True, False])
def test_a_hole_reads_as_zeros_whatever_the_target_held_and_is_no_byte_that_came(tmp_path: Path, empty: bool) -> None:
    content = leaves("a000b0", tail=1024)
    content = content[: LEAF_BYTES // 2] + bytes(LEAF_BYTES) + content[LEAF_BYTES // 2 * 3 :]
    target = tmp_path / "x"
    target.write_bytes(b"\xff" * len(content))
    writer = RawWriter.create(target, size=len(content)) if empty else RawWriter.open(target)
    with writer:
        result = run(tmp_path, HolesReader(content, chunk=4096), writer)
    assert target.read_bytes() == content
    assert result.bytes_transferred == len(content) - content.count(bytes(4096)) * 4096
    with Digests.open(tmp_path / "x.digests") as digests:
        assert digests.get(0) == record_of(content[:LEAF_BYTES])
        assert digests.get(1) == record_of(content[LEAF_BYTES : 2 * LEAF_BYTES])
