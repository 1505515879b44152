"""The course of a wave, by a clock that is given: canaries, gates, stop rules, retries, hard stop, a life before."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from tasks.facts import Checked, Finding, Preflight
from tasks.wave.choose import Listed, members
from tasks.wave.course import Attempt, Course
from tasks.wave.governor import QUIET_S, Governor
from tasks.wave.models import FailurePolicy, Wave
from tasks.wave.plan import Plan, Rates, plan_of
from tasks.wave.policy import stops
from tasks.wave.show import course_as_markdown, plan_as_csv, plan_as_markdown

NOW = datetime(2026, 11, 28, 12, tzinfo=UTC)
NO_GO = Finding(code="rdm", severity="no-go", reason="it is a raw device mapping", remedy="Map the LUN")


def plan(names: str, *, refused: str = "", **wave: Any) -> Plan:
    """Return the plan of VMs of one host each."""
    inventory = [Listed(moref=name, name=name, path=f"/DC/vm/{name}") for name in names.split()]
    made = Wave(**{"output_dir": "/d", "select": ["*"], **wave})
    found = members(made, inventory)
    checked = tuple(
        Checked(
            moref=each.vm.moref,
            name=each.vm.name,
            path=each.vm.path,
            mode="export",
            road="folder",
            host=f"esx-{each.vm.name}",
            datastores=("ds",),
            disks=1,
            bytes=1 << 30,
            output=f"/d/{each.vm.name}",
            findings=(NO_GO,) if each.vm.name in refused.split() else (),
        )
        for each in found
    )
    return plan_of(made, found, Preflight(vcenter="vc", created="", vms=checked), Rates(), NOW)


def started(course: Course, now: datetime = NOW) -> list[str]:
    names = []
    for vm in course.start(now):
        course.began(vm.key, f"run-{vm.key}-{course.next_number(vm.key)}")
        names.append(vm.key)
    return sorted(names)


def test_a_canary_goes_first_and_its_failure_stops_everything() -> None:
    course = Course(plan("a b c", canary=["b"]))
    assert started(course) == ["b"]
    course.ended("b", "failed", "DiskFull")
    assert started(course) == [] and course.over()
    assert dict(course.outcomes) == {"b": "failed", "a": "blocked", "c": "blocked"}
    assert course.stopped == "a canary failed"

    course = Course(plan("a b c", canary=["b"]))
    started(course)
    course.ended("b", "done")
    assert started(course) == ["a", "c"]


def test_a_refused_canary_lets_nothing_start() -> None:
    course = Course(plan("a b", canary=["b"], refused="b"))
    assert started(course) == [] and course.over()
    assert course.outcomes["a"] == "blocked"


def test_the_hard_stop_finishes_what_runs_and_starts_nothing_more() -> None:
    course = Course(plan("a b c", window={"stop": "18:00"}, limits={"runs": 1}))
    (first,) = started(course, NOW)
    course.ended(first, "done")
    (second,) = started(course, NOW + timedelta(hours=5, minutes=59))
    assert started(course, NOW + timedelta(hours=6)) == [] and not course.over()
    course.ended(second, "done")
    assert started(course, NOW + timedelta(hours=6, minutes=1)) == [] and course.over()
    assert (course.count("done"), course.count("unstarted")) == (2, 1)
    assert "hard stop" in course.stopped


def test_nothing_starts_before_the_window_opens() -> None:
    course = Course(plan("a", window={"start": "22:00"}))
    assert started(course, NOW) == [] and not course.over()
    assert started(course, NOW + timedelta(hours=10)) == ["a"]


def test_failures_stop_the_wave_by_count_and_by_share() -> None:
    assert stops(FailurePolicy(stop_after=2), failed=1, ended=5) == ""
    assert "2 VMs failed" in stops(FailurePolicy(stop_after=2), failed=2, ended=5)
    assert stops(FailurePolicy(stop_share=0.2), failed=9, ended=9) == ""  # too few to say
    assert "2 of 10" in stops(FailurePolicy(stop_share=0.2), failed=2, ended=10)
    assert stops(FailurePolicy(), failed=99, ended=99) == ""

    course = Course(plan("a b c d", limits={"runs": 2}, failure={"stop_after": 1}))
    for key in started(course):
        course.ended(key, "failed", "DiskFull")
    assert started(course) == [] and course.over()
    assert (course.count("failed"), course.count("unstarted")) == (2, 2)


def test_only_what_failed_is_tried_again_after_all_others() -> None:
    course = Course(plan("a b c", limits={"runs": 1}, failure={"retry_failed": 1}))
    order = []
    while not course.over():
        for key in started(course):
            order.append(key)
            course.ended(key, "failed" if key == "a" else "done", "why")
    assert order == ["a", "b", "c", "a"]
    assert course.attempts["a"].number == 2 and course.outcomes["a"] == "failed"


def test_a_life_before_is_gone_on_with_and_nothing_starts_twice() -> None:
    known = [
        Attempt(key="a", ending="done", run_id="1"),
        Attempt(key="b", run_id="2"),
        Attempt(key="c", ending="failed", run_id="3"),
    ]
    course = Course(plan("a b c d", limits={"runs": 2}), known=known)
    assert started(course) == ["d"]
    course.ended("b", "done")
    course.ended("d", "done")
    assert started(course) == [] and course.over()
    assert (course.count("done"), course.count("failed")) == (3, 1)

    course = Course(plan("a b c d"), known=known, more_attempts=1)
    assert started(course) == ["d"]
    for key in ("b", "d"):
        course.ended(key, "done")
    assert started(course) == ["c"] and course.attempts["c"].number == 2


def test_what_failed_before_a_retry_does_not_stop_it_and_what_fails_again_does() -> None:
    known = [Attempt(key=key, ending="failed", run_id=key) for key in "ab"]
    wave = plan("a b c", failure={"stop_after": 2}, limits={"runs": 3})
    assert started(Course(wave, known=known)) == [], "killed before it had stopped: the rule holds"
    course = Course(wave, known=known, more_attempts=1)
    assert started(course) == ["c"]
    course.ended("c", "done")
    assert started(course) == ["a", "b"]
    course.ended("a", "failed")
    assert not course.stopped
    course.ended("b", "failed")
    assert started(course) == [] and course.stopped == "2 VMs failed, and 2 are the limit"


def test_gates_hold_what_is_behind_them_until_somebody_says_so() -> None:
    groups = [{"name": "web", "select": ["w"], "after": ["db"], "approve": True}, {"name": "db", "select": ["d"]}]
    course = Course(plan("a w d", canary=["a"], groups=groups, approve_plan=True, approve_after_canary=True))
    assert (course.asks(), started(course), course.over()) == (["plan"], [], False)
    course.approved("plan")
    assert (course.asks(), started(course)) == ([], ["a"])
    course.ended("a", "done")
    assert (course.asks(), started(course)) == (["canaries"], [])
    course.approved("canaries")
    assert started(course) == ["d"]
    course.ended("d", "done")
    assert (course.asks(), started(course), course.over()) == (["group web"], [], False)
    course.refused("group web")
    assert started(course) == [] and course.over()
    assert course.outcomes["w"] == "unstarted"


def test_a_paused_resource_is_no_end() -> None:
    course = Course(plan("a"))
    course.limit("host:esx-a", 0)
    assert started(course) == [] and not course.over()
    course.limit("host:esx-a", 1)
    assert started(course) == ["a"]


def test_a_host_is_given_less_when_it_runs_short_and_one_more_after_a_while() -> None:
    governor = Governor(8)
    assert governor.took(1.0, now=0) == 8 and governor.took(1.9, now=1) == 8
    assert governor.took(2.1, now=2) == 4
    assert governor.short_of_memory(now=3) == 2
    assert governor.quiet(now=3 + QUIET_S / 2) == 2
    assert governor.quiet(now=3 + QUIET_S) == 3
    governor.raised_to(1)
    assert governor.short_of_memory(now=500) == 1


def test_a_plan_shows_who_does_not_go_and_why_and_a_picture() -> None:
    made = plan("a b=c", refused="b=c", groups=[{"name": "late", "select": ["b=c"]}])
    text, table = plan_as_markdown(made), plan_as_csv(made).splitlines()
    assert "1 go, 1 do not" in text and "raw device mapping" in text and "Map the LUN" in text
    assert "data:image/svg+xml;base64," in text
    assert len(table) == 3 and ",no-go," in table[2] and "rdm: it is a raw device mapping" in table[2]
    course = Course(made)
    started(course)
    assert "1 running" in course_as_markdown(course, now_s=1) and "| refused |" in course_as_markdown(course, now_s=1)


def test_a_csv_holds_no_formula() -> None:
    assert ",'=cmd()," in "," + plan_as_csv(plan("=cmd()")).splitlines()[1].replace(",/DC", ",/DC")


def test_the_end_and_what_it_hangs_on_are_told() -> None:
    made = plan(
        "a b c",
        limits={"runs": 2},
        groups=[{"name": "x", "select": ["c"], "after": ["y"]}, {"name": "y", "select": ["b"]}],
    )
    assert made.critical == ("b", "c")
    assert made.ends > NOW and made.expected_s >= made.bound_s > 0
