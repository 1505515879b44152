"""Proving an image again against `qemu-img compare` of that image and its source, all of it allocated and random.

Ours reads the image, hashes it and compares it with its sidecar; qemu-img reads both files and compares them. Both read
past the page cache (`-T none`), or, as qemu-img does where nothing is said, through one that is empty: a warm one would
be what is compared, not the disk. `HYPER2KVM_BENCH_MIB` makes the disk smaller.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from tasks.images import qemu
from tasks.images.digests import LEAF_BYTES, Digests, record_of
from tests.benchmarks.measure import (
    DISK_BYTES,
    MIB,
    Contender,
    Row,
    Run,
    command,
    compare,
    interleaved,
    program,
    row,
    show,
    write,
)
from tests.labs import ROOT

GOAL, MEMORY_GOAL = 0.7, 2.0


def main() -> None:
    """Run the contenders on one disk as raw and as qcow2; print and leave the rows."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=ROOT / "build") as folder:
        source, image, sidecar = (Path(folder) / name for name in ("disk.raw", "disk.qcow2", "disk.digests"))
        make_disk(source, sidecar)
        qemu.convert(source, image, source_format="raw", target_format="qcow2")
        for path, format in ((image, "qcow2"), (source, "raw")):
            runs = interleaved(contenders(path, format, sidecar, source, image), Path(folder))
            rows += told(f"verify {format}", runs)
    write("verify", rows)


def make_disk(source: Path, sidecar: Path) -> None:
    """Write a disk of random bytes and its digests."""
    with source.open("wb") as disk, Digests.create(sidecar, size=DISK_BYTES) as digests:
        for leaf in range(DISK_BYTES // LEAF_BYTES):
            content = os.urandom(LEAF_BYTES)
            disk.write(content)
            digests.put(leaf, record_of(content))
        digests.flush()


def contenders(path: Path, format: str, sidecar: Path, source: Path, image: Path) -> dict[str, Contender]:
    def peer(cache: str) -> Contender:
        argv = ["qemu-img", "compare", "-q", "-T", cache, "-f", "raw", "-F", "qcow2", str(source), str(image)]
        return lambda target: command(argv, target)

    def cold(contender: Contender) -> Contender:
        def run(target: Path) -> Run:
            for each in (source, image):
                forget_cached(each)
            return contender(target)

        return run

    every: dict[str, Contender] = {
        "ours": lambda _: program("tests.benchmarks.prove_image", str(path), format, str(sidecar)),
        "qemu-img compare": peer("none"),
        "qemu-img compare, cold": peer("writeback"),
    }
    return {name: cold(contender) for name, contender in every.items()}


def forget_cached(path: Path) -> None:
    """Have the page cache hold nothing of a file."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def told(case: str, runs: dict[str, list[Run]]) -> list[Row]:
    """Return ours against each peer in speed, and the memory that ours takes against what it has before it begins."""
    show(runs, case, DISK_BYTES)
    peak, idle = (max(getattr(run, name) for run in runs["ours"]) for name in ("peak_rss_bytes", "idle_rss_bytes"))
    memory = row(case, "memory before it begins", "MiB", peak / MIB, idle / MIB, MEMORY_GOAL, at_least=False)
    return [*compare(case, runs, size=DISK_BYTES, goals=dict.fromkeys(runs, GOAL)), memory]
