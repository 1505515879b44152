"""The roads' readers against programs that read the same: C with the same queue depth, nbdcopy, `ssh cat`, qemu-img.

VDDK and C copy to a file (ours hashes every leaf on the way) until it is durable, and once more in memory only, without
hashes: there at no latency both cores are busy, and what a second process costs in wake-ups shows. Of the
others the bytes go nowhere, as what is compared is how fast they come. Server and client share the machine, so the
figures are good for ratios only. The rows of leases are `lease`'s. `HYPER2KVM_BENCH_MIB` makes the disk smaller.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tasks.models import NbdSettings, VddkSettings
from tasks.transports.nbd import NbdDisk
from tasks.transports.ssh import SshDisk
from tasks.transports.vddk import REQUEST_BYTES, VddkDisk
from tests.benchmarks.download import random_file
from tests.benchmarks.lease import lease_cases
from tests.benchmarks.measure import DISK_BYTES, MIB, Contender, Row, Run, compare, interleaved, row, show, write
from tests.labs import ROOT, VDDK, Lab, running_lab
from tests.sshd import EsxiHost, esxi_host

QUEUE = 8  # requests under way at once: the threads of the stand-in for VDDK, in which more of ours wait
GOALS = {"C, same depth": 0.9, "nbdcopy": 1.0, "ssh cat": 0.9}
HALF_GOAL = 0.55  # of the bytes of a disk of which half is allocated


def main() -> None:
    """Run the cases; print and leave the rows."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=ROOT / "build") as folder:
        scratch = Path(folder)
        image = scratch / "volumes" / "ds" / "web" / "web-flat.vmdk"
        image.parent.mkdir(parents=True)
        random_file(image, DISK_BYTES)
        rows += vddk_cases(scratch, image)
        rows += nbd_case(scratch, image)
        rows += ssh_case(scratch)
        rows += half_empty(scratch)
        image.unlink()
        rows += lease_cases(scratch)
    write("readers", rows)


def vddk_cases(scratch: Path, image: Path) -> list[Row]:
    """Ours through the stand-in for VDDK, which preads a file here, all of it; the C program preads the same."""
    preads = scratch / "preads"
    source = Path(__file__).with_name("preads.c")
    subprocess.run(["gcc", "-O2", "-o", str(preads), str(source), "-lpthread"], check=True)
    rows = []
    with vddk_disk(DISK_BYTES) as (_, disk):
        for latency_ms in (0, 2):
            os.environ |= {"VIXLAB_FILE": str(image), "VIXLAB_LATENCY_MS": str(latency_ms)}
            how = [str(latency_ms), str(QUEUE), str(REQUEST_BYTES)]
            copies: dict[str, Contender] = {
                "ours": lambda target: ours("vddk", disk, str(target)),
                "C, same depth": lambda target, how=how: timed(  # type: ignore[misc]
                    [str(preads), str(image), str(target / "disk.raw"), *how]
                ),
            }
            rows += case(f"VDDK, {latency_ms} ms a request", copies, scratch)
            reads: dict[str, Contender] = {
                "ours": lambda _: ours("vddk", disk, "-"),
                "C, same depth": lambda _, how=how: timed([str(preads), str(image), "-", *how]),  # type: ignore[misc]
            }
            rows += case(f"VDDK, {latency_ms} ms, memory", reads, scratch)
        for name in ("VIXLAB_FILE", "VIXLAB_LATENCY_MS"):
            del os.environ[name]
    return rows


def nbd_case(scratch: Path, image: Path) -> list[Row]:
    address = scratch / "nbd"
    server = subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", "nbdkit", "-f", "-r", "-U", str(address), "file", str(image)]
    )
    try:
        while not address.exists():
            assert server.poll() is None
            time.sleep(0.05)
        uri = f"nbd+unix:///?socket={address}"
        disk = {"settings": NbdSettings(uri=uri).model_dump(mode="json"), "blanks": {}, "password": ""}
        disk |= {"datastore_path": "[ds] web/web.vmdk", "capacity_bytes": DISK_BYTES}
        NbdDisk.model_validate(disk)
        contenders: dict[str, Contender] = {
            "ours": lambda _: ours("nbd", disk),
            "nbdcopy": lambda _: timed(["nbdcopy", uri, "null:"]),
        }
        return case("NBD, nbdkit file", contenders, scratch)
    finally:
        server.kill()
        server.wait()


