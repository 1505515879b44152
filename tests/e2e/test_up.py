"""`make up`, exports started as a person does (by the form, and by the API with the form's schema), `make down`."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from tenacity import Retrying, retry_if_result, stop_after_delay, wait_fixed

from tasks.models import DownloadManifest, Manifest, Migration
from tests.e2e.processes import marked_processes
from tests.e2e.screenshot import browser
from tests.labs import ROOT, Lab
from tests.runs import assert_equal_to_the_guests_disks, raw_sha256
from tests.waits import await_that

pytestmark = pytest.mark.e2e

VM = "production-web"
PICTURES = ROOT / "build" / "e2e"
MIB = 1024 * 1024
MAKE_TIMEOUT_S = 300
RUN_TIMEOUT_S = 120


class Product:
    """What `make up` started, in a state folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def make(self, target: str) -> str:
        """Run a make target; return what it printed."""
        env = os.environ | {"HYPER2KVM_STATE_DIR": str(self.folder), "HYPER2KVM_PORT": "0"}
        done = subprocess.run(
            ["make", "--no-print-directory", target],
            cwd=ROOT, env=env, capture_output=True, text=True, timeout=MAKE_TIMEOUT_S,
        )  # fmt: skip
        assert done.returncode == 0, f"make {target}: {done.stdout}{done.stderr}{self.logs()}"
        return done.stdout

    @property
    def state(self) -> dict[str, Any]:
        return dict(json.loads((self.folder / "state.json").read_text()))

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.state['port']}"

    @property
    def lab(self) -> Lab:
        return Lab(self.state["lab"], None, Path())  # type: ignore[arg-type] - its process is not ours

    def processes(self) -> list[int]:
        return marked_processes(f"HYPER2KVM_STARTED_BY={self.folder}:")

    def ask(self, method: str, path: str, **body: Any) -> httpx.Response:
        """Ask the API; again where its database is busy (503), as Prefect's pages and clients do."""
        again = Retrying(
            retry=retry_if_result(lambda answer: answer.status_code == 503),
            stop=stop_after_delay(60),
            wait=wait_fixed(1),
            retry_error_callback=lambda state: state.outcome and state.outcome.result(),
        )
        url, content = f"{self.address}/api/{path}", body or None
        return cast(httpx.Response, again(httpx.request, method, url, json=content, timeout=30, trust_env=False))

    def api(self, path: str, **body: Any) -> Any:
        """GET without a body, else POST."""
        answer = self.ask("POST" if body else "GET", path, **body)
        assert answer.is_success, answer.text
        return answer.json() if answer.content else None

    def deployment(self, name: str = "export") -> dict[str, Any]:
        return dict(self.api(f"deployments/name/{name}/{name}"))

    def vcenter(self) -> dict[str, Any]:
        """Return the saved block, password and all, as only the API's `include_secrets` gives it."""
        blocks = self.api("block_documents/filter", include_secrets=True)
        return dict(next(block for block in blocks if block["name"] == "lab"))

    def start(self, output: Path, *, deployment: str = "export", **options: Any) -> str:
        """Create a run as the form does, `options` set in it beside what is required; return its id."""
        found = self.deployment(deployment)
        schema = found["parameter_openapi_schema"]
        block, values = self.vcenter()["id"], {"vm_name": VM, "output_dir": str(output)}
        parameters = fill_in(schema, schema["definitions"], values, block=block)
        parameters["options"] |= options
        return str(self.api(f"deployments/{found['id']}/create_flow_run", parameters=parameters)["id"])

    def await_state(self, run: str, *wanted: str, timeout_s: float = RUN_TIMEOUT_S) -> dict[str, Any]:
        def reached() -> bool:
            return self.api(f"flow_runs/{run}")["state_name"] in {
                *wanted,
                "Completed",
                "Failed",
                "Crashed",
                "Cancelled",
            }

        await_that(reached, timeout_s, lambda: f"the run is not {wanted}, but {self.api(f'flow_runs/{run}')['state']}")
        found = dict(self.api(f"flow_runs/{run}"))
        assert found["state_name"] in wanted, f"{found['state']}{self.logs()}"
        return found

    def logs(self) -> str:
        tails = [
            f"\n── {log.name}\n" + "\n".join(log.read_text().splitlines()[-40:]) for log in self.folder.glob("*.log")
        ]
        return "".join(tails)


