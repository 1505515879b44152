"""What a run owes to the one before it, and to the one after: a dead run is closed, what nobody will use is removed.

Prefect's word that a run crashed is no proof that it is dead: the job's lock is, which ends with its process.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import Flow, State
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import ObjectNotFound
from prefect.logging import get_run_logger
from prefect.logging.loggers import flow_run_logger
from prefect.states import Crashed
from pydantic import ConfigDict

from blocks import VCenter
from tasks.errors import Hyper2KvmError
from tasks.images.job import job_lock, last_holder, lock_holder
from tasks.images.mirror import PARTS, forget
from tasks.images.state import JobState, discard, read_state, resumable
from tasks.models import Value, VddkSettings
from tasks.road import end_access
from tasks.steps import connection_of, in_thread, on_vcenter, quietly
from tasks.vsphere.snapshots import drop_snapshot

_log = logging.getLogger(__name__)


class _Options(Value):
    """What every mode's options have."""

    model_config = ConfigDict(extra="ignore", from_attributes=True)

    output_dir: Path


async def close_predecessor(holder: dict[str, str] | None, *, ours: str) -> None:
    """Have the run that held the job before, and died without a word, count as crashed.

    holder: what its lock file says (`flow_run_id`); `ours` is this run's id: the same for a retry.
    """
    run_id = (holder or {}).get("flow_run_id")
    if run_id and run_id != ours:
        await quietly(_close(UUID(run_id)))


async def _close(run_id: UUID) -> None:
    async with get_client() as client:
        try:
            run = await client.read_flow_run(run_id)
        except ObjectNotFound:
            return  # it ran under another server
        if run.state and run.state.is_running():
            message = "Its process died; another run went on with its job."
            await client.set_flow_run_state(run_id, Crashed(message=message), force=True)
            get_run_logger().warning("closed a dead run flow_run=%s", run_id)


async def clean_up(flow: Flow[Any, Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Hook for the end of a run that did not complete: see that nothing is left which no other run will use.

    The flow's own `finally` has done so, unless it was killed. A resumable job keeps its one snapshot, except when
    it was cancelled: nobody will go on with that. May run in another process, and more than once.
    """
    log = flow_run_logger(flow_run, flow)
    vcenter = await _saved_vcenter(flow_run.parameters.get("vcenter"))
    options = _Options.model_validate(flow_run.parameters["options"])
    for folder, holder in _left_by(str(flow_run.id), options.output_dir):
        if lock_holder(folder):
            log.warning("another run is at work on it folder=%s", folder)
        elif resumable(folder) and not state.is_cancelled():
            log.warning("kept for the next run folder=%s", folder)
        elif vcenter is None:
            log.warning("not looked for a snapshot: the run's vCenter was not a saved block folder=%s", folder)
        else:
            await _remove(vcenter, folder, holder)
            log.info("seen removed vm=%s snapshot=%s", holder["vm"], holder["snapshot"])


def _left_by(run_id: str, output_dir: Path) -> list[tuple[Path, dict[str, str]]]:
    """Return the job folders whose last holder was that run, with what it wrote of itself."""
    found = []
    for folder in output_dir.expanduser().absolute().glob("*/"):
        holder = last_holder(folder)
        if holder and holder.get("flow_run_id") == run_id:
            found.append((folder, holder))
    return found


async def _remove(vcenter: VCenter, folder: Path, holder: dict[str, str]) -> None:
    with job_lock(folder, holder):
        if job := read_state(folder):
            await release(vcenter, job)
        give_up = forget if (folder / PARTS).is_dir() else discard
        give_up(folder)
        await on_vcenter(vcenter, drop_snapshot, holder["vm"], name=holder["snapshot"])


async def release(vcenter: VCenter, job: JobState) -> None:
    """Have the server allow again what VDDK had it forbid for a run of a job, which is dead; log where it does not."""
    if not isinstance(job.road, VddkSettings):
        return
    try:
        await in_thread(end_access, None, job, connection_of(vcenter))
    except Hyper2KvmError as error:
        _log.warning("Storage vMotion may still be switched off vm=%s error=%s", job.vm.moref, error.cause)


async def _saved_vcenter(parameter: Any) -> VCenter | None:
    """Return the saved block that a parameter refers to; None for one given by value, whose secrets are masked."""
    reference = parameter.get("$ref") if isinstance(parameter, dict) else None
    document_id = reference.get("block_document_id") if isinstance(reference, dict) else reference
    if not document_id:
        return None
    async with get_client() as client:
        document = await client.read_block_document(UUID(str(document_id)), include_secrets=True)
    return VCenter._from_block_document(document)
