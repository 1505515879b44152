import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

from tasks import slots
from tasks.process import Stopped
from tasks.slots import halve, one_of

HOLDER = """
import sys
from pathlib import Path
from tasks.slots import one_of
with one_of(1, "esx1", folder=Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "LOOK_AGAIN_S", 0.01)


def test_who_comes_when_all_are_taken_waits_for_one(tmp_path: Path) -> None:
    got = threading.Event()

    def third() -> None:
        with one_of(2, "esx1", folder=tmp_path):
            got.set()

    with one_of(2, "esx1", folder=tmp_path):
        with ExitStack() as other:
            other.enter_context(one_of(2, "esx1", folder=tmp_path))
            waiting = threading.Thread(target=third)
            waiting.start()
            assert not got.wait(0.1)
        assert got.wait(10)
    waiting.join()


def test_another_host_has_its_own(tmp_path: Path) -> None:
    with one_of(1, "esx1", folder=tmp_path), one_of(1, "esx/2", folder=tmp_path):
        assert sorted(path.name for path in tmp_path.iterdir()) == ["esx1-0.slot", "esx_2-0.slot"]


def test_who_is_told_to_stop_stops_waiting(tmp_path: Path) -> None:
    stop = threading.Event()
    stop.set()
    with one_of(1, "esx1", folder=tmp_path), pytest.raises(Stopped):
        with one_of(1, "esx1", folder=tmp_path, stop=stop):
            pass


def test_a_process_that_is_killed_leaves_its_slot_free(tmp_path: Path) -> None:
    argv = [sys.executable, "-c", HOLDER, str(tmp_path)]
    holder = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout
    assert holder.stdout.readline() == b"held\n"
    holder.kill()
    holder.communicate()
    with one_of(1, "esx1", folder=tmp_path):
        pass


def test_there_are_fewer_for_a_while_where_the_source_bears_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [halve(10, "esx1", folder=tmp_path) for _ in range(5)] == [5, 2, 1, 1, 1]
    stop = threading.Event()
    with one_of(10, "esx1", folder=tmp_path):
        threading.Timer(0.1, stop.set).start()
        with pytest.raises(Stopped), one_of(10, "esx1", folder=tmp_path, stop=stop):
            pass
        with one_of(10, "esx2", folder=tmp_path):
            pass
    monkeypatch.setattr(slots, "FEWER_S", -1.0)
    halve(10, "esx1", folder=tmp_path)
    with one_of(10, "esx1", folder=tmp_path), one_of(10, "esx1", folder=tmp_path):
        pass
