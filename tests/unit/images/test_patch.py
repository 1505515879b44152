"""What a patch makes of scattered changes: the disk, few requests, and records to read back by."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Generator, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.errors import IntegrityMismatch
from tasks.images.changes import Changes
from tasks.images.copy import Limits
from tasks.images.digests import LEAF_BYTES, Digests, leaf_count, record_of
from tasks.images.dirty import DirtyList, Torn
from tasks.images.extents import leaf_extent
from tasks.images.layout import DiskFiles
from tasks.images.patch import PatchResult, patch
from tasks.images.raw import RawWriter
from tasks.images.written import Written, verify_written
from tasks.models import Extent
from tasks.rate import Rate
from tasks.reader import TransientFault
from tests.unit.images.fakes import FakeReader

SIZE = 60 * LEAF_BYTES - 7 * 512
BLOCK = LEAF_BYTES // 16
BEFORE = random.Random(1).randbytes(SIZE)
LIMITS = Limits(threads=1, attempts=4, first_wait_s=0.001, longest_wait_s=0.002)


def changed_at(places: Sequence[tuple[int, int]]) -> tuple[Changes, bytes]:
    """Return the changes of `(block, blocks)`, and the disk that they make."""
    after = bytearray(BEFORE)
    extents = [Extent(start=at * BLOCK, length=min(count * BLOCK, SIZE - at * BLOCK)) for at, count in places]
    for number, each in enumerate(extents):
        after[each.start : each.end] = (
            random.Random(number).randbytes(each.length) if number % 4 else bytes(each.length)
        )
    return Changes(extents, size=SIZE), bytes(after)


class CountedRate(Rate):
    """A rate that holds nobody up, and says how many bytes it was told of."""

    def __init__(self) -> None:
        super().__init__(1 << 40)
        self.counted = 0

    def delay(self, count: int) -> float:
        self.counted += count
        return 0.0


def patched(
    folder: Path, changes: Changes, reader: FakeReader, *, rot: Sequence[int] = (), rate: Rate | None = None
) -> PatchResult:
    """Patch a copy of BEFORE in `folder`, of which some leaves rotted, and read back what was written."""
    files = DiskFiles(folder, 0)
    files.final("raw").write_bytes(BEFORE)
    with Digests.create(files.digests, size=SIZE) as digests:
        for leaf in range(leaf_count(SIZE)):
            digests.put(leaf, record_of(BEFORE[leaf * LEAF_BYTES :][:LEAF_BYTES]))
        with files.final("raw").open("r+b") as image:
            for leaf in rot:
                image.seek(leaf * LEAF_BYTES + 5)
                image.write(b"rot")
        todo, written = DirtyList(files, changes.leaves, Torn(), at="52/2", at_once=False), Written(changes)
        with RawWriter.open(files.final("raw")) as image:
            result = patch(
                reader, image, changes, digests=digests, todo=todo, written=written, limits=LIMITS, rate=rate
            )
        for leaf in range(leaf_count(SIZE)):
            whole = leaf_extent(leaf, size=SIZE)
            assert digests.get(leaf) == record_of(reader.content[whole.start : whole.end])
        _, read = verify_written(files.final("raw"), todo.planned, written, format="raw", digests=digests)
    assert read <= changes.length + changes.doubted * LEAF_BYTES
    return result


PLACES = st.lists(st.tuples(st.integers(0, SIZE // BLOCK), st.integers(1, 6) | st.just(300)), min_size=1, max_size=120)


@given(PLACES, st.booleans(), st.sets(st.integers(0, leaf_count(SIZE) - 1), max_size=3), st.integers(0, SIZE - 1))
@settings(max_examples=25, deadline=None)
def test_whatever_changed_the_image_is_the_disk(
    places: list[tuple[int, int]], shuffled: bool, rot: set[int], fault: int
) -> None:
    changes, after = changed_at(places)
    rotten = [leaf for leaf in rot if [*changes.of_all([leaf_extent(leaf, size=SIZE)])] and changes.kept(leaf)]
    reader = FakeReader(
        after, chunk=BLOCK, shuffled=shuffled, faults=[(fault // BLOCK * BLOCK, TransientFault("once"))]
    )
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder, reader:
        result = patched(Path(folder), changes, reader, rot=rotten)
        assert (Path(folder) / "disk-0.raw").read_bytes() == after
    assert result.leaves_in_doubt == len(rotten)


class Counting(FakeReader):
    requests = 0

    def stream_scattered(self, extents: Sequence[Extent]) -> Generator[tuple[int, memoryview], None, None]:
        self.requests += 1
        yield from super().stream_scattered(extents)


def test_scattered_changes_are_asked_for_together_and_read_here_once(tmp_path: Path) -> None:
    changes, after = changed_at([(block, 4) for block in range(0, 56 * 16, 2 * 16)])
    with Counting(after, chunk=BLOCK, preferred=64 * LEAF_BYTES) as reader:
        result = patched(tmp_path, changes, reader)
    assert result.bytes_transferred == changes.length == 28 * 4 * BLOCK
    assert result.bytes_read_here == 28 * LEAF_BYTES
    assert reader.requests == 2  # for the one thread there is
    assert len(reader.asked) == 28


@pytest.mark.parametrize("fault", ["omit", "twice"])
def test_a_reader_that_leaves_out_or_doubles_a_part_is_found_out(tmp_path: Path, fault: str) -> None:
    changes, after = changed_at([(block, 4) for block in range(0, 40 * 16, 16)])
    reader = FakeReader(after, chunk=BLOCK, **{fault: [16 * 8 * BLOCK + BLOCK]})  # type: ignore[arg-type]
    with reader, pytest.raises(IntegrityMismatch, match=r"of a leaf twice|left out"):
        patched(tmp_path, changes, reader)


class Talkative(FakeReader):
    """Sends a block that nobody asked for as well."""

    unasked = 0

    def stream_scattered(self, extents: Sequence[Extent]) -> Generator[tuple[int, memoryview], None, None]:
        yield from super().stream_scattered(extents)
        yield self.unasked, memoryview(self.content)[self.unasked : self.unasked + BLOCK]


@pytest.mark.parametrize("place", [1, 16 + 5], ids=["in a leaf that changed", "in one that did not"])
def test_a_reader_that_sends_what_nobody_asked_for_is_found_out(tmp_path: Path, place: int) -> None:
    changes, after = changed_at([(leaf * 16, 1) for leaf in range(0, 56, 2)])
    reader = Talkative(after, chunk=BLOCK, preferred=64 * LEAF_BYTES)
    reader.unasked = place * BLOCK
    with reader, pytest.raises(IntegrityMismatch, match="unasked"):
        patched(tmp_path, changes, reader)


def test_a_rate_is_of_what_comes_from_the_source_and_not_of_what_is_read_here(tmp_path: Path) -> None:
    changes, after = changed_at([(1, 1), (40, 2), (200, 1)])
    rate = CountedRate()
    result = patched(tmp_path, changes, FakeReader(after), rate=rate)
    assert rate.counted == result.bytes_transferred == 4 * BLOCK
    assert result.bytes_read_here > 2 * result.bytes_transferred
