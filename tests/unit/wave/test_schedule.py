"""The scheduler by chance: limits are never exceeded, groups keep their order, all is done."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from tasks.wave.graph import all_before
from tasks.wave.schedule import RUNS, Scheduler, Work
from tasks.wave.simulate import Model, simulate

HOSTS, STORES = ("host:a", "host:b", "host:c"), ("datastore:x", "datastore:y")
GROUPS = ("", "db", "app")
AFTER = {"": (), "db": (), "app": ("db",)}


@st.composite
def works(draw: st.DrawFn) -> list[Work]:
    return [
        Work(
            key=f"vm-{number}",
            group=draw(st.sampled_from(GROUPS)),
            slots=draw(st.integers(1, 4)),
            seconds=draw(st.floats(1, 1000)),
            resources=(draw(st.sampled_from(HOSTS)), draw(st.sampled_from(STORES)), "vcenter"),
        )
        for number in range(draw(st.integers(0, 25)))
    ]


limits = st.fixed_dictionaries({each: st.integers(1, 4) for each in (*HOSTS, *STORES, "vcenter", RUNS)})


def taken(running: list[Work], slots: dict[str, int]) -> Counter[str]:
    """Return slots by resource as the works themselves have them: one that wants more than there are takes all."""
    used: Counter[str] = Counter()
    for work in running:
        used.update({each: min(work.slots, slots[each]) for each in work.resources} | {RUNS: 1})
    return used


@given(works=works(), slots=limits, chance=st.randoms(use_true_random=False))
def test_limits_hold_groups_wait_and_everything_is_done(works, slots, chance) -> None:
    scheduler, running, done = Scheduler(works, after=AFTER, limits=slots), [], set()
    while not scheduler.finished:
        running += scheduler.admit()
        used = taken(running, slots)
        assert all(used[each] <= slots[each] for each in slots), used
        assert running, "nothing runs, and something waits"
        for work in running:
            before = all_before(AFTER, work.group)
            assert {other.key for other in works if other.group in before} <= done
        ended = running.pop(chance.randrange(len(running)))
        scheduler.ended(ended.key, "done")
        done.add(ended.key)
    assert done == {work.key for work in works}
    assert all(scheduler.used(each) == 0 for each in slots)


@given(works=works(), slots=limits, failing=st.sets(st.integers(0, 25)))
def test_what_waits_for_a_failure_is_blocked_and_nothing_else(works, slots, failing) -> None:
    scheduler = Scheduler(works, after=AFTER, limits=slots)
    bad = {f"vm-{number}" for number in failing}
    while admitted := scheduler.admit():
        for work in admitted:
            scheduler.ended(work.key, "failed" if work.key in bad else "done")
    scheduler.block()
    spoilt = any(work.group == "db" and work.key in bad for work in works)
    for work in works:
        expected = "blocked" if spoilt and work.group == "app" else "failed" if work.key in bad else "done"
        assert scheduler.outcomes[work.key] == expected


def test_a_lowered_limit_ends_nothing_and_lets_nothing_more_start() -> None:
    works = [Work(key=f"vm-{number}", resources=("host:a",)) for number in range(6)]
    scheduler = Scheduler(works, limits={"host:a": 4})
    running = scheduler.admit()
    scheduler.limit("host:a", 2)
    for left in (3, 2):
        scheduler.ended(running.pop().key, "done")
        assert (len(scheduler.running), scheduler.admit()) == (left, [])
    scheduler.ended(running.pop().key, "done")
    assert len(scheduler.admit()) == 1


def test_the_longest_goes_first_and_hosts_are_filled_evenly() -> None:
    works = [
        Work(key=f"{host}-{seconds}", seconds=seconds, resources=(f"host:{host}", "vcenter"))
        for host in "ab"
        for seconds in (1, 5, 9)
    ]
    scheduler = Scheduler(works, limits={"host:a": 2, "host:b": 2, "vcenter": 2})
    assert {work.key for work in scheduler.admit()} == {"a-9", "b-9"}


def test_what_failed_can_be_tried_again_and_frees_what_waited_for_it() -> None:
    works = [Work(key="db", group="db"), Work(key="app", group="app")]
    scheduler = Scheduler(works, after=AFTER)
    scheduler.admit()
    scheduler.ended("db", "failed")
    assert scheduler.admit() == []
    scheduler.again("db")
    assert [work.key for work in scheduler.admit()] == ["db"]
    scheduler.ended("db", "done")
    assert [work.key for work in scheduler.admit()] == ["app"]


def test_a_fleet_is_simulated_within_a_tenth_of_the_bound() -> None:
    """Bound by the vCenter's limit, by a hot datastore, and by hosts: each is kept busy to the end."""
    cases = (
        (Model(vms=1500, hosts=60, datastores=8, total_bytes_per_s=2 << 30), 200, 10, 32),
        (Model(vms=1500, hosts=60, datastores=4, datastore_bytes_per_s=256 << 20), 200, 10, 64),
        (Model(vms=1500, hosts=12, datastores=12, host_bytes_per_s=100 << 20), 200, 10, 64),
    )
    for model, vcenter, host, store in cases:
        slots = model.limits(vcenter=vcenter, host=host, datastore=store)
        played = simulate(list(model.works()), limits=slots, bandwidth=model.bandwidth())
        assert played.vms == 1500
        assert 0 <= played.over < 0.1, (played.bottleneck, played.over)
