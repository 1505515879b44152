"""The command line as a person or a script meets it: exit status, what is printed where, Ctrl-C, no traceback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.labs import ROOT
from tests.runs import assert_nothing_left, command, faults, run_command

pytestmark = [pytest.mark.live]


def no_traceback(done: subprocess.CompletedProcess[str]) -> bool:
    return "Traceback" not in done.stdout + done.stderr


def test_help_starts_no_server_and_names_the_flags(lab):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "hyper2kvm", "vsphere", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 0
    for flag in ("--vcenter", "--username", "--password-file", "--vs-action", "--vs-vm-name", "--output-dir", "--json"):
        assert flag in done.stdout
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not {"prefect", "pyVmomi", "httpx"} & loaded


def test_vms_are_listed_without_prefect(lab):
    done = run_command(lab, "list-vms", env={"PREFECT_API_URL": "http://127.0.0.1:9/api"})
    assert (done.returncode, done.stderr) == (0, "")
    vm = lab.vm("demo")
    assert done.stdout == f"{vm['path']}\t{vm['moref']}\tpoweredOn\n"
    assert_nothing_left(lab)


def test_vms_are_listed_as_json_and_by_glob(lab):
    done = run_command(lab, "list-vms", "d*o", "--json")
    assert json.loads(done.stdout) == {
        "path": lab.vm("demo")["path"],
        "moref": lab.vm("demo")["moref"],
        "power": "poweredOn",
    }
    assert run_command(lab, "list-vms", "x*").stdout == ""
    assert run_command(lab, "list-vms", "/DC/vm/production/*").stdout.count("\n") == 1


def test_an_export_prints_its_summary_and_ends_with_0(lab, tmp_path, api):
    words = ("--vs-vm-name", "demo", "--output-dir", str(tmp_path))
    done = run_command(lab, "export-vm", *words, env=api)
    assert done.returncode == 0, done.stderr
    assert "disk-0.qcow2" in done.stdout
    assert "verified" in done.stdout
    assert no_traceback(done)
    assert_nothing_left(lab)


def test_an_export_with_json_prints_its_manifest_and_its_digests_are_of_the_hash_asked_for(lab, tmp_path, api):
    words = ("--vs-vm-name", "demo", "--output-dir", str(tmp_path), "--json", "--format", "raw", "--digest", "sha256")
    done = run_command(lab, "export-vm", *words, env=api)
    manifest = json.loads(done.stdout)
    assert manifest == json.loads((tmp_path / "demo" / "manifest.json").read_text())
    assert all(disk["digest"].startswith("sha256:") for disk in manifest["disks"])
    verified = run_command(lab, "verify", str(tmp_path / "demo"), env=api)
    assert verified.returncode == 0, verified.stderr


def test_without_a_server_a_temporary_one_is_started_and_ends_with_us(lab, tmp_path):
    home = {"PREFECT_HOME": str(tmp_path / "home"), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    words = ("--vs-vm-name", "demo", "--output-dir", str(tmp_path), "--format", "raw")
    done = run_command(lab, "export-vm", *words, env=home)
    assert done.returncode == 0, done.stderr
    assert "Starting a temporary Prefect server" in done.stderr
    assert not processes_with(str(tmp_path / "home"))
    secret = lab.password.encode()
    for path in (path for path in (tmp_path / "home").rglob("*") if path.is_file()):
        assert secret not in path.read_bytes(), path


def test_killed_it_takes_its_server_along(lab, tmp_path):
    home = str(tmp_path / "home")
    lab.post("/stats/reset")
    with faults(lab, throttle_bytes_per_s=1 << 20):
        process = start(lab, tmp_path, {"PREFECT_HOME": home, "PREFECT_SERVER_ANALYTICS_ENABLED": "false"})
        wait_for_bytes(lab, process)
        process.kill()
        process.wait()
        deadline = time.monotonic() + 20
        while processes_with(home) and time.monotonic() < deadline:
            time.sleep(0.1)
    assert not processes_with(home)
    lab.post("/faults", expire_sessions=True)  # a killed process's session is the server's to time out
    lab.govc("snapshot.remove", "-vm", lab.vm("demo")["path"], "*")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("own_server", [False, True])
def test_stopped_mid_transfer_it_removes_the_snapshot_and_says_so(lab, tmp_path, api, number, own_server):
    home = {"PREFECT_HOME": str(tmp_path / "home"), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    lab.post("/stats/reset")
    with faults(lab, throttle_bytes_per_s=1 << 20):
        process = start(lab, tmp_path, home if own_server else api)
        wait_for_bytes(lab, process)
        os.killpg(process.pid, number)
        time.sleep(0.3)
        os.killpg(process.pid, number)
        out, err = process.communicate(timeout=40)
    assert process.returncode == 130, err
    assert "Interrupted" in err
    assert "Traceback" not in out + err
    assert not list(tmp_path.glob("demo/disk-?.qcow2"))
    assert_nothing_left(lab)
    assert not processes_with(str(tmp_path))


@pytest.mark.parametrize(
    ("words", "env", "cause"),
    [
        (["--vs-vm-name", "demo"], {"VCENTER_PASSWORD": "wrong"}, "wrong user name or password"),
        (["--vs-vm-name", "nobody"], {}, "There is no VM 'nobody'"),
        (["--vs-vm-name", "demo", "--thumbprint", "AB" * 20], {}, "expected AB:AB:"),
        (["--vs-vm-name", "demo", "--ca-file", ""], {"VCENTER_CA_FILE": ""}, "is not trusted"),
        (["--vs-vm-name", "demo", "--transport", "ssh"], {}, "no ESXi host is given"),
        (["--vs-vm-name", "demo", "--transport", "vddk", "--vddk-libdir", "/x"], {}, "looked in /x/lib64 (not there)"),
        (["--vs-vm-name", "demo", "--format", "vpc"], {}, "format"),
        ([], {}, "--vs-vm-name"),
    ],
)
def test_what_fails_is_one_line_of_cause_and_one_of_remedy(lab, tmp_path, api, words, env, cause):
    done = run_command(lab, "export-vm", *words, "--output-dir", str(tmp_path), env=api | env)
    assert done.returncode in (1, 2)
    assert no_traceback(done)
    lines = [line for line in done.stderr.splitlines() if line != "Loading Prefect"]
    assert lines[0].startswith("Error: ")
    assert cause in lines[0]
    assert len(lines) == 2
    assert_nothing_left(lab)


def test_a_failure_as_json_has_cause_and_remedy(lab, tmp_path, api):
    done = run_command(lab, "export-vm", "--vs-vm-name", "nobody", "--output-dir", str(tmp_path), "--json", env=api)
    said = json.loads(done.stdout)
    assert said["error"] == "VmNotFound"
    assert {"cause", "remedy"} <= set(said)


def test_an_action_that_there_is_not_is_refused_with_those_that_there_are(lab):
    done = run_command(lab, "teleport-vm", "--vs-vm-name", "x", "--output-dir", "/x")
    assert done.returncode == 2
    assert "unknown 'teleport-vm'" in done.stderr and "preflight, wave, janitor or list-vms" in done.stderr


def test_the_password_comes_from_a_file_and_from_nowhere_else_in_argv(lab, tmp_path):
    file = tmp_path / "password"
    file.write_text(f"{lab.password}\n")
    done = run_command(lab, "list-vms", "--password-file", str(file), env={"VCENTER_PASSWORD": "wrong"})
    assert done.returncode == 0
    done = run_command(lab, "list-vms", "--password-file", str(tmp_path / "none"))
    assert "No such file" in done.stderr
    assert no_traceback(done)


def test_a_server_that_does_not_answer_is_named(lab, tmp_path):
    words = ("--vs-vm-name", "demo", "--output-dir", str(tmp_path))
    done = run_command(lab, "export-vm", *words, env={"PREFECT_API_URL": "http://127.0.0.1:9/api"})
    assert done.returncode == 1
    assert no_traceback(done)
    assert "127.0.0.1:9" in done.stderr.splitlines()[-2]
    assert_nothing_left(lab)


def start(lab, output_dir, env) -> subprocess.Popen[str]:
    words = ("--vs-vm-name", "demo", "--output-dir", str(output_dir))
    return subprocess.Popen(
        command(lab, "export-vm", *words),
        cwd=ROOT,
        env=os.environ | lab.environment() | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for_bytes(lab, process, count=1 << 19, timeout_s=60) -> None:
    deadline = time.monotonic() + timeout_s
    while lab.stats()["bytes_served"] < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "no bytes flow"
        time.sleep(0.05)


def processes_with(text: str) -> list[str]:
    """Return the command lines of the processes in whose environment or command line `text` stands."""
    found = []
    for process in (path for path in Path("/proc").iterdir() if path.name.isdigit()):
        try:
            words = (process / "cmdline").read_bytes()
            state = (process / "stat").read_text().rpartition(")")[2].split()[0]
            environment = (process / "environ").read_bytes()
        except OSError:
            continue
        if text.encode() in words + environment and int(process.name) != os.getpid() and state != "Z":
            found.append(words.replace(b"\0", b" ").decode(errors="replace")[:120])
    return found
