"""Small guests that boot for real: a Debian kernel, an initramfs with the drivers named and no others, GRUB, a disk.

Packages are downloaded and unpacked below `build/`, not installed. What init finds, it says on the first serial port:

    guest-marker disk=vmw_pvscsi nic=vmxnet3 sector=<text of the marker sector>
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from tests.labs import ROOT

UNPACKED = ROOT / "build" / "guest"
PACKAGES = ("linux-image-amd64", "busybox-static", "grub-pc-bin", "grub-efi-amd64-bin")
MIB = 1024 * 1024
SECTOR_BYTES = 512
DISK_BYTES = 48 * MIB
PARTITION_START = MIB
MARKER_SECTOR = 2000  # between GRUB's core and the partition
BIOS_MODULES = ("biosdisk", "part_msdos", "fat", "linux", "normal", "serial", "terminal")
EFI_MODULES = ("part_msdos", "fat", "linux", "normal")

INIT = """#!/bin/busybox sh
b=/bin/busybox
for each in proc sys; do $b mkdir -p /$each; done
$b mount -t proc proc /proc
$b mount -t sysfs sys /sys
$b mount -t devtmpfs dev /dev
for each in $($b cat /modules); do $b insmod /lib/$each.ko; done
tries=0
until [ -b /dev/sda ] || [ $tries -ge 60 ]; do $b sleep 1; tries=$((tries + 1)); done
is_pci() { [ "$($b basename "$($b readlink "$1/subsystem")")" = pci ]; }
driver_of() { # the driver of the PCI device that a device hangs on
  path=$($b readlink -f "$1")
  until [ "$path" = / ] || is_pci "$path"; do path=$($b dirname "$path"); done
  $b basename "$($b readlink "$path/driver")"
}
for each in /sys/class/net/*; do [ -e "$each/device" ] && nic=$(driver_of "$each/device"); done
text=$($b dd if=/dev/sda bs=512 skip=SECTOR count=1 2>/dev/null | $b tr -d '\\000')
for each in ttyS0 tty0; do
  echo "guest-marker disk=$(driver_of /sys/block/sda/device) nic=$nic sector=$text" >/dev/$each
done
while :; do $b sleep 60; done
"""
GRUB = """
search --file --set=root /vmlinuz
linux /vmlinuz console=tty0 console=ttyS0 quiet
initrd /initrd
boot
"""
GRUB_WITHOUT_INITRAMFS = """
search --file --set=root /vmlinuz
linux /vmlinuz root=/dev/sda1
boot
"""


def make_guest(
    disk: Path,
    *,
    drivers: tuple[str, ...],
    marker: str,
    firmware: Literal["bios", "efi"] = "bios",
    grub: str = GRUB,
) -> None:
    """Write a raw disk that boots by `firmware` and has `drivers` (modules, with what they need) and no others."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "vmlinuz").symlink_to(next(unpacked().glob("boot/vmlinuz-*")))
        _initramfs(folder, ("sd_mod", *drivers))
        (folder / "grub.cfg").write_text(grub)
        with disk.open("wb") as file:
            file.truncate(DISK_BYTES)
            file.seek(MARKER_SECTOR * SECTOR_BYTES)
            file.write(marker.encode())
        _partition(disk, folder, firmware)
        if firmware == "bios":
            _embed_grub(disk, folder)


@functools.cache
def unpacked() -> Path:
    """Return the folder that the packages are unpacked in."""
    if not (UNPACKED / "complete").exists():
        shutil.rmtree(UNPACKED, ignore_errors=True)
        (UNPACKED / "packages").mkdir(parents=True)
        depends = _said("apt-cache", "depends", PACKAGES[0])
        kernel = re.findall(r"^\s*Depends: (linux-image-\S+)$", depends, re.MULTILINE)
        subprocess.run(["apt-get", "download", "-q", *kernel[:1], *PACKAGES[1:]], cwd=UNPACKED / "packages", check=True)
        for package in (UNPACKED / "packages").glob("*.deb"):
            subprocess.run(["dpkg", "-x", str(package), str(UNPACKED)], check=True)
        (UNPACKED / "complete").touch()
    return UNPACKED


def _initramfs(folder: Path, drivers: tuple[str, ...]) -> None:
    modules = list(dict.fromkeys(each for driver in drivers for each in _with_needs(driver)))
    tree = folder / "tree"
    for name in ("bin", "lib", "dev"):
        (tree / name).mkdir(parents=True)
    shutil.copy(unpacked() / "bin" / "busybox", tree / "bin" / "busybox")
    for module in modules:
        shutil.copy(_module(module), tree / "lib" / f"{module}.ko")
    (tree / "modules").write_text("\n".join(modules))
    (tree / "init").write_text(INIT.replace("SECTOR", str(MARKER_SECTOR)))
    (tree / "init").chmod(0o755)
    names = "\n".join(str(path.relative_to(tree)) for path in sorted(tree.rglob("*")))
    with (folder / "initrd").open("wb") as file:
        argv = [str(tree / "bin" / "busybox"), "cpio", "-o", "-H", "newc"]
        subprocess.run(argv, cwd=tree, input=names.encode(), stdout=file, stderr=subprocess.DEVNULL, check=True)


def _with_needs(module: str) -> Iterator[str]:
    """Yield what a module needs, and what that needs, before the module itself."""
    needs = re.search(rb"\0depends=([^\0]*)\0", b"\0" + _module(module).read_bytes())
    for each in needs[1].decode().split(",") if needs and needs[1] else ():
        yield from _with_needs(each)
    yield module


@functools.cache
def _module(name: str) -> Path:
    spelled = name.replace("-", "_")
    return next(path for path in unpacked().glob("lib/modules/**/*.ko") if path.stem.replace("-", "_") == spelled)


