"""Guests made here, with drivers for VMware's devices and no others: exported from a lab, started from `domain.xml`."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from prefect.settings import PREFECT_API_URL

from tasks.errors import ToolFailed
from tasks.images.boot import PACKAGES, boot
from tasks.images.domain import DOMAIN
from tasks.models import BootCheck, BootWishes
from tasks.process import Stopped
from tests.guests import GRUB_WITHOUT_INITRAMFS, make_guest
from tests.labs import ROOT, Lab, running_lab
from tests.runs import raw_sha256, run_command
from tests.waits import await_that

pytestmark = pytest.mark.e2e

EVERYWHERE = "tcg"  # what a host has behind /dev/kvm is its own business
COMMAND_TIMEOUT_S = 400
WAIT_S = 60
OURS = {"boot-check.json", "boot-check.log", "boot-check.png"}


class Case(NamedTuple):
    """A guest, the devices that it gets, and the names of its drivers for them."""

    controller: str
    nic: str
    drivers: tuple[str, str]
    firmware: Any = "bios"


CASES = {
    "pvscsi": Case("pvscsi", "vmxnet3", ("vmw_pvscsi", "vmxnet3")),
    "lsisas1068": Case("lsisas1068", "e1000e", ("mptsas", "e1000e")),
    "ahci": Case("ahci", "e1000", ("ahci", "e1000"), firmware="efi"),
}


def marker(name: str) -> str:
    return f"this is {name}"


def expected(name: str) -> str:
    """Return what a guest says once it has found its disk, its card, and the bytes that it was exported with."""
    disk, nic = CASES[name].drivers
    return f"guest-marker disk={disk} nic={nic} sector={marker(name)}"


def vm_of(name: str, disk: Path) -> dict[str, Any]:
    case, size = CASES[name], disk.stat().st_size
    disks = [{"from": str(disk), "size": size, "controller": case.controller}]
    return {
        "name": name, "power": "off", "firmware": case.firmware, "nics": [case.nic], "memory_mib": 512, "disks": disks
    }  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _one_server(prefect_api: None) -> Iterator[None]:
    """One Prefect server for all commands."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_API_URL", str(PREFECT_API_URL.value()))
        yield


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A lab with one VM a case, which is off, its disk one that boots."""
    folder = tmp_path_factory.mktemp("guests")
    for name, case in CASES.items():
        make_guest(folder / name, drivers=case.drivers, marker=marker(name), firmware=case.firmware)
    vms = [vm_of(name, folder / name) for name in CASES]
    datacenter = {"name": "DC", "clusters": [{"name": "c", "hosts": ["esx1"]}], "vms": vms}
    with running_lab(scenario={"datacenters": [datacenter]}) as lab:
        yield lab


@pytest.fixture(scope="module")
def exported(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Export a VM by the command line, its boot checked; return its folder."""
    output = tmp_path_factory.mktemp("exports")

    @functools.cache
    def export(name: str) -> Path:
        words = ["--vs-vm-name", name, "--output-dir", str(output), "--boot-check", "--boot-expect", expected(name)]
        words += ["--boot-accelerator", EVERYWHERE]
        done = run_command(lab, "export-vm", *words, timeout_s=COMMAND_TIMEOUT_S)
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"{name} boots" in done.stdout
        return output / name

    return export


