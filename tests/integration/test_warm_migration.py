"""`warm_migration` against a live lab: rounds while the guest writes, a cutover, and the source put back as it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from flows.cbt_sync import cbt_sync
from flows.rollback import rollback
from flows.warm_migration import warm_migration
from tasks import errors
from tasks.models import Migration, RollbackJob, SyncJob, WarmJob
from tests.labs import ROOT, Lab, running_lab
from tests.runs import assert_nothing_left, command, faults, raw_sha256, run_command, vcenter_of

pytestmark = [pytest.mark.anyio, pytest.mark.live, pytest.mark.usefixtures("prefect_api")]

MIB = 1024 * 1024
DISKS = [{"size": "16MiB", "data": "4MiB"}, {"size": "8MiB", "data": "1MiB"}]
TOUCHING = ("ShutdownGuest", "PowerOffVM_Task", "Rename_Task", "ReconfigVM_Task")


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    cards = ["vmxnet3", {"model": "e1000", "disconnected": True}]
    vms = [
        {"name": "busy", "cbt": True, "nics": cards, "disks": DISKS, "shutdown_s": 0.3},
        {"name": "toolless", "cbt": True, "tools": False, "disks": DISKS[:1]},
        {"name": "deaf", "cbt": True, "ignores_shutdown": True, "disks": DISKS[:1]},
    ]
    with running_lab(scenario={"datacenters": [{"name": "DC", "standalone_hosts": ["esx1"], "vms": vms}]}) as lab:
        yield lab


async def migrate(lab: Lab, folder: Path, vm: str = "busy", **options: Any) -> Migration:
    job = WarmJob(vm_name=vm, output_dir=folder, **{"pause": 0, "sample": 4, "expected_shutdown": 1} | options)
    result: Migration = await warm_migration(vcenter=vcenter_of(lab), options=job)
    return result


async def roll_back(lab: Lab, folder: Path) -> tuple[str, ...]:
    done: tuple[str, ...] = await rollback(vcenter=vcenter_of(lab), options=RollbackJob(folder=folder))
    return done


def seen(lab: Lab, vm: str = "busy") -> tuple[str, str, list[tuple[int, bool, bool]]]:
    """Return name, power state and network cards of a VM, as govc tells them."""
    entity = f"VirtualMachine:{lab.vm(vm)['moref']}"
    uuid = lab.govc("object.collect", "-s", entity, "config.uuid").strip()
    (found,) = json.loads(lab.govc("vm.info", "-json", "-vm.uuid", uuid))["virtualMachines"]
    cards = [each for each in found["config"]["hardware"]["device"] if "macAddress" in each]
    wires = sorted((c["key"], c["connectable"]["connected"], c["connectable"]["startConnected"]) for c in cards)
    return found["name"], found["runtime"]["powerState"], wires


def touched(lab: Lab) -> list[str]:
    return [name for name in TOUCHING if lab.stats()["soap_calls"].get(name)]


def assert_the_domain_starts_from_the_sources_disks(lab: Lab, made: Migration, scratch: Path) -> None:
    assert made.folder
    text = (made.folder / "domain.xml").read_text()
    for image in made.manifest.disks:
        assert str(made.folder / image.path) in text
        assert raw_sha256(made.folder / image.path, scratch) == lab.sha256(made.manifest.vm.moref, image.index)


async def test_the_copy_takes_over_and_a_rollback_puts_the_source_back(lab, tmp_path):
    before, moref, folder = seen(lab), lab.vm("busy")["moref"], tmp_path / "busy"
    lab.post("/guest-load", vm=moref, disk=0, bytes_per_s=1 << 20, burst_s=0.2, block=65536, seed=7)
    words = {"cutover": "auto", "shut_down_source": True, "rename_source": "-migrated", "disconnect_source": True}
    made = await migrate(lab, tmp_path, **words)
    assert seen(lab) == ("busy-migrated", "poweredOff", [(key, False, False) for key, _, _ in before[2]])
    assert_the_domain_starts_from_the_sources_disks(lab, made, tmp_path)
    assert len(made.rounds) >= 4 and made.forecast and made.forecast.verdict == "fits"
    assert made.downtime_s == pytest.approx(sum(made.parts.values()))
    assert made.how == "its guest shut down" and made.removal_s is not None
    assert ">busy<" in (made.folder / "domain.xml").read_text()
    assert_nothing_left(lab)

    assert len(await roll_back(lab, folder)) == 3
    assert seen(lab) == before
    assert [path.name for path in folder.glob("rolled-back-*/*.json")] == ["cutover.json"]
    with pytest.raises(errors.NotRolledBack, match=r"no rollback\.json"):
        await roll_back(lab, folder)

    lab.post("/stats/reset")
    again = await migrate(lab, tmp_path, cutover="auto", shut_down_source=True)
    lab.post("/guest-load", vm=moref, disk=0, stop=True)
    assert_the_domain_starts_from_the_sources_disks(lab, again, tmp_path)
    assert touched(lab) == ["ShutdownGuest"]
    assert seen(lab)[0] == "busy"
    with pytest.raises(errors.CopyUnfit, match="its domain may run"):
        await cbt_sync(vcenter=vcenter_of(lab), options=SyncJob(vm_name=moref, output_dir=tmp_path))
    assert len(await roll_back(lab, folder)) == 1
    assert seen(lab) == before


async def test_without_a_cutover_the_source_is_left_alone(lab, tmp_path):
    lab.post("/stats/reset")
    before = seen(lab)
    made = await migrate(lab, tmp_path, rename_source="-x", disconnect_source=True)
    assert (made.downtime_s, made.folder, made.forecast and made.forecast.verdict) == (None, None, "fits")
    assert (touched(lab), seen(lab)) == ([], before)
    assert not (tmp_path / "busy" / "rollback.json").exists()
    assert_nothing_left(lab)


async def test_what_vsphere_did_not_tell_is_caught_by_the_sample_and_the_next_run_reads_all(lab, tmp_path):
    await migrate(lab, tmp_path)
    lab.post("/stats/reset")
    lab.post("/guest-write", vm=lab.vm("busy")["moref"], disk=0, offset=MIB, length=MIB, seed=3)
    with faults(lab, cbt={"wrong": "silent"}), pytest.raises(errors.IntegrityMismatch, match="4 differ, the first 4"):
        await migrate(lab, tmp_path, cutover="auto", shut_down_source=True, sample=64)
    assert (touched(lab), seen(lab)[1]) == ([], "poweredOn")
    made = await migrate(lab, tmp_path)
    for image in made.manifest.disks:
        assert raw_sha256(tmp_path / "busy" / image.path, tmp_path) == lab.sha256(lab.vm("busy")["moref"], image.index)
    assert_nothing_left(lab)


async def test_what_cannot_shut_down_is_found_before_the_first_byte(lab, tmp_path):
    lab.post("/stats/reset")
    with pytest.raises(errors.GuestStaysOn, match=r"no VMware Tools.*--power-off-source"):
        await migrate(lab, tmp_path, "toolless", cutover="auto", shut_down_source=True)
    with pytest.raises(errors.InvalidInput, match="no deployment cutover-approval"):
        await migrate(lab, tmp_path, cutover="approval", shut_down_source=True)
    assert lab.stats()["bytes_served"] == 0
    assert touched(lab) == []


async def test_it_is_powered_off_hard_only_where_that_was_said(lab, tmp_path):
    words = {"cutover": "auto", "shut_down_source": True, "shutdown_timeout": 0.5}
    with pytest.raises(errors.GuestStaysOn, match=r"within 0.5 s.*--power-off-source") as caught:
        await migrate(lab, tmp_path, "deaf", **words)
    assert "rollback" in caught.value.__notes__[0]
    assert seen(lab, "deaf")[1] == "poweredOn"
    made = await migrate(lab, tmp_path, "deaf", power_off_source=True, convert_to="vdi", **words)
    assert seen(lab, "deaf")[1] == "poweredOff"
    assert made.how.startswith("powered off, its guest having had")
    assert [image.path for image in made.manifest.disks] == ["disk-0.vdi"]
    assert_the_domain_starts_from_the_sources_disks(lab, made, tmp_path)
    assert await roll_back(lab, tmp_path / "deaf") == ("powered on",)


async def test_what_will_not_converge_ends_before_the_source_is_touched(lab, tmp_path):
    lab.post("/stats/reset")
    with pytest.raises(errors.WillNotConverge, match=r"of busy will not come below 3 s.*without a byte fetched"):
        await migrate(lab, tmp_path, cutover="auto", shut_down_source=True, downtime_budget=3, expected_shutdown=9)
    assert (touched(lab), seen(lab)[1]) == ([], "poweredOn")
    assert lab.stats()["soap_calls"]["CreateSnapshot_Task"] == 3  # the whole copy's, and two rounds'
    assert_nothing_left(lab)


async def test_a_cutover_at_a_time_begins_then(lab, tmp_path):
    at = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=9)
    made = await migrate(lab, tmp_path, cutover="at", cutover_at=at.isoformat(), shut_down_source=True, pause=60)
    aside = json.loads((tmp_path / "busy" / "rollback.json").read_text())
    assert datetime.fromisoformat(aside["created"]) >= at
    assert datetime.fromisoformat(made.rounds[-1].taken) < at
    assert await roll_back(lab, tmp_path / "busy") == ("powered on",)


POINTS = {
    "asked to shut down, not seen off": "tasks.vsphere.power:shut_down:after",
    "off, cards disconnected, not renamed": "tasks.vsphere.power:rename:before",
    "put aside, its domain not yet there": "tasks.images.cutover:land:before",
}


def test_killed_there_the_next_run_goes_on_and_a_rollback_still_undoes_all(lab, tmp_path, api):
    before = seen(lab)
    words = ["--vs-vm-name", "busy", "--output-dir", str(tmp_path), "--cutover", "auto", "--shut-down-source"]
    words += ["--pause", "0", "--sample", "4", "--expected-shutdown", "1", "--disconnect-source"]
    words += ["--rename-source=-gone"]
    folder = tmp_path / "busy"
    for moment, point in POINTS.items():
        argv = [sys.executable, "-m", "tests.integration.dying", point, *command(lab, "warm-migrate", *words)[3:]]
        died = subprocess.run(
            argv, cwd=ROOT, env=os.environ | lab.environment() | api, capture_output=True, timeout=120
        )
        assert died.returncode == -9, (moment, died.stderr)
        lab.post("/faults", clear=True, expire_sessions=True)
    assert seen(lab)[:2] == ("busy-gone", "poweredOff")
    text = (folder / "cutover" / "domain.xml").read_text()
    assert ">busy<" in text and text.count('<link state="down"') == 1  # as they were, before any of that
    done = run_command(lab, "rollback", str(folder), env=api)
    assert done.returncode == 0, done.stderr
    assert "powered on" in done.stdout
    assert seen(lab) == before
    done = run_command(lab, "warm-migrate", *words, env=api)
    assert done.returncode == 0, done.stderr
    assert "downtime " in done.stdout and f"--vs-action rollback {folder}" in done.stdout
    made = Migration.model_validate_json((folder / "cutover" / "cutover.json").read_text())
    assert_the_domain_starts_from_the_sources_disks(lab, made, tmp_path)
    done = run_command(lab, "rollback", str(folder), "--json", env=api)
    assert len(json.loads(done.stdout)["done"]) == 3
    assert seen(lab) == before
    assert_nothing_left(lab)
