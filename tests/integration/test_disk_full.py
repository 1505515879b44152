"""A target that is too small: refused before the first byte where that can be known, and clean where it cannot."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tasks import errors
from tests.labs import Lab, running_lab
from tests.runs import assert_equal_to_the_guests_disks, assert_nothing_left, download, export, vddk_download

pytestmark = [pytest.mark.anyio, pytest.mark.live, pytest.mark.usefixtures("prefect_api")]

MIB = 1024 * 1024
SIZE = 96 * MIB
SITE = {
    "datacenters": [
        {
            "name": "DC",
            "clusters": [{"name": "c", "hosts": ["esx1"]}],
            "vms": [
                {"name": "thick", "power": "off", "disks": [{"size": SIZE, "data": SIZE, "thin": False}]},
                {"name": "hollow", "power": "off", "disks": [{"size": SIZE, "data": 4 * MIB, "thin": False}]},
                {"name": "thin", "disks": [{"size": "1MiB"}, {"size": SIZE, "data": SIZE, "thin": True}]},
            ],
        }
    ],
}


@pytest.fixture(scope="module")
def module_lab() -> Iterator[Lab]:
    with running_lab(scenario=SITE) as lab:
        yield lab


@pytest.fixture
def site(module_lab: Lab) -> Lab:
    module_lab.post("/stats/reset")
    return module_lab


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """An ext4 of 48 MiB, mounted (which needs root)."""
    image, folder = tmp_path / "small.img", tmp_path / "small"
    folder.mkdir()
    with image.open("wb") as file:
        file.truncate(48 * MIB)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, folder], check=True)
    yield folder
    subprocess.run(["umount", folder], check=True)


COPIES = pytest.mark.parametrize("copy", [export, download], ids=["export", "download"])


async def test_files_that_cannot_fit_are_refused_before_the_first_byte(site, small):
    image = Path(site.state_dir) / "datastore1" / "hollow" / "install.iso"
    with image.open("wb") as file:
        file.truncate(SIZE)
    try:
        with pytest.raises(errors.DiskFull) as raised:
            await download(site, small, "hollow")
        assert raised.value.need >= SIZE > raised.value.have
        assert site.stats()["bytes_served"] == 0
        assert {path.name for path in (small / "hollow").iterdir()} == {".hyper2kvm.lock"}
    finally:
        image.unlink()
    assert_nothing_left(site)


@COPIES
async def test_a_disk_without_a_byte_left_is_refused_before_the_first_byte(site, small, copy):
    with pytest.raises(OSError, match="space"), (small / "ballast").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    with pytest.raises(errors.DiskFull) as raised:
        await copy(site, small, "hollow")
    assert raised.value.need > raised.value.have == 0
    assert site.stats()["bytes_served"] == 0
    assert_nothing_left(site)


@COPIES
async def test_a_thick_disk_is_refused_before_the_first_byte_where_its_capacity_is_not_free(site, small, copy):
    with pytest.raises(errors.DiskFull, match="--overcommit") as raised:
        await copy(site, small, "thick")
    assert raised.value.need >= SIZE > raised.value.have
    assert site.stats()["bytes_served"] <= 512  # of the probe
    assert {path.name for path in (small / "thick").iterdir()} == {".hyper2kvm.lock"}
    assert_nothing_left(site)


@COPIES
async def test_a_thick_disk_that_is_mostly_zeros_fits_in_less_than_its_capacity(site, small, copy):
    manifest = await copy(site, small, "hollow", overcommit=True)
    assert manifest.consistent
    assert_nothing_left(site)


@COPIES
async def test_a_vm_that_is_off_and_fills_the_disk_leaves_nothing(site, small, copy):
    with pytest.raises(errors.DiskFull):
        await copy(site, small, "thick", overcommit=True)
    assert {path.name for path in (small / "thick").iterdir()} == {".hyper2kvm.lock"}
    assert_nothing_left(site)


@pytest.mark.parametrize("options", [{"format": "qcow2"}, {"format": "raw"}], ids=["qcow2", "raw"])
async def test_an_export_that_fills_the_disk_ends_and_leaves_nothing(site, small, options):
    with pytest.raises(errors.DiskFull) as raised:
        await export(site, small, "thin", **options)
    assert raised.value.need > raised.value.have
    assert site.stats()["bytes_served"] > 16 * MIB
    assert {path.name for path in (small / "thin").iterdir()} == {".hyper2kvm.lock"}
    assert_nothing_left(site)


async def test_a_download_that_fills_the_disk_ends_and_leaves_nothing(site, small):
    with pytest.raises(errors.DiskFull):
        await download(site, small, "thin", snapshot=True)
    assert {path.name for path in (small / "thin").iterdir()} == {".hyper2kvm.lock"}
    assert_nothing_left(site)


async def test_a_thick_disk_that_holds_little_fits_where_vddk_reads_only_that(site, small, tmp_path):
    manifest = await vddk_download(site, small, "hollow")
    assert_equal_to_the_guests_disks(site, manifest, small / "hollow", tmp_path)
    assert_nothing_left(site)


async def test_what_vddk_cannot_fit_ends_by_name_and_leaves_nothing(site, small):
    with pytest.raises(errors.DiskFull):
        await vddk_download(site, small, "thick")
    assert {path.name for path in (small / "thick").iterdir()} == {".hyper2kvm.lock"}
    assert_nothing_left(site)
