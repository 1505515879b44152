import json
from pathlib import Path

import pytest

from tasks.errors import InvalidInput
from tasks.images.manifest import MANIFEST, read_manifest, write_manifest
from tasks.models import DiskImage, Manifest, VirtualMachine

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
        (None, "there is none"),
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
    with pytest.raises(InvalidInput, match=why):
        read_manifest(tmp_path)


def test_a_manifest_of_before_there_were_domains_is_read(tmp_path: Path) -> None:
    said = json.loads(MANIFEST_OF_VM.model_dump_json())
    for newer in ("boot_keys", "cores_per_socket", "devices", "secure_boot", "video_ram_kib"):
        del said["vm"][newer]
    for newer in ("controller_key", "unit_number"):
        del said["disks"][0][newer]
    del said["domain"]
    (tmp_path / MANIFEST).write_text(json.dumps(said))
    assert read_manifest(tmp_path) == MANIFEST_OF_VM
