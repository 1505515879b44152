"""One pass to qcow2 against download and convert, and against nbdcopy: half of the disk is empty, the lab serves it.

Ours hashes, journals and, in rows of its own, reads back; nbdcopy does none of that and reads from a local qemu-nbd,
not over HTTPS. virt-v2v is not among the peers yet: it converts the guest as well. `HYPER2KVM_BENCH_MIB` makes the disk
smaller.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import tempfile
from pathlib import Path

from tasks.images.qemu import qemu_nbd
from tasks.vsphere.session import borrow
from tests.benchmarks.download import connection_to
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
        borrow(connection_to(lab)) as session,
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
        if shutil.which("nbdcopy"):
            contenders["nbdcopy"] = lambda target: nbdcopy(source, target)
        else:
            print("nbdcopy is not there: that peer is left out")
        runs = interleaved(contenders, Path(scratch))
        show(runs, CASE, DISK_BYTES)
        write("onepass", rows(runs, allocated=source.stat().st_blocks * 512))


def nbdcopy(source: Path, target: Path) -> Run:
    image = target / "nbdcopy.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, str(DISK_BYTES)], check=True)
    with (
        qemu_nbd(source, format="raw") as read_from,
        qemu_nbd(image, format="qcow2", read_only=False) as write_to,
    ):
        argv = ["nbdcopy", "--flush", f"nbd+unix:///?socket={read_from}", f"nbd+unix:///?socket={write_to}"]
        return command(argv, target)


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
    if "nbdcopy" in runs:
        found.append(row(CASE, "nbdcopy", "s", seconds("ours"), seconds("nbdcopy"), 1.0, at_least=False))
    cpu_s = {name: cpu_s_per_gib(runs[name], DISK_BYTES) for name in ("ours", "two passes")}
    found.append(row(CASE, "two passes, CPU", "CPU-s/GiB", cpu_s["ours"], cpu_s["two passes"], 1.0, at_least=False))
    written = statistics.median(run.written_bytes for run in runs["ours"])
    return [*found, row(CASE, "allocated bytes", "GiB", written / GIB, allocated / GIB, WRITTEN_GOAL, at_least=False)]
