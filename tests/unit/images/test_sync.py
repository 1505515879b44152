"""Syncs of an image whose guest goes on writing, killed wherever it may be: after the last one the copy is the disk."""

from __future__ import annotations

import random
import subprocess
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from tasks.errors import ChangeIdInvalid, IntegrityMismatch, InvalidInput
from tasks.images.base import Base
from tasks.images.copy import Limits, copy
from tasks.images.digests import LEAF_BYTES, Digests, record_of
from tasks.images.dirty import DirtyList, begin, refuse_torn, torn_of
from tasks.images.extents import merged, whole_disk
from tasks.images.layout import DiskFiles
from tasks.images.manifest import read_manifest, write_manifest
from tasks.images.qcow2 import Qcow2Writer
from tasks.images.raw import RawWriter
from tasks.images.sync import Synced, bring_up_to_date, count
from tasks.models import ArrivalFormat, DiskImage, Extent, Manifest, VirtualDisk
from tests.unit.images.dying import CALLS, every_death, killed
from tests.unit.images.fakes import FakeReader, leaves
from tests.unit.images.test_manifest import VM

BLOCK = 64 * 1024
CONTENT = leaves("ab0c0de", tail=5 * 512)
SIZE = len(CONTENT)
MEMORY = "/dev/shm"  # where fsync takes no time: thousands of them
LIMITS = Limits(threads=2, attempts=3, first_wait_s=0.001, longest_wait_s=0.002, checkpoint_bytes=LEAF_BYTES)


