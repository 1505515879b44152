"""The verify mode on real copies: bit rot located and told apart, by the flow and by the command line."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from flows.verify import verify_copy
from hyper2kvm.client import VMwareClient
from tasks import errors
from tasks.images.digests import HEADER_BYTES, LEAF_BYTES, RECORD_BYTES
from tasks.images.job import job_lock
from tasks.models import Extent, Verification, VerifyJob
from tasks.source import sample_disk
from tests.labs import ROOT, running_lab
from tests.runs import download, export, vcenter_of

pytestmark = [pytest.mark.anyio, pytest.mark.live, pytest.mark.usefixtures("prefect_api")]

MIB = 1024 * 1024
DISKS = [{"size": 6 * MIB, "data": 4 * MIB}, {"size": 3 * MIB}]
SITE = {
    "datacenters": [
        {
            "name": "DC",
            "clusters": [{"name": "c", "hosts": ["esx1"]}],
            "vms": [
                {"name": "web", "disks": DISKS},
                {"name": "off", "power": "off", "disks": DISKS},
                {"name": "brief", "disks": [{"size": MIB}]},
            ],
        }
    ]
}


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def site():
    with running_lab(scenario=SITE) as lab:
        yield lab


@pytest.fixture(scope="module")
async def originals(prefect_api, site, tmp_path_factory) -> Path:
    """A running VM as qcow2, from a snapshot that is kept, and as raw; one that is off, exported and downloaded.

    `qcow2/web`, `raw/web`, `qcow2/off`, `files/off`.
    """
    top = tmp_path_factory.mktemp("copies")
    kept = snapshot_of(site, "web")
    await export(site, top / "qcow2", "web", snapshot_moref=kept)
    await export(site, top / "raw", "web", format="raw", snapshot_moref=kept)
    await export(site, top / "qcow2", "off")
    await download(site, top / "files", "off")
    return top


def snapshot_of(lab, name: str) -> str:
    """Have somebody take a snapshot of a VM, and return its moref."""
    path = lab.vm(name)["path"]
    lab.govc("snapshot.create", "-vm", path, "-m=false", "kept")
    return str(re.findall(r"snapshot-\d+", lab.govc("snapshot.tree", "-i", "-vm", path))[0])


@pytest.fixture
def copies(originals, tmp_path) -> Path:
    """Copies of those, to be spoiled."""
    return Path(shutil.copytree(originals, tmp_path / "copies"))


async def verified(folder: Path) -> Verification:
    return await verify_copy(options=VerifyJob(folder=folder))


async def refused(folder: Path) -> Verification:
    """Verify a copy that is not equal; return what was found."""
    with pytest.raises(errors.IntegrityMismatch) as raised:
        await verified(folder)
    return raised.value.found


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        (byte,) = os.pread(file.fileno(), 1, offset)
        os.pwrite(file.fileno(), bytes([byte ^ 1]), offset)


def rot(image: Path, raw: Path, leaf: int) -> None:
    """Turn a bit of a leaf over in `image`, whose content `raw` holds."""
    start = first_data(raw, leaf)
    flip(image, start if image == raw else image.read_bytes().index(raw.read_bytes()[start : start + 64]))


def first_data(raw: Path, leaf: int) -> int:
    """Return the offset of the first sector of a leaf that is not zero."""
    content = raw.read_bytes()
    starts = range(leaf * LEAF_BYTES, (leaf + 1) * LEAF_BYTES, 512)
    return next(at for at in starts if any(content[at : at + 512]))


def data_leaves(raw: Path) -> list[int]:
    content = raw.read_bytes()
    return [at // LEAF_BYTES for at in range(0, len(content), LEAF_BYTES) if any(content[at : at + LEAF_BYTES])]


def leaf(number: int) -> Extent:
    return Extent(start=number * LEAF_BYTES, length=LEAF_BYTES)


@pytest.mark.parametrize("name", ["qcow2/web", "raw/web", "files/off"])
async def test_a_copy_that_nobody_touched_is_equal(originals, name):
    found = await verified(originals / name)
    assert found.equal
    assert {file.verdict for file in found.files} == {"equal"}
    assert found.moref.startswith("vm-")


@pytest.mark.parametrize("format", ["qcow2", "raw"])
async def test_bit_rot_in_an_image_is_located_to_its_leaf(copies, format):
    raw = copies / "raw" / "web" / "disk-0.raw"
    number = data_leaves(raw)[-1]
    rot(copies / format / "web" / f"disk-0.{format}", raw, number)
    first, second = (await refused(copies / format / "web")).files
    assert (first.verdict, first.wrong_leaves, first.first_wrong) == ("content differs", 1, (leaf(number),))
    assert second.verdict == "equal"


async def test_bit_rot_in_the_digests_is_told_apart_and_located(copies):
    flip(copies / "qcow2" / "web" / "disk-1.digests", HEADER_BYTES + 5 * RECORD_BYTES)
    first, second = (await refused(copies / "qcow2" / "web")).files
    assert first.verdict == "equal"
    assert (second.verdict, second.wrong_leaves, second.first_wrong) == ("digests differ", 1, (leaf(5),))


async def test_each_file_has_its_verdict_whatever_became_of_the_others(copies):
    folder = copies / "raw" / "web"
    (folder / "disk-0.raw").unlink()
    os.truncate(folder / "disk-1.raw", 3 * MIB - 1)
    found = await refused(folder)
    assert [file.verdict for file in found.files] == ["missing", "damaged"]


async def test_a_downloaded_file_that_changed_is_named(copies):
    folder = copies / "files" / "off"
    flip(folder / "off.vmx", 10)
    flip(folder / "off-flat.vmdk", 5 * MIB)
    (folder / "off.vmdk").unlink()
    found = await refused(folder)
    wrong = {file.path: file.verdict for file in found.files if file.verdict != "equal"}
    assert wrong == {"off.vmx": "content differs", "off-flat.vmdk": "content differs", "off.vmdk": "missing"}


async def test_a_folder_that_a_run_is_at_work_on_is_refused(copies):
    with job_lock(copies / "raw" / "web", {"flow_run": "brave-fox"}), pytest.raises(errors.JobLocked, match="brave"):
        await verified(copies / "raw" / "web")


async def test_a_run_that_has_not_ended_is_no_copy(copies):
    folder = copies / "raw" / "web"
    (folder / "manifest.json").unlink()
    (folder / "disk-0.raw").rename(folder / "disk-0.raw.part")
    with pytest.raises(errors.InvalidInput, match="did not come to its end"):
        await verified(folder)


async def test_a_copy_that_cannot_be_written_to_is_verified_and_stays_as_it_was(copies):
    folder = copies / "qcow2" / "web"
    before = {path.name: path.stat() for path in folder.iterdir()}
    await verified(folder)
    after = {path.name: path.stat() for path in folder.iterdir()}
    assert {name: (s.st_mtime_ns, s.st_ino, s.st_size) for name, s in after.items()} == {
        name: (s.st_mtime_ns, s.st_ino, s.st_size) for name, s in before.items()
    }


# ── against the source ───────────────────────────────────────────────────────────────────────────────


async def sampled(lab, folder: Path, **options) -> Verification:
    job = VerifyJob(folder=folder, against_source=True, **options)
    return await verify_copy(options=job, vcenter=vcenter_of(lab))


async def test_a_snapshot_that_is_kept_is_sampled_by_a_seed_that_is_told(originals, site):
    found = await sampled(site, originals / "qcow2" / "web", sample=5)
    assert found.equal
    assert found.source and found.source.seed > 0
    assert "the snapshot kept" in found.source.point
    assert [(disk.leaves, disk.wrong) for disk in found.source.disks] == [(5, ()), (5, ())]
    assert site.stats()["live_sessions"] == 0


async def test_a_vm_that_is_off_is_sampled_while_nobody_writes_to_its_disks(originals, site):
    folder, flat = originals / "qcow2" / "off", flat_of(site, "off")
    found = await sampled(site, folder, seed=7)
    assert (found.equal, found.source.seed) == (True, 7)
    assert "the VM is off" in found.source.point
    times = flat.stat()
    with spoiled(flat, 2 * LEAF_BYTES):
        os.utime(flat, ns=(times.st_atime_ns, times.st_mtime_ns))
        with pytest.raises(
            errors.IntegrityMismatch, match=f"24 leaves differ, the first at byte {2 * LEAF_BYTES}"
        ) as raised:
            await sampled(site, folder)
    assert raised.value.found.source.disks[0].wrong == (2,)
    with pytest.raises(errors.SourceChanged, match="was written to at"):
        await sampled(site, folder)  # the bit was turned back since


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("raw/web", {"snapshot": {"moref": "snapshot-9999"}}, "its snapshot kept is gone, and it is not powered off"),
        ("raw/web", {"snapshot": {"created": "2020-01-01T00:00:00+00:00"}}, "its snapshot kept is gone"),
        ("raw/web", {"vcenter_uuid": "another"}, "it was copied from another server than"),
        ("raw/web", {"disks": [{"source": "[old] web/web.vmdk"}]}, r"disk 0 lay at \[old\] web/web.vmdk and is now \["),
        (
            "qcow2/off",
            {"snapshot": None, "vm": {"change_version": "older"}},
            "it was copied without a snapshot, and was started or reconfigured since",
        ),
    ],
)
async def test_a_source_that_has_moved_on_is_refused_with_what_to_do(copies, site, name, changes, reason):
    path = copies / name / "manifest.json"
    path.write_text(json.dumps(merged(json.loads(path.read_text()), changes)))
    with pytest.raises(errors.SourceChanged, match=f"{reason}.*--vs-snapshot-moref"):
        await sampled(site, copies / name)


def merged(value: Any, changes: Any) -> Any:
    """Return JSON with what `changes` says put in its place, however deep."""
    if isinstance(changes, dict) and isinstance(value, dict):
        return {**value, **{name: merged(value[name], change) for name, change in changes.items()}}
    if isinstance(changes, list):
        return [merged(old, new) for old, new in zip(value, changes, strict=False)] + value[len(changes) :]
    return changes


async def test_a_snapshot_that_goes_while_it_is_read_makes_the_sample_worthless(site, tmp_path, monkeypatch):
    kept = snapshot_of(site, "brief")
    await export(site, tmp_path, "brief", snapshot_moref=kept)

    async def read_then_gone(*args: Any, **options: Any) -> Any:
        found = await sample_disk(*args, **options)
        site.govc("snapshot.remove", "-vm", site.vm("brief")["path"], "*")
        return found

    monkeypatch.setattr("flows.verify.sample_disk", read_then_gone)
    with pytest.raises(errors.SourceChanged, match="it is gone"):
        await sampled(site, tmp_path / "brief")


async def test_a_copy_that_differs_is_not_held_against_the_source(copies, site):
    flip(copies / "raw" / "web" / "disk-0.raw", 0)
    site.post("/stats/reset")
    with pytest.raises(errors.IntegrityMismatch, match=r"disk-0\.raw: content differs"):
        await sampled(site, copies / "raw" / "web")
    assert site.stats()["soap_total"] == 0


async def test_a_download_and_a_missing_vcenter_are_refused_before_anything_is_read(originals, site):
    with pytest.raises(errors.InvalidInput, match="Run download-vm again"):
        await sampled(site, originals / "files" / "off")
    with pytest.raises(errors.InvalidInput, match="comparing with the source needs it"):
        await verify_copy(options=VerifyJob(folder=originals / "raw" / "web", against_source=True))


def flat_of(lab, name: str) -> Path:
    return Path(lab.state_dir) / "datastore1" / name / f"{name}-flat.vmdk"


@contextmanager
def spoiled(path: Path, offset: int) -> Iterator[None]:
    """Have one bit of a file turned over for the block."""
    flip(path, offset)
    try:
        yield
    finally:
        flip(path, offset)


# ── the command line ─────────────────────────────────────────────────────────────────────────────────


def run_verify(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    from prefect.settings import PREFECT_API_URL

    env = os.environ | {"PREFECT_API_URL": PREFECT_API_URL.value(), **env}
    argv = [sys.executable, "-m", "hyper2kvm", "vsphere", "--vs-action", "verify", *words]
    return subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)


def test_the_command_needs_no_vcenter_prints_a_table_and_ends_with_0(originals):
    done = run_verify(str(originals / "qcow2" / "web"))
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["disk-0.qcow2", "qcow2"] in [words[:2] for words in lines]
    assert [words[-1] for words in lines if words and words[0].startswith("disk-")] == ["equal", "equal"]
    assert "all equal" in done.stdout


def test_a_difference_is_a_row_an_error_and_exit_status_1(copies):
    folder, raw = copies / "qcow2" / "web", copies / "raw" / "web" / "disk-0.raw"
    number = data_leaves(raw)[0]
    rot(folder / "disk-0.qcow2", raw, number)
    done = run_verify(str(folder))
    assert done.returncode == 1
    assert f"1 at bytes {number * LEAF_BYTES:,}–{(number + 1) * LEAF_BYTES - 1:,}" in done.stdout
    assert "content differs" in done.stdout
    error, remedy = [line for line in done.stderr.splitlines() if line != "Loading Prefect"][-2:]
    assert error.startswith("Error: ") and "1 of 2 files: disk-0.qcow2: content differs, 1 leaf" in error
    assert "Put it back from a backup" in remedy
    assert "Traceback" not in done.stdout + done.stderr


def test_json_has_the_same_and_the_name_of_the_error(copies):
    folder = copies / "raw" / "web"
    flip(folder / "disk-0.digests", HEADER_BYTES)
    done = run_verify(str(folder), "--json")
    said = json.loads(done.stdout)
    assert (done.returncode, said["error"], said["equal"]) == (1, "IntegrityMismatch", False)
    assert said["files"][0]["verdict"] == "digests differ"
    assert said["files"][0]["first_wrong"] == [{"start": 0, "length": LEAF_BYTES}]


def test_against_the_source_it_says_what_it_read_there_and_by_which_seed(originals, site):
    where = ["--vcenter", site.address, "--username", site.username]
    done = run_verify(
        str(originals / "qcow2" / "web"), "--against-source", "--seed", "42", *where, **site.environment()
    )
    assert done.returncode == 0, done.stderr
    assert "At the source, the snapshot kept" in done.stdout
    assert "seed 42" in done.stdout
    assert "disk-0.qcow2  [datastore1] web/web.vmdk: 24 leaves read, all equal" in done.stdout


async def test_from_python_it_is_a_method_of_the_client(originals, site, copies):
    client = VMwareClient(host=site.address, user=site.username, pwd=site.password, ca_file=str(site.ca_file))
    job = VerifyJob(folder=originals / "qcow2" / "web", against_source=True, sample=1)
    assert (await client.async_verify(job)).source
    (copies / "raw" / "web" / "disk-0.raw").unlink()
    with pytest.raises(errors.IntegrityMismatch, match="missing"):
        await client.async_verify(VerifyJob(folder=copies / "raw" / "web"))


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (["/usr", "--against-source"], "--vcenter: verify needs it"),
        (["/usr", "--sample", "0"], "sample: Input should be greater than or equal to 1"),
        ([], "The folder: verify needs it"),
        (["/nowhere"], "there is no such folder"),
        (["/usr"], "there is none"),
    ],
)
def test_what_is_no_copy_is_one_line_of_cause_and_exit_status_2(words, cause):
    done = run_verify(*words)
    assert done.returncode == 2
    error, _ = done.stderr.splitlines()  # before Prefect is loaded
    assert cause in error
