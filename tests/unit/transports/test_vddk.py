"""Where the library is looked for, and the arithmetic of what is asked of it. The rest is in tests/integration."""

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.errors import VddkUnavailable
from tasks.models import SECTOR_BYTES, Extent
from tasks.reader import cut
from tasks.transports import vddk, vddk_library
from tasks.transports.vddk import LEAF_BYTES, REQUEST_BYTES, SAMPLES
from tasks.transports.vddk_library import find_library


def a_library(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()
    return folder


@pytest.mark.parametrize("given", ["", "lib64"])
def test_it_is_found_from_the_distributions_root_and_from_its_lib64(tmp_path: Path, given: str) -> None:
    lib64 = a_library(tmp_path / "lib64", "libvixDiskLib.so.8.0.3")
    (lib64 / "libvixDiskLib.so.8").symlink_to("libvixDiskLib.so.8.0.3")
    found = find_library(tmp_path / given)
    assert (found.folder, found.root, found.version) == (lib64, tmp_path, "8.0.3")
    assert found.words == "VDDK 8.0.3 (for vSphere 6.7 and newer)"


def test_it_may_lie_in_the_folder_itself_and_of_several_the_newest_is_taken(tmp_path: Path) -> None:
    a_library(tmp_path, "libvixDiskLib.so.6", "libvixDiskLib.so.9", "libvixDiskLib.so.7")
    found = find_library(tmp_path)
    assert (found.file.name, found.folder, found.root) == ("libvixDiskLib.so.9", tmp_path, tmp_path)
    assert found.words.endswith("(for vSphere 7.0 and newer)")


def test_what_is_missing_and_where_it_was_looked_for_is_in_the_error(tmp_path: Path) -> None:
    a_library(tmp_path / "lib64", "libvixDiskLib.so.5", "libvixDiskLib.so")
    with pytest.raises(VddkUnavailable) as caught:
        find_library(tmp_path)
    assert caught.value.missing.endswith("so.6, .7, .8, .9 (only libvixDiskLib.so, libvixDiskLib.so.5)")
    assert caught.value.looked_in == f"{tmp_path}/lib64, {tmp_path}"
    with pytest.raises(VddkUnavailable, match=r"nowhere/lib64 \(not there\)"):
        find_library(tmp_path / "nowhere")


def test_without_a_folder_it_is_looked_for_where_it_usually_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vddk_library, "USUAL_FOLDERS", (tmp_path / "a", tmp_path / "b"))
    a_library(tmp_path / "b" / "lib64", "libvixDiskLib.so.7")
    assert find_library(None).root == tmp_path / "b"


@given(st.integers(0, 40), st.integers(1, 40))
def test_requests_cover_an_extent_and_end_at_multiples_of_their_length(start: int, count: int) -> None:
    extent = Extent(start=start * LEAF_BYTES, length=count * LEAF_BYTES)
    requests = list(cut(extent, REQUEST_BYTES))
    assert (requests[0].start, requests[-1].end) == (extent.start, extent.end)
    for one, next_one in pairwise(requests):
        assert one.end == next_one.start
        assert one.end % REQUEST_BYTES == 0
    assert max(request.length for request in requests) <= REQUEST_BYTES


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20))), st.integers(1, 64))
def test_runs_of_sectors_become_sorted_extents_that_do_not_touch_and_end_with_the_disk(
    runs: list[tuple[int, int]], sectors: int
) -> None:
    size = sectors * SECTOR_BYTES
    extents = list(vddk._extents(runs, size))
    allocated = {sector for first, count in runs for sector in range(first, first + count) if sector < sectors}
    found = [sector for extent in extents for sector in range(extent.start // 512, extent.end // 512)]
    assert found == sorted(allocated)
    assert all(one.end < after.start for one, after in pairwise(extents))


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 3000)), max_size=30))
def test_a_sample_is_spread_over_what_is_allocated(shapes: list[tuple[int, int]]) -> None:
    extents, at = [], 0
    for gap, leaves in shapes:
        at += (gap + 1) * LEAF_BYTES
        extents.append(Extent(start=at, length=leaves * LEAF_BYTES))
        at += leaves * LEAF_BYTES
    places = vddk._sample(extents)
    assert len(places) <= SAMPLES * 2
    assert bool(places) == bool(extents)
    for place in places:
        assert any(extent.start <= place.start and place.end <= extent.end for extent in extents)
