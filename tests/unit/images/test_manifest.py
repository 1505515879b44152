import json
import re
from pathlib import Path

import pytest

from tasks.errors import InvalidInput
from tasks.images.manifest import MANIFEST, read_manifest, write_manifest
from tasks.models import DiskImage, DownloadManifest, Manifest, VirtualMachine

VM = VirtualMachine(
    moref="vm-1",
    name="wéb",
    instance_uuid="i",
    bios_uuid="b",
    inventory_path="/DC0/vm/wéb",
    datacenter_path="/DC0",
    host_path="/DC0/host/C/h",
    host_name="h",
    vpx_uri="vpx://h/DC0/C/h",
    power_state="poweredOn",
    firmware="efi",
    cpus=2,
    memory_mib=1024,
    vmx_path="[ds] web/web.vmx",
)
DISK = DiskImage(
    index=0,
    disk_key=2000,
    uuid="u",
    change_id=None,
    source="[ds] web/web.vmdk",
    path="disk-0.qcow2",
    format="qcow2",
    virtual_size=512,
    digest="blake3:00",
    bytes_transferred=512,
    road="folder",
    verified="direct",
)
MANIFEST_OF_VM = Manifest(
    vcenter_uuid="v", vm=VM, snapshot=None, disks=(DISK,), consistent=True, created="2025-01-01T00:00:00Z"
)


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    path = write_manifest(tmp_path, MANIFEST_OF_VM)
    assert path.name == MANIFEST
    assert read_manifest(tmp_path) == MANIFEST_OF_VM
    assert json.loads(path.read_text())["version"] == 1


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (None, "there is none$"),
        ("{", "damaged"),
        ("[]", "version None"),
        ('{"version": 2}', "version 2"),
        ('{"version": 1}', "damaged"),
        ("\ud800".encode("utf-8", "surrogatepass").decode("latin-1"), "damaged"),
    ],
)
def test_no_manifest_or_a_foreign_one_is_named(tmp_path: Path, text: str | None, why: str) -> None:
    if text is not None:
        (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(InvalidInput) as raised:
        read_manifest(tmp_path)
    assert re.search(why, raised.value.why)


def test_a_newer_manifest_is_left_to_a_newer_program(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text('{"version": 2}')
    with pytest.raises(InvalidInput) as raised:
        read_manifest(tmp_path)
    assert raised.value.remedy == "Use the hyper2kvm that wrote it, or a newer one"


def test_the_manifest_of_a_download_is_read_as_one(tmp_path: Path) -> None:
    download = DownloadManifest(vcenter_uuid="v", vm=VM, snapshot=None, files=(), consistent=True, created="now")
    (tmp_path / MANIFEST).write_text(download.model_dump_json())
    assert read_manifest(tmp_path) == download


@pytest.mark.parametrize("name", ["disk-0.qcow2.part", "disk-0.journal", ".hyper2kvm.job.json", ".hyper2kvm.parts"])
def test_a_folder_whose_run_has_not_ended_is_told_from_an_empty_one(tmp_path: Path, name: str) -> None:
    (tmp_path / ".hyper2kvm.lock").touch()
    with pytest.raises(InvalidInput, match=r"there is none\. Name"):
        read_manifest(tmp_path)
    (tmp_path / name).touch()
    with pytest.raises(InvalidInput, match=r"did not come to its end\. Run the same command again"):
        read_manifest(tmp_path)


def test_the_folder_above_names_those_that_hold_a_copy(tmp_path: Path) -> None:
    for name in ("web", "db"):
        (tmp_path / name).mkdir()
        write_manifest(tmp_path / name, MANIFEST_OF_VM)
    with pytest.raises(InvalidInput, match="Name one of the folders in it: db, web"):
        read_manifest(tmp_path)


def test_no_folder_at_all_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="there is no such folder"):
        read_manifest(tmp_path / "gone")
    (tmp_path / "file").touch()
    with pytest.raises(InvalidInput, match="that is no folder"):
        read_manifest(tmp_path / "file")


def test_a_manifest_of_before_there_were_domains_is_read(tmp_path: Path) -> None:
    said = json.loads(MANIFEST_OF_VM.model_dump_json())
    for newer in ("boot_keys", "cores_per_socket", "devices", "secure_boot", "video_ram_kib"):
        del said["vm"][newer]
    for newer in ("controller_key", "unit_number"):
        del said["disks"][0][newer]
    del said["domain"]
    (tmp_path / MANIFEST).write_text(json.dumps(said))
    assert read_manifest(tmp_path) == MANIFEST_OF_VM
