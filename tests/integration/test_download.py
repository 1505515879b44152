"""The download_only mode against a live lab: byte for byte, what it refuses, what a second run does, kills."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tasks import errors
from tasks.images.mirror import digest_of
from tests.labs import ROOT, Lab, running_lab
from tests.runs import (
    assert_nothing_left,
    chance_of_this_run,
    command,
    download,
    faults,
    kill_after,
    kill_at_random,
    run_command,
)

pytestmark = [pytest.mark.anyio, pytest.mark.live, pytest.mark.usefixtures("prefect_api")]

MIB = 1024 * 1024
BIG = 160 * MIB
WINDOW = 64 * MIB
SITE = {
    "datacenters": [
        {
            "name": "DC",
            "folder": "a b",
            "clusters": [{"name": "c", "hosts": ["esx1"]}],
            "datastores": ["datastore1", "second store"],
            "vms": [
                {
                    "name": "off",
                    "power": "off",
                    "disks": [{"size": "4MiB"}, {"size": "2MiB", "datastore": "second store"}],
                },
                {"name": "running", "disks": [{"size": "4MiB"}, {"size": "2MiB"}]},
                {"name": "changing", "power": "off", "disks": [{"size": "2MiB"}]},
                {"name": "odd names", "power": "off", "disks": [{"size": "1MiB"}]},
                {"name": "big", "power": "off", "disks": [{"size": BIG, "data": 100 * MIB}]},
            ],
        }
    ],
    "keep_frozen": True,
}


@pytest.fixture(scope="module")
def module_lab():
    with running_lab(scenario=SITE) as lab:
        yield lab


@pytest.fixture
def site(module_lab):
    """The lab without the sessions of processes that were killed, which are the server's to time out."""
    module_lab.post("/faults", clear=True, expire_sessions=True)
    module_lab.post("/stats/reset")
    return module_lab


def store(lab: Lab, name: str, datastore: str = "datastore1") -> Path:
    """Return the folder of a VM on the lab's own disk."""
    return Path(lab.state_dir) / datastore / name


