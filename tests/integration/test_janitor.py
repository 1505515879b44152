"""The janitor against live labs: for each kind of thing that may lie there, what becomes of it, and of nothing else."""

from __future__ import annotations

import asyncio
import json
import os
import time
from datetime import UTC, datetime, timedelta

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType
from prefect.client.schemas.objects import StateType
from prefect.states import Cancelled, Crashed
from pydantic import SecretStr

from flows.snapshot_janitor import snapshot_janitor
from tasks.errors import JanitorUnfinished, VddkFailed
from tasks.images.claim import Claim, judge
from tasks.images.job import job_id, job_lock, machine_id
from tasks.images.leftovers import left_jobs
from tasks.janitor import AT_WORK, _end_access, read_by_vddk
from tasks.models import JanitorJob
from tasks.vsphere.leftovers import survey
from tasks.vsphere.session import borrow
from tests.labs import VDDK, running_lab
from tests.runs import command, faults, kill_after, run_command, vcenter_of

pytestmark = [pytest.mark.anyio, pytest.mark.live, pytest.mark.usefixtures("prefect_api")]

MIB = 1024 * 1024
VMS = ("dead", "alive", "early", "forged", "garbled", "similar", "none", "elsewhere", "chained")


@pytest.fixture(scope="module")
def site():
    machines = [
        {"name": name, "instance_uuid": uuid_of(name), "disks": [{"size": MIB, "data": 65536}]} for name in VMS
    ] + [
        {"name": "deltas", "consolidation_needed": True, "disks": [{"size": MIB, "data": 65536}]},
        {"name": "large", "disks": [{"size": 64 * MIB, "data": 60 * MIB}]},
    ]
    center = {"name": "DC", "clusters": [{"name": "c", "hosts": ["esx1"]}], "vms": machines}
    with running_lab(scenario={"datacenters": [center]}) as lab:
        yield lab


def uuid_of(name: str) -> str:
    return f"50000000-0000-4000-8000-0000000000{VMS.index(name):02x}"


@pytest.fixture(scope="module")
def vcenter_uuid(site):
    with borrow(site.connection()) as session:
        return session.info.uuid


class Left:
    """Snapshots as runs would have left them, made by somebody else's hand."""

    def __init__(self, site, vcenter_uuid, root):
        self.site, self.vcenter_uuid, self.root = site, vcenter_uuid, root

    def snapshot(self, vm, *, name=None, description=None, expired=True, **changes):
        folder = self.root / vm
        with job_lock(folder, {}):
            pass
        over = datetime.now(UTC) + timedelta(hours=-1 if expired else 1)
        fields = {
            "purpose": "export",
            "flow_run": None,
            "expires": over,
            "machine": machine_id(),
            "folder": str(folder),
        }
        known = job_id(vcenter_uuid=self.vcenter_uuid, instance_uuid=uuid_of(vm), folder=folder)
        said = description if description is not None else Claim(**(fields | changes)).model_dump_json()
        name = name or f"hyper2kvm-{known}"
        self.site.govc("snapshot.create", "-vm", self.site.vm(vm)["path"], "-m=false", "-d", said, name)
        return name

    def names(self, vm):
        tree = self.site.govc("snapshot.tree", "-vm", self.site.vm(vm)["path"])
        return [word for word in tree.split() if word != "."]


@pytest.fixture
def left(site, vcenter_uuid, tmp_path):
    yield Left(site, vcenter_uuid, tmp_path)
    for vm in VMS:
        site.govc("snapshot.remove", "-vm", site.vm(vm)["path"], "*")


def by_vm(report):
    return {
        each.what.partition(" of ")[2].partition(" (")[0]: each for each in report.leftovers if each.kind == "snapshot"
    }


async def tidy(site, **options):
    return await snapshot_janitor(options=JanitorJob(**options), vcenter=vcenter_of(site))


