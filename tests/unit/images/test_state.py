from pathlib import Path

import pytest
from pydantic import SecretStr

from tasks.images.layout import DiskFiles
from tasks.images.state import STATE, JobState, discard, read_state, write_state
from tasks.models import (
    Arrival,
    FolderSettings,
    LeaseSettings,
    NbdSettings,
    RoadSettings,
    Snapshot,
    SshSettings,
    Trust,
    VddkSettings,
    VirtualDisk,
)
from tests.unit.images.dying import every_death
from tests.unit.images.test_manifest import VM

DISKS = tuple(
    VirtualDisk(
        index=index,
        key=2000 + index,
        label=f"Hard disk {index + 1}",
        controller_key=1000,
        datastore_path="[ds] web/web.vmdk",
        capacity_bytes=512,
        backing="flat",
    )
    for index in range(2)
)
ARRIVALS = tuple(
    Arrival(disk=disk, digest="blake3:00", bytes_transferred=9, road="folder", seconds=1) for disk in DISKS
)
JOB = JobState(
    job_id="j",
    flow_run_id="f",
    vcenter_uuid="v",
    vm=VM,
    snapshot=Snapshot(
        moref="snapshot-1", name="hyper2kvm-j", created="2025-01-01T00:00:00Z", quiesced=False, ours=True
    ),
    disks=DISKS,
)
ARRIVED = JOB.model_copy(update={"arrivals": ARRIVALS})


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    for state in (JOB, ARRIVED):
        write_state(tmp_path, state)
        assert read_state(tmp_path) == state
    assert [path.name for path in tmp_path.iterdir()] == [STATE]
    assert (tmp_path / STATE).read_text().startswith('{\n  "version": 1')


@pytest.mark.parametrize(
    "road",
    [
        VddkSettings(libdir=Path("/opt/vddk")),
        NbdSettings(command=("nbdkit", "{path}"), secret=SecretStr("s")),
        NbdSettings(uri="nbds://host", trust=Trust(thumbprint="AB" * 20)),
        FolderSettings(),
        SshSettings(host="esx1", host_key=f"SHA256:{'A' * 43}", password=SecretStr("s")),
        LeaseSettings(),
    ],
)
def test_every_road_is_read_again_without_its_secrets(tmp_path: Path, road: RoadSettings) -> None:
    write_state(tmp_path, JOB.model_copy(update={"road": road}))
    again = read_state(tmp_path)
    assert again
    assert again.road == road.model_copy(update={name: None for name in ("secret", "password") if hasattr(road, name)})


@pytest.mark.parametrize("text", [None, "", "{", "[]", "7", '{"version": 2}', '{"version": 1}', "\udcff"])
def test_no_state_or_a_damaged_one_is_none(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / STATE).write_bytes(text.encode(errors="surrogateescape"))
    assert read_state(tmp_path) is None


def test_all_have_arrived_only_when_each_has() -> None:
    assert ARRIVED.all_arrived
    assert not JOB.all_arrived
    assert not JOB.model_copy(update={"arrivals": ARRIVALS[:1]}).all_arrived
    assert not JOB.model_copy(update={"disks": ()}).all_arrived


def test_killed_while_writing_the_old_state_or_the_new_one_is_there(tmp_path: Path) -> None:
    write_state(tmp_path, JOB)
    for _ in every_death(lambda: write_state(tmp_path, ARRIVED)):
        assert read_state(tmp_path) in (JOB, ARRIVED)
    assert read_state(tmp_path) == ARRIVED


OURS = [".hyper2kvm.job.json", ".hyper2kvm.job.json.part", "disk-0.journal", "disk-12.raw.part", "disk-0.qcow2.part"]
OURS += ["disk-0.digests.part"]
NOT_OURS = ["disk-0.raw", "disk-0.qcow2", "disk-0.digests", "manifest.json", ".hyper2kvm.lock", "notes.part"]
NOT_OURS += ["disk-a.raw.part", "disk-0.vmdk.part", "disk-0.raw.part.old", "my-disk-0.raw.part"]


def full(folder: Path) -> None:
    for name in OURS + NOT_OURS:
        (folder / name).write_text(name)
    write_state(folder, JOB)
    (folder / OURS[1]).write_text("half")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_discarding_takes_what_is_ours_and_unfinished(tmp_path: Path) -> None:
    full(tmp_path)
    discard(tmp_path)
    assert names(tmp_path) == set(NOT_OURS)
    discard(tmp_path)


def test_killed_while_discarding_the_state_goes_first_and_the_next_one_ends_it(tmp_path: Path) -> None:
    for _ in every_death(lambda: discard(tmp_path), prepare=lambda: full(tmp_path)):
        assert read_state(tmp_path) is None or names(tmp_path) == set(OURS + NOT_OURS)
        discard(tmp_path)
        assert names(tmp_path) == set(NOT_OURS)
    assert names(tmp_path) == set(NOT_OURS)


def test_the_names_of_a_disks_files(tmp_path: Path) -> None:
    files = DiskFiles(tmp_path, 3)
    assert [path.name for path in (files.raw_part, files.digests_part, files.journal, files.digests)] == [
        "disk-3.raw.part",
        "disk-3.digests.part",
        "disk-3.journal",
        "disk-3.digests",
    ]
    assert (files.part("qcow2").name, files.final("raw").name) == ("disk-3.qcow2.part", "disk-3.raw")
    assert files.sidecar == files.digests_part
    files.digests.touch()
    assert files.sidecar == files.digests
