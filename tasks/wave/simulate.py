"""A wave played through by its own scheduler against a model of hosts and datastores: how long, how near to the bound.

Transfers share what they pass through: a disk has `disk_bytes_per_s` at most, those of a host or datastore share its
bandwidth evenly, and all together keep to the vCenter's.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence

from pydantic import Field

from tasks.models import Value
from tasks.wave.graph import all_before
from tasks.wave.schedule import RUNS, Scheduler, Work

GIB = 1 << 30
MIB = 1 << 20
TOTAL = "vcenter"


class Bandwidth(Value):
    """What the model's parts carry, in bytes a second. resources: by name; what is not named is no bottleneck."""

    disk: float = 64 * MIB
    resources: Mapping[str, float] = Field(default_factory=dict)
    start_s: float = 20.0  # of a run, before its first byte: process, login, snapshot


class Simulation(Value):
    """What came of playing a wave. busy: of each host, the share of its bandwidth used. bound_s: see `bound`."""

    vms: int
    bytes: int
    wave_s: float
    bound_s: float
    bottleneck: str
    busy: dict[str, float]
    seconds: float  # that the simulation itself took
    spans: dict[str, tuple[float, float]] = Field(default_factory=dict)

    @property
    def over(self) -> float:
        """How much longer the wave takes than the bound, as a share."""
        return self.wave_s / self.bound_s - 1 if self.bound_s else 0.0


def simulate(
    works: Sequence[Work],
    *,
    limits: Mapping[str, int],
    bandwidth: Bandwidth,
    after: Mapping[str, Sequence[str]] | None = None,
) -> Simulation:
    """Play a wave in which nothing fails. Raises no error; what can never start is not in `spans`."""
    began = time.perf_counter()
    scheduler = Scheduler(works, after=after, limits=limits)
    flows, spans = _Flows(bandwidth), dict[str, tuple[float, float]]()
    now, starts = 0.0, dict[str, float]()
    while True:
        for work in scheduler.admit():
            flows.add(work)
            starts[work.key] = now
        if not flows.left:
            break
        step, ended = flows.advance()
        now += step
        for key in ended:
            spans[key] = (starts[key], now)
            scheduler.ended(key, "done")
    bottleneck, bound_s = bound(works, limits=limits, bandwidth=bandwidth, after=after)
    return Simulation(
        vms=len(spans),
        bytes=sum(work.bytes for work in works if work.key in spans),
        wave_s=now,
        bound_s=bound_s,
        bottleneck=bottleneck,
        busy=_busy(works, now, bandwidth),
        seconds=time.perf_counter() - began,
        spans=spans,
    )


class _Flows:
    """Transfers under way, and how fast each goes just now. `left`: bytes by key."""

    def __init__(self, bandwidth: Bandwidth) -> None:
        self._bandwidth = bandwidth
        self._work: dict[str, Work] = {}
        self._slots: dict[str, int] = {}  # in use, by resource
        self._members: dict[str, set[str]] = {}
        self._rate: dict[str, float] = {}  # as hosts and datastores let it
        self._stale: set[str] = set()  # whose rate is to be worked out anew
        self._waits: dict[str, float] = {}  # seconds until the first byte
        self.left: dict[str, float] = {}

    def add(self, work: Work) -> None:
        self._work[work.key], self.left[work.key] = work, float(work.bytes)
        self._waits[work.key] = self._bandwidth.start_s
        self._changed(work, work.slots)

    def advance(self) -> tuple[float, list[str]]:
        """Let time pass until the next transfer begins or ends; return how much, and what ended."""
        rate, left, waits = self._rates(), self.left, self._waits
        moving = [(left[key] / rate[key], key) for key in left if key not in waits]
        scale = self._scale(sum(rate[key] for _, key in moving))
        first = min(moving)[0] / scale if moving else float("inf")
        step = min(first, min(waits.values(), default=first))
        ended = []
        for _, key in moving:
            left[key] -= step * scale * rate[key]
            if left[key] < 1:
                ended.append(key)
        for key, wait in list(waits.items()):
            if wait - step < 1e-9:
                del waits[key]
            else:
                waits[key] = wait - step
        for key in ended:
            self._remove(key)
        return step, ended

    def _remove(self, key: str) -> None:
        work = self._work.pop(key)
        del self.left[key], self._rate[key]
        self._changed(work, -work.slots)

    def _changed(self, work: Work, slots: int) -> None:
        for each in work.resources:
            if each != TOTAL and each in self._bandwidth.resources:
                members = self._members.setdefault(each, set())
                members.add(work.key) if slots > 0 else members.discard(work.key)
                self._slots[each] = self._slots.get(each, 0) + slots
                self._stale |= members
        if slots > 0:
            self._stale.add(work.key)
        else:
            self._stale.discard(work.key)

    def _rates(self) -> dict[str, float]:
        have, cap = self._bandwidth.resources, self._bandwidth.disk
        for key in self._stale:
            work = self._work[key]
            shares = (have[each] / self._slots[each] for each in work.resources if each in self._slots)
            self._rate[key] = work.slots * min([cap, *shares])
        self._stale = set()
        return self._rate

    def _scale(self, wanted: float) -> float:
        """Return which share of the rates all together can have."""
        most = self._bandwidth.resources.get(TOTAL, wanted)
        return min(1.0, most / wanted) if wanted else 1.0


