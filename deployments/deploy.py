"""`make deploy`: brings a Prefect server up to what stands here: pool, block types, deployments, limits, automations.

Done twice, nothing is there twice; what operators changed (the pool's template, a limit's slots, an automation or a
schedule switched on or off) stays. Which server: `PREFECT_API_URL`, `PREFECT_API_AUTH_STRING`.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.client.schemas.filters import WorkPoolFilter, WorkPoolFilterName
from prefect.client.schemas.objects import DeploymentSchedule
from prefect.exceptions import ObjectNotFound
from prefect.workers.process import ProcessWorker

from blocks import VCenter
from deployments import POOL, automations
from tasks.limits import ensure, limit_name

ROOT = Path(__file__).resolve().parents[1]
HEARTBEAT = {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(automations.HEARTBEAT_S)}
VCENTER_DISKS = 200  # at once of one vCenter: others measured that all slow down beyond


def main() -> int:
    """Do all of it; return the exit status."""
    with get_client(sync_client=True) as client:
        make_pool(client)
        with switches_kept(client):
            if status := deploy(None):
                return status
        make_limits(client)
        make_automations(client)
    return 0


def make_pool(client: SyncPrefectClient) -> None:
    """Create the work pool, which must be there before anything is deployed to it; an old one learns to beat."""
    try:
        template = client.read_work_pool(POOL).base_job_template
    except ObjectNotFound:
        template = ProcessWorker.get_default_base_job_template()
        client.create_work_pool(WorkPoolCreate(name=POOL, type="process", base_job_template=template))
    environment = template["variables"]["properties"]["env"]
    if not environment.get("default", {}).keys() >= HEARTBEAT.keys():
        environment["default"] = HEARTBEAT | environment.get("default", {})
        client.update_work_pool(POOL, WorkPoolUpdate(base_job_template=template))


def deploy(log: IO[Any] | None) -> int:
    """Register the block types and deploy by Prefect's own commands, their words to `log`; return the exit status.

    `python -m prefect`, since the `prefect` script alone does not find our modules.
    """
    for words in ("block register -m blocks", "deploy --all --prefect-file deployments/prefect.yaml"):
        argv = [sys.executable, "-m", "prefect", "--no-prompt", *words.split()]
        if status := subprocess.run(argv, cwd=ROOT, stdout=log, stderr=log and subprocess.STDOUT).returncode:
            return status
    return 0


@contextmanager
def switches_kept(client: SyncPrefectClient) -> Iterator[None]:
    """Leave schedules switched on or off as they are: Prefect's deploying sets them to what prefect.yaml says."""
    before = {(each.deployment_id, each.slug): each.active for each in _schedules(client)}
    yield
    for each in _schedules(client):
        active = before.get((each.deployment_id, each.slug), each.active)
        if each.deployment_id and active != each.active:
            client.update_deployment_schedule(each.deployment_id, each.id, active=active)


def _schedules(client: SyncPrefectClient) -> list[DeploymentSchedule]:
    """Return the schedules of the pool's deployments that have a name: prefect.yaml knows no others."""
    ours = client.read_deployments(work_pool_filter=WorkPoolFilter(name=WorkPoolFilterName(any_=[POOL])), limit=200)
    return [schedule for deployment in ours for schedule in deployment.schedules if schedule.slug]


def make_limits(client: SyncPrefectClient) -> None:
    """Create the limit of disks at once of each saved vCenter; those of hosts and datastores come with waves."""
    names = [limit_name("vcenter", vcenter=address) for address in _vcenters(client)]
    asyncio.run(ensure(dict.fromkeys(names, VCENTER_DISKS)))


def _vcenters(client: SyncPrefectClient) -> Iterator[str]:
    slug = VCenter.get_block_type_slug()
    for document in client.read_block_documents_by_type(slug, limit=200):
        yield str(document.data["host"])


def make_automations(client: SyncPrefectClient) -> None:
    """Create the automations, or bring them up to date."""
    automations.upsert(automations.zombie(), client=client)


if __name__ == "__main__":
    sys.exit(main())
