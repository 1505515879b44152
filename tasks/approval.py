"""A person's word that a cutover may begin: a run of its own that waits for it suspended, holding no process.

The migration asks for it, keeps what its form shows up to date, and looks now and then what came of it.
"""

from __future__ import annotations

from typing import Literal
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import arun_deployment
from prefect.exceptions import ObjectNotFound
from prefect.input import RunInput
from prefect.input.actions import acreate_flow_run_input, adelete_flow_run_input
from prefect.input.run_input import keyset_from_base_key
from prefect.utilities.urls import url_for
from pydantic import Field

from tasks.errors import InvalidInput
from tasks.models import Value
from tasks.steps import quietly

DEPLOYMENT = "cutover-approval/cutover-approval"
PAUSE_KEY = "cutover"
KEYS = keyset_from_base_key(f"suspended-{PAUSE_KEY}")  # of what the form shows, and what is answered


class CutoverDecision(RunInput):
    """What the form asks."""

    decision: Literal["cut over", "stop"] = Field(
        default="cut over",
        title="Decision",
        description="cut over: one more round, then the source is shut down and its copy takes over. stop: no more "
        "rounds; the copy is kept, and the source runs.",
    )
    note: str = Field(default="", title="Note", description="For the report: who decided, and why.")


class CutoverRequest(Value):
    """What a person is asked about. asked_by: id of the migration's flow run. words: what the form says at first."""

    vm: str
    moref: str
    folder: str
    asked_by: str
    words: str


async def check_askable() -> None:
    """Raise InvalidInput where nobody could be asked: the server has no deployment for it."""
    async with get_client() as client:
        try:
            await client.read_deployment_by_name(DEPLOYMENT)
        except ObjectNotFound as error:
            raise InvalidInput(
                what="cutover approval",
                why=f"Prefect's server has no deployment {DEPLOYMENT}, in whose form a person would say so",
                remedy="Use a server with the deployments (make up, or prefect deploy --all), by PREFECT_API_URL",
            ) from error


async def ask(request: CutoverRequest, *, key: str) -> FlowRun:
    """Have a run wait for a person's word; the same one for the same key, however often it is asked."""
    parameters = {"request": request.model_dump(mode="json")}
    return await arun_deployment(
        DEPLOYMENT,
        parameters=parameters,
        flow_run_name=f"approve the cutover of {request.vm}",
        timeout=0,
        as_subflow=False,
        idempotency_key=key,
    )


def link_to(run_id: str) -> str:
    """Return where a person gives the word: the run's page; its id, where the UI's address is not known."""
    return url_for("flow-run", obj_id=run_id) or f"flow run {run_id}"


async def remind(run_id: str, words: str) -> None:
    """Have the form say `words` instead of what it said."""
    async with get_client() as client:
        state = (await client.read_flow_run(UUID(run_id))).state
    if state and state.is_paused():
        await quietly(_replace(UUID(run_id), words))


async def _replace(run_id: UUID, words: str) -> None:
    await adelete_flow_run_input(KEYS["description"], flow_run_id=run_id)
    await acreate_flow_run_input(KEYS["description"], words, flow_run_id=run_id)


async def answer(run_id: str) -> CutoverDecision | str | None:
    """Return the decision; None while there is none; where there will be none, why, in words."""
    async with get_client() as client:
        state = (await client.read_flow_run(UUID(run_id))).state
    if state is None or not state.is_final():
        return None
    if not state.is_completed():
        return f"its approval ended as {state.name}"
    return await CutoverDecision.aload(KEYS, flow_run_id=UUID(run_id))
