"""The course of a wave under way: what may start now, what has ended, whose word is waited for, and when it is over.

It has no clock and starts nothing itself: the time and what has happened are told to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Literal

from tasks.models import Value
from tasks.wave.models import CANARY
from tasks.wave.plan import Plan, Planned, limits_of
from tasks.wave.policy import stops
from tasks.wave.schedule import RUNS, SPOILING, Outcome, Scheduler

Ending = Literal["done", "failed", "skipped"]
PLAN_GATE, CANARY_GATE = "plan", "canaries"


class Attempt(Value):
    """One run of a VM: its number from 1 on, what came of it (None: it is not over), and in what words."""

    key: str
    number: int = 1
    ending: Ending | None = None
    message: str = ""
    run_id: str = ""


class Course:
    """A wave under way.

    known: the attempts of this wave's life before, if it had one: what is done is not done again, what runs is
    counted as running. more_attempts: that VMs which failed are given beside those of the policy.
    """

    def __init__(self, plan: Plan, *, known: Iterable[Attempt] = (), more_attempts: int = 0) -> None:
        self.plan = plan
        self.vms: Mapping[str, Planned] = {vm.key: vm for vm in plan.vms}
        self.attempts: dict[str, Attempt] = {}
        self.stopped = ""
        self._forgiven: set[str] = set()  # failed in a life before that was gone on with: they do not stop this one
        self._most = 1 + plan.wave.failure.retry_failed + more_attempts
        works = [vm.work for vm in plan.vms]
        self._gates = self._of_plan()
        held = {group for groups in self._gates.values() for group in groups}
        self.scheduler = Scheduler(works, after=plan.after, limits=limits_of(plan.wave.limits, works), held=held)
        for vm in plan.vms:
            if not vm.checked.go:
                self.scheduler.ended(vm.key, "refused")
        for attempt in sorted(known, key=lambda each: each.number):
            self._remember(attempt)
        if more_attempts:
            self._forgiven = set(self._worth_another())

    # ── what is told ─────────────────────────────────────────────────────────────────────────────────

    def began(self, key: str, run_id: str) -> None:
        """A run of the VM was created."""
        self.attempts[key] = Attempt(key=key, number=self.next_number(key), run_id=run_id)

    def ended(self, key: str, ending: Ending, message: str = "") -> None:
        """The run of the VM is over."""
        self.attempts[key] = self.attempts[key].model_copy(update={"ending": ending, "message": message})
        self.scheduler.ended(key, ending)
        self._forgiven.discard(key)

    def approved(self, gate: str) -> None:
        """Somebody let the gate be passed."""
        del self._gates[gate]
        self._hold()

    def refused(self, gate: str) -> None:
        """Somebody did not: what is behind it is not started."""
        for group in self._gates.pop(gate):
            for key in [key for key in self.scheduler.waiting if self.vms[key].work.group == group]:
                self.scheduler.ended(key, "unstarted")
        self._hold()

    def stop(self, why: str) -> None:
        """Start nothing more; what runs is let finish. The first reason counts."""
        self.stopped = self.stopped or why

    def heed(self, now: datetime) -> None:
        """Stop where the hard stop has come, or too many have failed; also while nothing is to be started."""
        if self.plan.hours.closed(now):
            self.stop(f"the hard stop, {self.plan.hours.stop:%Y-%m-%d %H:%M %Z}, has come")
        self._heed_failures()

    def limit(self, resource: str, slots: int) -> None:
        """Take over how many slots a resource has from now on."""
        self.scheduler.limit(resource, slots)

    # ── what is asked ────────────────────────────────────────────────────────────────────────────────

    def next_number(self, key: str) -> int:
        """Return which attempt the VM's next is: 1 for one that has had none."""
        return self.attempts[key].number + 1 if key in self.attempts else 1

    def start(self, now: datetime, *, most: int | None = None) -> list[Planned]:
        """Return the VMs to start now; they count as running."""
        self.heed(now)
        if self.stopped or self.plan.hours.opens_in(now):
            return []
        admitted = self.scheduler.admit(**({"most": most} if most is not None else {}))
        if not admitted and not self.scheduler.running and not self.scheduler.startable:
            self._try_again()
            admitted = self.scheduler.admit()
        return [self.vms[work.key] for work in admitted]

    def asks(self) -> list[str]:
        """Return the gates that somebody must be asked to let through now."""
        return [] if self.stopped else [gate for gate, groups in self._gates.items() if self._at(gate, groups)]

    def over(self) -> bool:
        """Whether nothing runs and nothing more can start; what is left is given its outcome then."""
        if self.scheduler.running:
            return False
        if not self.stopped and (self.scheduler.startable or self.asks() or self._worth_another()):
            return False
        self.scheduler.block()
        for key in list(self.scheduler.waiting):
            self.scheduler.ended(key, "unstarted")
        return True

    @property
    def outcomes(self) -> Mapping[str, Outcome]:
        return self.scheduler.outcomes

    def count(self, *outcomes: Outcome) -> int:
        """Return how many VMs have one of these outcomes."""
        return sum(each in outcomes for each in self.outcomes.values())

    # ── inside ───────────────────────────────────────────────────────────────────────────────────────

    def _of_plan(self) -> dict[str, list[str]]:
        wave, groups = self.plan.wave, list(self.plan.after)
        canaries = [group for group in groups if _is_canary(group)]
        gates: dict[str, list[str]] = {}
        if wave.approve_plan:
            gates[PLAN_GATE] = groups
        if wave.approve_after_canary and canaries:
            gates[CANARY_GATE] = [group for group in groups if not _is_canary(group)]
        gates |= {f"group {group.name}": [group.name] for group in wave.groups if group.approve}
        return gates

    def _hold(self) -> None:
        self.scheduler.hold({group for groups in self._gates.values() for group in groups})

    def _at(self, gate: str, groups: Iterable[str]) -> bool:
        """Whether all that comes before a gate is done: it is asked for then, and not earlier."""
        if gate == PLAN_GATE:
            return True
        others = {each for other, its in self._gates.items() if other != gate for each in its}
        return any(self.scheduler.would_open(group) for group in groups if group not in others)

    def _remember(self, attempt: Attempt) -> None:
        key = attempt.key
        if key not in self.vms or self.outcomes.get(key) == "refused":
            return
        if self.outcomes.get(key) == "failed":
            self.scheduler.again(key)
        self.attempts[key] = attempt
        if key in self.scheduler.waiting:
            self.scheduler.resume(key)
        if attempt.ending:
            self.scheduler.ended(key, attempt.ending)

    def _heed_failures(self) -> None:
        canary = any(self.outcomes.get(vm.key) in SPOILING and vm.member.canary for vm in self.plan.vms)
        if canary and self._worth_another():
            canary = False
        failed = sum(each == "failed" and key not in self._forgiven for key, each in self.outcomes.items())
        ended = failed + self.count("done")
        if why := stops(self.plan.wave.failure, failed=failed, ended=ended, canary_failed=canary):
            self.stop(why)

    def _worth_another(self) -> list[str]:
        return [
            key for key, each in self.outcomes.items() if each == "failed" and self.attempts[key].number < self._most
        ]

    def _try_again(self) -> None:
        for key in self._worth_another():
            self.scheduler.again(key)


def _is_canary(group: str) -> bool:
    return group == CANARY or group.startswith(f"{CANARY} of ")


__all__ = ["CANARY_GATE", "PLAN_GATE", "RUNS", "Attempt", "Course", "Ending"]
