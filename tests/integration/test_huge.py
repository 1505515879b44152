"""Disks of 3 TiB, nearly all hole, through VDDK: what they cost goes with what is allocated, not with their size."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from tests.labs import ROOT, VDDK, running_lab
from tests.runs import assert_nothing_left, command

pytestmark = [pytest.mark.live, pytest.mark.soak]

MIB, TIB = 1024**2, 1024**4
DISKS, SIZE, DATA = 8, 3 * TIB, 8 * MIB
# The lab strews the data over the disk: some 4000 chunks of 256 KiB that VDDK calls allocated, 1 GiB of 3 TiB.
MOST_ALLOCATED_BYTES = SIZE // 2000
MOST_RSS_BYTES = 350 * MIB  # Prefect takes 200 of them
SIDECAR_BYTES = 48 * MIB  # of 384 MiB of records: a block of the file system for each chunk


def test_eight_disks_of_3_tib_cost_what_is_allocated(api, tmp_path):
    vm = {"name": "huge", "disks": [{"size": SIZE, "data": DATA}] * DISKS}
    site = {"datacenters": [{"name": "DC", "clusters": [{"name": "c", "hosts": ["esx1"]}], "vms": [vm]}]}
    with running_lab(scenario=site) as lab:
        lab.post("/stats/reset")
        words = ["--vs-vm-name", "huge", "--all-disks", "--vddk-libdir", str(VDDK), "--output-dir", str(tmp_path)]
        env = os.environ | lab.environment() | api
        started = time.monotonic()
        argv = command(lab, "vddk-export", *words, "--json")
        with (tmp_path / "result").open("w") as result:
            run = subprocess.Popen(argv, cwd=ROOT, env=env, stdout=result)
            _, status, usage = os.wait4(run.pid, 0)
        run.returncode = os.waitstatus_to_exitcode(status)
        print(f"8 disks of 3 TiB: {time.monotonic() - started:.0f} s, {usage.ru_maxrss // 1024} MiB RSS")
        assert run.returncode == 0
        assert lab.stats()["bytes_served"] <= DISKS * MOST_ALLOCATED_BYTES
        assert_nothing_left(lab)
        manifest = json.loads((tmp_path / "result").read_text())
        assert len(manifest["disks"]) == DISKS
        for disk in manifest["disks"]:
            image = tmp_path / "huge" / disk["path"]
            assert image.stat().st_size == disk["virtual_size"] == SIZE
            assert taken(image) <= disk["bytes_transferred"] <= MOST_ALLOCATED_BYTES
            assert taken(image.with_suffix(".digests")) <= SIDECAR_BYTES
            assert_what_is_allocated_is_equal(lab, manifest, disk, image)
    assert usage.ru_maxrss * 1024 <= MOST_RSS_BYTES


def assert_what_is_allocated_is_equal(lab, manifest, disk, image: Path) -> None:
    """Compare the first MiB of data, and the last of the disk, with the lab's: all of it would take hours."""
    vm, snapshot = manifest["vm"]["moref"], manifest["snapshot"]["moref"]
    with image.open("rb") as file:
        first = os.lseek(file.fileno(), 0, os.SEEK_DATA) // MIB * MIB
        for offset in (first, SIZE - MIB):
            file.seek(offset)
            here = hashlib.sha256(file.read(MIB)).hexdigest()
            query = {"vm": vm, "disk": disk["index"], "snapshot": snapshot, "offset": offset, "length": MIB}
            assert lab.get("/sha256", **query)["sha256"] == here


def taken(path: Path) -> int:
    return path.stat().st_blocks * 512
