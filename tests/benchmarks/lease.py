"""Rows of `readers`: decoding an NFC lease's stream against `qemu-img convert` of it as a file, until it is durable.

Half of the disk holds something that deflates to two thirds. Ours hashes every leaf on the way; qemu-img does not. What
is read lies in the page cache for both: no network is compared. `HYPER2KVM_BENCH_MIB` makes the disk smaller.
"""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

from tests.benchmarks.measure import DISK_BYTES, MIB, Contender, Row, command, compare, interleaved, program, row, show

GOAL = 1.0
MEMORY_GOAL_MIB = 64  # more than before it begins, whatever the size of the disk


def lease_cases(scratch: Path) -> list[Row]:
    """Run the contenders in turn on one stream; return the rows."""
    stream = scratch / "disk.vmdk"
    make_stream(stream)
    contenders: dict[str, Contender] = {
        "ours": lambda target: program("tests.benchmarks.decode_stream", str(stream), str(DISK_BYTES), str(target)),
        "qemu-img convert": lambda target: command(
            ["qemu-img", "convert", "-f", "vmdk", "-O", "raw", str(stream), str(target / "disk.raw")], target
        ),
    }
    runs = interleaved(contenders, scratch, size=DISK_BYTES)
    stream.unlink()
    show(runs, "lease decode", DISK_BYTES)
    rows = compare("lease decode", runs, size=DISK_BYTES, goals={"qemu-img convert": GOAL})
    more = max(run.peak_rss_bytes - run.idle_rss_bytes for run in runs["ours"])
    return [*rows, row("lease decode", "memory, more", "MiB", more / MIB, MEMORY_GOAL_MIB, 1.0, at_least=False)]


def make_stream(stream: Path) -> None:
    """Have qemu-img encode a disk of which every other mebibyte holds something."""
    chance = random.Random(1)
    words = [chance.randbytes(chance.randrange(3, 12)) for _ in range(4000)]
    block = b"".join(chance.choice(words) if chance.random() < 0.9 else chance.randbytes(9) for _ in range(400_000))
    raw = stream.with_suffix(".raw")
    with raw.open("wb") as disk:
        disk.truncate(DISK_BYTES)
        for at in range(0, DISK_BYTES, 2 * MIB):
            disk.seek(at)
            begin = chance.randrange(len(block) - MIB)
            disk.write(block[begin : begin + MIB])
    argv = ["qemu-img", "convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized", str(raw), str(stream)]
    subprocess.run(argv, check=True)
    raw.unlink()
