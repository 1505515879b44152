"""Landing a download: what has its name, what has not, and that nobody else's file is ever replaced."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest

from tasks.errors import OutputExists
from tasks.images.mirror import LANDING, PARTS, digest_of, forget, known_files, land_files, parts_of, still_here
from tasks.models import DatastoreFile, DownloadedFile, DownloadManifest
from tests.unit.images.dying import every_death
from tests.unit.images.test_manifest import VM

MODIFIED = "2025-11-01T10:20:30.500000+00:00"
POINT = "off, 1"
NAMES = ("a.vmx", "sub/b.log", "c-flat.vmdk")


def content_of(name: str) -> bytes:
    return f"what is in {name}\n".encode()


def downloaded(name: str, scratch: Path) -> DownloadedFile:
    scratch.mkdir(exist_ok=True)
    (scratch / "content").write_bytes(content_of(name))
    digest = digest_of(scratch / "content", scratch=scratch / "digests", stop=threading.Event())
    return DownloadedFile(
        datastore_path=f"[ds] web/{name}",
        path=name,
        size_bytes=len(content_of(name)),
        modified=MODIFIED,
        digest=digest,
        point=POINT,
        bytes_transferred=1,
        road="folder",
        verified="direct",
    )


def download_of(scratch: Path) -> DownloadManifest:
    files = tuple(downloaded(name, scratch / "scratch") for name in NAMES)
    return DownloadManifest(vcenter_uuid="v", vm=VM, snapshot=None, files=files, consistent=True, created="now")


@pytest.fixture
def manifest(tmp_path: Path) -> DownloadManifest:
    return download_of(tmp_path)


def arrived(folder: Path, manifest: DownloadManifest) -> Path:
    """Make a folder in which every file of a manifest lies as a part."""
    (folder / PARTS).mkdir(parents=True)
    for file in manifest.files:
        parts_of(folder, file).raw_part.write_bytes(content_of(file.path))
    return folder


def known(folder: Path) -> dict[str, DownloadedFile]:
    return known_files(folder, vcenter_uuid="v", vm=VM)


def here(folder: Path, file: DatastoreFile) -> bool:
    (folder / PARTS).mkdir(exist_ok=True)
    return still_here(folder, file, known=known(folder).get(file.path), point=POINT, stop=threading.Event())


def test_somebody_elses_file_in_the_way_is_not_replaced_by_the_next_run_either(
    tmp_path: Path, manifest: DownloadManifest
) -> None:
    folder = arrived(tmp_path / "web", manifest)
    before = known(folder)
    (folder / "sub").mkdir()
    (folder / "sub" / "b.log").write_text("somebody's")
    with pytest.raises(OutputExists, match=r"b\.log exists already"):
        land_files(folder, manifest, before)
    with pytest.raises(OutputExists, match=r"b\.log exists already: no download of ours"):
        known(folder)
    assert (folder / "sub" / "b.log").read_text() == "somebody's"


def test_a_name_that_was_taken_after_a_kill_is_not_replaced(tmp_path: Path, manifest: DownloadManifest) -> None:
    folder = arrived(tmp_path / "web", manifest)
    (folder / LANDING).write_text(manifest.model_dump_json())
    (folder / "a.vmx").write_bytes(content_of("a.vmx"))  # of that size, but put there now
    with pytest.raises(OutputExists, match=r"a\.vmx exists already"):
        known(folder)
    (folder / "a.vmx").unlink()
    assert known(folder) == {}


@pytest.mark.parametrize("flags", [1, 1 << 10], ids=["rename", "link and unlink, as on NFS"])
def test_killed_between_any_two_steps_the_next_run_lands_the_rest(
    tmp_path: Path, manifest: DownloadManifest, monkeypatch: pytest.MonkeyPatch, flags: int
) -> None:
    monkeypatch.setattr("tasks.images.files.RENAME_NOREPLACE", flags)  # EINVAL for a flag that nobody knows
    folder, deaths = tmp_path / "web", 0

    def prepare() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        arrived(folder, manifest)

    for _ in every_death(lambda: land_files(folder, manifest, {}), prepare=prepare):
        deaths += 1
        land_files(folder, manifest, known(folder))
        assert_landed(folder, manifest)
    assert_landed(folder, manifest)
    assert deaths > 12


def assert_landed(folder: Path, manifest: DownloadManifest) -> None:
    left = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    assert set(left) == {*NAMES, "manifest.json"}
    assert all(left[file.path].read_bytes() == content_of(file.path) for file in manifest.files)
    assert all(here(folder, file) for file in manifest.files)


def test_what_has_its_name_when_a_run_is_given_up_is_known_and_stays(
    tmp_path: Path, manifest: DownloadManifest
) -> None:
    folder = arrived(tmp_path / "web", manifest)
    (folder / "sub").mkdir()
    (folder / "sub" / "b.log").write_text("somebody's")
    with pytest.raises(OutputExists):
        land_files(folder, manifest, {})
    forget(folder)
    (folder / "sub" / "b.log").unlink()
    assert set(known(folder)) == {"a.vmx"}
    assert not (folder / PARTS).exists()
    assert here(folder, manifest.files[0])
