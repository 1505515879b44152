"""A wave's plan: who goes, who does not and why, in which order, how long it takes by rates that were measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from pydantic import Field

from tasks.facts import Checked, Finding, Preflight
from tasks.models import Value
from tasks.wave.choose import Member, canary_group, waits
from tasks.wave.graph import all_before
from tasks.wave.jobs import job_of, slots_of
from tasks.wave.models import Limits, Wave
from tasks.wave.schedule import RUNS, Work
from tasks.wave.simulate import Bandwidth, simulate
from tasks.wave.window import Hours, hours_of

MIB = 1 << 20
VCENTER = "vcenter"


class Rates(Value):
    """How fast disks of earlier waves came. bytes_per_s: of one disk, by road; start_s: of a run besides its bytes."""

    bytes_per_s: dict[str, float] = Field(default_factory=dict)
    start_s: float = 20.0
    runs: int = 0  # that were measured

    def of(self, road: str) -> float:
        return self.bytes_per_s.get(road, 60.0 * MIB)


class Planned(Value):
    """A VM of the plan. start_s, end_s: expected, from the wave's start on; both 0 for one that does not go."""

    checked: Checked
    member: Member
    work: Work
    start_s: float = 0.0
    end_s: float = 0.0

    @property
    def key(self) -> str:
        return self.work.key

    def job(self) -> Any:
        """Return the options of its run."""
        return member_job(self.member)


class Plan(Value):
    """Everything that a wave goes by, made once."""

    wave: Wave
    vcenter: str
    made: datetime
    hours: Hours
    vms: tuple[Planned, ...]
    after: dict[str, tuple[str, ...]]
    findings: tuple[Finding, ...] = ()
    rates: Rates = Rates()
    expected_s: float = 0.0
    bound_s: float = 0.0
    bottleneck: str = ""
    critical: tuple[str, ...] = ()

    @property
    def go(self) -> tuple[Planned, ...]:
        return tuple(vm for vm in self.vms if vm.checked.go)

    @property
    def ends(self) -> datetime:
        """When the wave is expected to end."""
        return self.made + timedelta(seconds=self.hours.opens_in(self.made) + self.expected_s)

    def late(self) -> tuple[Planned, ...]:
        """VMs that are not expected to start before the hard stop."""
        if not self.hours.stop:
            return ()
        begin = self.made + timedelta(seconds=self.hours.opens_in(self.made))
        return tuple(vm for vm in self.go if begin + timedelta(seconds=vm.start_s) >= self.hours.stop)


def limits_of(limits: Limits, works: Iterable[Work]) -> dict[str, int]:
    """Return slots by resource, of all resources that works name."""
    by_kind = {"host": limits.host, "datastore": limits.datastore, VCENTER: limits.vcenter}
    named = {each for work in works for each in work.resources}
    return {each: by_kind[each.partition(":")[0]] for each in named} | {RUNS: limits.runs}


def plan_of(wave: Wave, found: Sequence[Member], preflight: Preflight, rates: Rates, now: datetime) -> Plan:
    """Return the plan of a wave whose VMs have been checked, in the order of `found`. `now` has a time zone."""
    planned = [
        Planned(checked=checked, member=member, work=_work(member, checked, rates))
        for member, checked in zip(found, preflight.vms, strict=True)
    ]
    after = waits(wave, found)
    go = _hopeful(planned, after)
    limits = limits_of(wave.limits, go)
    played = simulate(go, limits=limits, bandwidth=_bandwidth(planned, rates), after=after)
    timed = tuple(
        vm.model_copy(update=dict(zip(("start_s", "end_s"), played.spans.get(vm.key, (0.0, 0.0)), strict=True)))
        for vm in planned
    )
    return Plan(
        wave=wave,
        vcenter=preflight.vcenter,
        made=now,
        hours=hours_of(wave.window, now),
        vms=timed,
        after=after,
        findings=preflight.findings,
        rates=rates,
        expected_s=played.wave_s,
        bound_s=played.bound_s,
        bottleneck=played.bottleneck,
        critical=_critical([vm for vm in timed if vm.end_s], after),
    )


def _work(member: Member, checked: Checked, rates: Rates) -> Work:
    slots = slots_of(member_job(member), checked.disks)
    stores = (f"datastore:{each}" for each in checked.datastores)
    return Work(
        key=checked.moref,
        group=canary_group(member.group) if member.canary else member.group,
        slots=slots,
        seconds=rates.start_s + checked.bytes / (slots * rates.of(checked.road)),
        bytes=checked.bytes,
        resources=(f"host:{checked.host}", *stores, VCENTER),
    )


def member_job(member: Member) -> Any:
    """Return the options of a member's run. Raises InvalidInput, NotBuilt."""
    return job_of(member.mode, member.vm.path, member.output_dir, member.options)


def _bandwidth(planned: Iterable[Planned], rates: Rates) -> Bandwidth:
    """Return the model that times are expected by: the slowest road's rate, for want of a better word of each host."""
    roads = {vm.checked.road for vm in planned if vm.checked.go} or {"folder"}
    return Bandwidth(disk=min(rates.of(road) for road in roads), start_s=rates.start_s)


def _hopeful(planned: Sequence[Planned], after: Mapping[str, tuple[str, ...]]) -> list[Work]:
    """Return the works that go, and wait for none that does not."""
    spoilt = {vm.work.group for vm in planned if not vm.checked.go}
    return [vm.work for vm in planned if vm.checked.go and not spoilt & all_before(after, vm.work.group)]


def _critical(vms: Sequence[Planned], after: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """Return the VMs that the end hangs on, in their order: each began when the one before it ended."""
    path: list[Planned] = []
    last = max(vms, key=lambda vm: vm.end_s, default=None)
    while last is not None:
        path.append(last)
        here, seen = last, {each.key for each in path}
        before = [vm for vm in vms if vm.key not in seen and vm.end_s <= here.start_s + 1e-6]
        groups = after.get(here.work.group, ())
        near = [vm for vm in before if vm.work.group in groups or _share(vm, here)]
        last = max(near, key=lambda vm: (vm.end_s, vm.work.group in groups), default=None)
    return tuple(vm.checked.name for vm in reversed(path))


def _share(one: Planned, other: Planned) -> bool:
    return bool(set(one.work.resources) & set(other.work.resources))