def tree(folder: Path) -> dict[str, bytes]:
    """Return what lies in a folder, but for what is ours."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    relative = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
    return {name: content for name, content in relative.items() if name not in ("manifest.json", ".hyper2kvm.lock")}


async def test_a_vm_that_is_off_comes_byte_for_byte(site, tmp_path):
    manifest = await download(site, tmp_path, "off")
    expected = tree(store(site, "off"))
    expected |= {f"second store/off/{name}": data for name, data in tree(store(site, "off", "second store")).items()}
    assert tree(tmp_path / "off") == expected
    assert {"off.vmx", "off.nvram", "vmware.log", "off-flat.vmdk", "second store/off/off_1-flat.vmdk"} <= set(expected)
    assert (manifest.consistent, manifest.snapshot, manifest.warnings, manifest.left_out) == (True, None, (), ())
    assert_nothing_left(site)


async def test_the_manifest_has_size_time_and_digest_of_each_file(site, tmp_path):
    await download(site, tmp_path, "off")
    text = (tmp_path / "off" / "manifest.json").read_text()
    said = json.loads(text)
    assert said["mode"] == "download_only"
    for file in said["files"]:
        path = tmp_path / "off" / file["path"]
        there = path.stat()
        assert file["size_bytes"] == there.st_size
        assert abs(store_of(site, file["datastore_path"]).stat().st_mtime - there.st_mtime) < 1
        assert file["digest"] == digest_of(path, scratch=tmp_path / "scratch", stop=threading.Event())
    assert site.password not in text


def store_of(lab: Lab, datastore_path: str) -> Path:
    datastore, _, path = datastore_path.removeprefix("[").partition("] ")
    return Path(lab.state_dir) / datastore / path


async def test_a_second_run_fetches_nothing(site, tmp_path):
    await download(site, tmp_path, "off")
    first, before = site.stats()["bytes_served"], tree(tmp_path / "off")
    assert first == 6 * MIB  # of the disks; each byte once, though each file is tried before it is copied
    manifest = await download(site, tmp_path, "off")
    assert site.stats()["bytes_served"] == first
    assert sum(file.bytes_transferred for file in manifest.files) == 0
    assert tree(tmp_path / "off") == before
    assert_nothing_left(site)


async def test_a_second_run_fetches_what_is_missing_rotten_or_changed_and_nothing_else(site, tmp_path):
    await download(site, tmp_path, "changing")
    here = tmp_path / "changing"
    (here / "changing.vmdk").unlink()
    with (here / "changing-flat.vmdk").open("r+b") as file:
        file.write(b"rot")
    log = store(site, "changing") / "vmware.log"
    log.write_bytes(log.read_bytes() + b"one more line\n")
    manifest = await download(site, tmp_path, "changing")
    fetched = {file.path for file in manifest.files if file.bytes_transferred}
    assert fetched == {"changing.vmdk", "changing-flat.vmdk", "vmware.log"}
    assert tree(here) == tree(store(site, "changing"))


async def test_globs_choose_files(site, tmp_path):
    manifest = await download(site, tmp_path, "off", include_glob=("*.vmx", "*.vmdk"), exclude_glob=("second store/*",))
    assert {file.path for file in manifest.files} == {"off.vmx", "off.vmdk", "off-flat.vmdk"}
    assert ("off.nvram", "it matches no include glob") in {(each.path, each.why) for each in manifest.left_out}
    assert set(tree(tmp_path / "off")) == {"off.vmx", "off.vmdk", "off-flat.vmdk"}


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"max_files": 3}, errors.InvalidInput, "there are 7 to download, and at most 3"),
        ({"include_glob": ("*.iso",)}, errors.InvalidInput, "none is left"),
    ],
)
async def test_too_many_or_no_files_are_refused_before_the_first_byte(site, tmp_path, options, error, words):
    with pytest.raises(error, match=words):
        await download(site, tmp_path, "off", **options)
    assert site.stats()["bytes_served"] == 0
    assert_nothing_left(site)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ODD NAMES.vmx", "collides with that of"),
        ("a\x1bb", "characters that cannot be shown"),
        ("manifest.json", "one of ours"),
        (".hyper2kvm.lock", "one of ours"),
    ],
)
async def test_a_hostile_name_is_refused_before_the_first_byte(site, tmp_path, name, words):
    hostile = store(site, "odd names") / name
    hostile.write_bytes(b"x")
    try:
        with pytest.raises(errors.FileUnfit, match=words):
            await download(site, tmp_path, "odd names")
        assert site.stats()["bytes_served"] == 0
        await download(site, tmp_path / "without", "odd names", exclude_glob=(name.replace("\x1b", "?"),))
    finally:
        hostile.unlink()
    assert_nothing_left(site)


async def test_an_output_folder_that_holds_something_else_is_refused(site, tmp_path):
    (tmp_path / "off").mkdir()
    (tmp_path / "off" / "mine.txt").write_text("mine")
    with pytest.raises(errors.OutputExists, match=r"mine\.txt exists already"):
        await download(site, tmp_path, "off")
    (tmp_path / "off" / "mine.txt").unlink()
    (tmp_path / "off" / "manifest.json").write_text("{}")
    with pytest.raises(errors.OutputExists, match="no manifest of a download of ours"):
        await download(site, tmp_path, "off")
    assert site.stats()["bytes_served"] == 0
    assert_nothing_left(site)


async def test_a_link_in_the_output_folder_is_not_followed(site, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "off").mkdir()
    (tmp_path / "off" / "second store").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(errors.OutputExists, match="second store"):
        await download(site, tmp_path, "off")
    assert not list((tmp_path / "elsewhere").iterdir())


async def test_a_running_vm_without_a_snapshot_is_refused_before_the_first_byte(site, tmp_path):
    with pytest.raises(errors.FileLocked, match=r"running-flat\.vmdk.*--snapshot\), power it off"):
        await download(site, tmp_path, "running")
    assert site.stats()["bytes_served"] == 0
    assert_nothing_left(site)


async def test_the_small_files_of_a_running_vm_come_without_a_snapshot_and_the_report_says_so(site, tmp_path):
    manifest = await download(site, tmp_path, "running", exclude_glob=("*.vmdk",))
    assert {file.path for file in manifest.files} == {"running.vmx", "running.nvram"}
    assert manifest.consistent is False
    assert any("not of one time" in warning for warning in manifest.warnings)
    assert ("vmware.log", "a log that a running VM is writing") in {(e.path, e.why) for e in manifest.left_out}


async def test_a_running_vm_with_a_snapshot_comes_frozen(site, tmp_path):
    vm = site.vm("running")["moref"]
    site.post("/guest-load", vm=vm, disk=0, bytes_per_s=MIB, seed=5)
    manifest = await download(site, tmp_path, "running", snapshot=True)
    site.post("/guest-load", vm=vm, disk=0, stop=True)
    here, frozen = tmp_path / "running", Path(site.state_dir) / "frozen" / manifest.snapshot.moref
    for name in ("running-flat.vmdk", "running_1-flat.vmdk", "running.vmdk", "running_1.vmdk"):
        assert (here / name).read_bytes() == (frozen / name).read_bytes(), name
    assert not [path for path in tree(here) if "-0000" in path]
    assert any("names a delta that is not here" in warning for warning in manifest.warnings)
    assert {"running-000001-delta.vmdk", "vmware.log"} <= {each.path for each in manifest.left_out}
    assert manifest.consistent
    assert_nothing_left(site)


async def test_a_disk_that_is_not_there_is_named_or_fails(site, tmp_path):
    gone = store(site, "odd names") / "odd names.vmdk"
    content = gone.read_bytes()
    gone.unlink()
    try:
        with pytest.raises(errors.FileMissing, match=r"odd names\.vmdk is not there"):
            await download(site, tmp_path / "a", "odd names", fail_on_missing=True)
        manifest = await download(site, tmp_path / "b", "odd names")
        assert manifest.missing == ("[datastore1] odd names/odd names.vmdk",)
        assert any("Missing at the source" in warning for warning in manifest.warnings)
    finally:
        gone.write_bytes(content)
    assert_nothing_left(site)


def test_killed_inside_a_file_the_same_command_goes_on_there(site, tmp_path, api):
    words = ("--vs-vm-name", "big", "--output-dir", str(tmp_path), "--concurrency", "1")
    with faults(site, throttle_bytes_per_s=24 * MIB):
        for kill_at in (72 * MIB, 130 * MIB):
            assert kill_after(site, command(site, "download-vm", *words), api, kill_at)
    assert not (tmp_path / "big" / "manifest.json").exists()
    done = run_command(site, "download-vm", *words, env=api)
    assert done.returncode == 0, done.stderr
    assert tree(tmp_path / "big") == tree(store(site, "big"))
    size = sum(len(content) for content in tree(store(site, "big")).values())
    assert site.stats()["bytes_served"] <= 1.05 * size + 2 * WINDOW
    assert_nothing_left(site)


def test_killed_at_random_it_downloads_little_twice(site, tmp_path, api):
    kill_and_resume(site, tmp_path, api, random.Random(chance_of_this_run()))


@pytest.mark.soak
def test_killed_thirty_times_it_downloads_little_twice(tmp_path, api):
    seed = chance_of_this_run()
    with running_lab(scenario=SITE) as lab:
        for number in range(10):
            kill_and_resume(lab, tmp_path / str(number), api, random.Random(seed + number))


def kill_and_resume(lab: Lab, output_dir: Path, api: dict[str, str], chance: random.Random, *, kills: int = 3) -> None:
    output_dir.mkdir(exist_ok=True)
    words = ("download-vm", "--vs-vm-name", "big", "--output-dir", str(output_dir))
    kill_at_random(lab, command(lab, *words), api, chance, size=BIG, kills=kills)
    done = run_command(lab, *words, env=api)
    assert done.returncode == 0, done.stderr
    assert tree(output_dir / "big") == tree(store(lab, "big"))
    assert {path.name for path in (output_dir / "big").glob(".*")} == {".hyper2kvm.lock"}
    size = sum(len(content) for content in tree(store(lab, "big")).values())
    assert lab.stats()["bytes_served"] <= 1.05 * size + kills * WINDOW
    assert_nothing_left(lab)


def test_killed_under_its_snapshot_the_next_run_goes_on_with_that(site, tmp_path, api):
    words = ("--vs-vm-name", "running", "--output-dir", str(tmp_path), "--snapshot")
    with faults(site, throttle_bytes_per_s=MIB):
        assert kill_after(site, command(site, "download-vm", *words), api, MIB)
    assert site.stats()["open_snapshots"] == 1
    state = json.loads((tmp_path / "running" / ".hyper2kvm.job.json").read_text())
    done = run_command(site, "download-vm", *words, "--json", env=api)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["snapshot"] == state["snapshot"]
    frozen = Path(site.state_dir) / "frozen" / state["snapshot"]["moref"]
    for name in ("running-flat.vmdk", "running_1-flat.vmdk"):
        assert (tmp_path / "running" / name).read_bytes() == (frozen / name).read_bytes(), name
    assert not (tmp_path / "running" / ".hyper2kvm.job.json").exists()
    assert_nothing_left(site)


@pytest.mark.parametrize(
    "moment", ["publish:before:2", "publish:after:2", "write_atomically:before:2", "forget:before"]
)
def test_killed_while_files_get_their_names_the_next_run_ends_it(site, tmp_path, api, moment):
    argv = [sys.executable, "-m", "tests.integration.dying", f"tasks.images.mirror:{moment}"]
    argv += command(site, "download-vm", "--vs-vm-name", "off", "--output-dir", str(tmp_path))[3:]
    died = subprocess.run(argv, cwd=ROOT, env=os.environ | site.environment() | api, capture_output=True, timeout=120)
    assert died.returncode == -9, died.stderr
    site.post("/faults", expire_sessions=True)
    served = site.stats()["bytes_served"]
    done = run_command(site, "download-vm", "--vs-vm-name", "off", "--output-dir", str(tmp_path), env=api)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "off").glob(".*")} == {".hyper2kvm.lock"}
    assert set(tree(tmp_path / "off")) >= set(tree(store(site, "off")))
    assert site.stats()["bytes_served"] - served < 8 * 1024  # a sector of each file, to see that it can be read
