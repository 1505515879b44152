import os
import subprocess
import threading
from pathlib import Path
from typing import get_args

import pytest

from tasks.images.digests import HEADER_BYTES, LEAF_BYTES, RECORD_BYTES, Digests
from tasks.images.prove import Claim, in_words, prove, wrong_leaves
from tasks.images.qemu import convert, qemu_nbd, takes_direct
from tasks.models import Extent, ImageFormat
from tasks.process import Stopped
from tests.unit.images.copies import CONTENT, copied, flip

FORMATS = pytest.mark.parametrize("format", get_args(ImageFormat))
BOTH = pytest.mark.parametrize("format", ["raw", "qcow2"])


def claimed(folder: Path, format: ImageFormat = "raw", **changes: object) -> Claim:
    """Return what a manifest would say of a copy of CONTENT, which is made in `folder`."""
    path = copied(folder, format)
    sidecar = folder / "x.digests"
    with Digests.open(sidecar) as digests:
        claim = Claim(
            name=path.name,
            path=path,
            format=format,
            size_bytes=len(CONTENT),
            digest=digests.image_digest(),
            sidecar=sidecar,
        )
    return claim.model_copy(update=changes)


def rot(claim: Claim, leaf: int) -> None:
    """Turn a bit over in the middle of a leaf of the image, wherever its format keeps that."""
    middle = leaf * LEAF_BYTES + 1000
    flip(claim.path, claim.path.read_bytes().index(CONTENT[middle : middle + 64]))


def rot_digests(claim: Claim, leaf: int) -> None:
    assert claim.sidecar
    flip(claim.sidecar, HEADER_BYTES + leaf * RECORD_BYTES + 7)


def leaf(number: int, count: int = 1) -> Extent:
    return Extent(start=number * LEAF_BYTES, length=count * LEAF_BYTES)


@FORMATS
def test_what_was_copied_is_equal_and_its_holes_are_not_read(tmp_path: Path, format: ImageFormat) -> None:
    done: list[int] = []
    file = prove(claimed(tmp_path, format), progress=done.append)
    assert (file.verdict, file.wrong_leaves, file.first_wrong, file.detail) == ("equal", 0, (), "")
    assert sum(done) == len(CONTENT)
    if format in ("raw", "qcow2"):  # blocks of the others are larger than a leaf
        assert file.bytes_read == 6 * LEAF_BYTES + 1024
    assert file.read == ("direct" if takes_direct(tmp_path) else "cached")


def test_a_compressed_qcow2_is_read_by_its_content(tmp_path: Path) -> None:
    claim = claimed(tmp_path, "qcow2")
    packed = tmp_path / "packed.qcow2"
    convert(claim.path, packed, source_format="qcow2", target_format="qcow2", compression="zstd")
    claim = claim.model_copy(update={"path": packed})
    assert prove(claim).verdict == "equal"
    flip(packed, packed.stat().st_size - 3000)
    assert prove(claim).verdict != "equal"


@BOTH
def test_rot_in_an_image_is_located_to_its_leaves(tmp_path: Path, format: ImageFormat) -> None:
    claim = claimed(tmp_path, format)
    for number in (0, 1, 45):
        rot(claim, number)
    file = prove(claim)
    assert (file.verdict, file.wrong_leaves, file.first_wrong) == ("content differs", 3, (leaf(0, 2), leaf(45)))
    assert wrong_leaves(file) == "3 at bytes 0–524,287, 11,796,480–12,058,623"


@BOTH
def test_rot_in_the_digests_is_told_apart_from_rot_in_the_image(tmp_path: Path, format: ImageFormat) -> None:
    claim = claimed(tmp_path, format)
    rot_digests(claim, 3)
    rot_digests(claim, 20)
    file = prove(claim)
    assert (file.verdict, file.wrong_leaves, file.first_wrong) == ("digests differ", 2, (leaf(3), leaf(20)))


@BOTH
def test_where_both_rotted_it_says_that_it_cannot_tell(tmp_path: Path, format: ImageFormat) -> None:
    claim = claimed(tmp_path, format)
    rot(claim, 1)
    rot_digests(claim, 3)
    file = prove(claim)
    assert (file.verdict, file.first_wrong) == ("both differ", (leaf(1), leaf(3)))


def test_image_and_digests_that_agree_accuse_the_manifest(tmp_path: Path) -> None:
    file = prove(claimed(tmp_path, digest="blake3:00"))
    assert (file.verdict, file.wrong_leaves) == ("manifest differs", 0)


@BOTH
def test_a_hole_where_there_was_data_is_a_difference(tmp_path: Path, format: ImageFormat) -> None:
    claim = claimed(tmp_path, format)
    subprocess.run(["qemu-io", "-f", format, "-c", f"discard {LEAF_BYTES} {LEAF_BYTES}", claim.path], check=True)
    file = prove(claim)
    assert (file.verdict, file.first_wrong) == ("content differs", (leaf(1),))
    assert file.bytes_read < prove(claimed(tmp_path, format)).bytes_read


def test_data_where_there_was_a_hole_is_a_difference(tmp_path: Path) -> None:
    claim = claimed(tmp_path)
    flip(claim.path, 20 * LEAF_BYTES + 5)
    assert prove(claim).first_wrong == (leaf(20),)


def test_many_differences_are_counted_and_the_first_are_told(tmp_path: Path) -> None:
    claim = claimed(tmp_path)
    with claim.path.open("r+b") as file:
        for number in range(4, 44, 2):
            file.seek(number * LEAF_BYTES)
            file.write(b"x")
    found = prove(claim)
    assert found.wrong_leaves == 20
    assert found.first_wrong == tuple(leaf(number) for number in range(4, 20, 2))
    assert wrong_leaves(found).endswith("4,718,592–4,980,735, …")


