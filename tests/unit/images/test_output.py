from pathlib import Path

import pytest

from tasks.errors import OutputExists
from tasks.images.domain import DOMAIN
from tasks.images.layout import DiskFiles
from tasks.images.manifest import MANIFEST, read_manifest
from tasks.images.output import give_up, land_all, refuse_existing
from tasks.images.state import STATE, read_state, write_state
from tasks.models import Domain
from tests.unit.images.dying import every_death
from tests.unit.images.test_manifest import DISK, MANIFEST_OF_VM
from tests.unit.images.test_state import ARRIVED, JOB

IMAGES = (DISK, DISK.model_copy(update={"index": 1, "path": "disk-1.raw", "format": "raw"}))
DESCRIBED = Domain(path=DOMAIN, name="wéb", uuid="b", machine="q35")
LANDED = MANIFEST_OF_VM.model_copy(update={"disks": IMAGES, "domain": DESCRIBED})
XML = "<domain>wéb</domain>\n"
NAMES = {"disk-0.qcow2", "disk-0.digests", "disk-1.raw", "disk-1.digests", DOMAIN, MANIFEST}


def verified(folder: Path) -> Path:
    """Make a folder whose images are ready for their names: disk 0 converted, disk 1 raw."""
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    zero, one = DiskFiles(folder, 0), DiskFiles(folder, 1)
    for path in (zero.raw_part, zero.journal, zero.digests_part, zero.part("qcow2")):
        path.write_text(path.name)
    for path in (one.raw_part, one.journal, one.digests_part):
        path.write_text(path.name)
    write_state(folder, ARRIVED)
    return folder


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def assert_landed(folder: Path) -> None:
    assert names(folder) == NAMES
    assert read_manifest(folder) == LANDED
    assert (folder / DOMAIN).read_text() == XML
    assert (folder / "disk-0.qcow2").read_text() == "disk-0.qcow2.part"
    assert (folder / "disk-1.raw").read_text() == "disk-1.raw.part"


def test_landing_leaves_the_copy_and_nothing_else(tmp_path: Path) -> None:
    land_all(verified(tmp_path / "vm"), LANDED, XML)
    assert_landed(tmp_path / "vm")


@pytest.mark.parametrize("flags", [1, 1 << 10], ids=["rename", "link and unlink, as on NFS"])
def test_killed_between_any_two_steps_the_next_run_lands_or_finds_it_landed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: int
) -> None:
    monkeypatch.setattr("tasks.images.files.RENAME_NOREPLACE", flags)  # EINVAL for a flag that nobody knows
    folder, deaths = tmp_path / "vm", 0
    for _ in every_death(lambda: land_all(folder, LANDED, XML), prepare=lambda: verified(folder)):
        deaths += 1
        if (folder / MANIFEST).exists():
            with pytest.raises(OutputExists):
                refuse_existing(folder, read_state(folder))
        else:
            refuse_existing(folder, read_state(folder))
            land_all(folder, LANDED, XML)
        assert_landed(folder)
    assert_landed(folder)
    assert deaths > 12


def test_a_name_that_was_taken_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    folder = verified(tmp_path / "vm")
    (folder / "disk-1.raw").write_text("somebody's")
    for _ in range(2):  # the next run of the job fares as this one
        with pytest.raises(OutputExists):
            land_all(folder, LANDED, XML)
        assert (folder / "disk-1.raw").read_text() == "somebody's"
        assert DiskFiles(folder, 1).raw_part.read_text() == "disk-1.raw.part"
    assert (folder / STATE).exists()
    assert not (folder / MANIFEST).exists()


def test_given_up_a_job_is_forgotten_unless_names_were_given(tmp_path: Path) -> None:
    folder = verified(tmp_path / "vm")
    DiskFiles(folder, 0).digests.touch()
    give_up(folder)
    assert read_state(folder) == ARRIVED
    DiskFiles(folder, 0).digests.unlink()
    give_up(folder)
    assert names(folder) == set()


def test_an_image_that_is_nowhere_is_an_error(tmp_path: Path) -> None:
    folder = verified(tmp_path / "vm")
    DiskFiles(folder, 1).raw_part.unlink()
    with pytest.raises(FileNotFoundError):
        land_all(folder, LANDED, XML)
    assert not (folder / MANIFEST).exists()


@pytest.mark.parametrize("name", ["disk-0.qcow2", "disk-7.raw", "disk-0.digests", DOMAIN])
@pytest.mark.parametrize("state", [None, JOB], ids=["no job", "not all arrived"])
def test_a_final_name_is_refused_unless_all_have_arrived(tmp_path: Path, name: str, state: object) -> None:
    refuse_existing(tmp_path, state)  # type: ignore[arg-type]
    (tmp_path / name).touch()
    with pytest.raises(OutputExists, match=name):
        refuse_existing(tmp_path, state)  # type: ignore[arg-type]
    refuse_existing(tmp_path, ARRIVED)


def test_a_manifest_is_refused_always(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).touch()
    with pytest.raises(OutputExists, match=MANIFEST):
        refuse_existing(tmp_path, ARRIVED)
