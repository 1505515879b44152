"""`make bench`: one flat file over HTTPS `/folder`, by us and by peers, interleaved on the same data; prints ratios.

Ours also hashes every leaf and leaves holes sparse; the peers do neither. Lab and client share the machine, so the
figures are good for ratios only.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from pydantic import SecretStr

from tasks.images.copy import copy
from tasks.images.digests import Digests
from tasks.images.extents import whole_disk
from tasks.images.raw import RawWriter
from tasks.models import Connection, Trust
from tasks.transports.folder import FolderDisk, FolderReader
from tasks.vsphere.session import borrow
from tests.labs import Lab, running_lab

ROUNDS = 5
MIB = 1024 * 1024
SIZE = 1024 * MIB
SITE = {
    "datacenters": [
        {
            "name": "DC",
            "clusters": [{"name": "c", "hosts": ["esx1"]}],
            "vms": [{"name": "off", "power": "off", "disks": [{"size": SIZE, "data": SIZE}]}],
        }
    ]
}


def main() -> None:
    """Run every contender once unmeasured, then `ROUNDS` times in turn; print medians and ratios to ours."""
    with running_lab(scenario=SITE) as lab, tempfile.TemporaryDirectory() as scratch:
        contenders: dict[str, Callable[[Path], None]] = {
            "ours": lambda target: ours(lab, target),
            "govc datastore.download": lambda target: govc(lab, target),
            "curl": lambda target: curl(lab, target),
        }
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        for number in range(ROUNDS + 1):
            for name, fetch in contenders.items():
                taken = timed(fetch, Path(scratch) / "disk.raw")
                if number:
                    seconds[name].append(taken)
        report(seconds)


def timed(fetch: Callable[[Path], None], target: Path) -> float:
    started = time.monotonic()
    fetch(target)
    taken = time.monotonic() - started
    assert target.stat().st_size == SIZE
    target.unlink()
    return taken


def report(seconds: dict[str, list[float]]) -> None:
    print(f"one flat file of {SIZE // MIB} MiB, all data, {ROUNDS} rounds interleaved, {os.cpu_count()} cores")
    for name, taken in seconds.items():
        ratio = statistics.median(mine / theirs for mine, theirs in zip(seconds["ours"], taken, strict=True))
        median = statistics.median(taken)
        print(f"{name:26} {median:6.2f} s  {SIZE / MIB / median:6.0f} MiB/s  ours/{name}: {ratio:.2f}")


def ours(lab: Lab, target: Path) -> None:
    with borrow(connection_to(lab)) as session:
        disk = FolderDisk(
            connection=session.connection,
            datacenter_path="/DC",
            datastore_path="[datastore1] off/off.vmdk",
            capacity_bytes=SIZE,
        )
        with (
            FolderReader(disk, cookie=lambda: session.cookie, renew=session.renew) as reader,
            RawWriter.create(target, size=SIZE) as writer,
            Digests.create(target.with_suffix(".digests"), size=SIZE) as digests,
        ):
            copy(reader, whole_disk(SIZE), writer, digests=digests)


def govc(lab: Lab, target: Path) -> None:
    lab.govc("datastore.download", "-dc", "/DC", "-ds", "datastore1", "off/off-flat.vmdk", str(target))
    os.sync()


def curl(lab: Lab, target: Path) -> None:
    with borrow(connection_to(lab)) as session:
        url = f"https://{lab.address}/folder/off/off-flat.vmdk?dcPath=DC&dsName=datastore1"
        argv = ["curl", "-sf", "--cacert", str(lab.ca_file), "-b", session.cookie, "-o", str(target), url]
        subprocess.run(argv, check=True)
    os.sync()


def connection_to(lab: Lab) -> Connection:
    return Connection(
        host=lab.host,
        port=lab.port,
        username=lab.username,
        password=SecretStr(lab.password),
        trust=Trust(ca_pem=lab.ca_pem),
    )


if __name__ == "__main__":
    main()