@pytest.fixture
def copy(exported: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of its own of the guest on pvscsi."""
    folder, there = exported("pvscsi"), tmp_path / "copy"
    there.mkdir()
    shutil.copy(folder / "disk-0.qcow2", there)
    (there / DOMAIN).write_text((folder / DOMAIN).read_text().replace(str(folder), str(there)))
    return there


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def check_in(folder: Path) -> BootCheck:
    return BootCheck.model_validate_json((folder / "boot-check.json").read_text())


def boot_check(folder: Path, *words: str, path: str = os.environ["PATH"]) -> subprocess.CompletedProcess[str]:
    """Run the action from the command line, with no vCenter anywhere."""
    argv = [sys.executable, "-m", "hyper2kvm", "vsphere", "--vs-action", "boot-check", str(folder), *words]
    argv += ["--boot-accelerator", EVERYWHERE]
    return subprocess.run(
        argv, cwd=ROOT, env=os.environ | {"PATH": path}, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S
    )


@pytest.mark.parametrize("name", CASES)
def test_a_guest_boots_under_its_generated_domain(
    lab: Lab, exported: Callable[[str], Path], name: str, tmp_path: Path
) -> None:
    folder = exported(name)
    check = check_in(folder)
    assert (check.verdict, check.recognised) == ("boots", expected(name))
    assert (folder / "boot-check.png").read_bytes().startswith(b"\x89PNG")
    assert expected(name) in (folder / "boot-check.log").read_text()
    assert raw_sha256(folder / "disk-0.qcow2", tmp_path) == lab.sha256(lab.vm(name)["moref"], 0)
    manifest = {"manifest.json", DOMAIN, "disk-0.qcow2", "disk-0.digests", ".hyper2kvm.lock"}
    assert {path.name for path in folder.iterdir()} == manifest | OURS


def test_a_wiped_boot_sector_is_told_and_the_image_is_as_it_was(copy: Path) -> None:
    image = copy / "disk-0.qcow2"
    subprocess.run(["qemu-io", "-c", "write -P 0 0 512", str(image)], check=True, capture_output=True)
    before = sha256(image)
    done = boot_check(copy)
    assert done.returncode == 1
    assert "Error: pvscsi does not boot: No bootable device." in done.stderr
    assert "No bootable device." in check_in(copy).serial_tail
    assert sha256(image) == before
    assert {path.name for path in copy.iterdir()} == {DOMAIN, image.name} | OURS


def test_a_boot_that_proves_nothing_is_told_as_that(copy: Path) -> None:
    done = boot_check(copy, "--boot-expect", "never said", "--boot-timeout", "20", "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["error"] == "BootUnproven"
    assert (check_in(copy).verdict, check_in(copy).recognised) == ("unknown", "nothing like 'never said' was seen")


def test_a_panic_is_read_off_the_screen_where_the_kernel_is_silent_on_the_serial_port(
    copy: Path, tmp_path: Path
) -> None:
    make_guest(tmp_path / "raw", drivers=("vmw_pvscsi",), marker="", grub=GRUB_WITHOUT_INITRAMFS)
    subprocess.run(
        ["qemu-img", "convert", "-O", "qcow2", str(tmp_path / "raw"), str(copy / "disk-0.qcow2")], check=True
    )
    check = boot(copy, BootWishes(accelerator=EVERYWHERE), stop=threading.Event()).check
    assert check.verdict == "fails"
    assert "Unable to mount root fs" in check.recognised
    assert "Unable to mount root fs" not in "".join(check.serial_tail)


def test_what_libvirt_refuses_is_told_in_its_own_words(copy: Path) -> None:
    (copy / DOMAIN).write_text((copy / DOMAIN).read_text().replace('machine="pc"', 'machine="no-such-board"'))
    with pytest.raises(ToolFailed, match=r"virt-qemu-run failed .*cannot start VM"):
        boot(copy, BootWishes(accelerator=EVERYWHERE), stop=threading.Event())
    assert {path.name for path in copy.iterdir()} == {DOMAIN, "disk-0.qcow2"}


def processes_naming(path: Path) -> list[str]:
    found = []
    for each in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(path).encode() in (words := each.read_bytes()):
                found.append(words.replace(b"\0", b" ").decode())
        except OSError:
            continue  # it has ended
    return found


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A folder for temporary files, of a path short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="h2k-") as folder:
        yield Path(folder)


def test_a_kill_leaves_no_process_and_no_file(copy: Path, temporary: Path) -> None:
    code = f"""import threading, pathlib; from tasks.images.boot import boot; from tasks.models import BootWishes
boot(pathlib.Path({str(copy)!r}), BootWishes(expect="never said", accelerator="tcg"), stop=threading.Event())"""
    env = os.environ | {"TMPDIR": str(temporary)}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=env)
    await_that(lambda: any("qemu-system" in each for each in processes_naming(copy)))
    assert len(processes_naming(temporary)) > 2
    process.kill()
    process.wait()
    await_that(lambda: not processes_naming(temporary) and not processes_naming(copy))
    await_that(lambda: not [*temporary.iterdir()])
    assert {path.name for path in copy.iterdir()} == {DOMAIN, "disk-0.qcow2"}


def test_a_cancelled_check_leaves_no_process_and_no_file(copy: Path) -> None:
    stop = threading.Event()
    with ThreadPoolExecutor() as pool:
        running = pool.submit(boot, copy, BootWishes(expect="never said", accelerator="tcg"), stop=stop)
        await_that(lambda: any("qemu-system" in each for each in processes_naming(copy)))
        stop.set()
        with pytest.raises(Stopped):
            running.result(WAIT_S)
    assert processes_naming(copy) == []
    assert {path.name for path in copy.iterdir()} == {DOMAIN, "disk-0.qcow2"}


@pytest.mark.parametrize("missing", PACKAGES)
def test_a_missing_tool_is_named_with_its_package_before_anything_is_copied(
    lab: Lab, missing: str, tmp_path: Path
) -> None:
    (tmp_path / "bin").mkdir()
    for tool in {*PACKAGES, "qemu-nbd", "setpriv", "sh"} - {missing}:
        (tmp_path / "bin" / tool).symlink_to(str(shutil.which(tool)))
    lab.post("/stats/reset")
    words = ["--vs-vm-name", "pvscsi", "--output-dir", str(tmp_path / "exports"), "--boot-check"]
    done = run_command(lab, "export-vm", *words, env={"PATH": str(tmp_path / "bin")})
    assert done.returncode == 1
    assert f"{missing} is needed" in done.stderr
    assert f"Install the package {PACKAGES[missing]}" in done.stderr
    assert (lab.stats()["bytes_served"], [*tmp_path.glob("exports/*/disk*")]) == (0, [])
