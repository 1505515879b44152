"""`tasks.images.cutover`: what lies beside a copy, the copy itself being only read."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tasks.errors import CopyUnfit, IntegrityMismatch, InvalidInput
from tasks.images import cutover
from tasks.images.cutover import ASIDE, CAMPAIGN, PLACE, Campaign
from tasks.images.digests import LEAF_BYTES, Digests
from tasks.models import Aside, Controller, Manifest, Migration, NicState
from tests.unit.images.copies import CONTENT, copied, flip
from tests.unit.images.test_manifest import DISK, MANIFEST_OF_VM

ASIDE_OF_VM = Aside(
    vcenter_uuid="v",
    moref="vm-1",
    instance_uuid="i",
    name="w%2fb",
    shown_name="w/b",
    was_on=True,
    nics=(NicState(key=4000, connected=True, start_connected=True),),
    created="2025-01-01T00:00:00Z",
)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    """A folder with a raw copy of one disk, and its manifest."""
    folder = tmp_path_factory.mktemp("copy")
    copied(folder, "raw").rename(folder / "disk-0.raw")
    (folder / "x.digests").rename(folder / "disk-0.digests")
    with Digests.open(folder / "disk-0.digests") as digests:
        digest = digests.image_digest()
    changes = {"path": "disk-0.raw", "format": "raw", "virtual_size": len(CONTENT), "digest": digest}
    image = DISK.model_copy(update={**changes, "controller_key": 1000, "unit_number": 0})
    scsi = Controller(key=1000, model="ParaVirtualSCSIController", bus=0)
    vm = MANIFEST_OF_VM.vm.model_copy(update={"controllers": (scsi,)})
    return folder, MANIFEST_OF_VM.model_copy(update={"disks": (image,), "vm": vm})


def delivered(copy: tuple[Path, Manifest], form: str, *, converted: bool) -> Manifest:
    folder, manifest = copy
    return cutover.deliver(folder, manifest, PLACE, format=form, converted=converted, networks={})


def content(path: Path, form: str, scratch: Path) -> bytes:
    raw = scratch / "raw"
    subprocess.run(["qemu-img", "convert", "-f", form, "-O", "raw", str(path), str(raw)], check=True)
    return raw.read_bytes()


@pytest.mark.parametrize(("form", "converted"), [("qcow2", False), ("qcow2", True), ("vdi", True)])
def test_the_domain_starts_from_what_the_copy_holds_and_the_copy_stays(copy, tmp_path, form, converted):
    folder, _ = copy
    base = folder / "disk-0.raw"
    before = base.read_bytes(), base.stat().st_mtime_ns
    made = delivered(copy, form, converted=converted)
    (image,) = made.disks
    path = folder / PLACE / image.path
    assert (image.path, image.format, image.converted) == (f"disk-0.{form}", form, converted)
    assert content(path, form, tmp_path) == CONTENT + bytes(-len(CONTENT) % 512)
    assert made.domain and str(path) in (folder / PLACE / made.domain.path).read_text()
    subprocess.run(["qemu-io", "-f", form, "-c", "write -P 7 0 64k", str(path)], check=True, stdout=subprocess.DEVNULL)
    assert (base.read_bytes(), base.stat().st_mtime_ns) == before


def test_what_was_made_before_is_made_anew(copy):
    folder, _ = copy
    delivered(copy, "vdi", converted=True)
    delivered(copy, "qcow2", converted=False)
    assert sorted(path.name for path in (folder / PLACE).iterdir()) == ["disk-0.qcow2", "domain.xml"]


def test_a_conversion_of_a_rotten_copy_is_refused(copy):
    folder, _ = copy
    flip(folder / "disk-0.raw", 3 * LEAF_BYTES)
    try:
        with pytest.raises(IntegrityMismatch, match="1 leaves"):
            delivered(copy, "qcow2", converted=True)
    finally:
        flip(folder / "disk-0.raw", 3 * LEAF_BYTES)


def test_a_copy_whose_domain_may_run_is_refused_until_that_is_put_away(copy):
    folder, _ = copy
    made = delivered(copy, "qcow2", converted=False)
    cutover.refuse_cut_over(folder)
    cutover.land(folder, Migration(manifest=made, rounds=(), forecast=None, folder=folder / PLACE))
    with pytest.raises(CopyUnfit, match="its domain may run"):
        cutover.refuse_cut_over(folder)
    cutover.put_away(folder, when="now")
    cutover.refuse_cut_over(folder)
    assert (folder / "rolled-back-now" / "cutover.json").exists()


def test_what_was_done_to_the_source_is_read_as_it_was_written(tmp_path):
    assert cutover.read_aside(tmp_path) is None
    cutover.write_aside(tmp_path, ASIDE_OF_VM)
    assert cutover.read_aside(tmp_path) == ASIDE_OF_VM
    (tmp_path / ASIDE).write_text("{")
    with pytest.raises(InvalidInput, match="by hand"):
        cutover.read_aside(tmp_path)


def test_a_migration_goes_on_until_it_is_forgotten_and_a_damaged_one_begins_anew(tmp_path):
    first = cutover.read_campaign(tmp_path)
    assert first.id != cutover.read_campaign(tmp_path).id
    known = Campaign(id=first.id, preparing_s=1.5, approval="run")
    cutover.write_campaign(tmp_path, known)
    assert cutover.read_campaign(tmp_path) == known
    (tmp_path / CAMPAIGN).write_text('{"id": 7}')
    assert cutover.read_campaign(tmp_path).approval == ""
    cutover.forget_campaign(tmp_path)
    assert list(tmp_path.iterdir()) == []
