"""Running contenders in turn, each a process of its own, and telling how they compare."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.labs import ROOT

ROUNDS = 5
MIB = 1024 * 1024
GIB = 1024 * MIB
DISK_BYTES = int(os.environ.get("HYPER2KVM_BENCH_MIB", "4096")) * MIB
Contender = Callable[[Path], "Run"]


@dataclass(frozen=True)
class Run:
    """One download: seconds until durable, CPU-seconds (user and system), peak RSS, and that before the first byte."""

    seconds: float
    cpu_s: float
    written_bytes: int = 0
    peak_rss_bytes: int = 0  # not told of a command: its ru_maxrss begins with ours
    idle_rss_bytes: int = 0


@dataclass(frozen=True)
class Row:
    """How ours and one peer compare. `goal` is of the ratio, theirs/ours where less is better, or of `ours` itself."""

    case: str
    peer: str
    unit: str
    ours: float
    theirs: float
    ratio: float
    goal: float
    met: bool


def program(module: str, *words: str) -> Run:
    """Run one of our programs, which takes its own measure without the interpreter's start; see `child`."""
    done = subprocess.run(
        [sys.executable, "-m", module, *words], stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT
    )
    return Run(**json.loads(done.stdout))


def command(argv: list[str], target: Path, *, env: Mapping[str, str] | None = None) -> Run:
    """Run a command and make durable what it left under `target`; raise where it failed."""
    started = time.monotonic()
    process = subprocess.Popen(argv, env=env, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, argv)
    own = time.process_time()
    make_durable(target)
    seconds = time.monotonic() - started
    cpu_s = usage.ru_utime + usage.ru_stime + time.process_time() - own
    return Run(seconds, cpu_s)


def make_durable(target: Path) -> None:
    """Flush every file of a folder."""
    for path in target.iterdir():
        fd = os.open(path, os.O_RDONLY)
        os.fdatasync(fd)
        os.close(fd)


def interleaved(contenders: dict[str, Contender], scratch: Path, *, size: int | None = None) -> dict[str, list[Run]]:
    """Run each once unmeasured, then `ROUNDS` times in turn, each into an empty folder that then holds `size` bytes."""
    runs: dict[str, list[Run]] = {name: [] for name in contenders}
    for number in range(ROUNDS + 1):
        for name, fetch in contenders.items():
            target = scratch / "target"
            target.mkdir()
            run = fetch(target)
            left = sum(path.stat().st_size for path in target.iterdir() if path.suffix != ".digests")
            assert size in (None, left), f"{name} left {left} bytes of {size}"
            shutil.rmtree(target)
            if number:
                runs[name].append(run)
    return runs


def compare(case: str, runs: dict[str, list[Run]], *, size: int, goals: dict[str, float]) -> list[Row]:
    """Return a row of speed for each peer; `goals` are times its speed."""
    speed = {name: size / MIB / statistics.median(run.seconds for run in taken) for name, taken in runs.items()}
    return [
        row(case, peer, "MiB/s", speed["ours"], speed[peer], goals[peer], at_least=True)
        for peer in runs
        if peer != "ours"
    ]


def row(case: str, peer: str, unit: str, ours: float, theirs: float, goal: float, *, at_least: bool) -> Row:
    ratio = ours / theirs
    return Row(case, peer, unit, ours, theirs, ratio, goal, ratio >= goal if at_least else ratio <= goal)


def cpu_s_per_gib(runs: list[Run], size: int) -> float:
    return statistics.median(run.cpu_s for run in runs) * GIB / size


def show(runs: dict[str, list[Run]], case: str, size: int) -> None:
    """Print what each contender took."""
    print(f"\n{case}: {size // MIB} MiB, {ROUNDS} rounds interleaved, {os.cpu_count()} cores, until durable")
    for name, taken in runs.items():
        seconds = sorted(run.seconds for run in taken)
        middle, rss = statistics.median(seconds), max(run.peak_rss_bytes for run in taken) / MIB
        print(
            f"  {name:26} median {middle:6.2f} s ({seconds[0]:.2f}-{seconds[-1]:.2f}) {size / MIB / middle:6.0f} MiB/s"
            f"  {cpu_s_per_gib(taken, size):5.2f} CPU-s/GiB  {f'{rss:5.0f}' if rss else '    -'} MiB RSS"
        )


def write(name: str, rows: list[Row]) -> None:
    """Print the rows, and leave them in build/bench/<name>.json."""
    print()
    for each in rows:
        verdict = "met" if each.met else "MISSED"
        print(
            f"  {each.case:22} {each.peer:26} {each.ours:8.2f} {each.theirs:8.2f} {each.unit:10}"
            f" ratio {each.ratio:5.2f} goal {each.goal:.2f} {verdict}"
        )
    folder = ROOT / "build" / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps([asdict(each) for each in rows], indent=2) + "\n")
