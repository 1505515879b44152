"""The dirty list: told before anything is written, and what of it a run that follows believes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.images.changes import Changes
from tasks.images.copy import Limits
from tasks.images.digests import LEAF_BYTES, Buffer, Digests, leaf_count, record_of
from tasks.images.dirty import Attempt, DirtyList, Torn, begin, torn_of
from tasks.images.extents import leaf_aligned, whole_disk, without
from tasks.images.layout import DiskFiles
from tasks.images.patch import patch
from tasks.images.raw import RawWriter
from tasks.models import Extent
from tests.unit.images.fakes import FakeReader, leaves

BEFORE, AFTER = leaves("abcdefgh", tail=512), leaves("ABCD0FGH", tail=512)
SIZE = len(AFTER)


def leaf(number: int, count: int = 1) -> Extent:
    return Extent(start=number * LEAF_BYTES, length=count * LEAF_BYTES)


class Watched(RawWriter):
    """An image that is written only where its dirty list on the disk says so."""

    files: DiskFiles
    writes = 0

    def write(self, offset: int, buffer: Buffer) -> None:
        self.check(offset, len(buffer))
        super().write(offset, buffer)

    def zero(self, offset: int, length: int) -> None:
        self.check(offset, length)
        super().zero(offset, length)

    def check(self, offset: int, length: int) -> None:
        torn = torn_of(self.files, size=SIZE)
        assert torn
        assert not without([Extent(start=offset, length=length)], torn.leaves)
        self.writes += 1


@pytest.mark.parametrize("compare", [False, True])
@pytest.mark.parametrize("window_bytes", [LEAF_BYTES, 3 * LEAF_BYTES])
def test_nothing_is_written_that_the_list_on_the_disk_does_not_name(
    tmp_path: Path, window_bytes: int, compare: bool
) -> None:
    files = DiskFiles(tmp_path, 0)
    files.final("raw").write_bytes(BEFORE)
    changes = Changes(whole_disk(SIZE), size=SIZE)
    with (
        FakeReader(AFTER, preferred=LEAF_BYTES) as reader,
        Watched.open(files.final("raw")) as image,
        Digests.create(files.digests, size=SIZE) as digests,
    ):
        for number in range(leaf_count(SIZE)):
            digests.put(number, record_of(BEFORE[number * LEAF_BYTES :][:LEAF_BYTES]))
        image.files = files
        todo = DirtyList(files, changes.leaves, Torn(), at="52 aa/2", at_once=compare, window_bytes=window_bytes)
        limits = Limits(threads=2, checkpoint_bytes=LEAF_BYTES)
        patch(reader, image, changes, digests=digests, todo=todo, compare=compare, limits=limits)
        assert image.writes >= leaf_count(SIZE)
    todo.settle()
    assert files.final("raw").read_bytes() == AFTER
    assert torn_of(files, size=SIZE) == Torn(done=(Attempt(at="52 aa/2", leaves=whole_disk(SIZE)),))


def test_what_was_done_before_is_kept_until_it_is_about_to_change_again(tmp_path: Path) -> None:
    files = DiskFiles(tmp_path, 0)
    before = Torn(leaves=(leaf(5),), done=(Attempt(at="52 aa/2", leaves=(leaf(0, 4),)),))
    todo = DirtyList(files, [leaf(1), leaf(3), leaf(5)], before, at="52 aa/3", at_once=False, window_bytes=LEAF_BYTES)
    assert torn_of(files, size=SIZE) == before.model_copy(update={"done": (*before.done, Attempt(at="52 aa/3"))})
    todo.ahead(leaf(1).end)
    todo.append([leaf(1)])
    todo.ahead(leaf(3).start + 1)
    told = torn_of(files, size=SIZE)
    assert told
    assert told.leaves == (leaf(3), leaf(5))
    assert told.done == (
        Attempt(at="52 aa/2", leaves=(leaf(0), leaf(2))),
        Attempt(at="52 aa/3", leaves=(leaf(1),)),
    )
    assert todo.touched == (leaf(0, 4), leaf(5))


def test_a_list_of_leaves_alone_and_one_that_is_damaged_are_understood(tmp_path: Path) -> None:
    files = DiskFiles(tmp_path, 0)
    assert torn_of(files, size=SIZE) is None
    begin(files, [Extent(start=5, length=10)])
    assert torn_of(files, size=SIZE) == Torn(leaves=(leaf(0),))
    files.dirty.write_text('{"version": 1, "leaves": [{"start": 0, "length": 262144}]}')
    assert torn_of(files, size=SIZE) == Torn(leaves=leaf_aligned([leaf(0)], size=SIZE))
    for text in ("{", '{"version": 9, "leaves": []}', '{"version": 1, "done": 7}'):
        files.dirty.write_text(text)
        assert torn_of(files, size=SIZE) == Torn(leaves=whole_disk(SIZE))


def test_a_line_that_a_kill_or_a_full_disk_cut_short_is_of_no_leaf(tmp_path: Path) -> None:
    files = DiskFiles(tmp_path, 0)
    todo = DirtyList(files, [leaf(1), leaf(3), leaf(5)], Torn(), at="52 aa/3", at_once=False, window_bytes=LEAF_BYTES)
    begun = len(files.dirty.read_bytes())
    todo.ahead(leaf(1).end)  # tells the next one too
    whole = files.dirty.read_bytes()
    first, second = (line + b"\n" for line in whole[begun:].splitlines())
    for length in range(len(second)):
        files.dirty.write_bytes(whole[: begun + len(first) + length])
        told = torn_of(files, size=SIZE)
        assert told
        assert told.leaves == (leaf(1),)
    for damaged in (whole.replace(b'"done"', b'"dome"'), whole[:begun] + b"\0\0\n" + second):
        files.dirty.write_bytes(damaged)
        assert torn_of(files, size=SIZE) == Torn(leaves=whole_disk(SIZE))


def test_a_long_list_is_written_once_and_not_once_a_window(tmp_path: Path) -> None:
    files, size = DiskFiles(tmp_path, 0), 2000 * LEAF_BYTES
    planned = [leaf(number) for number in range(0, 2000, 2)]
    todo = DirtyList(files, planned, Torn(), at="52 aa/3", at_once=False, window_bytes=8 * LEAF_BYTES)
    written = before = 0
    for each in planned:
        todo.ahead(each.end)
        todo.append([each])
        grown = files.dirty.stat().st_size
        written, before = written + (grown - before), grown
    todo.settle()
    assert torn_of(files, size=size) == Torn(done=(Attempt(at="52 aa/3", leaves=tuple(planned)),))
    assert written < 100 * len(planned)


def test_after_a_full_disk_no_window_more_is_told(tmp_path: Path) -> None:
    files = DiskFiles(tmp_path, 0)
    todo = DirtyList(files, [leaf(1), leaf(3)], Torn(), at="52 aa/3", at_once=False, window_bytes=LEAF_BYTES)
    files.dirty.unlink()
    files.dirty.mkdir()  # nothing can be appended to that
    for end in (leaf(1).end, leaf(1).end):
        with pytest.raises(IsADirectoryError):
            todo.ahead(end)
