import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.errors import JobLocked
from tasks.images.job import LOCK, job_id, job_lock, machine_id

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
    assert "brave-fox" in (tmp_path / LOCK).read_text()
    with job_lock(tmp_path, {}):
        assert "brave-fox" not in (tmp_path / LOCK).read_text()


def test_a_holder_that_has_not_written_its_name_is_no_reason_to_crash(tmp_path: Path) -> None:
    with job_lock(tmp_path, {}) as path:
        path.write_text("")
        with pytest.raises(JobLocked, match="not written"), job_lock(tmp_path, {}):
            pass


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
