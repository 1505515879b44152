"""`tasks.images.esp`: disks made by sfdisk and mtools, in every format."""

import subprocess
import threading
from pathlib import Path

import pytest

from tasks.errors import ToolFailed
from tasks.images.esp import has_fallback_loader
from tasks.process import Stopped

DISK_BYTES = 40 << 20
ESP_START, ESP_SECTORS = 4096, 16384


def disk(folder: Path, *, table: str = "gpt", kind: str = "U", loader: str | None = "EFI/Boot/bootx64.efi") -> Path:
    """Make a disk with a small partition of a kind and a FAT file system; `loader`: a file in that."""
    image = folder / "disk.raw"
    with image.open("wb") as file:
        file.truncate(DISK_BYTES)
    parts = f"label: {table}\nstart=2048,size=1024,type=L\nstart={ESP_START},size={ESP_SECTORS},type={kind}\n"
    subprocess.run(["sfdisk", "-q", str(image)], input=parts, text=True, check=True)
    at = f"{image}@@{ESP_START * 512}"
    subprocess.run(["mformat", "-i", at, "-T", str(ESP_SECTORS), "::"], check=True)
    if loader:
        for parent in reversed(Path(loader).parents[:-1]):
            subprocess.run(["mmd", "-i", at, f"::/{parent}"], check=True)
        subprocess.run(["mcopy", "-i", at, __file__, f"::/{loader}"], check=True)
    return image


def looked_at(image: Path, **fields) -> bool:
    return has_fallback_loader(image, **({"format": "raw", "virtual_size": DISK_BYTES} | fields))


@pytest.mark.parametrize("format", ["raw", "qcow2", "vmdk", "vdi", "vhdx"])
def test_the_loader_is_found_in_an_image_of_any_format(tmp_path, format):
    image = disk(tmp_path).rename(tmp_path / 'a,b "c": {json}.raw')
    subprocess.run(["qemu-img", "convert", "-O", format, f"file:{image}", f"file:{image}.{format}"], check=True)
    assert looked_at(Path(f"{image}.{format}"), format=format)


@pytest.mark.parametrize(
    ("made", "found"),
    [
        ({}, True),
        ({"table": "dos", "kind": "ef"}, True),
        ({"loader": "EFI/BOOT/BOOTX64.EFI"}, True),
        ({"loader": None}, False),
        ({"loader": "EFI/debian/grubx64.efi"}, False),
        ({"kind": "L"}, False),
    ],
)
def test_only_a_system_partition_with_the_loader_will_do(tmp_path, made, found):
    assert looked_at(disk(tmp_path, **made)) is found


def test_a_disk_without_partitions_or_smaller_than_a_table_has_none(tmp_path):
    (blank := tmp_path / "blank").write_bytes(bytes(4096))
    assert not looked_at(blank, virtual_size=4096)


def test_a_partition_beyond_the_end_of_the_disk_is_not_read(tmp_path):
    image = disk(tmp_path, table="dos", kind="ef")
    with image.open("r+b") as file:
        file.truncate(3 << 20)
    assert not looked_at(image, virtual_size=3 << 20)


def test_a_missing_tool_is_named_with_its_package(tmp_path, monkeypatch):
    image = disk(tmp_path)
    (only := tmp_path / "bin").mkdir()
    for tool in ("setpriv", "sh", "env", "qemu-img", "partx"):
        (only / tool).symlink_to(subprocess.check_output(["which", tool], text=True).strip())
    monkeypatch.setenv("PATH", str(only))
    with pytest.raises(ToolFailed) as caught:
        looked_at(image)
    assert "mtools" in caught.value.remedy


def test_it_can_be_stopped(tmp_path):
    (stop := threading.Event()).set()
    with pytest.raises(Stopped):
        looked_at(disk(tmp_path), stop=stop)
