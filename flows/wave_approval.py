"""A person's word on a gate of a wave: a run that waits suspended, however long, while the wave waits or goes on."""

from __future__ import annotations

from typing import Literal

from prefect import asuspend_flow_run, flow
from prefect.input import RunInput
from pydantic import Field

from tasks.errors import NotApproved

PAUSE_KEY = "wave-approval"  # one word a run, however often it is run again


class WaveDecision(RunInput):
    """What is said of a gate."""

    decision: Literal["let through", "refuse"] = Field(
        default="let through",
        title="Decision",
        description="let through: what is behind the gate starts. refuse: it is not started in this wave.",
    )
    note: str = Field(default="", title="Note", description="Why; it stays with the run.")


@flow(name="wave-approval", flow_run_name="approve {gate} of wave {wave}", persist_result=True)
async def wave_approval(wave: str, gate: str, words: str = "") -> str:
    """Wait for a person's word on a gate of a wave; return the note. A wave starts this; nobody else needs to.

    The run suspends itself: it holds no process and does not expire. Its Resume button is the form. It fails with
    NotApproved unless the gate is let through.

    Args:
        wave: The wave that asks.
        gate: What is behind the gate.
        words: What is to be known before one says so.
    """
    form = WaveDecision.with_initial_data(description=words or f"Let {gate} of wave {wave} through?")
    decision = await asuspend_flow_run(wait_for_input=form, timeout=None, key=PAUSE_KEY)
    if decision.decision == "refuse":
        raise NotApproved(what=f"{gate} of wave {wave}", why=f": {decision.note}" if decision.note else "")
    return decision.note
