"""The hooks at the end of a run, as Prefect calls them: elsewhere, perhaps twice, the block saved or masked."""

from __future__ import annotations

import asyncio
import json
from uuid import UUID

import pytest
from prefect.client.orchestration import get_client
from prefect.states import Cancelled, Crashed, Failed

from flows.export import export_vm
from tasks.images.job import job_lock
from tasks.succession import clean_up
from tests.integration.test_resume import MIB, export_to
from tests.labs import running_lab
from tests.runs import assert_nothing_left, export, faults, kill_after, vcenter_of

pytestmark = [pytest.mark.anyio, pytest.mark.live, pytest.mark.usefixtures("prefect_api")]

SITE = {
    "datacenters": [
        {
            "name": "DC",
            "clusters": [{"name": "c", "hosts": ["esx1"]}],
            "vms": [{"name": "db", "disks": [{"size": 160 * MIB, "data": 100 * MIB}]}],
        }
    ]
}


@pytest.fixture(scope="module")
def site():
    with running_lab(scenario=SITE) as lab:
        yield lab


@pytest.fixture
async def killed(site, tmp_path, api):
    """A run that was killed in the middle, as the API has it, its vCenter given as a saved block."""
    site.post("/stats/reset")
    with faults(site, throttle_bytes_per_s=24 * MIB):
        await asyncio.to_thread(kill_after, site, export_to(site, tmp_path), api, 100 * MIB)
    assert site.stats()["open_snapshots"] == 1
    run_id = json.loads((tmp_path / "db" / ".hyper2kvm.lock").read_text())["flow_run_id"]
    block = await vcenter_of(site).save("lab", overwrite=True)
    async with get_client() as client:
        run = await client.read_flow_run(UUID(run_id))
    run.parameters["vcenter"] = {"$ref": {"block_document_id": str(block)}}
    yield run
    site.govc("snapshot.remove", "-vm", site.vm("db")["path"], "*")


async def test_a_cancelled_run_that_was_killed_leaves_nothing(site, killed, tmp_path):
    for _ in range(2):
        await clean_up(export_vm, killed, Cancelled())
        assert {path.name for path in (tmp_path / "db").iterdir()} == {".hyper2kvm.lock"}
        assert_nothing_left(site)


@pytest.mark.parametrize("state", [Crashed(), Failed()], ids=["crashed", "failed"])
async def test_a_job_that_can_be_gone_on_with_is_left_alone(site, killed, tmp_path, state):
    site.post("/stats/reset")
    await clean_up(export_vm, killed, state)
    assert site.stats()["open_snapshots"] == 1
    assert site.stats()["soap_total"] == 0
    await export(site, tmp_path, "db", skip_readback=True)
    assert site.stats()["bytes_served"] < 160 * MIB
    assert_nothing_left(site)


async def test_a_job_that_another_run_works_on_is_left_alone(site, killed, tmp_path):
    before = {path.name for path in (tmp_path / "db").iterdir()}
    with job_lock(tmp_path / "db", {"flow_run_id": str(killed.id), "vm": "vm-1", "snapshot": "x"}):
        await clean_up(export_vm, killed, Cancelled())
    assert {path.name for path in (tmp_path / "db").iterdir()} == before
    assert site.stats()["open_snapshots"] == 1


async def test_a_masked_block_is_not_logged_in_with(site, killed):
    killed.parameters["vcenter"] = {"host": site.host, "username": "hyper", "password": "**********"}
    site.post("/stats/reset")
    await clean_up(export_vm, killed, Cancelled())
    assert site.stats()["login_attempts"] == 0


async def test_a_run_that_never_got_to_work_is_not_asked_about(site, killed, tmp_path):
    killed.id = UUID(int=0)
    site.post("/stats/reset")
    await clean_up(export_vm, killed, Cancelled())
    assert site.stats()["soap_total"] == 0
