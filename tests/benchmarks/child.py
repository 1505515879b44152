"""What a contender written in Python says of itself: from its start to the last durable byte, imports left out."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path


def measured(work: Callable[[], object]) -> None:
    """Do the work and print a `Run` as JSON."""
    idle, cpu_s, written, started = peak_rss_bytes(), cpu_seconds(), written_bytes(), time.monotonic()
    work()
    run = {"seconds": time.monotonic() - started, "cpu_s": cpu_seconds() - cpu_s}
    run |= {"peak_rss_bytes": peak_rss_bytes(), "idle_rss_bytes": idle, "written_bytes": written_bytes() - written}
    json.dump(run, sys.stdout)


def cpu_seconds() -> float:
    """Return user and system time of this process and the children it has waited for."""
    return sum(os.times()[:4])


def written_bytes() -> int:
    """Return what this process and the children it has waited for had the disks write: proc(5), io."""
    return int(Path("/proc/self/io").read_text().partition("\nwrite_bytes:")[2].split()[0])


def peak_rss_bytes() -> int:
    """Return VmHWM; ru_maxrss would begin with that of the process which started this one."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024