def bound(
    works: Iterable[Work],
    *,
    limits: Mapping[str, int],
    bandwidth: Bandwidth,
    after: Mapping[str, Sequence[str]] | None = None,
) -> tuple[str, float]:
    """Return the bottleneck, and the seconds that no schedule can beat: the most of bytes ÷ bandwidth.

    Of each host, datastore and vCenter with what its limit lets through (slots times the rate of a disk), of each VM
    by itself, and of chains of groups by their longest VMs.
    """
    bytes_on: dict[str, int] = {}
    alone: dict[str, float] = {}
    for work in works:
        for each in (*work.resources, RUNS):
            bytes_on[each] = bytes_on.get(each, 0) + work.bytes
        seconds = bandwidth.start_s + work.bytes / (work.slots * bandwidth.disk)
        alone[work.group] = max(alone.get(work.group, 0.0), seconds)
    found = {
        each: count / through for each, count in bytes_on.items() if (through := _through(each, limits, bandwidth))
    }
    chains = {
        f"groups up to {group}" if group else "the longest VM": sum(
            alone.get(each, 0.0) for each in (*_chain(after or {}, group, alone), group)
        )
        for group in alone
    }
    most = found | chains
    name = max(most, key=lambda each: most[each], default="")
    return name, most.get(name, 0.0)


def _chain(after: Mapping[str, Sequence[str]], group: str, alone: Mapping[str, float]) -> list[str]:
    """Return the groups on the longest way to `group`."""
    ways = [[*_chain(after, each, alone), each] for each in after.get(group, ()) if each not in all_before(after, each)]
    return max(ways, key=lambda way: sum(alone.get(each, 0.0) for each in way), default=[])


def _through(resource: str, limits: Mapping[str, int], bandwidth: Bandwidth) -> float:
    """Return what passes through a resource at most, by bandwidth or by slots; 0 where nothing is known of it."""
    by_slots = limits[resource] * bandwidth.disk if resource in limits and resource != RUNS else 0.0
    return min((each for each in (by_slots, bandwidth.resources.get(resource, 0.0)) if each), default=0.0)


def _busy(works: Iterable[Work], wave_s: float, bandwidth: Bandwidth) -> dict[str, float]:
    moved: dict[str, int] = {}
    for work in works:
        for each in work.resources:
            if each.startswith("host:"):
                moved[each] = moved.get(each, 0) + work.bytes
    have = bandwidth.resources
    return {each: count / wave_s / have[each] for each, count in moved.items() if each in have and wave_s}


class Model(Value):
    """A fleet to simulate with. Sizes are drawn from a lognormal distribution, as VM sizes tend to be."""

    vms: int = 10_000
    hosts: int = 300
    datastores: int = 40
    median_bytes: int = 60 * GIB
    host_bytes_per_s: float = 284 * MIB  # 20 VMs of one ESXi host, measured by others
    datastore_bytes_per_s: float = 1024 * MIB
    total_bytes_per_s: float = 10 * GIB
    seed: int = 1

    def bandwidth(self) -> Bandwidth:
        hosts = {f"host:{number}": self.host_bytes_per_s for number in range(self.hosts)}
        stores = {f"datastore:{number}": self.datastore_bytes_per_s for number in range(self.datastores)}
        return Bandwidth(resources=hosts | stores | {TOTAL: self.total_bytes_per_s})

    def works(self, *, disk_bytes_per_s: float = Bandwidth().disk) -> Iterator[Work]:
        """Yield the VMs, hosts and datastores unevenly filled."""
        chance = random.Random(self.seed)
        for number in range(self.vms):
            size = min(int(chance.lognormvariate(0, 0.9) * self.median_bytes), 4096 * GIB)
            host = int(self.hosts * chance.random() ** 1.15)
            store = int(self.datastores * chance.random() ** 1.15)
            disks = chance.choice((1, 1, 1, 2, 2, 3))
            slots = min(2, disks)
            yield Work(
                key=f"vm-{number}",
                slots=slots,
                bytes=size,
                seconds=size / (slots * disk_bytes_per_s),
                resources=(f"host:{host}", f"datastore:{store}", TOTAL),
            )

    def limits(self, *, vcenter: int, host: int, datastore: int) -> dict[str, int]:
        """Return slots by resource; as many VMs at once as the disks let."""
        return (
            {f"host:{number}": host for number in range(self.hosts)}
            | {f"datastore:{number}": datastore for number in range(self.datastores)}
            | {TOTAL: vcenter, RUNS: vcenter}
        )
