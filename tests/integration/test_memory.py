"""Memory does not grow with the size of the disk: a real run of the command line, measured by the kernel."""

from __future__ import annotations

import os
import subprocess

import pytest

from tests.labs import ROOT, running_lab
from tests.runs import command

pytestmark = [pytest.mark.live]

SMALL, LARGE = "256MiB", "4GiB"


def test_peak_memory_is_the_same_for_256_mib_and_4_gib(api, tmp_path):
    machines = [{"name": size, "disks": [{"size": size, "data": "64MiB"}]} for size in (SMALL, LARGE)]
    site = {"datacenters": [{"name": "DC", "clusters": [{"name": "c", "hosts": ["esx1"]}], "vms": machines}]}
    with running_lab(scenario=site) as lab:
        env = os.environ | lab.environment() | api
        peaks = {size: peak_kib(lab, size, tmp_path, env) for size in (SMALL, LARGE)}
    assert peaks[LARGE] <= 1.10 * peaks[SMALL], peaks


def peak_kib(lab, vm_name, output_dir, env) -> int:
    """Return the peak resident size, in KiB, of an export's own process."""
    process = subprocess.Popen(
        command(lab, "export-vm", "--vs-vm-name", vm_name, "--output-dir", str(output_dir)),
        cwd=ROOT,
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_maxrss
