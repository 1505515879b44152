"""What came of a wave: a value that its flow returns, and that a wave which is not all done carries in its error."""

from __future__ import annotations

from pathlib import Path

from tasks.facts import Finding
from tasks.models import Value
from tasks.wave.course import Course
from tasks.wave.plan import Plan, Planned
from tasks.wave.schedule import Outcome


class VmOutcome(Value):
    """One VM: what came of it, by which run, and why where that is not `done`. None: only planned."""

    name: str
    path: str
    group: str
    outcome: Outcome | None = None
    attempts: int = 0
    run_id: str = ""
    message: str = ""
    output: str = ""
    bytes: int = 0
    findings: tuple[Finding, ...] = ()


class WaveReport(Value):
    """What came of a wave. plan_csv: where the plan lies as CSV."""

    wave: str
    dry_run: bool
    vms: tuple[VmOutcome, ...]
    expected_s: float
    bound_s: float
    stopped: str = ""
    plan_csv: Path

    @classmethod
    def of_plan(cls, plan: Plan, csv: Path) -> WaveReport:
        """Return the report of a wave that was only planned."""
        vms = tuple(_planned(vm) for vm in plan.vms)
        return cls(
            wave=plan.wave.name,
            dry_run=True,
            vms=vms,
            expected_s=plan.expected_s,
            bound_s=plan.bound_s,
            plan_csv=csv,
        )

    @classmethod
    def of_course(cls, course: Course, csv: Path) -> WaveReport:
        """Return the report of a wave that is over."""
        report = cls.of_plan(course.plan, csv)
        vms = tuple(_ended(vm, course, planned.key) for vm, planned in zip(report.vms, course.plan.vms, strict=True))
        return report.model_copy(update={"dry_run": False, "vms": vms, "stopped": course.stopped})

    @property
    def complete(self) -> bool:
        """Whether every VM is done."""
        return all(vm.outcome == "done" for vm in self.vms)

    def count(self, outcome: Outcome) -> int:
        return sum(vm.outcome == outcome for vm in self.vms)

    def rest(self) -> str:
        """Return what became of those that are not done, in words."""
        kinds: tuple[Outcome, ...] = ("failed", "skipped", "refused", "blocked", "unstarted")
        words = [f"{self.count(kind)} {kind}" for kind in kinds if self.count(kind)]
        return ", ".join(words) + (f" ({self.stopped})" if self.stopped else "")


def _planned(vm: Planned) -> VmOutcome:
    checked = vm.checked
    return VmOutcome(
        name=checked.name,
        path=checked.path,
        group=vm.work.group,
        outcome=None if checked.go else "refused",
        output=checked.output,
        bytes=checked.bytes,
        findings=checked.findings,
    )


def _ended(vm: VmOutcome, course: Course, key: str) -> VmOutcome:
    attempt = course.attempts.get(key)
    told = {"attempts": attempt.number, "run_id": attempt.run_id, "message": attempt.message} if attempt else {}
    return vm.model_copy(update={"outcome": course.outcomes[key], **told})