def fill_in(schema: dict[str, Any], definitions: dict[str, Any], values: dict[str, Any], *, block: str) -> Any:
    """Return parameters with all that `schema` requires and nothing else, a block by reference."""
    schema = resolved(schema, definitions)
    if "block_type_slug" in schema:
        return {"$ref": {"block_document_id": block}}
    return {
        name: values[name] if name in values else fill_in(schema["properties"][name], definitions, values, block=block)
        for name in schema.get("required", ())
    }


def resolved(schema: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """Return `schema` with what it refers to; what stands beside the reference wins."""
    reference = schema.get("$ref", "").removeprefix("#/definitions/")
    return definitions.get(reference, {}) | schema


def fields_of(
    schema: dict[str, Any], definitions: dict[str, Any], path: str = ""
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every field of a form, groups before what is in them."""
    for name, field in schema["properties"].items():
        field = resolved(field, definitions)
        yield f"{path}{name}", field
        if "properties" in field:
            yield from fields_of(field, definitions, f"{path}{name}.")


@pytest.fixture(scope="module")
def product(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Product]:
    """One product for the tests of this file, which follow an operator's day: up, export, cancel, mend, down."""
    product = Product(tmp_path_factory.mktemp("up") / "state")
    try:
        product.up = product.make("up")  # type: ignore[attr-defined]
        yield product
    finally:
        product.make("down")


@pytest.fixture
def busy_guest(product: Product) -> Iterator[Lab]:
    """The lab, with a guest that writes to both disks meanwhile."""
    moref = product.lab.vm(VM)["moref"]
    for disk in range(2):
        product.lab.post("/guest-load", vm=moref, disk=disk, bytes_per_s=1 << 20, seed=disk)
    yield product.lab
    for disk in range(2):
        product.lab.post("/guest-load", vm=moref, disk=disk, stop=True)


def check_export(lab: Lab, folder: Path, scratch: Path) -> None:
    """Check images against the guest's disks as of the snapshot, and that nothing is left on the vCenter."""
    manifest = Manifest.model_validate_json((folder / VM / "manifest.json").read_text())
    assert [image.path for image in manifest.disks] == ["disk-0.qcow2", "disk-1.qcow2"]
    assert_equal_to_the_guests_disks(lab, manifest, folder / VM, scratch)
    check_nothing_left(lab)


def check_nothing_left(lab: Lab) -> None:
    await_that(lambda: lab.stats()["live_sessions"] == 0, 10, lambda: f"a session is left: {lab.stats()}")
    assert lab.stats()["open_snapshots"] == 0


def test_up_says_where_to_click_and_does_nothing_twice(product: Product) -> None:
    assert product.up.splitlines()[-1] == f"UI: {product.address}"  # type: ignore[attr-defined]
    before, known = product.state["pids"], everything_there(product)
    assert known["automations"] and known["v2/concurrency_limits"] and known["deployments"] and known["block_documents"]
    assert "already up" in product.make("up")
    assert product.state["pids"] == before
    assert everything_there(product) == known


def everything_there(product: Product) -> dict[str, list[str]]:
    """Return the names of what deploying makes, each as often as it is there."""
    kinds = ("automations", "deployments", "v2/concurrency_limits", "work_pools", "block_types", "block_documents")
    queues = [each["name"] for each in product.api("work_queues/filter", limit=200)]
    found = {kind: product.api(f"{kind}/filter", limit=200) for kind in kinds}
    return {kind: sorted(each["name"] for each in rows) for kind, rows in found.items()} | {"queues": sorted(queues)}


def test_what_an_operator_switched_stays_so(product: Product) -> None:
    """By what the UI's switches send; Prefect's own deploying sets schedules to what prefect.yaml says."""
    assert switched(product) == (True, False, True)
    switch(product, janitor=False, sync=True, zombie=False)
    product.make("up")
    assert switched(product) == (False, True, False)
    switch(product, janitor=True, sync=False, zombie=True)
    product.make("up")
    assert switched(product) == (True, False, True)


def switched(product: Product) -> tuple[bool, ...]:
    """Tell whether the janitor's schedule, that of the example, and the automation are switched on."""
    schedules = [product.deployment(name)["schedules"] for name in ("snapshot-janitor", "cbt-sync")]
    assert [len(each) for each in schedules] == [1, 1]
    (zombie,) = product.api("automations/filter", limit=5)
    return (*(each[0]["active"] for each in schedules), zombie["enabled"])


def switch(product: Product, *, janitor: bool, sync: bool, zombie: bool) -> None:
    for name, active in (("snapshot-janitor", janitor), ("cbt-sync", sync)):
        found = product.deployment(name)
        path = f"deployments/{found['id']}/schedules/{found['schedules'][0]['id']}"
        assert product.ask("PATCH", path, active=active).is_success
    (automation,) = product.api("automations/filter", limit=5)
    assert product.ask("PATCH", f"automations/{automation['id']}", enabled=zombie).is_success


def test_nothing_of_this_machine_is_baked_into_the_deployment(product: Product) -> None:
    deployment = product.deployment()
    assert (deployment["entrypoint"], deployment["path"], deployment["pull_steps"]) == (
        "flows.export.export_vm",
        None,
        [],
    )
    assert deployment["parameters"] == {} and deployment["description"] and deployment["version"] and deployment["tags"]
    assert str(ROOT) not in json.dumps(deployment)


FORMS = {
    "export": "options.boot.expect",
    "boot-check": "options.folder",
    "verify": "options.folder",
    "snapshot-janitor": "options.remove",
    "warm-migration": "options.cutover_at",
    "rollback": "options.folder",
    "preflight": "options.select",
    "migration-wave": "wave.window.stop",
}
# Two tabs each, one called None: the form sends null for them where none is chosen, and only such a schema takes that.
OPTIONAL_BLOCKS = {"toolkit", "nbd_source", "esxi_host", "vcenter"}


@pytest.mark.parametrize(("name", "known"), FORMS.items())
def test_every_field_of_a_form_explains_itself(product: Product, name: str, known: str) -> None:
    schema = product.deployment(name)["parameter_openapi_schema"]
    fields = dict(fields_of(schema, schema["definitions"]))
    assert known in fields
    for path, field in fields.items():
        assert field.get("title") and field.get("description"), path
        if path in OPTIONAL_BLOCKS and "anyOf" in field:
            continue
        assert field.get("examples") or "properties" in field or field.get("writeOnly"), path
        assert "anyOf" not in field, f"{path}: the form makes tabs of it, one of them called None"


def test_a_run_from_the_forms_schema_completes(product: Product, busy_guest: Lab, tmp_path: Path) -> None:
    run = product.await_state(product.start(tmp_path / "exports"), "Completed")
    check_export(busy_guest, tmp_path / "exports", tmp_path)
    mine = {"flow_runs": {"id": {"any_": [run["id"]]}}}
    artifacts = {artifact["key"]: artifact for artifact in product.api("artifacts/filter", **mine)}
    moref = busy_guest.vm(VM)["moref"]
    for disk in range(2):
        progress = artifacts[f"transfer-{moref}-disk-{disk}"]
        assert (progress["type"], progress["data"]) == ("progress", 100)
    report = artifacts[f"export-{moref}"]
    assert report["type"] == "markdown" and "disk-1.qcow2" in report["data"]
    names = {task["name"] for task in product.api("task_runs/filter", **mine)}
    assert run["name"] == f"export {VM}" and {f"transfer {VM} disk 0", f"transfer {VM} disk 1"} < names


def test_a_download_from_the_forms_schema_completes(product: Product, busy_guest: Lab, tmp_path: Path) -> None:
    started = product.start(tmp_path / "files", deployment="download-only", snapshot=True)
    run = product.await_state(started, "Completed")
    here, moref = tmp_path / "files" / VM, busy_guest.vm(VM)["moref"]
    manifest = DownloadManifest.model_validate_json((here / "manifest.json").read_text())
    assert manifest.snapshot and manifest.consistent
    flats = [here / file.path for file in manifest.files if file.path.endswith("-flat.vmdk")]
    assert len(flats) == 2
    for disk, flat in enumerate(flats):
        with flat.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        assert digest == busy_guest.sha256(moref, disk, manifest.snapshot.moref)
    check_nothing_left(busy_guest)
    artifacts = {artifact["key"]: artifact for artifact in artifacts_of(product, run["id"])}
    for number in range(len(manifest.files)):
        progress = artifacts[f"download-{moref}-{number}"]
        assert (progress["type"], progress["data"]) == ("progress", 100)
    report = artifacts[f"download-{moref}"]
    assert report["type"] == "markdown" and flats[0].name in report["data"]


def test_the_form_in_the_browser_starts_an_export(product: Product, busy_guest: Lab, tmp_path: Path) -> None:
    seen = {run["id"] for run in product.api("flow_runs/filter", limit=200)}
    with browser() as page:
        page.open(f"{product.address}/v2/deployments/deployment/{product.deployment()['id']}/run")
        page.wait_for("Output folder", "Existing snapshot")
        page.click("Select a block...")
        page.click("lab")
        page.fill("VM", VM)
        page.fill("Output folder", str(tmp_path / "exports"))
        page.picture(PICTURES / "form.png")
        page.click("Submit")
        page.wait_for("scheduled to start now")
        (run,) = {run["id"] for run in product.api("flow_runs/filter", limit=200)} - seen
        product.await_state(run, "Completed")
        check_export(busy_guest, tmp_path / "exports", tmp_path)

        page.open(f"{product.address}/v2/runs/flow-run/{run}")
        page.wait_for(f"export {VM}", "Completed", "snapshot taken")  # the page shows the first lines of the log
        page.picture(PICTURES / "run.png")
        report = next(a for a in artifacts_of(product, run) if a["type"] == "markdown")
        source = busy_guest.vm(VM)["disks"][1]["datastore_path"]
        for ui in ("/v2", ""):
            page.open(f"{product.address}{ui}/artifacts/artifact/{report['id']}")
            page.wait_for(f"Export of {VM}", source, "all disks of one point in time")
            page.picture(PICTURES / f"report{ui.replace('/', '-')}.png")


def test_a_boot_check_shows_the_screen(product: Product, tmp_path: Path) -> None:
    """The lab's disks begin with a boot sector that says so."""
    product.await_state(product.start(tmp_path / "exports"), "Completed")
    parameters = {
        "options": {
            "folder": str(tmp_path / "exports" / VM),
            "boot": {"expect": "HYPER2KVM BOOT OK", "accelerator": "tcg"},
        }
    }
    deployment = product.deployment("boot-check")["id"]
    run = str(product.api(f"deployments/{deployment}/create_flow_run", parameters=parameters)["id"])
    product.await_state(run, "Completed")
    (report,) = (each for each in artifacts_of(product, run) if each["type"] == "markdown")
    with browser() as page:
        for ui in ("/v2", ""):
            page.open(f"{product.address}{ui}/artifacts/artifact/{report['id']}")
            page.wait_for(f"Boot check of {VM}", "It boots", "Serial port", "SeaBIOS")
            shown = "[...document.images].some(i => i.src.startsWith('data:image/png') && i.naturalWidth >= 640)"
            assert page.evaluate(shown)
            page.picture(PICTURES / f"boot-check{ui.replace('/', '-')}.png")


def test_a_cutover_is_approved_in_the_browser_while_rounds_go_on(
    product: Product, busy_guest: Lab, tmp_path: Path
) -> None:
    """Approved by the form of a suspended run, which holds no process; then a rollback, by its own deployment."""
    options = {"cutover": "approval", "shut_down_source": True, "enable_cbt": True, "rename_source": "-migrated"}
    durations = {"pause": "PT1S", "expected_shutdown": "PT1S", "downtime_budget": "PT2M"}
    run = product.start(tmp_path / "copies", deployment="warm-migration", **options, **durations)
    asked = await_approval(product)
    await_that(lambda: rounds_of(product, run) >= 4, RUN_TIMEOUT_S, lambda: f"no rounds{product.logs()}")
    assert product.api(f"flow_runs/{asked}")["state_name"] == "Suspended"
    report = warm_report(product, run)
    with browser() as page:
        page.open(re.findall(r"\((http\S+)\)", report)[0])
        page.wait_for(f"approve the cutover of {VM}", "Suspended", "Resume")
        page.click("Resume")
        page.wait_for("Forecast downtime", "Pending", "rounds go on meanwhile", "Note")
        page.fill("Note (Optional)", "by the test")
        page.picture(PICTURES / "approval.png")
        before = rounds_of(product, run)
        await_that(lambda: rounds_of(product, run) > before, RUN_TIMEOUT_S, lambda: "rounds did not go on")
        page.click("Submit")
        product.await_state(asked, "Completed")
        product.await_state(run, "Completed")
        report = next(a for a in artifacts_of(product, run) if a["key"].startswith("warm-") and "Real" in a["data"])
        page.open(f"{product.address}/artifacts/artifact/{report['id']}")
        page.wait_for("Downtime", "its guest shut down")
        page.picture(PICTURES / "migration.png")
    folder, moref = tmp_path / "copies" / VM, busy_guest.vm(VM)["moref"]
    made = Migration.model_validate_json((folder / "cutover" / "cutover.json").read_text())
    assert made.forecast and made.downtime_s and "by the test" in made.notes[0]
    for image in made.manifest.disks:
        assert raw_sha256(folder / "cutover" / image.path, tmp_path) == busy_guest.sha256(moref, image.index)
    check_nothing_left(busy_guest)
    deployment, vcenter = product.deployment("rollback")["id"], {"$ref": {"block_document_id": product.vcenter()["id"]}}
    parameters = {"vcenter": vcenter, "options": {"folder": str(folder)}}
    undone = str(product.api(f"deployments/{deployment}/create_flow_run", parameters=parameters)["id"])
    product.await_state(undone, "Completed")
    product.await_state(product.start(tmp_path / "exports"), "Completed")
    manifest = Manifest.model_validate_json((tmp_path / "exports" / VM / "manifest.json").read_text())
    assert (manifest.vm.name, manifest.vm.power_state) == (VM, "poweredOn")


def await_approval(product: Product) -> str:
    """Return the id of the run that waits for a person's word."""

    def waiting() -> list[dict[str, Any]]:
        runs = product.api("flow_runs/filter", flows={"name": {"any_": ["cutover-approval"]}})
        return [each for each in runs if each["state_name"] == "Suspended"]

    await_that(lambda: bool(waiting()), RUN_TIMEOUT_S, lambda: f"nobody is asked{product.logs()}")
    (found,) = waiting()
    return str(found["id"])


def warm_report(product: Product, run: str) -> str:
    """Return the migration's newest artifact."""
    found = [a for a in artifacts_of(product, run) if (a["key"] or "").startswith("warm-")]
    return str(max(found, key=lambda a: a["created"])["data"]) if found else ""


def rounds_of(product: Product, run: str) -> int:
    rows = re.findall(r"^\| (\d+) \|", warm_report(product, run), re.MULTILINE)
    return int(rows[-1]) if rows else 0


def artifacts_of(product: Product, run: str) -> list[dict[str, Any]]:
    return list(product.api("artifacts/filter", flow_runs={"id": {"any_": [run]}}))


def test_the_password_is_nowhere_to_be_read(product: Product) -> None:
    password = product.vcenter()["data"]["password"]
    assert len(password) > 8 and set(password) != {"*"}
    for what in ("flow_runs", "task_runs", "logs", "artifacts"):
        found = product.api(f"{what}/filter", limit=200)
        assert found and password not in json.dumps(found), what
    assert password not in json.dumps(product.api("block_documents/filter", include_secrets=False))
    files = [path for path in product.folder.rglob("*") if path.is_file() and "datastores" not in path.parts]
    assert {"prefect.db", "worker.log", "state.json"} <= {path.name for path in files}
    assert [path for path in files if VM.encode() in path.read_bytes()], "the search does not find what is there"
    assert [str(path) for path in files if password.encode() in path.read_bytes()] == []
    assert [pid for pid in product.processes() if password.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()] == []


def test_a_relative_folder_is_refused_since_the_worker_would_delete_it(product: Product) -> None:
    run = product.await_state(product.start(Path("exports")), "Failed")
    assert "the worker deletes the folder that it runs in" in run["state"]["message"]
    check_nothing_left(product.lab)


def test_cancelling_in_the_ui_leaves_no_snapshot(product: Product, tmp_path: Path) -> None:
    product.lab.post("/faults", throttle_bytes_per_s=MIB)
    run = product.start(tmp_path / "exports")
    await_that(
        lambda: product.lab.stats()["open_snapshots"] == 1, RUN_TIMEOUT_S, lambda: "no snapshot" + product.logs()
    )
    product.api(f"flow_runs/{run}/set_state", state={"type": "CANCELLING", "name": "Cancelling"})
    product.await_state(run, "Cancelled", timeout_s=60)
    product.lab.post("/faults", clear=True)
    check_nothing_left(product.lab)
    assert {path.name for path in (tmp_path / "exports" / VM).iterdir()} == {".hyper2kvm.lock"}


def test_a_retry_in_the_ui_goes_on_where_the_run_was_cut_off(product: Product, tmp_path: Path) -> None:
    lab, run = product.lab, half_done(product, tmp_path / "exports")
    lab.post("/faults", folder_503=100_000)
    failed = product.await_state(run, "Failed", timeout_s=240)
    assert "TransferInterrupted" in failed["state"]["message"]
    lab.post("/faults", clear=True)
    check_kept(lab)
    product.api(f"flow_runs/{run}/set_state", state={"type": "SCHEDULED", "name": "AwaitingRetry"}, force=True)
    product.await_state(run, "Completed")
    check_export(lab, tmp_path / "exports", tmp_path)
    assert lab.stats()["bytes_served"] < (512 + 2 * 64) * MIB


def test_a_run_killed_under_the_worker_is_gone_on_with(product: Product, tmp_path: Path) -> None:
    lab, run = product.lab, half_done(product, tmp_path / "exports")
    holder = json.loads((tmp_path / "exports" / VM / ".hyper2kvm.lock").read_text())
    os.kill(int(holder["pid"]), signal.SIGKILL)
    product.await_state(run, "Crashed")
    lab.post("/faults", clear=True)
    assert lab.stats()["open_snapshots"] == 1
    product.await_state(product.start(tmp_path / "exports"), "Completed")
    lab.post("/faults", expire_sessions=True)  # the dead run's session is the server's to time out
    check_export(lab, tmp_path / "exports", tmp_path)
    assert lab.stats()["bytes_served"] < (512 + 2 * 64) * MIB


def half_done(product: Product, output: Path) -> str:
    """Start an export on a slowed-down lab; return its run's id in its middle.

    Of 512 MiB 150 have been served then, and up to 256 more are on their way, in eight replies of 32 MiB.
    """
    product.lab.post("/faults", clear=True)
    product.lab.post("/stats/reset")
    product.lab.post("/faults", throttle_bytes_per_s=8 * MIB)  # a reply
    run = product.start(output)
    await_that(
        lambda: product.lab.stats()["bytes_served"] > 150 * MIB, RUN_TIMEOUT_S, lambda: "no bytes" + product.logs()
    )
    return run


def check_kept(lab: Lab) -> None:
    """A run that was cut off keeps its one snapshot, for the one that goes on, and no session."""
    await_that(lambda: lab.stats()["live_sessions"] == 0, 10, lambda: f"a session is left: {lab.stats()}")
    assert lab.stats()["open_snapshots"] == 1


def test_up_mends_what_died(product: Product) -> None:
    before, password = product.state["pids"], product.vcenter()["data"]["password"]
    for role in ("server", "lab"):
        os.kill(before[role], signal.SIGKILL)
    product.make("up")
    after = product.state["pids"]
    assert all(after[role] != before[role] for role in before), "the worker must not poll a port that is gone"
    assert sorted(product.processes()) == sorted(after.values())
    assert product.vcenter()["data"]["password"] != password


def test_down_ends_all_of_it_also_in_the_middle_of_a_run(product: Product, tmp_path: Path) -> None:
    product.lab.post("/faults", throttle_bytes_per_s=4 << 20)
    product.start(tmp_path / "exports")
    await_that(
        lambda: product.lab.stats()["open_snapshots"] == 1, RUN_TIMEOUT_S, lambda: "no snapshot" + product.logs()
    )
    assert len(product.processes()) > 3
    assert "ended approvals, waves, worker, server, lab" in product.make("down")
    assert product.processes() == []
    assert not (product.folder / "datastores").exists()
    assert "nothing was up" in product.make("down")
