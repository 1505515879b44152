"""Waves under `make up`: what is started and asked as the form and the pages of Prefect's UI do it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.e2e.processes import marked_processes
from tests.e2e.test_up import Product, fill_in
from tests.labs import ROOT, Lab, running_lab
from tests.waves import fleet

VMS, REFUSED = 40, 2
VICTIM = "app-21"  # large enough to be met in its middle
WAVE_TIMEOUT_S = 420
ENDS = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}
SAVE = """
import json, os, blocks
kind, name, fields = json.loads(os.environ["FLEET_BLOCK"])
getattr(blocks, kind)(**fields).save(name, overwrite=True)
"""


class Fleet:
    """The product, a lab of many VMs that it knows as a block, and one more worker."""

    def __init__(self, product: Product, lab: Lab, state: Path, *, name: str = "fleet") -> None:
        self.product, self.lab, self.datastores, self.name = product, lab, state, name
        fields = {each: lab.ready[each] for each in ("host", "port", "username", "password")}
        self.save("VCenter", name, **fields, ca_bundle=lab.ca_pem, connections=1)

    def save(self, kind: str, name: str, **fields: Any) -> None:
        """Save a block; what is secret in it stands in no argument of a command."""
        env = environment(self.product) | {"FLEET_BLOCK": json.dumps([kind, name, fields])}
        subprocess.run([sys.executable, "-c", SAVE], cwd=ROOT, env=env, check=True)

    def source(self, vm: str) -> Path:
        """Return the file of a VM's first disk among the lab's datastores."""
        store, _, path = self.lab.vm(vm)["disks"][0]["datastore_path"].removeprefix("[").partition("] ")
        return self.datastores / store / path

    def manifest(self, output: Path, vm: str) -> dict[str, Any]:
        return dict(json.loads((output / vm / "manifest.json").read_text()))

    def start(self, **wave: Any) -> str:
        """Create a wave's run as the form does; return its id."""
        found = self.product.deployment("migration-wave")
        schema = found["parameter_openapi_schema"]
        parameters = fill_in(schema, schema["definitions"], {}, block=self.block())
        parameters["wave"] |= wave
        return str(self.product.api(f"deployments/{found['id']}/create_flow_run", parameters=parameters)["id"])

    def block(self) -> str:
        """Return the id of the block that has the lab's address and password."""
        blocks = self.product.api("block_documents/filter", limit=50)
        return str(next(each["id"] for each in blocks if each["name"] == self.name))

    def deployed(self, name: str, **parameters: Any) -> str:
        """Create a run of a deployment; return its id."""
        found = self.product.deployment(name)
        return str(self.product.api(f"deployments/{found['id']}/create_flow_run", parameters=parameters)["id"])

    def children(self, wave: str, kind: str = "vm") -> list[dict[str, Any]]:
        """Return the runs that a wave created, of VMs or gates."""
        return children_of(self.product.api, wave, kind)

    def ended(self, wave: str) -> int:
        return sum(run["state_type"] in ENDS for run in self.children(wave))

    def outcomes(self, wave: str) -> dict[str, list[str]]:
        """Return the states of each VM's runs, the earliest first."""
        runs = sorted(self.children(wave), key=lambda run: str(run["expected_start_time"]))
        return {vm: [run["state_type"] for run in runs if vm_of(run) == vm] for vm in sorted({*map(vm_of, runs)})}

    def table(self, name: str) -> str:
        """Return the newest table of a wave's runs, as the page of its artifact shows it."""
        wanted = {"artifacts": {"key": {"any_": [f"wave-{name}"]}}, "limit": 1}
        found = self.product.api("artifacts/filter", **wanted)
        return str(found[0]["data"]) if found else ""

    def change(self, path: str, **body: Any) -> None:
        """Send what the UI sends to change something."""
        answer = self.product.ask("PATCH", path, **body)
        assert answer.is_success, answer.text

    def cancel(self, run: str) -> None:
        """Cancel a run as the UI's menu does."""
        self.product.api(f"flow_runs/{run}/set_state", state={"type": "CANCELLING", "name": "Cancelling"}, force=True)

    def processes_of(self, runs: list[dict[str, Any]]) -> list[int]:
        return [pid for run in runs for pid in marked_processes(f"PREFECT__FLOW_RUN_ID={run['id']}")]

    def retry(self, run: str) -> None:
        state = {"type": "SCHEDULED", "name": "AwaitingRetry"}
        self.product.api(f"flow_runs/{run}/set_state", state=state, force=True)

    def await_end(self, wave: str, *wanted: str) -> dict[str, Any]:
        return self.product.await_state(wave, *wanted, timeout_s=WAVE_TIMEOUT_S)


@contextmanager
def fleet_up(folder: Path) -> Iterator[Fleet]:
    """Have `make up` with a lab of 40 VMs and a second worker for the block; what is kept of it is in `folder`."""
    product, state = Product(folder / "state"), folder / "datastores"
    scenario = fleet(vms=VMS, refused=REFUSED, sizes={VICTIM: "96MiB"})
    try:
        product.make("up")
        with running_lab("-state", str(state), scenario=scenario) as lab:
            it = Fleet(product, lab, state)
            with _worker(environment(product), product):
                yield it
    finally:
        product.make("down")


def environment(product: Product) -> dict[str, str]:
    return os.environ | {
        "PREFECT_HOME": str(product.folder / "prefect"),
        "PREFECT_API_URL": f"{product.address}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "HYPER2KVM_STARTED_BY": f"{product.folder}:worker",  # so that `make down` ends what is left of it
    }


class _worker:
    """One more worker for the block: that of `make up` takes two VMs at once."""

    def __init__(self, env: dict[str, str], product: Product) -> None:
        words = "worker start --pool hyper2kvm --work-queue default --type process --name second --limit 4"
        self._argv, self._env = [sys.executable, "-m", "prefect", "--no-prompt", *words.split()], env
        self._log = (product.folder / "second.log").open("w")

    def __enter__(self) -> None:
        self._process = subprocess.Popen(self._argv, cwd=ROOT, env=self._env, stdout=self._log, stderr=self._log)

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._log.close()


def children_of(api: Callable[..., Any], wave: str, kind: str = "vm") -> list[dict[str, Any]]:
    """Return the runs that a wave created, of VMs or gates, as Prefect's API tells them."""
    runs = api("flow_runs/filter", flow_runs={"tags": {"all_": [f"wave:{wave}"]}}, limit=200)
    return [run for run in runs if any(tag.startswith(f"{kind}:") for tag in run["tags"])]


def assert_equal_to_the_source(fleet: Fleet, vm: str, image: Path) -> None:
    """Compare an image with what qemu-img reads of the VM's own disk, which nothing writes to."""
    argv = ["qemu-img", "compare", "-f", image.suffix[1:], "-F", "vmdk", str(image), str(fleet.source(vm))]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, f"{vm}: {done.stdout}{done.stderr}"


def vm_of(run: dict[str, Any]) -> str:
    return str(run["parameters"]["options"]["vm_name"]).rpartition("/")[2]


def kill_run(run: str) -> Path:
    """End every process of a flow run, as a lost machine would; return the folder that its worker gave it."""
    pids = marked_processes(f"PREFECT__FLOW_RUN_ID={run}")
    assert pids
    place = Path(f"/proc/{min(pids)}/cwd").resolve()
    assert place.name.endswith("prefect")
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return place