async def test_only_what_is_ours_dead_and_over_is_removed(site, left, tmp_path):
    left.snapshot("dead")
    left.snapshot("chained", name="somebody-elses", description="{}")
    left.snapshot("chained")
    names = {
        "alive": left.snapshot("alive"),
        "early": left.snapshot("early", expired=False),
        "forged": left.snapshot("forged", folder="/srv/of/somebody"),
        "garbled": left.snapshot("garbled", description='{"tool": "hyper2kvm", "expires": "2020'),
        "similar": left.snapshot("similar", name="hyper2kvm-weekly"),
        "elsewhere": left.snapshot("elsewhere", machine="another"),
    }
    with job_lock(tmp_path / "alive", {"flow_run": "still-here"}):
        told = by_vm(await tidy(site))
        assert {vm: each.done for vm, each in told.items()} == dict.fromkeys(names, "left") | dict.fromkeys(
            ("dead", "chained"), "would be removed"
        )
        assert len(left.names("dead")) == 1
        done = by_vm(await tidy(site, remove=True))
    assert {vm for vm, each in done.items() if each.done == "removed"} == {"dead", "chained"}
    assert left.names("dead") == [] and left.names("chained") == ["somebody-elses"]
    assert {vm: left.names(vm) for vm in names} == {vm: [name] for vm, name in names.items()}
    assert "at work" in done["alive"].why and "kept until" in done["early"].why
    assert all("not ours" in done[vm].why for vm in ("forged", "garbled", "similar", "elsewhere"))
    assert "datastore1: " in done["early"].room and done["early"].age_s >= 0


async def test_a_vm_that_needs_consolidation_is_told_and_left(site, left):
    (found,) = [each for each in (await tidy(site, remove=True)).leftovers if each.kind == "consolidation"]
    assert (found.what.partition(" ")[0], found.done) == ("deltas", "left")


def test_all_vms_are_looked_at_in_pages(new_lab):
    vm = {"name": "web", "snapshots": [{"name": "hyper2kvm-1"}], "disks": [{"size": MIB, "data": 65536}]}
    center = {"name": "DC", "clusters": [{"name": "c", "hosts": ["esx1"]}], "vms": [vm], "filler": {"count": 1200}}
    lab = new_lab(scenario={"datacenters": [center]})
    with borrow(lab.connection()) as session:
        lab.post("/stats/reset")
        found = survey(session)
        calls = lab.stats()["soap_total"]
    assert (found.vms, [each.name for each in found.snapshots]) == (1201, ["hyper2kvm-1"])
    assert calls <= 6, "a view, three pages of it, its end, the datastores"


async def test_one_vcenter_that_is_gone_keeps_nobody_from_the_other(site, left):
    left.snapshot("dead")
    await vcenter_of(site).save("janitor-here", overwrite=True)
    await vcenter_of(site).save("janitor-here-again", overwrite=True)
    await vcenter_of(site, host="127.0.0.1", port=9).save("janitor-gone", overwrite=True)
    with pytest.raises(JanitorUnfinished) as failure:
        await snapshot_janitor(options=JanitorJob(remove=True))
    report = failure.value.found
    assert any("127.0.0.1:9" in trouble for trouble in report.troubles)
    assert by_vm(report)["dead"].done == "removed" and left.names("dead") == []
    async with get_client() as client:
        for name in ("janitor-here", "janitor-here-again", "janitor-gone"):
            block = await client.read_block_document_by_name(name, "vcenter", include_secrets=False)
            await client.delete_block_document(block.id)


async def test_parts_go_when_they_are_old_and_only_when_asked_and_a_finished_copy_stays(site, tmp_path):
    parts, copy = {"disk-0.journal", "disk-0.raw.part"}, {"disk-0.raw", "disk-0.digests", "manifest.json"}
    for name, days, more in (("old", 8, set()), ("young", 6, set()), ("whole", 30, copy)):
        with job_lock(tmp_path / name, {}):
            pass
        for each in parts | more:
            (tmp_path / name / each).write_text(each)
            os.utime(tmp_path / name / each, (time.time() - days * 86400,) * 2)
    before = contents(tmp_path)
    told = (await tidy(site, folders=(tmp_path,))).leftovers
    assert [each.done for each in told if each.kind == "journal"] == ["would be removed", "left", "left"]
    assert contents(tmp_path) == before
    await tidy(site, folders=(tmp_path,), remove=True)
    assert contents(tmp_path) == {
        name: text for name, text in before.items() if name not in {f"old/{p}" for p in parts}
    }


