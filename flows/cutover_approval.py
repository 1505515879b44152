"""A person's approval of a cutover: a run that waits suspended, however long, while the migration goes on."""

from __future__ import annotations

from prefect import asuspend_flow_run, flow

from tasks.approval import PAUSE_KEY, CutoverDecision, CutoverRequest


@flow(name="cutover-approval", flow_run_name="approve the cutover of {request.vm}", persist_result=True)
async def cutover_approval(request: CutoverRequest) -> dict[str, str]:
    """Wait for a person's word on a cutover, and return it. A warm migration starts this; nobody else needs to.

    The run suspends itself: it holds no process and does not expire. Its Resume button is the form, which says what is
    to be expected.

    Args:
        request: What is asked about.
    """
    form = CutoverDecision.with_initial_data(description=request.words)
    decision = await asuspend_flow_run(wait_for_input=form, timeout=None, key=PAUSE_KEY)
    return {"decision": decision.decision, "note": decision.note}