class Source:
    """A disk whose guest writes, and a host that tracks it; a snapshot is held from `point` on."""

    def __init__(self) -> None:
        self.content, self.uuid = bytearray(CONTENT), "52 00"
        self.epochs: list[set[int]] = [set()]
        self.frozen = bytes(self.content)
        self.history = [self.frozen]
        self.widened = self.silent = False

    @property
    def size(self) -> int:
        return len(self.content)

    def grow(self, length: int) -> None:
        """As vSphere extends a disk: zeros at its end, of which no changeId of before knows."""
        self.content += bytes(length)

    def write(self, offset: int, data: bytes) -> None:
        self.content[offset : offset + len(data)] = data
        self.epochs[-1] |= set(range(offset // BLOCK, -(-(offset + len(data)) // BLOCK)))

    def reset(self) -> None:
        self.uuid, self.epochs = f"52 {int(self.uuid[3:]) + 1:02}", [set()]

    def revert(self, back: int) -> None:
        before = self.history[-1 - back % len(self.history)]
        self.content[: len(before)] = before  # of the size that it has now: hosts do not extend what has snapshots
        self.reset()

    def restore(self, back: int) -> None:
        """As `revert`, but the tracking is of that time too: the next points have the numbers of those since."""
        self.content[:] = self.history[-1 - back]
        del self.epochs[len(self.epochs) - back :]
        self.epochs[-1] = set()

    def point(self) -> str:
        """Take the snapshot to sync to; return its changeId."""
        self.frozen = bytes(self.content)
        self.history.append(self.frozen)
        self.epochs.append(set())
        return f"{self.uuid}/{len(self.epochs)}"

    def changed(self, since: str) -> tuple[Extent, ...]:
        uuid, _, number = since.partition("/")
        if uuid != self.uuid or self.silent:
            raise ChangeIdInvalid(disk="disk", reason="unknown")
        blocks = set().union(*self.epochs[int(number) - 1 : -1])
        if self.widened:
            blocks |= {block + 1 for block in blocks} | {0}
        size = len(self.frozen)
        found = (Extent(start=n * BLOCK, length=min(BLOCK, size - n * BLOCK)) for n in blocks if n * BLOCK < size)
        return merged(found)


def disk(change_id: str, size: int = SIZE) -> VirtualDisk:
    return VirtualDisk(
        index=0,
        key=2000,
        label="Hard disk 1",
        controller_key=1000,
        datastore_path="[ds] web/web.vmdk",
        capacity_bytes=size,
        backing="FlatVer2BackingInfo",
        uuid="6000C29",
        change_id=change_id,
    )


def make_copy(folder: Path, source: Source, form: ArrivalFormat = "raw") -> None:
    """Leave a whole copy of the source as of now, as an export does."""
    change_id, files = source.point(), DiskFiles(folder, 0)
    kind = RawWriter if form == "raw" else Qcow2Writer
    with (
        FakeReader(source.frozen) as reader,
        kind.create(files.final(form), size=SIZE) as writer,
        Digests.create(files.digests, size=SIZE) as digests,
    ):
        result = copy(reader, whole_disk(SIZE), writer, digests=digests, limits=LIMITS)
    image = DiskImage(
        index=0,
        disk_key=2000,
        uuid="6000C29",
        change_id=change_id,
        source="[ds] web/web.vmdk",
        path=files.final(form).name,
        format=form,
        virtual_size=SIZE,
        digest=result.digest,
        bytes_transferred=SIZE,
        road="fake",
        verified="direct",
    )
    whole = Manifest(vcenter_uuid="v", vm=VM, snapshot=None, disks=(image,), consistent=True, created="now")
    write_manifest(folder, whole)


def assert_torn_or_whole(folder: Path, history: Sequence[bytes]) -> None:
    """A copy is refused, or is one of the points in time that there were."""
    try:
        refuse_torn(folder)
    except InvalidInput:
        return
    image = read_manifest(folder).disks[0]
    assert content_of(folder / image.path, image.format) in history


def sync(folder: Path, source: Source, change_id: str, *, skip_readback: bool = False) -> Synced:
    """Bring the copy up to the source's last point, and have it count."""
    manifest = read_manifest(folder)
    base = Base(disk=disk(change_id, len(source.frozen)), image=manifest.disks[0])
    with FakeReader(source.frozen, chunk=BLOCK // 2) as reader:
        synced = bring_up_to_date(
            reader, base, folder, source.changed, limits=LIMITS, skip_readback=skip_readback, window_bytes=LEAF_BYTES
        )
    count(folder, manifest.model_copy(update={"disks": (synced.image,)}))
    return synced


def content_of(path: Path, form: str) -> bytes:
    """Return what a guest would see: of a qcow2 by qemu-img."""
    if form == "raw":
        return path.read_bytes()
    raw = path.with_name(".compare")
    subprocess.run(["qemu-img", "convert", "-f", form, "-O", "raw", str(path), str(raw)], check=True)
    content = raw.read_bytes()
    raw.unlink()
    return content


def assert_counts(folder: Path, source: Source) -> None:
    """Compare image, digests and manifest with the source's last point."""
    image = read_manifest(folder).disks[0]
    assert image.virtual_size == len(source.frozen)
    leaves = range(0, len(source.frozen), LEAF_BYTES)
    with Digests.open(folder / "disk-0.digests") as digests:
        assert digests.image_digest() == image.digest
        records = [record_of(source.frozen[at : at + LEAF_BYTES]) for at in leaves]
        assert digests.records(0, len(leaves)) == b"".join(records)
    assert content_of(folder / image.path, image.format) == source.frozen
    refuse_torn(folder)
    kept = {image.path, "disk-0.digests", "manifest.json"}
    assert {path.name for path in folder.iterdir() if not path.name.startswith(".")} == kept


@pytest.mark.parametrize("form", ["raw", "qcow2"])
def test_only_what_changed_is_fetched_and_written(tmp_path: Path, form: ArrivalFormat) -> None:
    source = Source()
    make_copy(tmp_path, source, form)
    source.write(3 * BLOCK + 7, b"x" * 100)
    source.write(LEAF_BYTES * 5 - 5, b"y" * 10)
    source.write(SIZE - 3, b"end")
    source.write(LEAF_BYTES, bytes(BLOCK))
    synced = sync(tmp_path, source, source.point())
    assert synced.how == "changes"
    assert synced.image.bytes_transferred == synced.changed_bytes == 4 * BLOCK + 5 * 512
    assert synced.written_bytes == 3 * BLOCK + 5 * 512  # the zeros are a hole
    assert synced.read_here_bytes <= 5 * synced.changed_bytes
    assert_counts(tmp_path, source)


def test_what_is_near_comes_with_one_request() -> None:
    from tasks.images.changes import closed_up

    apart = [Extent(start=start * BLOCK, length=BLOCK) for start in (0, 2, 3, 9)]
    assert [(each.start // BLOCK, each.length // BLOCK) for each in closed_up(apart, gap_bytes=BLOCK)] == [
        (0, 4),
        (9, 1),
    ]


def test_where_nobody_knows_what_changed_only_what_differs_is_written(tmp_path: Path) -> None:
    source = Source()
    make_copy(tmp_path, source)
    source.write(7 * BLOCK, b"z" * 5)
    source.reset()
    synced = sync(tmp_path, source, source.point())
    assert (synced.how, synced.image.bytes_transferred, synced.written_bytes) == ("everything", SIZE, BLOCK)
    assert "reset" in synced.why
    assert_counts(tmp_path, source)


def test_a_disk_put_back_with_its_tracking_is_read_whole(tmp_path: Path) -> None:
    source = Source()
    make_copy(tmp_path, source)
    source.write(BLOCK, b"written, and undone by the restore")
    sync(tmp_path, source, source.point())
    source.restore(1)
    source.write(5 * BLOCK, b"written since")
    synced = sync(tmp_path, source, source.point())
    assert (synced.how, synced.written_bytes) == ("everything", 2 * BLOCK)
    assert "put back to an older state" in synced.why
    assert_counts(tmp_path, source)


def test_a_leaf_that_a_power_cut_tore_is_fetched_whole_whatever_its_digest_says(tmp_path: Path) -> None:
    source, files = Source(), DiskFiles(tmp_path, 0)
    make_copy(tmp_path, source)
    source.write(LEAF_BYTES * 2, b"changed")
    begin(files, [Extent(start=LEAF_BYTES * 2, length=LEAF_BYTES)])
    with pytest.raises(InvalidInput, match="no point in time"):
        refuse_torn(tmp_path)
    ruin = random.Random(1).randbytes(LEAF_BYTES)
    with files.final("raw").open("r+b") as image, Digests.open(files.digests, writable=True) as digests:
        image.seek(LEAF_BYTES * 2)
        image.write(ruin)
        digests.put(2, record_of(ruin))
    synced = sync(tmp_path, source, source.point())
    assert (synced.how, synced.image.bytes_transferred, synced.leaves_in_doubt) == ("changes", LEAF_BYTES, 0)
    assert_counts(tmp_path, source)


def test_digests_that_are_gone_are_no_ground_to_build_on_in_a_torn_image_either(tmp_path: Path) -> None:
    source, files = Source(), DiskFiles(tmp_path, 0)
    make_copy(tmp_path, source)
    begin(files, [Extent(start=0, length=LEAF_BYTES)])
    files.digests.unlink()
    source.write(LEAF_BYTES * 2, b"changed")
    synced = sync(tmp_path, source, source.point())
    assert (synced.how, synced.image.bytes_transferred) == ("everything", SIZE)
    assert_counts(tmp_path, source)


def test_a_copy_whose_disks_are_of_several_points_in_time_is_refused(tmp_path: Path) -> None:
    make_copy(tmp_path, Source())
    refuse_torn(tmp_path)
    manifest = read_manifest(tmp_path)
    write_manifest(tmp_path, manifest.model_copy(update={"consistent": False}))
    with pytest.raises(InvalidInput, match="several points in time"):
        refuse_torn(tmp_path)


def test_a_dirty_list_that_cannot_be_read_means_all_of_the_disk(tmp_path: Path) -> None:
    source = Source()
    make_copy(tmp_path, source)
    DiskFiles(tmp_path, 0).dirty.write_text("{")
    synced = sync(tmp_path, source, source.point())
    assert synced.image.bytes_transferred == SIZE
    assert_counts(tmp_path, source)


GROWTH = [LEAF_BYTES * 2 + 512, 512]  # by whole leaves, and by so little that the last leaf stays the last


@pytest.mark.parametrize("growth", GROWTH)
@pytest.mark.parametrize("form", ["raw", "qcow2"])
def test_a_disk_that_grew_is_read_whole_and_only_what_differs_is_written(
    tmp_path: Path, form: ArrivalFormat, growth: int
) -> None:
    source = Source()
    make_copy(tmp_path, source, form)
    source.grow(growth)
    source.write(source.size - 512, b"the end")
    source.write(LEAF_BYTES, b"changed")
    synced = sync(tmp_path, source, source.point())
    assert (synced.how, synced.image.bytes_transferred) == ("everything", source.size)
    assert f"resized from {SIZE} to {source.size}" in synced.why
    assert synced.written_bytes <= 2 * BLOCK
    assert_counts(tmp_path, source)
    source.write(source.size - 7, b"again")
    assert sync(tmp_path, source, source.point()).how == "changes"
    assert_counts(tmp_path, source)


def test_a_disk_that_was_killed_while_it_was_larger_is_made_good_too(tmp_path: Path) -> None:
    source = Source()
    make_copy(tmp_path, source)
    source.grow(LEAF_BYTES)
    source.write(SIZE, b"beyond")
    assert killed(partial(sync, tmp_path, source, source.point()), before=5)
    del source.content[SIZE:]
    sync(tmp_path, source, source.point())
    assert_counts(tmp_path, source)


@pytest.mark.parametrize("grows", [0, LEAF_BYTES + 512], ids=["same size", "grown"])
@pytest.mark.parametrize("form", ["raw", "qcow2"])
def test_killed_at_any_call_the_next_sync_makes_it_good(tmp_path: Path, form: ArrivalFormat, grows: int) -> None:
    """Each line of the crash table that a sync has, and all between them."""
    number = 0

    def prepare() -> None:
        nonlocal number, source, folder, change_id
        number += 1
        source, folder = Source(), tmp_path / str(number)
        folder.mkdir()
        make_copy(folder, source, form)
        source.write(BLOCK, b"x" * 3 * BLOCK)
        source.write(LEAF_BYTES * 4 + 9, b"y")
        source.grow(grows)
        change_id = source.point()

    source, folder, change_id = Source(), tmp_path, ""
    deaths = 0
    for _ in every_death(lambda: sync(folder, source, change_id), prepare=prepare):
        deaths += 1
        assert_torn_or_whole(folder, source.history[1:])
        source.write(LEAF_BYTES * 2, b"later")
        sync(folder, source, source.point())
        assert_counts(folder, source)
    assert deaths >= 6


def test_what_a_killed_sync_fetched_is_not_fetched_again(tmp_path: Path) -> None:
    number, change_id, again = 0, "", list[int]()
    source, folder = Source(), tmp_path

    def prepare() -> None:
        nonlocal number, source, folder, change_id
        number += 1
        source, folder = Source(), tmp_path / str(number)
        folder.mkdir()
        make_copy(folder, source)
        for leaf in range(7):
            source.write(leaf * LEAF_BYTES, b"changed")
        change_id = source.point()

    for _ in every_death(lambda: sync(folder, source, change_id, skip_readback=True), prepare=prepare):
        source.write(LEAF_BYTES * 2, b"later")
        again.append(sync(folder, source, source.point(), skip_readback=True).image.bytes_transferred)
        assert_counts(folder, source)
    assert again[0] == 7 * BLOCK  # killed before it began
    assert again[-3:] == [BLOCK, BLOCK, BLOCK]  # killed when all was durable: what changed since, and no more


def corrupt(path: Path, form: str, offset: int) -> None:
    """Change bytes of an image behind everyone's back."""
    if form == "raw":
        with path.open("r+b") as image:
            image.seek(offset)
            image.write(b"not what was sent")
    else:
        subprocess.run(["qemu-io", "-f", form, "-c", f"write -P 0x77 {offset} 512", str(path)], check=True)


@pytest.mark.parametrize("place", [3 * BLOCK, LEAF_BYTES * 2], ids=["a part of a leaf", "a whole leaf"])
@pytest.mark.parametrize("form", ["raw", "qcow2"])
def test_a_write_that_did_not_land_is_found_by_reading_back_what_was_written(
    tmp_path: Path, form: ArrivalFormat, place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Source()
    make_copy(tmp_path, source, form)
    source.write(3 * BLOCK, b"x" * BLOCK)
    source.write(LEAF_BYTES * 2, b"y" * LEAF_BYTES)

    settled = DirtyList.settle

    def ruin(todo: DirtyList) -> None:  # the image is closed by then
        settled(todo)
        corrupt(tmp_path / f"disk-0.{form}", form, place)

    monkeypatch.setattr(DirtyList, "settle", ruin)
    change_id = source.point()
    with pytest.raises(
        IntegrityMismatch, match=f"1 leaves .* differ, the first at byte {place // LEAF_BYTES * LEAF_BYTES}"
    ):
        sync(tmp_path, source, change_id)
    with pytest.raises(InvalidInput, match="no point in time"):
        refuse_torn(tmp_path)


def test_what_is_read_back_is_what_was_written_and_no_more(tmp_path: Path) -> None:
    source = Source()
    make_copy(tmp_path, source)
    source.write(BLOCK, b"x")
    source.write(LEAF_BYTES * 4 + BLOCK, b"y" * 2 * BLOCK)
    synced = sync(tmp_path, source, source.point())
    assert synced.read_back_bytes == synced.written_bytes == synced.changed_bytes == 3 * BLOCK
    assert synced.read_here_bytes == 2 * LEAF_BYTES


def test_what_a_killed_sync_wrote_and_did_not_read_back_is_read_back_by_the_next(tmp_path: Path) -> None:
    source = Source()
    make_copy(tmp_path, source)
    source.write(BLOCK, b"x" * BLOCK)
    change_id = source.point()
    deaths = 0
    while killed(partial(sync, tmp_path, source, change_id, skip_readback=True), before=deaths + 1):
        deaths += 1
        torn = torn_of(DiskFiles(tmp_path, 0), size=SIZE)
        if torn and torn.done and torn.done[-1].leaves:
            break
    corrupt(tmp_path / "disk-0.raw", "raw", BLOCK)
    source.write(5 * LEAF_BYTES, b"later")
    with pytest.raises(IntegrityMismatch, match="the first at byte 0"):
        sync(tmp_path, source, source.point())


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(0, SIZE - 1), st.integers(1, 3 * BLOCK)),
        st.tuples(st.just("trim"), st.integers(0, SIZE - 1), st.integers(1, 3 * BLOCK)),
        st.tuples(st.just("sync"), st.integers(0, 40), st.just(0)),
        st.tuples(st.just("sync"), st.integers(0, 12), st.just(0)),
        st.tuples(st.just("reset"), st.just(0), st.just(0)),
        st.tuples(st.just("revert"), st.integers(0, 3), st.just(0)),
        st.tuples(st.just("grow"), st.integers(1, 3 * LEAF_BYTES // 512), st.just(0)),
        st.tuples(st.just("widened"), st.booleans(), st.just(0)),
        st.tuples(st.just("silent"), st.booleans(), st.just(0)),
    ),
    max_size=14,
)
Steps = Sequence[tuple[str, int, int]]
bounded = partial(settings, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def play(steps: Steps, seed: int, form: ArrivalFormat) -> None:
    """The guest writes and trims, hosts reset, forget and say too much, runs are killed at any of their calls: after
    the last sync the copy is the disk."""
    noise, source = random.Random(seed), Source()
    with tempfile.TemporaryDirectory(dir=MEMORY) as scratch:
        folder = Path(scratch)
        make_copy(folder, source, form)
        for verb, a, b in steps:
            match verb:
                case "write":
                    source.write(a, noise.randbytes(min(b, SIZE - a)))
                case "trim":
                    source.write(a, bytes(min(b, SIZE - a)))
                case "sync":
                    before = a if noise.random() < 0.7 else 0
                    action = partial(sync, folder, source, source.point(), skip_readback=True)
                    if killed(action, before=before, calls=CALLS):
                        event("killed")
                        assert_torn_or_whole(folder, source.history)
                case "reset":
                    source.reset()
                case "revert":
                    source.revert(a)
                case "grow":
                    source.grow(a * 512)
                case _ if verb in ("widened", "silent"):
                    setattr(source, verb, bool(a))
        sync(folder, source, source.point(), skip_readback=noise.random() < 0.8)
        assert_counts(folder, source)


@given(steps=STEPS, seed=st.integers(0, 2**32))
@bounded(max_examples=200)
def test_whatever_happens_after_the_last_sync_the_copy_is_the_disk(steps: Steps, seed: int) -> None:
    play(steps, seed, "raw")


@given(steps=STEPS, seed=st.integers(0, 2**32))
@bounded(max_examples=20)
def test_so_it_is_with_a_qcow2(steps: Steps, seed: int) -> None:
    play(steps, seed, "qcow2")


@pytest.mark.soak
@given(steps=STEPS, seed=st.integers(0, 2**32), form=st.sampled_from(["raw", "raw", "raw", "qcow2"]))
@bounded(max_examples=4000)
def test_so_it_is_whatever_happens_for_longer(steps: Steps, seed: int, form: ArrivalFormat) -> None:
    play(steps, seed, form)
