from collections.abc import Iterable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.images.digests import LEAF_BYTES
from tasks.images.extents import check_plan, leaf_aligned, merged, pieces, whole_disk, within, without
from tasks.models import Extent

SIZE = 20 * LEAF_BYTES + 512


@st.composite
def extents(draw: st.DrawFn) -> list[Extent]:
    starts = draw(st.lists(st.integers(0, SIZE - 1), max_size=8))
    return [Extent(start=start, length=draw(st.integers(1, SIZE - start))) for start in starts]


@given(extents())
def test_aligning_covers_every_byte_and_makes_a_plan(parts: list[Extent]) -> None:
    wide = leaf_aligned(parts, size=SIZE)
    check_plan(wide, size=SIZE)
    for part in parts:
        assert any(each.start <= part.start and part.end <= each.end for each in wide)
    touched = {leaf for part in parts for leaf in range(part.start // LEAF_BYTES, (part.end - 1) // LEAF_BYTES + 1)}
    assert sum(-(-each.length // LEAF_BYTES) for each in wide) == len(touched)


@given(extents(), st.integers(1, 6 * LEAF_BYTES))
def test_pieces_are_a_partition_at_leaf_boundaries(parts: list[Extent], piece_bytes: int) -> None:
    wide = leaf_aligned(parts, size=SIZE)
    cut = list(pieces(wide, piece_bytes))
    assert leaf_aligned(cut, size=SIZE) == wide
    assert sum(piece.length for piece in cut) == sum(each.length for each in wide)
    assert all(piece.start % LEAF_BYTES == 0 for piece in cut)
    assert all(piece.length <= max(piece_bytes, LEAF_BYTES) for piece in cut)


@given(extents(), extents())
def test_within_is_what_is_in_both(parts: list[Extent], bounds: list[Extent]) -> None:
    both = within(parts, bounds)
    assert list(both) == list(merged(both))
    assert without(both, parts) == without(both, bounds) == ()
    assert without(without(parts, bounds), both) == without(parts, bounds)
    rest = sum(extent.length for extent in without(parts, bounds))
    assert sum(extent.length for extent in both) + rest == sum(extent.length for extent in merged(parts))


def test_an_empty_disk_has_no_extent() -> None:
    assert whole_disk(0) == ()
    assert whole_disk(5) == (Extent(start=0, length=5),)


@pytest.mark.parametrize(
    "bad",
    [
        [Extent(start=512, length=LEAF_BYTES - 512)],
        [Extent(start=0, length=512)],
        [Extent(start=0, length=SIZE + 512)],
        [Extent(start=LEAF_BYTES, length=LEAF_BYTES), Extent(start=0, length=LEAF_BYTES)],
        [Extent(start=0, length=2 * LEAF_BYTES), Extent(start=LEAF_BYTES, length=LEAF_BYTES)],
    ],
    ids=["starts inside", "ends inside", "too long", "out of order", "overlapping"],
)
def test_a_plan_that_is_not_whole_leaves_in_order_is_refused(bad: list[Extent]) -> None:
    with pytest.raises(ValueError, match=r"leaf|order"):
        check_plan(bad, size=SIZE)


def bytes_of(parts: Iterable[Extent]) -> set[int]:
    """In sectors, to keep it small."""
    return {at for part in parts for at in range(part.start // 512, part.end // 512)}


sectors = st.lists(
    st.builds(lambda at, n: Extent(start=at * 512, length=n * 512), st.integers(0, 30), st.integers(1, 9)), max_size=6
)


@given(sectors)
def test_merging_keeps_the_bytes_and_joins_what_touches(parts: list[Extent]) -> None:
    joined = merged(parts)
    assert bytes_of(joined) == bytes_of(parts)
    assert all(one.end < other.start for one, other in pairwise(joined))


@given(sectors, sectors)
def test_what_is_left_out_is_out_and_nothing_else(parts: list[Extent], others: list[Extent]) -> None:
    rest = without(parts, others)
    assert bytes_of(rest) == bytes_of(parts) - bytes_of(others)
    assert merged(rest) == rest
