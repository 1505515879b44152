"""Which image of a copy is whose, and what vSphere's changeIds say of each other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tasks.errors import CopyUnfit
from tasks.images.base import paired, same_tracking
from tasks.models import Manifest, VirtualDisk
from tests.unit.images.test_manifest import DISK, VM

HERE = DISK.model_copy(update={"format": "raw", "path": "disk-0.raw"})
NOW = VirtualDisk(
    index=0,
    key=2000,
    label="Hard disk 1",
    controller_key=1000,
    datastore_path="[ds] web/web.vmdk",
    capacity_bytes=512,
    backing="FlatVer2BackingInfo",
    uuid="u",
    change_id=None,
)
BASE = Manifest(vcenter_uuid="v", vm=VM, snapshot=None, disks=(HERE,), consistent=True, created="now")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "disk-0.raw").write_bytes(bytes(512))
    yield tmp_path


def test_a_disk_is_known_by_its_uuid_wherever_it_is_plugged_in(folder: Path) -> None:
    moved = NOW.model_copy(update={"index": 3, "key": 2007, "label": "Hard disk 4", "datastore_path": "[other] x.vmdk"})
    (pair,) = paired(folder, BASE, VM, (moved,))
    assert (pair.disk, pair.image, pair.grown) == (moved, HERE, "")


UNFIT = {
    "added": ({}, [{}, {"uuid": "new", "label": "Hard disk 2", "index": 1}], "Hard disk 2.* is not in it"),
    "without a uuid": ({}, [{"uuid": None}], "is not in it"),
    "removed": ({}, [], r"no disk for disk-0\.raw any more"),
    "replaced": ({}, [{"uuid": "new"}], "is not in it"),
    "smaller": ({}, [{"capacity_bytes": 256}], "shrinks no disk"),
    "another VM": ({"instance_uuid": "another"}, [{}], "of another VM"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_what_does_not_match_is_refused_by_name(folder: Path, case: str) -> None:
    vm, disks, why = UNFIT[case]
    now = tuple(NOW.model_copy(update=change) for change in disks)
    with pytest.raises(CopyUnfit, match=why):
        paired(folder, BASE, VM.model_copy(update=vm), now)


def test_a_disk_that_grew_says_so(folder: Path) -> None:
    (pair,) = paired(folder, BASE, VM, (NOW.model_copy(update={"capacity_bytes": 1024}),))
    assert pair.grown == "the disk was resized from 512 to 1024 bytes"


@pytest.mark.parametrize(
    ("before", "now", "why"),
    [
        ("52 aa/3", "52 aa/4", ""),
        ("52 aa/9", "52 aa/10", ""),
        ("52 aa/10", "52 aa/9", "put back"),
        ("52 aa/4", "52 aa/4", "put back"),
        ("52 aa/3", "52 bb/4", "reset"),
        ("52 aa/x", "52 aa/y", ""),  # of no shape that we know: vSphere's to answer
        (None, "52 aa/4", "without changed block tracking"),
        ("52 aa/3", None, "no changeId"),
    ],
)
def test_a_change_id_tells_of_another_only_where_tracking_went_on(before: str, now: str, why: str) -> None:
    found = same_tracking(before, now)
    assert why in found
    assert bool(found) is bool(why)
