"""One pass to qcow2 against download and convert, and against two peers: half of the disk is empty, the lab serves it.

Ours hashes, journals and, in rows of its own, reads back; the peers do none of that. `nbdcopy` reads from a local
qemu-nbd, not over HTTPS. `nbdkit curl` is what virt-v2v's vCenter input copies with: nbdkit's curl plugin on the same
`/folder` URL, and nbdcopy; virt-v2v itself refuses a disk without an operating system, and converts one that it finds.
`HYPER2KVM_BENCH_MIB` makes the disk smaller.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tasks.images.qemu import qemu_nbd
from tasks.vsphere.session import borrow
from tests.benchmarks.measure import (
    DISK_BYTES,
    GIB,
    Contender,
    Row,
    Run,
    command,
    cpu_s_per_gib,
    interleaved,
    program,
    row,
    show,
    write,
)
from tests.labs import ROOT, running_lab

VM = {"name": "off", "power": "off", "disks": [{"size": DISK_BYTES, "data": DISK_BYTES // 2}]}
SITE = {"datacenters": [{"name": "DC", "clusters": [{"name": "c", "hosts": ["esx1"]}], "vms": [VM]}]}
WRITTEN_GOAL, TIME_GOAL, CASE = 1.05, 0.7, "half-empty disk"


def main() -> None:
    """Run the contenders on one disk; print and leave the rows."""
    with (
        tempfile.TemporaryDirectory(dir=ROOT / "build") as scratch,
        running_lab(scenario=SITE) as lab,
        borrow(lab.connection()) as session,
    ):
        cookie = session.cookie.partition(";")[0].strip()

        def ours(passes: str, check: str) -> Contender:
            words = (passes, check, lab.address, str(lab.ca_file), cookie)
            return lambda target: program(
                "tests.benchmarks.export_disk", *words, str(target), str(DISK_BYTES), "off/off"
            )

        contenders = {
            "ours": ours("one", "as-it-is"),
            "two passes": ours("two", "as-it-is"),
            "ours, read back": ours("one", "read-back"),
            "two passes, read back": ours("two", "read-back"),
        }
        source = Path(lab.state_dir) / "datastore1" / "off" / "off-flat.vmdk"
        url = f"https://{lab.address}/folder/off/off-flat.vmdk?dcPath=DC&dsName=datastore1"
        peers: dict[str, Contender] = {
            "nbdcopy": lambda target: nbdcopy(source, target),
            "nbdkit curl": lambda target: nbdkit_curl(url, str(lab.ca_file), cookie, target),
        }
        for name, peer in peers.items():
            if all(shutil.which(tool) for tool in ("nbdcopy", name.split()[0])):
                contenders[name] = peer
            else:
                print(f"{name} is not there: that peer is left out")
        runs = interleaved(contenders, Path(scratch))
        show(runs, CASE, DISK_BYTES)
        write("onepass", rows(runs, allocated=source.stat().st_blocks * 512))


def nbdcopy(source: Path, target: Path) -> Run:
    with qemu_nbd(source, format="raw") as read_from, empty_qcow2(target) as write_to:
        return command(["nbdcopy", "--flush", f"nbd+unix:///?socket={read_from}", write_to], target)


def nbdkit_curl(url: str, ca_file: str, cookie: str, target: Path) -> Run:
    with empty_qcow2(target) as write_to:
        copying = f'nbdcopy --flush "$uri" "{write_to}"'
        return command(
            ["nbdkit", "-U-", "curl", url, f"cainfo={ca_file}", f"cookie={cookie}", "--run", copying], target
        )


@contextmanager
def empty_qcow2(target: Path) -> Iterator[str]:
    """Serve a new qcow2 for the block; yield its NBD URI."""
    image = target / "peer.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, str(DISK_BYTES)], check=True)
    with qemu_nbd(image, format="qcow2", read_only=False) as socket:
        yield f"nbd+unix:///?socket={socket}"


def rows(runs: dict[str, list[Run]], *, allocated: int) -> list[Row]:
    """Return ours against each peer in seconds, ours against the two passes in CPU, and what ours wrote."""

    def seconds(name: str) -> float:
        return statistics.median(run.seconds for run in runs[name])

    found = [
        row(CASE, "two passes", "s", seconds("ours"), seconds("two passes"), TIME_GOAL, at_least=False),
        row(
            f"{CASE}, read back",
            "two passes, read back",
            "s",
            seconds("ours, read back"),
            seconds("two passes, read back"),
            TIME_GOAL,
            at_least=False,
        ),
    ]
    found += [
        row(CASE, peer, "s", seconds("ours"), seconds(peer), 1.0, at_least=False)
        for peer in ("nbdcopy", "nbdkit curl")
        if peer in runs
    ]
    cpu_s = {name: cpu_s_per_gib(runs[name], DISK_BYTES) for name in ("ours", "two passes")}
    found.append(row(CASE, "two passes, CPU", "CPU-s/GiB", cpu_s["ours"], cpu_s["two passes"], 1.0, at_least=False))
    written = statistics.median(run.written_bytes for run in runs["ours"])
    return [*found, row(CASE, "allocated bytes", "GiB", written / GIB, allocated / GIB, WRITTEN_GOAL, at_least=False)]
