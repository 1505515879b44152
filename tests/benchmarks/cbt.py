"""Syncs of a sparse disk of 100 GiB in which a guest wrote 10,000 scattered blocks of 64 KiB, from the lab.

Goals: fetched ≤ 1.10 × what changed; read of the image here, the read-back with it, ≤ 5 ×; time ≤ 1.2 × (requests ×
latency ÷ connections + bytes ÷ bandwidth), at 0, 2 and 20 ms a request. Requests are those of the merged plan, one an
extent: of those sent there are fewer, since one may have several ranges. Bandwidth and the latency that is there by
itself are measured.
`HYPER2KVM_BENCH_WRITES` makes it shorter.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

from tasks.vsphere.session import borrow
from tests.benchmarks.measure import GIB, MIB, Row, row, write
from tests.labs import ROOT, Lab, running_lab

DISK_BYTES = 100 * GIB
WRITES = int(os.environ.get("HYPER2KVM_BENCH_WRITES", "10000"))
BLOCK = 64 * 1024
LATENCIES_MS = (0, 2, 20)
CONNECTIONS = 4
LATENCY_REQUESTS = 200
BANDWIDTH_BYTES = 512 * MIB
FETCHED_GOAL, READ_GOAL, TIME_GOAL = 1.10, 5.0, 1.2


def main() -> None:
    """Make a full copy, and sync it once for each latency; print and leave the rows."""
    disk = {"size": DISK_BYTES, "data": 128 * MIB}
    off = {"name": "off", "power": "off", "disks": [{"size": BANDWIDTH_BYTES, "data": BANDWIDTH_BYTES}]}
    vms = [{"name": "tracked", "cbt": True, "disks": [disk]}, off]
    site = {"datacenters": [{"name": "DC", "clusters": [{"name": "c", "hosts": ["esx1"]}], "vms": vms}]}
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=ROOT / "build") as scratch, running_lab(scenario=site) as lab:
        folder, chance = Path(scratch), random.Random(1)
        whole = sync(lab, folder)
        print(f"full copy: {told(whole)}", flush=True)
        for latency_ms in LATENCIES_MS:
            changed = guest_writes(lab, chance)
            lab.post("/faults", clear=True)
            bandwidth = bytes_per_s(lab)
            lab.post("/faults", folder_latency_s=latency_ms / 1000)
            latency_s = seconds_a_request(lab)
            lab.post("/stats/reset")
            took = sync(lab, folder)
            rows += judged(f"{latency_ms} ms", took, changed, requests(lab), latency_s, bandwidth, whole["seconds"])
            write("cbt", rows)  # as they come: a time-out loses none


def guest_writes(lab: Lab, chance: random.Random) -> int:
    """Have the guest write everywhere; return how many bytes that changed."""
    blocks = chance.sample(range(DISK_BYTES // BLOCK), WRITES)
    moref = lab.vm("tracked")["moref"]
    with httpx.Client(base_url=lab.admin_url, timeout=60) as admin:
        for block in blocks:
            words = {"vm": moref, "disk": 0, "offset": block * BLOCK, "length": BLOCK, "seed": chance.getrandbits(32)}
            admin.post("/guest-write", json=words).raise_for_status()
    return WRITES * BLOCK


def sync(lab: Lab, folder: Path) -> dict[str, Any]:
    """Run one sync in a process of its own; return its figures."""
    words = [lab.address, str(lab.ca_file), lab.username, lab.vm("tracked")["moref"], str(folder), str(CONNECTIONS)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.sync_disk", *words],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        cwd=ROOT,
        env=os.environ | lab.environment(),
    )
    return dict(json.loads(done.stdout))


def requests(lab: Lab) -> int:
    """Return how many requests for files the lab has had."""
    return int(sum(lab.stats()["http_requests"].values()))


def curl(lab: Lab, ranges: list[str], *words: str) -> float:
    """Ask for ranges of a file as curl does, which nobody here wrote; return its seconds."""
    url = f"https://{lab.address}/folder/off/off-flat.vmdk?dcPath=DC&dsName=datastore1"
    with borrow(lab.connection()) as session:
        cookie = session.cookie.partition(";")[0].strip()
        each = ["-sf", "--no-progress-meter", "--cacert", str(lab.ca_file), "-b", cookie, "-o", "/dev/null", url]
        argv = ["curl", *words]
        for part in ranges:
            argv += [*(["--next"] if part != ranges[0] else []), "-r", part, *each]
        started = time.monotonic()
        subprocess.run(argv, check=True, stderr=subprocess.DEVNULL)
        return time.monotonic() - started


def bytes_per_s(lab: Lab) -> float:
    """Return what curl gets over as many connections as we have, in a large request each."""
    share = BANDWIDTH_BYTES // CONNECTIONS
    ranges = [f"{start}-{start + share - 1}" for start in range(0, BANDWIDTH_BYTES, share)]
    return BANDWIDTH_BYTES / min(curl(lab, ranges, "-Z") for _ in range(3))


def seconds_a_request(lab: Lab) -> float:
    """Return how long curl waits for a sector, over a connection that is there."""
    one, many = ["0-511"], [f"{512 * n}-{512 * n + 511}" for n in range(LATENCY_REQUESTS + 1)]
    return (curl(lab, many) - curl(lab, one)) / LATENCY_REQUESTS


def judged(
    case: str, took: dict[str, Any], changed: int, asked: int, latency_s: float, bandwidth: float, whole_s: float
) -> list[Row]:
    """Print what a sync took beside what it could at best, and beside a full copy; return its rows."""
    best_s = took["extents"] * latency_s / CONNECTIONS + took["fetched"] / bandwidth
    print(
        f"{case}: {took['extents']:.0f} extents ({asked} requests) of {latency_s * 1000:.2f} ms "
        f"over {CONNECTIONS} connections, "
        f"{took['fetched'] / MIB:.0f} MiB at {bandwidth / MIB:.0f} MiB/s: at best {best_s:.1f} s; "
        f"all {DISK_BYTES // GIB} GiB took {whole_s:.0f} s\n  {told(took)}",
        flush=True,
    )
    return [
        row(case, "fetched : changed", "MiB", took["fetched"] / MIB, changed / MIB, FETCHED_GOAL, at_least=False),
        row(
            case,
            "read here : changed",
            "MiB",
            (took["read_here"] + took["read_back"]) / MIB,
            changed / MIB,
            READ_GOAL,
            at_least=False,
        ),
        row(case, "time : at best", "s", took["fetching_s"], best_s, TIME_GOAL, at_least=False),
        row(case, "all of it : a full copy", "s", took["seconds"], whole_s, 1.0, at_least=False),
    ]


def told(took: dict[str, Any]) -> str:
    """Return the figures of a sync in a line."""
    parts = [f"{name} {value / MIB:.0f} MiB" for name, value in took.items() if isinstance(value, int)]
    return ", ".join([*(f"{name} {took[name]:.1f}" for name in took if isinstance(took[name], float)), *parts])


if __name__ == "__main__":
    main()
