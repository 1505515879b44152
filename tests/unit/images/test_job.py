import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tasks.errors import JobLocked
from tasks.images.job import LOCK, job_id, job_lock, last_holder, lock_holder, machine_id, nobody_at_work

HOLDING = """
import sys, time
from pathlib import Path
from tasks.images.job import job_lock
with job_lock(Path(sys.argv[1]), {"flow_run": "brave-fox"}):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_run_is_refused_and_told_who_is_at_work(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "vm"
    with (
        job_lock(folder, {"flow_run": "brave-fox"}) as path,
        pytest.raises(JobLocked, match="flow_run brave-fox, pid") as raised,
        job_lock(folder, {}),
    ):
        pass
    assert path == folder / LOCK
    assert str(os.getpid()) in raised.value.holder
    with job_lock(folder, {}):
        assert json.loads(path.read_text())["pid"] == str(os.getpid())


def test_the_lock_of_a_killed_holder_is_taken_over(tmp_path: Path) -> None:
    argv = [sys.executable, "-c", HOLDING, str(tmp_path)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(JobLocked, match=f"pid {holder.pid}"), job_lock(tmp_path, {}):
            pass
        holder.send_signal(signal.SIGKILL)
    assert lock_holder(tmp_path) is None
    assert (last_holder(tmp_path) or {})["flow_run"] == "brave-fox"
    with job_lock(tmp_path, {}):
        assert "brave-fox" not in (tmp_path / LOCK).read_text()


def test_a_holder_that_has_not_written_its_name_is_no_reason_to_crash(tmp_path: Path) -> None:
    with job_lock(tmp_path, {}) as path:
        path.write_text("")
        assert (lock_holder(tmp_path), last_holder(tmp_path)) == ({}, None)
        with pytest.raises(JobLocked, match="not written"), job_lock(tmp_path, {}):
            pass


def test_who_holds_it_is_known_and_who_ended_it_properly_is_forgotten(tmp_path: Path) -> None:
    assert (lock_holder(tmp_path / "none"), last_holder(tmp_path / "none")) == (None, None)
    with job_lock(tmp_path, {"flow_run": "brave-fox"}):
        assert (lock_holder(tmp_path) or {})["flow_run"] == "brave-fox"
        assert last_holder(tmp_path) is None
    with pytest.raises(ZeroDivisionError), job_lock(tmp_path, {"flow_run": "brave-fox"}):
        _ = 1 / 0
    assert (lock_holder(tmp_path), last_holder(tmp_path)) == (None, None)


def test_somebody_who_looks_keeps_nobody_out(tmp_path: Path) -> None:
    ended = threading.Event()

    def look() -> None:
        while not ended.is_set():
            lock_holder(tmp_path)

    looking = threading.Thread(target=look)
    looking.start()
    try:
        for _ in range(200):
            with job_lock(tmp_path, {}):
                pass
    finally:
        ended.set()
        looking.join()


def test_the_lock_file_is_touched_while_held(tmp_path: Path) -> None:
    with job_lock(tmp_path, {"flow_run": "brave-fox"}, heartbeat_s=0.01) as path:
        os.utime(path, (0, 0))
        deadline = time.monotonic() + 5
        while path.stat().st_mtime == 0:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        assert (lock_holder(tmp_path) or {})["flow_run"] == "brave-fox"


def test_a_job_is_vcenter_vm_machine_and_folder() -> None:
    parts = {"vcenter_uuid": "V", "instance_uuid": "I", "folder": Path("/data/x"), "machine": "m"}
    same = job_id(**parts)  # type: ignore[arg-type]
    assert len(same) == 32
    assert job_id(**{**parts, "vcenter_uuid": "v"}) == same  # type: ignore[arg-type]
    for field, other in {"vcenter_uuid": "W", "instance_uuid": "J", "folder": Path("/data/y"), "machine": "n"}.items():
        assert job_id(**{**parts, field: other}) != same  # type: ignore[arg-type]


def test_parts_that_run_together_are_different_jobs() -> None:
    one = job_id(vcenter_uuid="ab", instance_uuid="c", folder=Path("/"), machine="m")
    assert one != job_id(vcenter_uuid="a", instance_uuid="bc", folder=Path("/"), machine="m")


def test_a_machine_without_id_is_known_by_its_name(tmp_path: Path) -> None:
    assert machine_id(tmp_path / "none")
    (tmp_path / "empty").write_text("\n")
    assert machine_id(tmp_path / "empty") == machine_id(tmp_path / "none")
    (tmp_path / "some").write_text("abc\n")
    assert machine_id(tmp_path / "some") == "abc"


def test_who_only_reads_is_refused_while_a_run_is_at_work_and_keeps_one_off_meanwhile(tmp_path: Path) -> None:
    with (
        job_lock(tmp_path, {"flow_run": "brave-fox"}),
        pytest.raises(JobLocked, match="flow_run brave-fox"),
        nobody_at_work(tmp_path),
    ):
        pass
    with nobody_at_work(tmp_path), nobody_at_work(tmp_path):
        with pytest.raises(JobLocked, match="only reads"), job_lock(tmp_path, {}):
            pass
    with job_lock(tmp_path, {}):
        pass


def test_who_only_reads_needs_no_lock_file_and_makes_none(tmp_path: Path) -> None:
    with nobody_at_work(tmp_path), nobody_at_work(tmp_path / "none"):
        assert not list(tmp_path.iterdir())
    with pytest.raises(BlockingIOError), nobody_at_work(tmp_path):
        raise BlockingIOError