def test_a_file_without_digests_of_its_leaves_is_compared_as_a_whole(tmp_path: Path) -> None:
    claim = claimed(tmp_path, sidecar=None)
    assert prove(claim).verdict == "equal"
    rot(claim, 1)
    file = prove(claim)
    assert (file.format, file.verdict, file.wrong_leaves, wrong_leaves(file)) == ("file", "content differs", None, "")


def test_an_empty_file_is_equal_to_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "empty"
    path.touch()
    with Digests.create(tmp_path / "digests", size=0) as digests:
        digest = digests.image_digest()
    claim = Claim(name="empty", path=path, format="raw", size_bytes=0, digest=digest, sidecar=None)
    assert prove(claim).verdict == "equal"


@pytest.mark.parametrize("by", [-1, 1, -LEAF_BYTES, 512])
def test_a_raw_image_of_another_size_is_damaged(tmp_path: Path, by: int) -> None:
    claim = claimed(tmp_path)
    os.truncate(claim.path, len(CONTENT) + by)
    file = prove(claim)
    assert (file.verdict, file.bytes_read) == ("damaged", 0)
    assert f"it has {len(CONTENT) + by:,} bytes" in file.detail


@pytest.mark.parametrize("format", ["qcow2", "vmdk", "vdi", "vhdx"])
def test_a_resized_image_is_damaged(tmp_path: Path, format: ImageFormat) -> None:
    claim = claimed(tmp_path, format, size_bytes=len(CONTENT) + 4 * LEAF_BYTES)
    file = prove(claim)
    assert (file.verdict, file.detail) == (
        "damaged",
        f"a disk of {len(CONTENT)} bytes, not of {len(CONTENT) + 4 * LEAF_BYTES}",
    )


@pytest.mark.parametrize("format", ["qcow2", "vmdk", "vdi", "vhdx"])
@pytest.mark.parametrize("left", [0, 100, 3 * LEAF_BYTES])
def test_a_cut_image_is_no_good(tmp_path: Path, format: ImageFormat, left: int) -> None:
    claim = claimed(tmp_path, format)
    os.truncate(claim.path, left)
    assert prove(claim).verdict in ("damaged", "content differs")


def test_metadata_that_is_damaged_is_told_though_the_content_is_equal(tmp_path: Path) -> None:
    claim = claimed(tmp_path, "qcow2")
    with claim.path.open("r+b") as file:
        table = int.from_bytes(os.pread(file.fileno(), 8, 48), "big")  # docs/interop/qcow2.txt: refcount_table_offset
        block = int.from_bytes(os.pread(file.fileno(), 8, table), "big")
        os.pwrite(file.fileno(), b"\0\5", block)
    file = prove(claim)
    assert (file.verdict, file.wrong_leaves) == ("damaged", 0)
    assert file.detail.startswith("qemu-img check: ")


@pytest.mark.parametrize("name", ["gone", "x.digests/below a file"])
def test_a_file_that_is_not_there_is_missing(tmp_path: Path, name: str) -> None:
    file = prove(claimed(tmp_path, path=tmp_path / name))
    assert (file.verdict, in_words(file)) == ("missing", "missing, there is no such file")


def test_what_is_no_file_is_unreadable(tmp_path: Path) -> None:
    file = prove(claimed(tmp_path, "qcow2", path=tmp_path))
    assert (file.verdict, file.detail) == ("unreadable", "Is a directory")


def test_an_image_on_top_of_another_is_not_followed(tmp_path: Path) -> None:
    claim = claimed(tmp_path, "qcow2")
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", claim.path, tmp_path / "top"], check=True
    )
    file = prove(claim.model_copy(update={"path": tmp_path / "top"}))
    assert (file.verdict, file.detail) == ("damaged", "it names a backing file")


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda path: path.unlink(), "it is missing"),
        (lambda path: flip(path, 0), "it is no digest sidecar of ours"),
        (lambda path: os.truncate(path, HEADER_BYTES + 40), "it is cut short, or not of the image that it names"),
    ],
)
def test_digests_that_cannot_be_used_leave_the_image_to_the_manifest(tmp_path: Path, spoil, why: str) -> None:
    claim = claimed(tmp_path)
    spoil(claim.sidecar)
    file = prove(claim)
    assert (file.verdict, file.detail, file.wrong_leaves) == ("digests differ", f"x.digests: {why}", None)
    rot(claim, 1)
    assert prove(claim).verdict == "both differ"


def test_digests_of_another_disk_are_told(tmp_path: Path) -> None:
    claim = claimed(tmp_path)
    with Digests.create(tmp_path / "x.digests", size=LEAF_BYTES):
        pass
    assert prove(claim).detail == f"x.digests: it is of a disk of {LEAF_BYTES:,} bytes"


def test_an_image_that_a_guest_runs_from_is_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.images.qemu.LOCK_S", 0.2)
    claim = claimed(tmp_path, "qcow2")
    with qemu_nbd(claim.path, format="qcow2", read_only=False):
        file = prove(claim)
    assert file.verdict == "in use"


def test_nothing_is_written_beside_the_image(tmp_path: Path) -> None:
    claim = claimed(tmp_path, "qcow2")
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.iterdir()}
    prove(claim)
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.iterdir()} == before


def test_stop_ends_it(tmp_path: Path) -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped):
        prove(claimed(tmp_path), stop=stop)
