"""Downloads over HTTPS: ours against curl, curl -Z, govc and an aiohttp loop, from nginx and from the lab.

Ours also hashes every leaf and leaves holes sparse; the peers do neither. Server and client share the machine, so the
figures are good for ratios only. `HYPER2KVM_BENCH_MIB` makes the big file smaller, for a try.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
from importlib.util import find_spec
from pathlib import Path

from tasks.vsphere.session import borrow
from tests.benchmarks import nginx
from tests.benchmarks.measure import (
    DISK_BYTES,
    MIB,
    Contender,
    Row,
    Run,
    command,
    compare,
    cpu_s_per_gib,
    interleaved,
    program,
    row,
    show,
    write,
)
from tests.labs import GOVC, ROOT, Lab, running_lab

FILES, FILE_BYTES = 200, 8 * MIB
RSS_GOAL_MIB = 120.0
GOALS = {"curl": 1.0, "curl -Z": 1.0, "aiohttp loop": 1.5, "govc datastore.download": 1.0}


def main() -> None:
    """Run the cases that the machine has the peers for; print and leave the rows."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=ROOT / "build") as scratch:
        if shutil.which("nginx"):
            rows += from_nginx(Path(scratch))
        else:
            print("nginx is not there: its cases are left out")
        rows += from_lab(Path(scratch))
    write("download", rows)


def from_nginx(scratch: Path) -> list[Row]:
    root, folder = scratch / "root", scratch / "nginx"
    (root / "folder").mkdir(parents=True)
    folder.mkdir()
    random_file(root / "folder" / "big-flat.vmdk", DISK_BYTES)
    names = [f"f{number:03}" for number in range(FILES)]
    for name in names:
        random_file(root / "folder" / f"{name}-flat.vmdk", FILE_BYTES)
    with nginx.serving(root, folder) as (address, ca_file):
        big = case("nginx, one file", server(address, ca_file, ["big"], DISK_BYTES), scratch, DISK_BYTES)
        return big + case("nginx, 200 files", server(address, ca_file, names, FILE_BYTES), scratch, FILES * FILE_BYTES)


def from_lab(scratch: Path) -> list[Row]:
    vm = {"name": "off", "power": "off", "disks": [{"size": DISK_BYTES, "data": DISK_BYTES}]}
    site = {"datacenters": [{"name": "DC", "clusters": [{"name": "c", "hosts": ["esx1"]}], "vms": [vm]}]}
    with running_lab(scenario=site) as lab, borrow(lab.connection()) as session:
        cookie = session.cookie.partition(";")[0].strip()
        contenders = server(lab.address, lab.ca_file, ["off/off"], DISK_BYTES, cookie=cookie)
        contenders["govc datastore.download"] = lambda target: govc(lab, target)
        contenders.pop("aiohttp loop", None)  # it has no say in cookies that are quoted
        return case("lab, one file", contenders, scratch, DISK_BYTES)


def server(address: str, ca_file: Path, names: list[str], size: int, *, cookie: str = "c=1") -> dict[str, Contender]:
    """Return who downloads `names` (of `size` bytes each) from a server."""
    urls = [f"https://{address}/folder/{name}-flat.vmdk?dcPath=DC&dsName=datastore1" for name in names]

    def ours(target: Path) -> Run:
        return program("tests.benchmarks.ours", address, str(ca_file), cookie, str(target), str(size), *names)

    def curl(target: Path) -> Run:
        several = ["-Z", "--parallel-max", "4"] if len(urls) > 1 else []
        outputs = [word for number, url in enumerate(urls) for word in ("-o", str(target / f"{number}.raw"), url)]
        return command(
            ["curl", "-sf", "--no-progress-meter", *several, "--cacert", str(ca_file), "-b", cookie, *outputs], target
        )

    contenders: dict[str, Contender] = {"ours": ours, "curl -Z" if len(urls) > 1 else "curl": curl}
    if find_spec("aiohttp") and find_spec("aiofiles"):
        loop = "tests.benchmarks.aiohttp_loop"
        contenders["aiohttp loop"] = lambda target: program(loop, str(ca_file), str(target), *urls)
    else:
        print("aiohttp and aiofiles are not there: that peer is left out")
    return contenders


def case(name: str, contenders: dict[str, Contender], scratch: Path, size: int) -> list[Row]:
    runs = interleaved(contenders, scratch, size=size)
    show(runs, name, size)
    rows = compare(name, runs, size=size, goals=GOALS)
    ours = cpu_s_per_gib(runs["ours"], size)
    for peer in runs.keys() & {"curl", "curl -Z"}:
        theirs = cpu_s_per_gib(runs[peer], size)
        rows.append(row(name, f"{peer}, CPU", "CPU-s/GiB", ours, theirs, 1.25, at_least=False))
    above = statistics.median(run.peak_rss_bytes - run.idle_rss_bytes for run in runs["ours"]) / MIB
    rows.append(row(name, "memory above idle", "MiB", above, RSS_GOAL_MIB, 1.0, at_least=False))
    return rows


def govc(lab: Lab, target: Path) -> Run:
    words = ["datastore.download", "-dc", "/DC", "-ds", "datastore1", "off/off-flat.vmdk", str(target / "off.raw")]
    return command([str(GOVC), *words], target, env=lab.govc_environment())


def random_file(path: Path, size: int) -> None:
    """Fill a file with what no peer can skip: 64 MiB of noise, again and again; durably, or it would be written while
    the contenders write."""
    noise = os.urandom(min(size, 64 * MIB))
    with path.open("wb") as file:
        for at in range(0, size, len(noise)):
            file.write(noise[: size - at])
        file.flush()
        os.fsync(file.fileno())
