"""Running exports in tests, as a flow in this process or as the command line, and judging what they leave."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from blocks import VCenter, VddkToolkit
from flows.download_only import download_only
from flows.export import export_vm
from flows.vddk_download import vddk_download as vddk_flow
from tasks.models import DownloadJob, DownloadManifest, ExportJob, Manifest, VddkJob
from tests.labs import ROOT, VDDK, Lab


def vcenter_of(lab: Lab, **changes: Any) -> VCenter:
    """Return the lab as an unsaved block."""
    fields = {
        "host": lab.host,
        "port": lab.port,
        "username": lab.username,
        "password": SecretStr(lab.password),
        "ca_bundle": lab.ca_pem,
    }
    return VCenter(**(fields | changes))


async def export(lab: Lab, output_dir: Path, vm_name: str, *, vcenter: dict[str, Any] | None = None, **options: Any):
    """Run the export flow in this process; return its manifest, raise what it raises."""
    job = ExportJob(vm_name=vm_name, output_dir=output_dir, **options)
    manifest: Manifest = await export_vm(vcenter=vcenter_of(lab, **(vcenter or {})), options=job)
    return manifest


async def vddk_download(lab: Lab, output_dir: Path, vm_name: str, *, libdir: Path = VDDK, **options: Any) -> Manifest:
    """Run the flow of VDDK in this process, with the stand-in for it; return its manifest, raise what it raises."""
    job = VddkJob(vm_name=vm_name, output_dir=output_dir, **options)
    toolkit = VddkToolkit(libdir=str(libdir))
    manifest: Manifest = await vddk_flow(vcenter=vcenter_of(lab), toolkit=toolkit, options=job)
    return manifest


def command(lab: Lab, action: str, *words: str) -> list[str]:
    """Return the command line of an action on the lab; password and CA come from the environment."""
    where = ["--vcenter", lab.address, "--username", lab.username, "--vs-action", action]
    return [sys.executable, "-m", "hyper2kvm", "vsphere", *where, *words]


def run_command(lab: Lab, action: str, *words: str, env: dict[str, str] | None = None, timeout_s: float = 120):
    """Run the command line to its end; return the finished process with its output as text."""
    environment = os.environ | lab.environment() | (env or {})
    return subprocess.run(
        command(lab, action, *words), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout_s
    )


def kill_after(lab: Lab, argv: list[str], api: dict[str, str], served: int) -> bool:
    """Start a command, kill it once the lab has served so many bytes; tell whether it lived so long."""
    process = subprocess.Popen(
        argv,
        cwd=ROOT,
        env=os.environ | lab.environment() | api,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while lab.stats()["bytes_served"] < served and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    lived = process.poll() is None
    process.kill()
    process.wait()
    lab.post("/faults", expire_sessions=True)  # the dead process's own, which is the server's to time out
    return lived


def chance_of_this_run() -> int:
    """Return the seed of a test by chance: HYPER2KVM_SEED, else a new one; printed, so that it can be run again."""
    seed = int(os.environ.get("HYPER2KVM_SEED", random.randrange(1 << 32)))
    print(f"HYPER2KVM_SEED={seed}")
    return seed


def kill_at_random(
    lab: Lab, argv: list[str], api: dict[str, str], chance: random.Random, *, size: int, kills: int
) -> None:
    """Kill a command that moves `size` bytes `kills` times, each later on; the lab's counts begin anew."""
    lab.post("/stats/reset")
    with faults(lab, throttle_bytes_per_s=24 << 20):
        for number in range(kills):
            kill_after(lab, argv, api, chance.randrange(1 << 20, size // 2) + number * size // 4)


def raw_sha256(image: Path, scratch: Path) -> str:
    """Return the SHA-256 of an image's guest-visible content, as qemu-img reads it."""
    raw = scratch / f"{image.name}.compare"
    subprocess.run(["qemu-img", "convert", "-O", "raw", str(image), str(raw)], check=True)
    with raw.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    raw.unlink()
    return digest


def assert_equal_to_the_guests_disks(lab: Lab, manifest: Manifest, folder: Path, scratch: Path) -> None:
    """Compare every image with what the guest saw at the snapshot, and ask qemu-img whether it is sound."""
    assert manifest.snapshot
    for image in manifest.disks:
        path = folder / image.path
        subprocess.run(["qemu-img", "check", "-q", "-f", image.format, str(path)], check=image.format == "qcow2")
        assert raw_sha256(path, scratch) == lab.sha256(manifest.vm.moref, image.index, manifest.snapshot.moref)


def assert_nothing_left(lab: Lab, children_before: set[int] | None = None) -> None:
    """Nothing of ours held on the lab (`held`), no child process and no thread of a transfer here."""
    assert not any(held(lab).values()), held(lab)
    busy = [thread.name for thread in threading.enumerate() if thread.name.startswith(("fetch", "_verify", "vcenter"))]
    assert not [name for name in busy if name.startswith(("fetch", "_verify"))], busy
    if children_before is not None:
        assert children() <= children_before


def held(lab: Lab) -> dict[str, int]:
    """Return how many things that a run must give back are held on the lab."""
    stats = lab.stats()
    return {each: stats[each] for each in ("open_snapshots", "live_sessions", "vddk_prepared", "leases_open")}


def children() -> set[int]:
    """Return the process ids of this process's children."""
    found: set[int] = set()
    for thread in Path(f"/proc/{os.getpid()}/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            found.update(int(pid) for pid in (thread / "children").read_text().split())
    return found


@contextmanager
def faults(lab: Lab, **body: Any) -> Iterator[None]:
    """Have the lab misbehave for the block."""
    lab.post("/faults", **body)
    try:
        yield
    finally:
        lab.post("/faults", clear=True)


async def download(lab: Lab, output_dir: Path, vm_name: str, **options: Any) -> DownloadManifest:
    """Run the download flow in this process; return its manifest, raise what it raises."""
    job = DownloadJob(vm_name=vm_name, output_dir=output_dir, **options)
    manifest: DownloadManifest = await download_only(vcenter=vcenter_of(lab), options=job)
    return manifest
