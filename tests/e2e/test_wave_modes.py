"""A wave under workers with a VM of each mode and road: what it says of them reaches their runs, by saved blocks."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.wave_fleet import Fleet, assert_equal_to_the_source
from tests.labs import VDDK, running_lab
from tests.sshd import esxi_host
from tests.waves import fleet, nfc_port

pytestmark = pytest.mark.e2e

COPIES: dict[str, dict[str, Any]] = {
    "app-01": {"transport": "vddk", "format": "raw"},
    "app-02": {"transport": "ssh", "format": "raw"},
    "app-03": {"transport": "nbd", "format": "raw"},
    "app-04": {"transport": "folder", "format": "raw"},
    "app-06": {"mode": "vddk_download"},
    "app-07": {"mode": "cbt_sync", "enable_cbt": True, "transport": "vddk"},
    "app-08": {
        "mode": "warm_migration",
        "transport": "nbd",
        "enable_cbt": True,
        "pause": "PT1S",
        "downtime_budget": "PT10M",
    },
}
FILES: dict[str, dict[str, Any]] = {"app-09": {"mode": "download_only", "snapshot": True}}
ROADS = {
    "app-01": "vddk",
    "app-02": "ssh",
    "app-03": "nbd",
    "app-04": "folder",
    "app-06": "vddk",
    "app-07": "vddk",
    "app-08": "nbd",
}


@pytest.fixture
def site(wave_fleet: Fleet, tmp_path: Path) -> Iterator[Fleet]:
    """The product with a lab whose one host can be reached by VDDK, by SSH, and by a command that serves NBD."""
    state = tmp_path / "datastores"
    scenario = fleet(vms=10, hosts=["localhost"])
    with (
        nfc_port(),
        esxi_host(tmp_path / "sshd", state) as esxi,
        running_lab("-state", str(state), scenario=scenario) as lab,
    ):
        it = Fleet(wave_fleet.product, lab, state, name="modes")
        it.save("NbdSource", "wave", command=nbd_command(state))
        it.save("VddkToolkit", "wave", libdir=str(VDDK))
        settings = esxi.settings()
        known = {each: getattr(settings, each) for each in ("host", "port", "user", "host_key")}
        it.save("ESXiHost", "wave", **known, key=(esxi.folder / "user").read_text())
        yield it


def nbd_command(state: Path) -> str:
    """Return a command that serves a datastore path of the lab's, `[ds] dir/x.vmdk`, by qemu-nbd."""
    file = 'p="${2#[}"; p="${p%%]*}/${p#*] }"'
    script = f'{file}; exec qemu-nbd -f vmdk --read-only -e 4 --persistent -k "$1" "{state}/$p"'
    return shlex.join(["sh", "-c", script, "sh", "{socket}", "{path}"])


def test_every_mode_and_road_runs_in_one_wave(site: Fleet, tmp_path: Path) -> None:
    out = tmp_path / "exports"
    wave = site.start(
        name="modes",
        output_dir=str(out),
        select=[*COPIES, *FILES],
        options={"toolkit": "wave", "nbd_source": "wave", "esxi_block": "wave"},
        overrides=COPIES | FILES,
        limits={"runs": 5},
    )
    ended = site.await_end(wave, "Completed", "Failed")
    assert ended["state_name"] == "Completed", f"{ended['state']['message']}\n{why_failed(site, wave)}"
    assert site.outcomes(wave) == {vm: ["COMPLETED"] for vm in (*COPIES, *FILES)}
    for vm in COPIES:
        (image,) = (path for path in (out / vm).glob("disk-0.*") if path.suffix in (".raw", ".qcow2"))
        assert_equal_to_the_source(site, vm, image)
    for vm, road in ROADS.items():
        assert site.manifest(out, vm)["disks"][0]["road"] == road, vm
    (files,) = FILES
    assert (out / files / f"{files}.vmx").exists() and site.manifest(out, files)["files"]
    assert site.lab.stats()["open_snapshots"] == 0


def why_failed(fleet: Fleet, wave: str) -> str:
    return "\n".join(f"{run['name']}: {run['state']['message']}" for run in fleet.children(wave))


def test_an_option_that_runs_on_workers_would_not_hear_of_is_refused(wave_fleet: Fleet, tmp_path: Path) -> None:
    wave = wave_fleet.start(
        name="deaf", output_dir=str(tmp_path), select=["app-01"], options={"nbd_uri": "nbd://127.0.0.1/disk"}
    )
    message = wave_fleet.await_end(wave, "Failed")["state"]["message"]
    assert "nbd_uri" in message and "nbd_source" in message and wave_fleet.children(wave) == []
