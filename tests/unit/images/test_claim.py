from __future__ import annotations

import json
import os
import time
from datetime import UTC, datetime, timedelta

import pytest

from tasks.images.claim import LOST_BEATS_S, Claim, judge
from tasks.images.job import LOCK, job_id, job_lock, machine_id

VCENTER, VM = "3f1c", "5012"
NOW = datetime.now(UTC)


@pytest.fixture
def folder(tmp_path):
    with job_lock(tmp_path, {}):
        pass
    return tmp_path


def claim(folder, **changes):
    fields = {"purpose": "export", "flow_run": "r", "expires": NOW - timedelta(hours=1), "machine": machine_id()}
    return Claim(**(fields | {"folder": str(folder)} | changes))


def judged(folder, said=None, *, vcenter=VCENTER, vm=VM, name=None):
    said = said or claim(folder)
    known = job_id(vcenter_uuid=vcenter, instance_uuid=vm, folder=folder, machine=said.machine)
    description = said if isinstance(said, str) else said.model_dump_json()
    return judge(
        name=name or f"hyper2kvm-{known}", description=description, vcenter_uuid=VCENTER, instance_uuid=VM, now=NOW
    )


def test_one_of_a_dead_job_whose_time_is_over_may_go(folder):
    assert judged(folder)[::2] == (True, folder)


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[]", "null", "{", "not json", '"hyper2kvm"', '{"tool": "hyper2kvm"}', "\ud800"],
    ids=range(9),
)
def test_a_description_that_is_not_ours_is_not_believed(folder, text):
    verdict = judge(name=f"hyper2kvm-{'0' * 32}", description=text, vcenter_uuid=VCENTER, instance_uuid=VM)
    assert not verdict.may_go and "not ours" in verdict.why


@pytest.mark.parametrize(
    "changes",
    [
        {"tool": "hyper2kvm-pro"},
        {"expires": "yesterday"},
        {"expires": "2020-01-01T00:00:00"},
        {"folder": 7},
        {"machine": None},
    ],
    ids=str,
)
def test_a_forged_field_makes_it_not_ours(folder, changes):
    said = json.loads(claim(folder).model_dump_json()) | changes
    known = job_id(vcenter_uuid=VCENTER, instance_uuid=VM, folder=folder)
    verdict = judge(
        name=f"hyper2kvm-{known}", description=json.dumps(said), vcenter_uuid=VCENTER, instance_uuid=VM, now=NOW
    )
    assert not verdict.may_go and "not ours" in verdict.why


@pytest.mark.parametrize("name", ["hyper2kvm-", "hyper2kvm-test", "hyper2kvm-" + "0" * 31, "Hyper2kvm-" + "0" * 32])
def test_a_similar_name_is_not_ours(folder, name):
    assert not judged(folder, name=name).may_go


def test_what_is_of_another_vm_vcenter_or_folder_is_not_ours(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    for verdict in (judged(folder, vcenter="4a"), judged(folder, vm="50ff"), judged(folder, claim(other))):
        assert not verdict.may_go and "not of the job" in verdict.why


def test_one_that_is_not_over_is_left(folder):
    verdict = judged(folder, claim(folder, expires=NOW + timedelta(minutes=1)))
    assert not verdict.may_go and "kept until" in verdict.why


def test_one_of_a_job_at_work_is_left(folder):
    with job_lock(folder, {"flow_run": "x"}):
        verdict = judged(folder)
    assert not verdict.may_go and "at work" in verdict.why


def test_where_the_folder_is_not_here_nothing_says_that_its_job_is_dead(tmp_path):
    verdict = judged(tmp_path / "unmounted")
    assert not verdict.may_go and "may be at work" in verdict.why


def test_a_version_that_did_not_say_where_is_left(folder):
    assert "remove it in vSphere" in judged(folder, claim(folder).model_copy(update={"machine": "", "folder": ""})).why


@pytest.mark.parametrize(
    ("silent_s", "names_it", "may_go"),
    [(LOST_BEATS_S + 60, True, True), (30, True, False), (LOST_BEATS_S + 60, False, False)],
)
def test_the_heartbeat_decides_of_a_job_on_another_machine(folder, silent_s, names_it, may_go):
    said = claim(folder, machine="other")
    known = job_id(vcenter_uuid=VCENTER, instance_uuid=VM, folder=folder, machine="other")
    (folder / LOCK).write_text(json.dumps({"snapshot": f"hyper2kvm-{known}" if names_it else "hyper2kvm-x"}))
    os.utime(folder / LOCK, (time.time() - silent_s,) * 2)
    assert judged(folder, said).may_go is may_go


@pytest.mark.parametrize(("silent_s", "may_go"), [(LOST_BEATS_S + 60, True), (30, False)])
def test_the_heartbeat_decides_of_a_job_in_another_container_that_shares_our_machine_id(folder, silent_s, may_go):
    (folder / LOCK).write_text(json.dumps({"host": "another-pod"}))
    os.utime(folder / LOCK, (time.time() - silent_s,) * 2)
    assert judged(folder).may_go is may_go
