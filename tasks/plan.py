"""Step: a wave's plan, made once a run: which VMs, what preflight found of each, when each is expected to run."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

from prefect import task
from prefect.artifacts import acreate_markdown_artifact
from prefect.cache_policies import RUN_ID, TASK_SOURCE
from prefect.logging import get_run_logger
from prefect.variables import Variable

from blocks import VCenter
from tasks.connect import connected
from tasks.facts import Preflight
from tasks.preflight import Candidate, check, kind_of
from tasks.saved import needs_of
from tasks.steps import in_thread, on_vcenter, quietly
from tasks.vsphere.session import Session
from tasks.vsphere.survey import listing
from tasks.vsphere.tags import tags_of
from tasks.wave.choose import Listed, Member, members
from tasks.wave.models import Wave
from tasks.wave.plan import Plan, Rates, member_job, plan_of
from tasks.wave.show import plan_as_csv, plan_as_markdown

RATES = "hyper2kvm_rates"  # a variable of Prefect: what waves before measured


@task(name="plan", task_run_name="plan {wave.name}", cache_policy=RUN_ID + TASK_SOURCE, persist_result=True)
async def make_plan(vcenter: VCenter, wave: Wave) -> Plan:
    """Return the plan of a wave; a run that is retried gets the one it had. Reads only.

    Raises VmNotFound, AmbiguousVmName, InvalidInput for what the wave names and is not, or is named twice.
    """
    async with connected(vcenter):
        inventory = await inventory_of(vcenter, tags_in(_selectors(wave)))
        found = members(wave, inventory)
        checked = await _checked(vcenter, found)
    plan = plan_of(wave, found, checked, await rates(), datetime.now(UTC))
    get_run_logger().info(
        "planned wave=%s vms=%d go=%d expected=%.0f s", wave.name, len(plan.vms), len(plan.go), plan.expected_s
    )
    return plan


async def show_plan(plan: Plan) -> Path:
    """Leave the plan as an artifact of the run, and as CSV in the wave's output folder; return that file."""
    folder = plan.wave.folder().expanduser()
    file = folder / f"wave-{plan.wave.name}.plan.csv"
    await in_thread(_write, None, file, plan_as_csv(plan))
    text = plan_as_markdown(plan, str(file))
    await quietly(acreate_markdown_artifact(text, key=key_of("plan", plan.wave.name), description="Plan of the wave"))
    return file


def key_of(kind: str, name: str) -> str:
    """Return an artifact's key: lower-case letters, digits and dashes."""
    return f"{kind}-{''.join(sign if sign.isalnum() else '-' for sign in name.lower())}".strip("-")


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_suffix(".csv.new")
    fresh.write_text(text)
    fresh.replace(file)


async def inventory_of(vcenter: VCenter, tags: tuple[str, ...] = ()) -> tuple[Listed, ...]:
    """Return every VM by what it can be named by; with the tags named, of those that have them."""

    def read(session: Session) -> tuple[Listed, ...]:
        having = tags_of(session, tags)
        return tuple(Listed.of(each, tags=having.get(each[0], ())) for each in listing(session))

    return await on_vcenter(vcenter, read)


def tags_in(selectors: Iterable[str]) -> tuple[str, ...]:
    """Return the tags that selectors name."""
    return tuple(sorted({each.removeprefix("tag:") for each in selectors if each.startswith("tag:")}))


def _selectors(wave: Wave) -> list[str]:
    return [*wave.select, *wave.exclude, *wave.canary, *(each for group in wave.groups for each in group.select)]


async def _checked(vcenter: VCenter, found: list[Member]) -> Preflight:
    needs = await needs_of([each.options for each in found])
    candidates = [
        Candidate(moref=each.vm.moref, mode=each.mode, job=kind_of(member_job(each)), needs=need)
        for each, need in zip(found, needs, strict=True)
    ]
    return await check(vcenter, candidates)


async def rates() -> Rates:
    """Return what waves before measured; the usual rates where there is nothing, or nothing that can be read."""
    stored = await quietly(Variable.aget(RATES))
    try:
        return Rates.model_validate(stored) if stored else Rates()
    except ValueError:
        get_run_logger().warning("not understood: variable %s; usual rates are taken", RATES)
        return Rates()


async def learn(measured: Rates) -> None:
    """Keep what a wave measured for the next one's plan."""
    await quietly(Variable.aset(RATES, measured.model_dump(mode="json"), overwrite=True))
