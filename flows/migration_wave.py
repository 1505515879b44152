"""The `migration_wave` flow: many VMs by one plan, a run each, under limits, canaries first."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
from prefect import flow
from prefect.artifacts import acreate_markdown_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactUpdate
from prefect.deployments.flow_runs import arun_deployment
from prefect.exceptions import ObjectNotFound, PrefectException
from prefect.logging import get_run_logger
from prefect.runtime import deployment, flow_run

from blocks import MigrationWave, VCenter
from flows.run import flow_for
from tasks import limits
from tasks.children import (
    TAG,
    InThisProcess,
    OnWorkers,
    Runner,
    Watched,
    cancel_all,
    ended_before,
    log_started,
    no_deployment,
    reference,
    references,
    refusal,
    refuse_unheard,
    say_state,
    tag_of,
)
from tasks.errors import InvalidInput, VddkOutOfMemory, WaveIncomplete
from tasks.models import ExportOptions
from tasks.plan import key_of, learn, make_plan, show_plan
from tasks.saved import BLOCKS
from tasks.steps import quietly
from tasks.wave.course import Course
from tasks.wave.governor import Governor
from tasks.wave.jobs import BESIDE
from tasks.wave.models import Wave
from tasks.wave.outcome import WaveReport
from tasks.wave.parse import loaded
from tasks.wave.plan import Plan, Planned, Rates, limits_of
from tasks.wave.schedule import RUNS
from tasks.wave.show import course_as_markdown

POLL_S = 2.0
SHOW_EVERY_S = 5.0  # an artifact's update costs Prefect 10 ms, and its pages show it on a reload
LIMITS_EVERY_S = 5.0
APPROVAL = "wave-approval/wave-approval"
LOST = (httpx.HTTPError, PrefectException)  # Prefect's server does not answer just now: the wave asks again


@flow(name="migration-wave", flow_run_name="wave {wave.name}", persist_result=True, on_cancellation=[cancel_all])
async def migration_wave(vcenter: VCenter, wave: Wave) -> WaveReport:
    """Migrate many VMs by one plan: each a run of its own, within limits, canaries first, groups in their order.

    Every VM is checked first, and the plan is among the *Artifacts*: who goes and who does not and why, when each is
    expected to run. What is under way is an artifact too; a reload shows it anew. The limits are global concurrency
    limits of Prefect named `hyper2kvm-…`: change one while the wave runs. `hyper2kvm-wave-<name>` is how many VMs run
    at once: 0 pauses the wave, and switched off it starts nothing more and ends with what runs. Cancel a VM's run that
    has not begun to skip it; cancel the wave to cancel all.

    A wave that was killed, or failed, is gone on with by *Retry*: what is done is not done again, and nothing twice.

    Args:
        vcenter: Where the VMs are: a saved vCenter.
        wave: Which VMs, in which order, how and when.
    """
    return await carry_out(vcenter, loaded(wave), on_workers=bool(deployment.get_id()))


@flow(name="saved-wave", flow_run_name="wave {wave.wave.name}", persist_result=True, on_cancellation=[cancel_all])
async def saved_wave(wave: MigrationWave, dry_run: bool = False) -> WaveReport:
    """Carry out a wave that is saved as a block *Migration Wave*: see *migration-wave*.

    Args:
        wave: A saved wave.
        dry_run: Check every VM, show the plan, and start nothing.
    """
    chosen = loaded(wave.wave)
    return await carry_out(
        wave.vcenter, chosen.model_copy(update={"dry_run": dry_run or chosen.dry_run}), on_workers=True
    )


async def carry_out(vcenter: VCenter, wave: Wave, *, on_workers: bool) -> WaveReport:
    """Plan a wave, show the plan, and, unless it is dry, carry it out. Raises WaveIncomplete unless all is done."""
    if on_workers:
        reference(vcenter)
    plan = await make_plan(vcenter, wave)
    csv = await show_plan(plan)
    if wave.dry_run:
        return WaveReport.of_plan(plan, csv)
    await _take_name(f"wave {plan.wave.name}")
    runner = await _runner(vcenter, plan, on_workers=on_workers)
    course = await _begun(plan, runner)
    under_way = _UnderWay(plan, course, runner, vcenter, asks=on_workers)
    try:
        await under_way.to_the_end()
    finally:
        await runner.close()
    report = WaveReport.of_course(course, csv)
    if not report.complete:
        raise WaveIncomplete(
            wave=wave.name, done=report.count("done"), all=len(report.vms), rest=report.rest(), found=report
        )
    return report


async def _take_name(name: str) -> None:
    """Name this run after its wave, whose name may stand in a file: it is looked for, and cancelled, by that."""
    if flow_run.get_name() != name:
        async with get_client() as client:
            await client.update_flow_run(UUID(flow_run.get_id() or ""), name=name)


async def _runner(vcenter: VCenter, plan: Plan, *, on_workers: bool) -> Runner:
    if not on_workers:
        if plan.wave.approve_plan or plan.wave.approve_after_canary or any(each.approve for each in plan.wave.groups):
            why = "somebody is to approve, in the Prefect UI, and this wave does not run on workers"
            raise InvalidInput(what="approval", why=why, remedy="Run the deployment migration-wave")
        refuse_unheard(plan.vms, known=ExportOptions.model_fields)
        return InThisProcess(lambda vm: flow_for(vm.member.mode, vcenter, vm.job(), _as_options(vm)))
    refuse_unheard(plan.vms, known=BLOCKS)
    return OnWorkers(plan, flow_run.get_id() or "", vcenter, await references(plan.vms))


def _as_options(vm: Planned) -> ExportOptions:
    """Return what a VM's options say of roads that need more than the mode's own options."""
    known = ExportOptions.model_fields.keys() & set(BESIDE)
    more = {key: value for key, value in vm.member.options.items() if key in known}
    return ExportOptions(vm_name=vm.member.vm.path, output_dir=Path(vm.member.output_dir), **more)


async def _begun(plan: Plan, runner: Runner) -> Course:
    """Return the course of a wave: at its beginning, or where a life before left it."""
    known = await runner.known()
    ended = await ended_before(flow_run.get_id() or "") if known else 0
    course = Course(plan, known=known, more_attempts=ended)
    if known:
        get_run_logger().info("gone on with wave=%s runs=%d ended_before=%d", plan.wave.name, len(known), ended)
    return course


class _UnderWay:
    """A wave while it runs: what is asked of Prefect, and told to it, between one look and the next."""

    def __init__(self, plan: Plan, course: Course, runner: Runner, vcenter: VCenter, *, asks: bool) -> None:
        self.plan, self.course, self.runner, self.vcenter, self.asks = plan, course, runner, vcenter, asks
        self.slots = limits_of(plan.wave.limits, [vm.work for vm in plan.go])
        self.names = {each: self._name_of(each) for each in self.slots}
        self.governors = {each: Governor(slots) for each, slots in self.slots.items() if each.startswith("host:")}
        self.started_at = time.monotonic()
        self.gates: dict[str, str] = {}
        self.took: list[tuple[Planned, float]] = []
        self.at_zero = ""
        self.paused = ""  # why nothing is started just now
        self._shown = ("", 0.0)
        self._limits_at = 0.0
        self._artifact: Any = None

    def _name_of(self, resource: str) -> str:
        if resource == RUNS:
            return limits.wave_limit_name(self.plan.wave.name)
        return limits.limit_name(resource, vcenter=self.plan.vcenter)

    async def to_the_end(self) -> None:
        """Start what may start, watch what runs, until nothing runs and nothing more can start."""
        await limits.ensure({self.names[each]: slots for each, slots in self.slots.items()})
        while True:
            try:
                await self._look()
                if self.course.over():
                    break
            except LOST as error:
                get_run_logger().warning("Prefect does not answer error=%s; asked again", type(error).__name__)
            await asyncio.sleep(POLL_S)
        await self._show(last=True)
        await learn(self._measured())
        await quietly(limits.remove(self.names[RUNS]))
        await quietly(self._give_back())

    async def _look(self) -> None:
        await self._watch_runs()
        await self._heed_limits()
        await self._heed_gates()
        self.paused = self.at_zero or await self.runner.held_back()
        now = datetime.now(UTC)
        self.course.heed(now)
        for vm in () if self.paused else self.course.start(now):
            await self._start(vm)
        await self._show()

    async def _start(self, vm: Planned) -> None:
        """Start a VM's run; asked again after a lost answer, the same key finds the run that was created."""
        number = self.course.next_number(vm.key)
        while True:
            try:
                run_id = await self.runner.start(vm, number)
                break
            except LOST as error:
                if words := refusal(error):
                    self.course.began(vm.key, "")
                    self.course.ended(vm.key, "failed", words)
                    get_run_logger().error("not started vm=%r %s", vm.checked.path, words)
                    return
                get_run_logger().warning("not started yet vm=%r error=%s", vm.checked.path, type(error).__name__)
                await asyncio.sleep(POLL_S)
        self.course.began(vm.key, run_id)
        log_started(vm, run_id, number)

    async def _watch_runs(self) -> None:
        running = {self.course.attempts[key].run_id: key for key in self.course.scheduler.running}
        for run in await self.runner.watch(running) if running else ():
            if run.ending:
                await self._ended(self.course.vms[running[run.run_id]], run)

    async def _ended(self, vm: Planned, run: Watched) -> None:
        assert run.ending
        self.course.ended(vm.key, run.ending, run.message)
        get_run_logger().info("ended vm=%r as=%s flow_run=%s %s", vm.checked.path, run.ending, run.run_id, run.message)
        if run.ending == "done":
            self.took.append((vm, run.seconds))
        governor = self.governors.get(f"host:{vm.checked.host}")
        if governor is None:
            return
        before, now = governor.limit, time.monotonic()
        if VddkOutOfMemory.__name__ in run.message:
            governor.short_of_memory(now)
        elif run.ending == "done" and (seconds := self._of_transfer(run.seconds)) and vm.checked.bytes:
            governor.took(seconds / vm.checked.bytes, now)
        if governor.limit != before:
            await self._govern(f"host:{vm.checked.host}", governor.limit)

    async def _govern(self, resource: str, slots: int) -> None:
        get_run_logger().warning("limit changed resource=%s slots=%d", resource, slots)
        self.course.limit(resource, slots)
        await limits.change(self.names[resource], slots)

    async def _heed_limits(self) -> None:
        """Take over what an operator, or a governor, has made of the limits."""
        if time.monotonic() - self._limits_at < LIMITS_EVERY_S:
            return
        self._limits_at = time.monotonic()
        now = await limits.current(self.names.values())
        own = now.get(self.names[RUNS])
        if own and not own.active:
            self.course.stop(f"the limit {self.names[RUNS]} was switched off")
        self.at_zero = f"the limit {self.names[RUNS]} is 0" if own and own.slots == 0 else ""
        for resource, name in self.names.items():
            if limit := now.get(name):
                await self._heed(resource, limit)

    async def _heed(self, resource: str, limit: limits.Limit) -> None:
        slots = limit.slots if limit.active else 1_000_000
        governor = self.governors.get(resource)
        if governor and slots != governor.limit:
            governor.raised_to(slots)
        elif governor and governor.quiet(time.monotonic()) != slots:
            await self._govern(resource, governor.limit)
            return
        self.course.limit(resource, slots)

    async def _give_back(self) -> None:
        """Give hosts what a governor took from them, unless somebody has said otherwise since."""
        now = await limits.current(self.names.values())
        for resource, governor in self.governors.items():
            limit = now.get(self.names[resource])
            if limit and limit.slots == governor.limit != governor.ceiling:
                await limits.change(self.names[resource], governor.ceiling)

    async def _heed_gates(self) -> None:
        for gate in self.course.asks() if self.asks else ():
            if gate not in self.gates:
                self.gates[gate] = await self._ask(gate)
            run = await say_state(self.gates[gate])
            if run and run.ending:
                answer = self.course.approved if run.ending == "done" else self.course.refused
                answer(gate)
                get_run_logger().info("gate=%s answered=%s %s", gate, run.ending, run.message)

    async def _ask(self, gate: str) -> str:
        """Have somebody asked; a wave that is gone on with finds the question that it has asked."""
        run_id = flow_run.get_id() or ""
        again = await ended_before(run_id)
        go, done = len(self.plan.go), self.course.count("done")
        words = f"{go} of {len(self.plan.vms)} VMs go; {done} are done"
        try:
            asked = await arun_deployment(
                APPROVAL,
                parameters={"wave": self.plan.wave.name, "gate": gate, "words": words},
                timeout=0,
                as_subflow=False,
                idempotency_key=f"wave-{run_id}-gate-{gate}-{again}",
                tags=[TAG, tag_of(run_id), f"gate:{gate}"],
            )
        except ObjectNotFound as error:
            raise no_deployment(APPROVAL) from error
        get_run_logger().warning("waiting for an approval gate=%s flow_run=%s", gate, asked.id)
        return str(asked.id)

    async def _show(self, *, last: bool = False) -> None:
        seconds = time.monotonic() - self.started_at
        notes = [f"Waits for an approval: {gate} (/runs/flow-run/{run})" for gate, run in self._asked().items()]
        notes += [f"Paused: {self.paused}"] if self.paused else []
        body = course_as_markdown(self.course, now_s=seconds, notes=notes)
        if not last and (body == self._shown[0] or seconds - self._shown[1] < SHOW_EVERY_S):
            return
        self._shown = (body, seconds)
        if self._artifact is None:
            key = key_of("wave", self.plan.wave.name)
            self._artifact = await quietly(
                acreate_markdown_artifact(body, key=key, description="The wave as it stands")
            )
            return
        async with get_client() as client:
            await quietly(client.update_artifact(self._artifact, ArtifactUpdate(data=body)))

    def _asked(self) -> Mapping[str, str]:
        waiting = set(self.course.asks())
        return {gate: run for gate, run in self.gates.items() if gate in waiting}

    def _measured(self) -> Rates:
        """Return what this wave's runs say of the next: rate of a disk by road, where runs were long enough to tell."""
        before = self.plan.rates
        by_road: dict[str, list[float]] = {}
        for vm, taken in self.took:
            if seconds := self._of_transfer(taken):
                rate = vm.checked.bytes / seconds / vm.work.slots
                by_road.setdefault(vm.checked.road, []).append(rate)
        medians = {road: sorted(found)[len(found) // 2] for road, found in by_road.items()}
        short = sorted(taken for _, taken in self.took if not self._of_transfer(taken))
        start_s = short[len(short) // 2] if short else before.start_s
        return Rates(bytes_per_s=before.bytes_per_s | medians, start_s=start_s, runs=before.runs + len(self.took))

    def _of_transfer(self, seconds: float) -> float:
        """Return how long a run's bytes took of its seconds; 0 where it was too short to tell."""
        start_s = self.plan.rates.start_s
        return seconds - start_s if seconds > 2 * start_s else 0.0
