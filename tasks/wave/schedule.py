"""Who starts next: the longest first, spread over hosts and datastores, within limits, groups in their order.

The same scheduler runs waves and their simulation. It knows no time and starts nothing: it is asked what may start,
and told what has ended.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Mapping
from typing import Literal

from tasks.models import Value

RUNS = "runs"  # the resource that every VM takes one slot of, whatever disks it has
LOOKED_AT, RESOURCES = 8, 24  # candidates of a resource, and resources, looked at while something runs
DEEP = 1_000_000

Outcome = Literal["done", "failed", "skipped", "blocked", "refused", "unstarted"]
SPOILING = ("failed", "refused", "blocked", "unstarted")  # what no group after it starts on


class Work(Value):
    """One VM to be migrated. slots: disks copied at once. resources: what each of them takes one slot of.

    `seconds`: how long it is expected to take.
    """

    key: str
    group: str = ""
    slots: int = 1
    seconds: float = 0.0
    bytes: int = 0
    resources: tuple[str, ...] = ()


class Scheduler:
    """Admits works as slots come free.

    after: by group, the groups that must be done before. limits: slots by resource; one that is not named has none.
    held: see `hold`. A VM that wants more slots than a resource has at all takes them all. Lowering a limit ends
    nothing: what runs is let finish.
    """

    def __init__(
        self,
        works: Iterable[Work],
        *,
        after: Mapping[str, Collection[str]] | None = None,
        limits: Mapping[str, int] | None = None,
        held: Collection[str] = (),
    ) -> None:
        self._works = {work.key: work for work in works}
        self._after = {group: frozenset(others) for group, others in (after or {}).items()}
        self._limits = dict(limits or {})
        self._used: dict[str, int] = {}
        self._load: dict[str, float] = {}
        self._queues: dict[str, list[str]] = {}
        self._taken: dict[str, dict[str, int]] = {}
        of_each = [set(work.resources) for work in self._works.values()]
        self._everywhere = set.intersection(*of_each) if of_each else set()
        self._left: dict[str, int] = {}
        self._open: set[str] = set()
        self._spoilt: set[str] = set()
        self._held = frozenset(held)
        self.waiting: set[str] = set(self._works)
        self.outcomes: dict[str, Outcome] = {}
        for work in self._works.values():
            self._left[work.group] = self._left.get(work.group, 0) + 1
        for group in self._after:
            self._left.setdefault(group, 0)
        self._open_groups()

    @property
    def running(self) -> Collection[str]:
        """Keys of what was admitted and has not ended."""
        return self._taken.keys()

    @property
    def finished(self) -> bool:
        """Whether nothing runs, and nothing waits that can ever start."""
        return not self._taken and not self.waiting

    @property
    def startable(self) -> bool:
        """Whether something waits for slots alone."""
        return any(
            self._works[key].group in self._open and self.is_open(self._works[key].group) for key in self.waiting
        )

    def used(self, resource: str) -> int:
        """Slots of a resource that are taken now."""
        return self._used.get(resource, 0)

    def limit(self, resource: str, slots: int) -> None:
        """Set how many slots a resource has from now on; 0 lets nothing more start on it."""
        self._limits[resource] = slots

    def is_open(self, group: str) -> bool:
        """Whether all that a group waits for is done, and nobody holds it."""
        return group not in self._held and self.would_open(group)

    def would_open(self, group: str) -> bool:
        """Whether all that a group waits for is done."""
        before = self._after.get(group, ())
        return all(self._left.get(each, 0) == 0 and each not in self._spoilt for each in before)

    def hold(self, groups: Collection[str]) -> None:
        """Have these groups, and no others, wait for a word of somebody's beside what they wait for anyway."""
        self._held = frozenset(groups)
        self._open_groups()

    def admit(self, *, most: int = DEEP) -> list[Work]:
        """Return what may start now, counted as running from now on; at most so many."""
        admitted: list[Work] = []
        while len(admitted) < most and (work := self._pick()):
            self._start(work)
            admitted.append(work)
        return admitted

    def resume(self, key: str) -> None:
        """Count a work as running that was started before this scheduler was made, whatever the limits say."""
        self._start(self._works[key])

    def ended(self, key: str, outcome: Outcome) -> None:
        """Say what came of a work that runs, or that waits and is not to be started."""
        work = self._works[key]
        for resource, slots in self._taken.pop(key, {}).items():
            self._used[resource] -= slots
        if key in self.waiting:
            self._leave_queue(work)
        self.outcomes[key] = outcome
        self._left[work.group] -= 1
        if outcome in SPOILING:
            self._spoilt.add(work.group)
        if self._left[work.group] == 0:
            self._open_groups()

    def again(self, key: str) -> None:
        """Have a work that failed wait once more. Its group is not spoilt by it any more."""
        del self.outcomes[key]
        group = self._works[key].group
        self._left[group] += 1
        if not any(each in SPOILING and self._works[other].group == group for other, each in self.outcomes.items()):
            self._spoilt.discard(group)
        self.waiting.add(key)
        if group in self._open:
            self._enqueue([self._works[key]])

    def block(self) -> list[str]:
        """Give up what waits for groups that were not all done; return it. Not before retries are over."""
        blocked: list[str] = []
        while now := [key for key in self.waiting if self._hopeless(self._works[key].group)]:
            for key in now:
                self.ended(key, "blocked")
            blocked += now
        return sorted(blocked)

    def _hopeless(self, group: str) -> bool:
        return any(each in self._spoilt for each in self._after.get(group, ()))

    def _open_groups(self) -> None:
        """Queue the works of groups that have become open: each in the queue of every resource, longest first."""
        fresh = {group for group in self._left if group not in self._open and self.is_open(group)}
        self._open |= fresh
        self._enqueue(work for work in self._works.values() if work.group in fresh and work.key in self.waiting)

    def _enqueue(self, works: Iterable[Work]) -> None:
        touched = set()
        for work in works:
            for resource in self._queued_by(work):
                self._queues.setdefault(resource, []).append(work.key)
                self._load[resource] = self._load.get(resource, 0.0) + work.slots * work.seconds
                touched.add(resource)
        for resource in touched:
            waiting = {key for key in self._queues[resource] if key in self.waiting}
            self._queues[resource] = sorted(waiting, key=lambda key: (-self._works[key].seconds, key))

    def _queued_by(self, work: Work) -> tuple[str, ...]:
        return work.resources or (RUNS,)

    def _pick(self) -> Work | None:
        """Return the longest that fits, of the resource that has most before it for the slots it has in use.

        Where something runs, only the most loaded resources and the longest of each are looked at: what ends soon
        makes room for the rest. Where nothing does, all are.
        """
        room = min((self._limits.get(each, DEEP) - self.used(each) for each in self._everywhere), default=DEEP)
        if room <= 0 or not self._free(RUNS):
            return None
        used, loads = self._used, self._load
        scores = [
            (loads[resource] / (1 + used.get(resource, 0)), resource)
            for resource, queue in self._queues.items()
            if queue and used.get(resource, 0) < self._limits.get(resource, DEEP)
        ]
        depth, width = (LOOKED_AT, RESOURCES) if self._taken else (DEEP, DEEP)
        for _, resource in heapq.nlargest(width, scores):
            for work in self._candidates(resource, depth):
                if (work.slots <= room or not self._taken) and self._fits(work):
                    return work
        return None

    def _candidates(self, resource: str, depth: int) -> list[Work]:
        queue = self._queues[resource]
        if any(key not in self.waiting for key in queue[:depth]):
            queue[:] = [key for key in queue if key in self.waiting]
        return [self._works[key] for key in queue[:depth]]

    def _fits(self, work: Work) -> bool:
        for each in work.resources:
            limit, used = self._limits.get(each, DEEP), self._used.get(each, 0)
            if used >= limit or used + min(work.slots, limit) > limit:
                return False
        return True

    def _free(self, resource: str) -> bool:
        return self._used.get(resource, 0) < self._limits.get(resource, DEEP)

    def _slots(self, work: Work, resource: str) -> int:
        return min(work.slots, max(1, self._limits.get(resource, DEEP)))

    def _start(self, work: Work) -> None:
        taken = {each: self._slots(work, each) for each in work.resources} | {RUNS: 1}
        for resource, slots in taken.items():
            self._used[resource] = self._used.get(resource, 0) + slots
        self._leave_queue(work)
        self._taken[work.key] = taken

    def _leave_queue(self, work: Work) -> None:
        self.waiting.discard(work.key)
        if work.group in self._open:
            for resource in self._queued_by(work):
                self._load[resource] = max(0.0, self._load.get(resource, 0.0) - work.slots * work.seconds)
