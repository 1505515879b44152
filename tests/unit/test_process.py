import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tasks.errors import ToolFailed
from tasks.process import LAST_LINES, LINE_BYTES, Stopped, child, run
from tests.waits import await_that

PARENT = """
import sys, time
from tasks.process import child
with child(["sh", "-c", "sleep 61 & echo $! $$; wait"]) as process:
    print(process.stdout.readline().decode(), flush=True)
    time.sleep(60)
"""


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_it_returns_what_was_printed() -> None:
    assert run(["sh", "-c", "echo one; echo two; echo noise >&2"]) == "one\ntwo"


def test_progress_in_one_line_is_seen_as_it_comes() -> None:
    seen: list[float] = []
    bar = "    (0.00/100%)\r    (50.25/100%)\r    (100.00/100%)\rdone\n"
    assert run(["printf", "%s", bar], progress=seen.append) == "done"
    assert seen == [0, 50.25, 100]


def test_a_message_with_a_percentage_is_a_message() -> None:
    with pytest.raises(ToolFailed, match="disk is 100% full"):
        run(["sh", "-c", "echo disk is 100% full >&2; exit 1"], progress=lambda _: None)


def test_a_line_without_end_takes_no_memory_and_stalls_nothing() -> None:
    said = run(python("import sys; sys.stdout.write('x' * 50_000_000)"))
    assert said == "x" * LINE_BYTES


def test_much_on_stderr_stalls_nothing_and_its_last_lines_are_kept() -> None:
    code = "import sys\nfor n in range(300_000): print('noise', n, file=sys.stderr)\nsys.exit(3)"
    with pytest.raises(ToolFailed) as raised:
        run(python(code), package="better")
    assert raised.value.status == 3
    assert len(raised.value.last_lines) == LAST_LINES
    assert raised.value.last_lines[-1] == "noise 299999"
    assert str(raised.value).splitlines()[0].endswith("failed with exit status 3: noise 299999")


def test_the_last_words_without_a_newline_are_kept() -> None:
    with pytest.raises(ToolFailed, match="exit status 1: oops"):
        run(["sh", "-c", "printf oops >&2; exit 1"])


def test_a_signal_is_named() -> None:
    with pytest.raises(ToolFailed, match="failed with signal 9"):
        run(["sh", "-c", "kill -9 $$"])


def test_a_program_that_is_not_there_is_named() -> None:
    with pytest.raises(ToolFailed, match=r"no-such-tool failed with exit status 127: .*not found. Install it-utils"):
        run(["no-such-tool"], package="it-utils")


def test_stop_ends_the_whole_group(tmp_path: Path) -> None:
    stop, told = threading.Event(), tmp_path / "pids"
    script = f"sleep 62 & echo $! $$ > {told}.new; mv {told}.new {told}; wait"

    def set_when_running() -> None:
        await_that(told.exists)
        stop.set()

    setter = threading.Thread(target=set_when_running)
    setter.start()
    started = time.monotonic()
    with pytest.raises(Stopped):
        run(["sh", "-c", script], stop=stop)
    assert time.monotonic() - started < 3
    setter.join()
    assert not any(map(alive, told.read_text().split()))


def test_a_program_that_ignores_sigterm_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.process.GRACE_S", 0.3)
    with child(["sh", "-c", "trap '' TERM; sleep 63 & echo $!; wait; wait"]) as process:
        assert process.stdout
        grandchild = process.stdout.readline().decode().strip()
    assert process.returncode == -9
    await_that(lambda: not alive(grandchild))


def test_a_deadline_ends_it() -> None:
    with pytest.raises(TimeoutError, match="sleep did not end within"):
        run(["sleep", "64"], timeout_s=0.3)


def test_a_grandchild_that_keeps_the_pipes_keeps_nobody_and_is_ended() -> None:
    started = time.monotonic()
    grandchild = run(["sh", "-c", "sleep 65 & echo $!"])
    assert time.monotonic() - started < 3
    await_that(lambda: not alive(grandchild))


def test_a_program_that_closes_its_pipes_is_waited_for() -> None:
    with pytest.raises(ToolFailed, match="exit status 4"):
        run(["sh", "-c", "exec >&- 2>&-; sleep 0.5; exit 4"])


def test_children_die_with_a_killed_parent() -> None:
    with subprocess.Popen(python(PARENT), stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        _, shell = parent.stdout.readline().split()
        assert alive(shell)
        parent.kill()
    await_that(lambda: not alive(shell))


def test_a_child_whose_parent_died_before_the_bond_was_made_does_not_start(tmp_path: Path) -> None:
    from tasks.process import dying_with_us

    argv = dying_with_us(["touch", str(tmp_path / "started")])
    subprocess.run([sys.executable, "-c", f"import subprocess; subprocess.run({argv!r})"], check=True)
    assert not (tmp_path / "started").exists()


def alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
