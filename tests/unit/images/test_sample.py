from pathlib import Path

import pytest

from tasks.images.digests import LEAF_BYTES, Digests, leaf_count, record_of
from tasks.images.sample import chosen_leaves, differing_at_source
from tasks.reader import TransientFault
from tests.unit.images.fakes import FakeReader, leaves

CONTENT = leaves("ab00cd", tail=700)


@pytest.fixture
def digests(tmp_path: Path):
    with Digests.create(tmp_path / "x.digests", size=len(CONTENT)) as digests:
        for leaf in range(leaf_count(len(CONTENT))):
            digests.put(leaf, record_of(CONTENT[leaf * LEAF_BYTES : (leaf + 1) * LEAF_BYTES]))
        yield digests


def test_leaves_are_chosen_by_the_seed_in_order_and_none_twice() -> None:
    size = 1000 * LEAF_BYTES + 1
    chosen = chosen_leaves(size, count=64, seed="7-0")
    assert len(set(chosen)) == 64
    assert sorted(chosen) == list(chosen)
    assert chosen[0] >= 0 and chosen[-1] <= 1000
    assert chosen == chosen_leaves(size, count=64, seed="7-0") != chosen_leaves(size, count=64, seed="7-1")


def test_of_a_small_disk_every_leaf_is_chosen() -> None:
    assert chosen_leaves(len(CONTENT), count=64, seed="x") == tuple(range(7))


def test_only_the_leaves_asked_for_are_read_and_they_are_equal(digests: Digests) -> None:
    reader = FakeReader(CONTENT)
    assert differing_at_source(reader, digests, (1, 2, 6)) == ()
    assert sorted(extent.start // LEAF_BYTES for extent in reader.asked) == [1, 2, 6]
    assert sum(extent.length for extent in reader.asked) == 2 * LEAF_BYTES + 700


def test_what_the_source_has_otherwise_is_named(digests: Digests) -> None:
    content = bytearray(CONTENT)
    for leaf in (1, 2, 5):
        content[leaf * LEAF_BYTES + 9] ^= 1
    assert differing_at_source(FakeReader(bytes(content)), digests, (0, 1, 2, 3)) == (1, 2)


def test_a_source_that_fails_in_passing_is_asked_again(digests: Digests) -> None:
    reader = FakeReader(CONTENT, faults=[(LEAF_BYTES + 100, TransientFault("reset"))])
    assert differing_at_source(reader, digests, (1,)) == ()
    assert len(reader.asked) == 2