def contents(root):
    return {str(each.relative_to(root)): each.read_text() for each in root.glob("*/*")}


async def test_slots_that_nobody_can_hold_are_freed(site, tmp_path):
    async with get_client() as client:
        in_the_way = FlowRunFilterStateType(any_=[*AT_WORK, StateType.CRASHED])
        running = FlowRunFilter(state=FlowRunFilterState(type=in_the_way))
        for run in await client.read_flow_runs(flow_run_filter=running):  # of tests before, which killed theirs
            await client.set_flow_run_state(run.id, Cancelled(), force=True)
        for name in ("hyper2kvm-host-esx1", "somebody-elses"):
            await client.create_global_concurrency_limit(
                GlobalConcurrencyLimitCreate(name=name, limit=3, active_slots=2)
            )
        (told,) = [each for each in (await tidy(site)).leftovers if each.kind == "slots"]
        assert (told.what, told.done) == ("2 of 3 slots of hyper2kvm-host-esx1", "would be removed")
        with job_lock(tmp_path / "crashed", {"flow_run": "says-prefect"}):
            await tidy(site, remove=True, folders=(tmp_path,))
        slots = {each.name: each.active_slots for each in await client.read_global_concurrency_limits()}
        assert slots["hyper2kvm-host-esx1"] == 2
        run, *_ = await client.read_flow_runs(limit=1)
        await client.set_flow_run_state(run.id, Crashed(), force=True)
        (told,) = [each for each in (await tidy(site, remove=True)).leftovers if each.kind == "slots"]
        assert (told.done, told.why) == ("left", "a run is at work, and may hold them")
        await tidy(site, remove=True, locks_after_h=1e-9)
        slots = {each.name: each.active_slots for each in await client.read_global_concurrency_limits()}
        assert (slots["hyper2kvm-host-esx1"], slots["somebody-elses"]) == (0, 2)
        for name in slots:
            await client.delete_global_concurrency_limit_by_name(name)


async def test_a_killed_run_of_vddk_gets_its_access_ended_and_keeps_what_it_may_go_on_with(
    site, vcenter_uuid, tmp_path, api
):
    words = ["--vs-vm-name", "large", "--output-dir", str(tmp_path), "--vddk-libdir", str(VDDK)]
    site.post("/stats/reset")
    with faults(site, throttle_bytes_per_s=MIB):
        assert await asyncio.to_thread(kill_after, site, command(site, "vddk-export", *words), api, 4 * MIB)
    assert site.stats()["vddk_prepared"] == 1
    (job,) = left_jobs(tmp_path)
    assert read_by_vddk([job], vcenter_uuid) == [job]
    assert not read_by_vddk([job.model_copy(update={"held": True})], vcenter_uuid)
    with pytest.raises(VddkFailed):
        _end_access(site.connection().model_copy(update={"password": SecretStr("wrong")}), job)
    assert site.stats()["vddk_prepared"] == 1
    done = await asyncio.to_thread(run_command, site, "janitor", str(tmp_path), "--remove", "--json", env=api)
    assert done.returncode == 0, done.stderr
    found = {each["kind"]: each for each in json.loads(done.stdout)["leftovers"] if each["kind"] != "consolidation"}
    assert {kind: each["done"] for kind, each in found.items()} | {"slots": ""} == {
        "vddk": "removed", "snapshot": "left", "journal": "left", "lock": "left", "slots": "",
    }  # fmt: skip
    assert "kept until" in found["snapshot"]["why"]
    assert (site.stats()["vddk_prepared"], site.stats()["open_snapshots"]) == (0, 1)
    with borrow(site.connection()) as session:  # a day later
        (snapshot,) = survey(session).snapshots
    verdict = judge(
        name=snapshot.name,
        description=snapshot.description,
        vcenter_uuid=vcenter_uuid,
        instance_uuid=snapshot.instance_uuid,
        now=datetime.now(UTC) + timedelta(hours=25),
    )
    assert verdict.may_go and verdict.folder == tmp_path / "large"
    site.govc("snapshot.remove", "-vm", site.vm("large")["path"], "*")
