import json
import os
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.errors import DiskFull
from tasks.images.digests import LEAF_BYTES
from tasks.images.extents import merged
from tasks.images.journal import RECORD_BYTES, Journal
from tasks.models import Extent
from tests.unit.images.dying import every_death, killed

BINDING: dict[str, str | int] = {"vcenter": "v", "disk": "6000C29…", "snapshot": "snapshot-57", "size": 1 << 40}

extents = st.builds(
    lambda at, count: Extent(start=at * LEAF_BYTES, length=count * LEAF_BYTES), st.integers(0, 60), st.integers(1, 9)
)
appended = st.lists(st.lists(extents, max_size=4), max_size=8)


def covered(path: Path, binding: Mapping[str, str | int] = BINDING) -> tuple[Extent, ...]:
    with Journal.open(path, binding=binding) as journal:
        return journal.covered


def written(path: Path, batches: list[list[Extent]]) -> Path:
    path.unlink(missing_ok=True)
    with Journal.open(path, binding=BINDING) as journal:
        for batch in batches:
            journal.append(batch)
    return path


def leaves_of(extents: tuple[Extent, ...] | list[Extent]) -> set[int]:
    return {leaf for each in extents for leaf in range(each.start // LEAF_BYTES, each.end // LEAF_BYTES)}


def all_of(batches: list[list[Extent]]) -> list[Extent]:
    return [extent for batch in batches for extent in batch]


@given(appended, appended)
def test_what_was_appended_is_covered_also_after_opening_again(
    tmp_path_factory: pytest.TempPathFactory, first: list[list[Extent]], then: list[list[Extent]]
) -> None:
    path = written(tmp_path_factory.mktemp("j") / "x.journal", first)
    with Journal.open(path, binding=BINDING) as journal:
        assert journal.covered == merged(all_of(first))
        for batch in then:
            journal.append(batch)
        assert journal.covered == merged(all_of(first + then))
    assert covered(path) == merged(all_of(first + then))


@given(appended, st.data())
def test_cut_anywhere_it_covers_a_part_of_what_was_appended_and_goes_on(
    tmp_path_factory: pytest.TempPathFactory, batches: list[list[Extent]], data: st.DataObject
) -> None:
    path = written(tmp_path_factory.mktemp("j") / "x.journal", batches)
    size = path.stat().st_size
    cut = data.draw(st.integers(0, size))
    os.truncate(path, cut)
    lost = -(-(size - cut) // RECORD_BYTES)
    kept = all_of(batches)[: max(0, len(all_of(batches)) - lost)]
    with Journal.open(path, binding=BINDING) as journal:
        assert journal.covered == merged(kept)
        if kept:
            assert path.stat().st_size == size - lost * RECORD_BYTES
        journal.append([Extent(start=1 << 30, length=LEAF_BYTES)])
    assert covered(path) == merged([*kept, Extent(start=1 << 30, length=LEAF_BYTES)])


@given(appended, st.data(), st.integers(0, 7))
def test_a_flipped_bit_anywhere_loses_something_and_invents_nothing(
    tmp_path_factory: pytest.TempPathFactory, batches: list[list[Extent]], data: st.DataObject, bit: int
) -> None:
    path = written(tmp_path_factory.mktemp("j") / "x.journal", batches)
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= 1 << bit
    path.write_bytes(content)
    assert leaves_of(covered(path)) <= leaves_of(all_of(batches))
    header = len(content) - len(all_of(batches)) * RECORD_BYTES
    whole_before = max(0, (at - header) // RECORD_BYTES)
    assert covered(path) == merged(all_of(batches)[:whole_before])


@given(st.binary(max_size=400))
def test_whatever_lies_there_is_no_journal_of_ours(tmp_path_factory: pytest.TempPathFactory, junk: bytes) -> None:
    path = tmp_path_factory.mktemp("j") / "x.journal"
    path.write_bytes(junk)
    assert covered(path) == ()


bindings = st.dictionaries(st.text(max_size=5), st.text(max_size=5) | st.integers(0, 9), max_size=4)


@given(bindings, bindings)
def test_another_bindings_journal_is_never_used(
    tmp_path_factory: pytest.TempPathFactory, one: dict[str, str | int], other: dict[str, str | int]
) -> None:
    path = tmp_path_factory.mktemp("j") / "x.journal"
    done = (Extent(start=0, length=LEAF_BYTES),)
    with Journal.open(path, binding=one) as journal:
        journal.append(done)
    same = json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    assert covered(path, other) == (done if same else ())
    assert covered(path, one) == (done if same else ())  # what was begun anew is gone


def test_the_order_of_a_binding_means_nothing(tmp_path: Path) -> None:
    written(tmp_path / "x", [[Extent(start=0, length=LEAF_BYTES)]])
    assert covered(tmp_path / "x", dict(reversed(BINDING.items())))


def test_records_of_before_a_restart_never_come_back(tmp_path: Path) -> None:
    """Not even where the old blocks turn up behind the new header: same binding, same place."""
    path = written(tmp_path / "x", [[Extent(start=0, length=LEAF_BYTES)]])
    old = path.read_bytes()
    with Journal.open(path, binding=BINDING) as journal:
        journal.restart()
        assert journal.covered == ()
    assert path.stat().st_size == len(old) - RECORD_BYTES
    path.write_bytes(path.read_bytes() + old[-RECORD_BYTES:])
    assert covered(path) == ()


def test_many_records_are_read_in_blocks(tmp_path: Path) -> None:
    apart = [Extent(start=2 * n * LEAF_BYTES, length=LEAF_BYTES) for n in range(9000)]
    assert covered(written(tmp_path / "x", [apart])) == tuple(apart)


def test_killed_anywhere_what_append_returned_for_is_there(tmp_path: Path) -> None:
    path = tmp_path / "x"
    batches = [[Extent(start=n * LEAF_BYTES, length=LEAF_BYTES)] for n in range(3)]
    assert [len(leaves_of(covered(path))) for _ in every_death(lambda: written(path, batches))][-3:] == [2, 2, 3]


def test_a_full_disk_is_named_and_what_was_there_stays(small_disk: Path) -> None:
    path = written(small_disk / "x", [[Extent(start=0, length=LEAF_BYTES)]])
    ballast = small_disk / "ballast"
    with Journal.open(path, binding=BINDING) as journal, ballast.open("wb") as file:
        with pytest.raises(OSError, match="space"):
            while True:
                os.write(file.fileno(), bytes(4096))
        with pytest.raises(DiskFull) as raised:
            journal.append([Extent(start=n * LEAF_BYTES, length=1) for n in range(1000)])
        assert raised.value.path == str(path)
    assert leaves_of(covered(path)) >= {0}


def test_a_symbolic_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "x").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="symbolic"):
        Journal.open(tmp_path / "x", binding=BINDING)


def test_the_harness_kills() -> None:
    assert killed(lambda: os.fsync(1), before=1)
    assert not killed(lambda: None, before=1)
