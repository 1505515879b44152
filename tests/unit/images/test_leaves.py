import tracemalloc
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.images.digests import LEAF_BYTES
from tasks.images.leaves import Misread, Piece
from tasks.models import Extent
from tests.unit.images.fakes import leaves

CONTENT = leaves("abc", tail=1536)
WHOLE = Extent(start=0, length=len(CONTENT))


def take_all(piece: Piece, cuts: list[tuple[int, int]]) -> dict[int, bytes]:
    whole: dict[int, bytes] = {}
    for start, end in cuts:
        for leaf, content in piece.take(start, memoryview(CONTENT)[start:end]):
            assert leaf not in whole
            whole[leaf] = bytes(content)
    return whole


@given(st.data())
def test_leaves_come_whole_and_once_from_cuts_in_any_order(data: st.DataObject) -> None:
    inner = data.draw(st.lists(st.integers(1, len(CONTENT) - 1), max_size=12, unique=True))
    marks = [0, *sorted(inner), len(CONTENT)]
    cuts = data.draw(st.permutations(list(pairwise(marks))))
    piece = Piece([WHOLE])
    whole = take_all(piece, cuts)
    assert b"".join(whole[leaf] for leaf in sorted(whole)) == CONTENT
    assert piece.left == 0
    assert piece.missing() == []


def test_memory_does_not_grow_with_what_is_asked_for_at_once() -> None:
    tracemalloc.start()
    try:
        piece = Piece([Extent(start=0, length=1 << 42)])
        buffer = memoryview(bytes(LEAF_BYTES))
        for leaf in range(1000):
            assert len([*piece.take(2 * leaf * LEAF_BYTES, buffer)]) == 1
        assert piece.left == (1 << 42) // LEAF_BYTES - 1000
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_leaf_that_lies_whole_in_a_buffer_is_not_copied() -> None:
    buffer = memoryview(CONTENT)[:LEAF_BYTES]
    ((_, content),) = Piece([WHOLE]).take(0, buffer)
    assert isinstance(content, memoryview)
    assert content.obj is buffer.obj


def test_only_what_is_not_complete_is_missing_and_half_a_leaf_is_forgotten() -> None:
    piece = Piece([WHOLE])
    take_all(piece, [(LEAF_BYTES, 2 * LEAF_BYTES + 100)])
    assert piece.missing() == [
        Extent(start=0, length=LEAF_BYTES),
        Extent(start=2 * LEAF_BYTES, length=LEAF_BYTES + 1536),
    ]
    assert piece.first_missing == 0
    take_all(piece, [(2 * LEAF_BYTES, len(CONTENT)), (0, LEAF_BYTES)])
    assert piece.left == 0


@pytest.mark.parametrize(
    "cuts",
    [
        [(0, 1000), (0, 1000)],
        [(0, 1000), (500, 2000)],
        [(0, LEAF_BYTES), (0, LEAF_BYTES)],
        [(0, 1000), (0, LEAF_BYTES)],
        [(0, LEAF_BYTES), (100, 200)],
    ],
)
def test_bytes_that_come_twice_are_a_misread(cuts: list[tuple[int, int]]) -> None:
    with pytest.raises(Misread, match="twice"):
        take_all(Piece([WHOLE]), cuts)


@pytest.mark.parametrize("offset", [0, 2 * LEAF_BYTES, 3 * LEAF_BYTES])
def test_bytes_that_nobody_asked_for_are_a_misread(offset: int) -> None:
    piece = Piece([Extent(start=LEAF_BYTES, length=LEAF_BYTES)])
    with pytest.raises(Misread, match="unasked"):
        list(piece.take(offset, memoryview(CONTENT)[offset : offset + 512]))


def test_bytes_past_the_end_of_the_last_leaf_are_a_misread() -> None:
    with pytest.raises(Misread, match="unasked"):
        list(Piece([WHOLE]).take(len(CONTENT) - 512, memoryview(bytes(1024))))
