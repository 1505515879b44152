from __future__ import annotations

import json
import os
import socket
import time

import pytest

from tasks.errors import JobLocked
from tasks.images.claim import LOST_BEATS_S
from tasks.images.job import LOCK, job_lock
from tasks.images.leftovers import clear_lock, drop_parts, left_job, left_jobs


@pytest.fixture
def job(tmp_path):
    """A folder as a killed run leaves it."""
    folder = tmp_path / "web"
    with job_lock(folder, {}):
        pass
    (folder / LOCK).write_text(json.dumps({"flow_run": "keen-owl", "flow_run_id": "1"}))
    for name in ("disk-0.journal", "disk-0.raw.part", "disk-0.digests.part", "notes.txt"):
        (folder / name).write_text("x")
    return folder


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_jobs_are_found_in_a_folder_of_copies_and_by_their_own_folder(job, tmp_path):
    (tmp_path / "somebody").mkdir()
    assert [each.folder for each in left_jobs(tmp_path)] == [each.folder for each in left_jobs(job)] == [job]


def test_what_a_dead_run_left_is_dropped_and_nothing_else(job):
    left = left_job(job)
    assert left.idle_s is not None and not left.finished and left.holder["flow_run"] == "keen-owl"
    drop_parts(job, left.holder)
    assert names(job) == {LOCK, "notes.txt"}
    assert left_job(job).holder == {} and left_job(job).idle_s is None


def test_a_finished_copy_or_a_torn_one_says_so(job):
    (job / "disk-0.dirty").write_text("{}")
    assert "sync" in left_job(job).finished
    (job / "disk-0.dirty").unlink()
    (job / "manifest.json").write_text("{}")
    assert "finished" in left_job(job).finished


def test_a_job_at_work_keeps_its_parts_and_its_lock(job):
    with job_lock(job, {"flow_run": "live"}):
        assert left_job(job).held
        for work in (drop_parts, clear_lock):
            with pytest.raises(JobLocked):
                work(job, {})
    assert "disk-0.raw.part" in names(job)


def test_the_name_of_a_dead_run_is_taken_out_of_its_lock(job):
    clear_lock(job, left_job(job).holder)
    assert (job / LOCK).read_text() == "" and "disk-0.journal" in names(job)


@pytest.mark.parametrize(
    ("host", "silent_s", "beats"),
    [("another", 30, True), ("another", LOST_BEATS_S + 60, False), (socket.gethostname(), 30, False)],
)
def test_a_job_of_another_machine_whose_heart_beats_counts_as_at_work(job, host, silent_s, beats):
    (job / LOCK).write_text(json.dumps({"flow_run": "keen-owl", "host": host}))
    os.utime(job / LOCK, (time.time() - silent_s,) * 2)
    assert left_job(job).held is beats