def _partition(disk: Path, folder: Path, firmware: str) -> None:
    """Make the one partition, FAT, with the kernel and the initramfs in it."""
    kind = "c" if firmware == "bios" else "ef"
    table = f"label: dos\nstart={PARTITION_START // SECTOR_BYTES}, type={kind}, bootable\n"
    subprocess.run(["sfdisk", "-q", str(disk)], input=table, text=True, check=True)
    at = f"{disk}@@{PARTITION_START}"
    sectors = (DISK_BYTES - PARTITION_START) // SECTOR_BYTES
    subprocess.run(["mformat", "-i", at, "-F", "-T", str(sectors), "::"], check=True)
    subprocess.run(["mcopy", "-i", at, str(folder / "vmlinuz"), str(folder / "initrd"), "::"], check=True)
    if firmware == "efi":
        subprocess.run(["mmd", "-i", at, "::/EFI", "::/EFI/BOOT"], check=True)
        subprocess.run(
            ["mcopy", "-i", at, str(_grub_image(folder, "x86_64-efi", EFI_MODULES)), "::/EFI/BOOT/BOOTX64.EFI"],
            check=True,
        )


def _embed_grub(disk: Path, folder: Path) -> None:
    """Put GRUB's boot sector and core where GRUB's own set-up puts them: around the partition table, and behind it."""
    boot = (unpacked() / "usr/lib/grub/i386-pc/boot.img").read_bytes()
    core = _grub_image(folder, "i386-pc", BIOS_MODULES).read_bytes()
    assert len(core) < (MARKER_SECTOR - 1) * SECTOR_BYTES
    with disk.open("r+b") as file:
        file.write(boot[:440])
        file.seek(SECTOR_BYTES)
        file.write(core)


def _grub_image(folder: Path, platform: str, modules: tuple[str, ...]) -> Path:
    image, library = folder / f"{platform}.img", unpacked() / "usr/lib/grub" / platform
    where = ["-d", str(library), "-O", platform, "-p", "/", "-c", str(folder / "grub.cfg"), "-o", str(image)]
    subprocess.run(["grub-mkimage", *where, *modules, "search", "search_fs_file", "boot"], check=True)
    return image


def _said(*argv: str) -> str:
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout
