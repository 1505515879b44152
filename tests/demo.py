"""`make demo`: a lab vCenter, a running two-disk VM whose guest keeps writing, exported by the command line, judged.

Says what it does, seconds and bytes; exit status 0 only where everything it checks holds.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.labs import Lab, running_lab  # noqa: E402

OUTPUT = ROOT / "exports" / "demo"
VM = "production-web"


def main() -> int:
    shutil.rmtree(OUTPUT, ignore_errors=True)
    with running_lab("-disks", "2", "-disk-size", "256MiB", "-vm", VM, "-folder", "production") as lab:
        say(f"vCenter up at {lab.url}; VM {VM} runs, with {len(lab.vm(VM)['disks'])} disks; its guest keeps writing")
        for disk in range(2):
            lab.post("/guest-load", vm=lab.vm(VM)["moref"], disk=disk, bytes_per_s=1 << 20, seed=disk)
        started = time.monotonic()
        status = subprocess.run(
            command(lab), cwd=ROOT, env=os.environ | lab.environment() | {"DO_NOT_TRACK": "1"}
        ).returncode
        seconds = time.monotonic() - started
        if status:
            say(f"export failed with exit status {status}")
            return status
        return judge(lab, seconds)


def command(lab: Lab) -> list[str]:
    """The command an operator would type; password and CA come from the environment."""
    words = f"-m hyper2kvm vsphere --vcenter {lab.address} --username {lab.username} --vs-action export-vm"
    return [sys.executable, *words.split(), "--vs-vm-name", VM, "--output-dir", str(OUTPUT)]


def judge(lab: Lab, seconds: float) -> int:
    """Compare the images with what the lab says the guest saw at the snapshot, and look for what was left behind."""
    folder = OUTPUT / VM
    manifest = json.loads((folder / "manifest.json").read_text())
    moref, stats, bad = manifest["vm"]["moref"], lab.stats(), 0
    for image in manifest["disks"]:
        path = folder / image["path"]
        clean = subprocess.run(["qemu-img", "check", "-q", str(path)]).returncode == 0
        equal = raw_sha256(path) == lab.sha256(moref, image["index"], manifest["snapshot"]["moref"])
        bad += not (clean and equal)
        say(f"{image['path']}: {'equal to' if equal else 'DIFFERENT FROM'} the guest's disk at the snapshot; "
            f"qemu-img check {'clean' if clean else 'FAILED'}")  # fmt: skip
    bad += stats["open_snapshots"]
    say(
        f"snapshots left: {stats['open_snapshots']}, sessions left: {stats['live_sessions']}, logins: {stats['logins']}"
    )
    size = sum(image["virtual_size"] for image in manifest["disks"])
    say(f"{size:,} bytes of disk, {stats['bytes_served']:,} served by the vCenter, in {seconds:.1f} s; see {OUTPUT}")
    return 1 if bad else 0


def raw_sha256(path: Path) -> str:
    """Return the SHA-256 of an image's guest-visible content, as qemu-img reads it."""
    raw = path.with_suffix(".compare")
    subprocess.run(["qemu-img", "convert", "-O", "raw", str(path), str(raw)], check=True)
    with raw.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    raw.unlink()
    return digest


def say(text: str) -> None:
    print(f"demo: {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
