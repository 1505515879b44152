"""What Prefect does by itself when something happens to a run: automations, created once or brought up to date by name.

Prefect's own command makes a second automation of the same name each time.
"""

from __future__ import annotations

from datetime import timedelta

from prefect.automations import AutomationCore
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification

HEARTBEAT_S = 30  # of a run of our pool
# More than three beats also of runs outside our pool, which keep Prefect's own frequency (180 s); a server that was
# away for minutes takes nobody for dead.
ZOMBIE_AFTER = timedelta(minutes=10)


def zombie(window: timedelta = ZOMBIE_AFTER) -> AutomationCore:
    """Return the automation that marks a run Crashed whose heartbeats stopped and which did not say that it ended.

    Any event of the run counts as a sign of life or as its end: a run that suspends itself beats no more, and is well.
    "Crashed" is what Prefect shows, and nothing of ours takes it for a death: the lock and heartbeat of its job decide.
    """
    run = "prefect.flow-run"
    return AutomationCore(
        name="hyper2kvm: a run without heartbeats is Crashed",
        description=f"A worker that was lost cannot say so: after {window.total_seconds():.0f} s without a heartbeat.",
        trigger=EventTrigger(
            after={f"{run}.heartbeat"},
            expect={f"{run}.*"},
            match=ResourceSpecification(root={"prefect.resource.id": [f"{run}.*"]}),
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=window,
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.CRASHED,
                message=f"No heartbeat for {window.total_seconds():.0f} s: its worker or machine may be lost. "
                "Run it again: it goes on where it was.",
            )
        ],
    )


def upsert(automation: AutomationCore, *, client: SyncPrefectClient) -> None:
    """Create `automation`, or bring that of its name up to date; its namesakes go, and one switched off stays so."""
    there = client.read_automations_by_name(automation.name)
    for other in there[1:]:
        client.delete_automation(other.id)
    if there:
        client.update_automation(there[0].id, automation.model_copy(update={"enabled": there[0].enabled}))
    else:
        client.create_automation(automation)
