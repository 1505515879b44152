"""What a contender written in Python says of itself: from its start to the last durable byte, imports left out."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path


def measured(work: Callable[[], object]) -> None:
    """Do the work and print a `Run` as JSON."""
    idle, cpu_s, started = peak_rss_bytes(), time.process_time(), time.monotonic()
    work()
    seconds = time.monotonic() - started
    run = {"seconds": seconds, "cpu_s": time.process_time() - cpu_s}
    json.dump(run | {"peak_rss_bytes": peak_rss_bytes(), "idle_rss_bytes": idle}, sys.stdout)


def peak_rss_bytes() -> int:
    """Return VmHWM; ru_maxrss would begin with that of the process which started this one."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024