def ssh_case(scratch: Path) -> list[Row]:
    with esxi_host(scratch / "sshd", scratch / "volumes") as host:
        settings = host.settings().model_dump(mode="json") | {"key": (host.folder / "user").read_text()}
        disk = {"settings": settings, "datastore_path": "[ds] web/web.vmdk", "capacity_bytes": DISK_BYTES}
        SshDisk.model_validate(disk)
        contenders: dict[str, Contender] = {
            "ours": lambda _: ours("ssh", disk),
            "ssh cat": lambda _: timed(ssh_cat(host, "/vmfs/volumes/ds/web/web-flat.vmdk")),
        }
        return case("SSH, sshd on loopback", contenders, scratch)


def ssh_cat(host: EsxiHost, path: str) -> list[str]:
    """Return a plain ssh of the same cipher, its output read by a program, as ours is."""
    options = ["-c", "aes128-gcm@openssh.com", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"]
    who = ["-i", str(host.folder / "user"), "-p", str(host.port), "-o", "LogLevel=ERROR"]
    words = ["ssh", "-F", "none", *options, *who, f"{host.settings().user}@127.0.0.1", f"cat {shlex.quote(path)}"]
    return ["bash", "-o", "pipefail", "-c", f"{shlex.join(words)} | cat >/dev/null"]


def half_empty(scratch: Path) -> list[Row]:
    """Count what the lab serves of a disk of which half is allocated."""
    size = min(DISK_BYTES, 1024 * MIB)
    image = scratch / "half.raw"
    random_file(image, size // 2)
    os.truncate(image, size)
    with vddk_disk(size, content=image) as (lab, disk):
        lab.post("/stats/reset")
        ours("vddk", disk)
        served = lab.stats()["bytes_served"]
    return [row("VDDK, half-empty disk", "the whole disk", "MiB", served / MIB, size / MIB, HALF_GOAL, at_least=False)]


@contextmanager
def vddk_disk(size: int, *, content: Path | None = None) -> Iterator[tuple[Lab, dict[str, Any]]]:
    """Yield a lab, and the disk of a VM there that is off, as JSON."""
    vm = {
        "name": "off",
        "power": "off",
        "disks": [{"size": size} | ({"from": str(content)} if content else {"data": size})],
    }
    site = {"datacenters": [{"name": "DC", "clusters": [{"name": "c", "hosts": ["esx1"]}], "vms": [vm]}]}
    with running_lab(scenario=site) as lab:
        disk = VddkDisk(
            connection=lab.connection(),
            settings=VddkSettings(libdir=VDDK),
            vm_moref=lab.vm("off")["moref"],
            snapshot_moref="",
            datastore_path=lab.vm("off")["disks"][0]["datastore_path"],
            capacity_bytes=size,
            identity="hyper2kvm-bench",
        )
        told = disk.model_dump(mode="json")
        told["connection"]["password"] = lab.password
        yield lab, told


def case(name: str, contenders: dict[str, Contender], scratch: Path) -> list[Row]:
    runs = interleaved(contenders, scratch)
    show(runs, name, DISK_BYTES)
    return compare(name, runs, size=DISK_BYTES, goals=GOALS)


def ours(kind: str, disk: dict[str, Any], *words: str) -> Run:
    argv = [sys.executable, "-m", "tests.benchmarks.read_disk", kind, *words]
    done = subprocess.run(argv, input=json.dumps(disk), stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    return Run(**json.loads(done.stdout))


def timed(argv: list[str]) -> Run:
    """Run a command that leaves nothing."""
    started = time.monotonic()
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, argv)
    return Run(time.monotonic() - started, usage.ru_utime + usage.ru_stime)
