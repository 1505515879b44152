"""`make demo` does what the README promises."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
import uuid

import pytest

from tests.e2e.processes import marked_processes
from tests.labs import ROOT

pytestmark = pytest.mark.e2e

DEMO_TIMEOUT_S = 300


def test_demo_exports_a_running_vm_and_leaves_nothing_behind() -> None:
    mark = uuid.uuid4().hex
    done = subprocess.run(
        ["make", "--no-print-directory", "demo"],
        cwd=ROOT, env=os.environ | {"HYPER2KVM_DEMO": mark}, capture_output=True, text=True, timeout=DEMO_TIMEOUT_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for line in (
        r"VM production-web runs, with 2 disks; its guest keeps writing",
        r"disk-0\.qcow2: equal to the guest's disk at the snapshot; qemu-img check clean",
        r"disk-1\.qcow2: equal to the guest's disk at the snapshot; qemu-img check clean",
        r"snapshots left: 0, sessions left: 0, logins: 1",
        r"[\d,]+ bytes of disk, [\d,]+ served by the vCenter, in [\d.]+ s",
    ):
        assert re.search(rf"^demo: .*{line}", done.stdout, re.MULTILINE), f"no {line!r} in:\n{done.stdout}{done.stderr}"
    assert "Traceback" not in done.stdout + done.stderr
    check_output()
    check_processes(mark)


def check_output() -> None:
    folder = ROOT / "exports" / "demo" / "production-web"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["consistent"] and len(manifest["disks"]) == 2
    expected = {"domain.xml", "manifest.json", *(f"disk-{n}.{kind}" for n in range(2) for kind in ("qcow2", "digests"))}
    assert {path.name for path in folder.iterdir() if not path.name.startswith(".")} == expected


def check_processes(mark: str) -> None:
    """The temporary server ends with the demo, though not in the same instant."""
    deadline = time.monotonic() + 20
    while left := marked_processes(f"HYPER2KVM_DEMO={mark}"):
        assert time.monotonic() < deadline, f"processes left: {left}"
        time.sleep(0.2)
