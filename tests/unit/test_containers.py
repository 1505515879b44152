"""The files for containers: by schema and linter, and against what they speak of. No image is built, nothing is run."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import prefect.settings
import pytest
import yaml
from compose_spec import PyCompose
from prefect.utilities.schema_tools import is_valid_schema, validate
from prefect.utilities.templating import apply_values

from deployments import POOL, worker
from deployments.deploy import HEARTBEAT
from tests.labs import ROOT

PRODUCTION = ROOT / "deployments" / "production"
KUBERNETES = PRODUCTION / "kubernetes"
DOCKERFILE = (PRODUCTION / "Dockerfile").read_text()
COMPOSE = yaml.safe_load((PRODUCTION / "compose.yaml").read_text())
POOL_TEMPLATE = json.loads((KUBERNETES / "pool.json").read_text())
# Prefect reads these from its environment, past its settings.
NO_SETTINGS = {"PREFECT_SERVER_ENCRYPTION_KEY", "PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR"}


def make_variable(name: str) -> set[str]:
    """Return the words of a variable of the Makefile, without what the shell is asked for."""
    (value,) = re.findall(rf"^{name} := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return set(re.sub(r"\$\(.*\)", "", value).split())


def manifests() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((KUBERNETES / "hyper2kvm.yaml").read_text()))


def job() -> dict[str, Any]:
    """Return the Job of a run, as a pool of the template makes it."""
    defaults = {name: of["default"] for name, of in POOL_TEMPLATE["variables"]["properties"].items() if "default" in of}
    values = defaults | {
        "name": "keen-owl",
        "command": ["prefect", "flow-run", "execute"],
        "labels": {},
        "annotations": {},
    }
    values["env"] = [{"name": name, "value": value} for name, value in defaults["env"].items()]
    made = apply_values(POOL_TEMPLATE["job_configuration"]["job_manifest"], values, remove_notset=True)
    return json.loads(json.dumps(made), object_hook=lambda of: {k: v for k, v in of.items() if v is not None})


def environment_names(text: str) -> set[str]:
    return set(re.findall(r"\bPREFECT_[A-Z_]+\b", text))


def commands() -> Iterator[list[str]]:
    """Yield the commands of containers that are of our image."""
    yield json.loads(re.findall(r"^CMD (.*)$", DOCKERFILE, re.MULTILINE)[0])
    yield from (each["command"] for each in COMPOSE["services"].values() if each["image"] == "hyper2kvm")


def test_the_linter_of_dockerfiles_finds_nothing():
    argv = [
        str(Path(sys.executable).parent / "hadolint"),
        "--failure-threshold",
        "style",
        str(PRODUCTION / "Dockerfile"),
    ]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_image_has_the_packages_that_setup_installs():
    installed = set(re.findall(r"^ {6}([a-z0-9 -]+?) *\\$", DOCKERFILE, re.MULTILINE))
    words = {word for line in installed for word in line.split()}
    builds_the_lab = {"gcc", "libc6-dev", "libssl-dev"}
    assert (make_variable("APT") - builds_the_lab) | make_variable("APT_BOOT") | {"openssh-client"} <= words
    assert words & builds_the_lab == set()


def test_the_image_is_made_of_what_is_here_and_is_nobodys_root():
    ignored = (PRODUCTION / "Dockerfile.dockerignore").read_text().split()
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    top = {name.partition(".")[0] for name in packages}
    assert top and {f"!{name}" for name in (*top, "deployments", "constraints.txt", "pyproject.toml")} <= set(ignored)
    assert all((ROOT / each[1:]).exists() for each in ignored if each.startswith("!"))
    assert ignored.index("deployments/production") > ignored.index("!deployments")  # the last rule wins
    assert re.search(r"^USER [1-9]\d*$", DOCKERFILE, re.MULTILINE)


@pytest.mark.parametrize("command", [*commands()], ids=" ".join)
def test_what_containers_run_is_there(command):
    assert command[:2] == ["python", "-m"]
    assert importlib.util.find_spec(command[2])
    if command[2] == "deployments.worker":
        worker.app.parse_args(command[3:], exit_on_error=False, print_error=False)
    else:
        assert {word for word in command if word.startswith("--")} <= {"--no-prompt", "--no-services"}


def test_compose_takes_it_and_its_services_are_those_of_systemd():
    assert set(PyCompose.from_json(json.dumps(COMPOSE)).service_names()) == set(COMPOSE["services"])
    units = "\n".join(unit.read_text() for unit in (PRODUCTION / "systemd").iterdir())
    for name in ("migration", "server", "services"):
        assert " ".join(COMPOSE["services"][name]["command"][1:]) in units
    worker = COMPOSE["services"]["worker"]
    assert (worker["stop_grace_period"], worker["hostname"]) == ("24h", "worker-1")


def test_compose_reads_files_that_are_there_or_have_an_example_and_holds_no_secret():
    for service in COMPOSE["services"].values():
        for name in service.get("env_file", ()):
            assert (PRODUCTION / name).exists() or (PRODUCTION / f"{name}.example").exists()
        assert not any(re.search("PASSWORD(?!_FILE)|SECRET|KEY|AUTH", name) for name in service.get("environment", {}))
    assert all(set(secret) == {"file"} for secret in COMPOSE["secrets"].values())


def test_kubernetes_takes_the_manifests_and_a_runs_job():
    for each in (*manifests(), job()):
        kubernetes_validate.validate(each, "1.30", strict=True)


def test_the_pools_template_is_whole():
    schema = POOL_TEMPLATE["variables"]
    assert is_valid_schema(schema) is None
    used = set(re.findall(r"{{ (\w+) }}", json.dumps(POOL_TEMPLATE["job_configuration"])))
    assert used == set(schema["properties"])
    defaults = {name: of["default"] for name, of in schema["properties"].items() if of.get("default") is not None}
    assert not validate(defaults, schema)
    assert HEARTBEAT.items() <= defaults["env"].items()  # else `make deploy` writes it


def test_kubernetes_takes_secrets_by_name_and_all_names_agree():
    pod = job()["spec"]["template"]["spec"]
    worker = next(each for each in manifests() if each["kind"] == "Deployment")
    (container,) = worker["spec"]["template"]["spec"]["containers"]
    assert container["envFrom"] == pod["containers"][0]["envFrom"] == [{"secretRef": {"name": "hyper2kvm-worker"}}]
    assert container["args"][container["args"].index("--pool") + 1] == POOL
    environment = {each["name"]: each["value"] for each in container["env"]}
    secret = "PREFECT_INTEGRATIONS_KUBERNETES_WORKER_API_AUTH_STRING_SECRET"
    assert environment[f"{secret}_NAME"] == "hyper2kvm-worker"
    assert environment[f"{secret}_KEY"] in (PRODUCTION / "worker.secrets.example").read_text()
    named = {(each["kind"], each["metadata"]["name"]) for each in manifests()}
    assert ("PersistentVolumeClaim", pod["volumes"][0]["persistentVolumeClaim"]["claimName"]) in named
    assert ("ServiceAccount", pod["serviceAccountName"]) in named
    made_by_hand = (KUBERNETES / "hyper2kvm.yaml").read_text().partition("apiVersion")[0]
    for name in (pod["volumes"][1]["configMap"]["name"], "secret generic hyper2kvm-worker", f"create {POOL} --type"):
        assert name in made_by_hand


def test_each_environment_variable_is_a_setting_of_prefects():
    text = "".join(path.read_text() for path in PRODUCTION.rglob("*") if path.is_file() and path.suffix != ".md")
    found = {
        name
        for name in environment_names(text) - NO_SETTINGS
        if not name.startswith(("PREFECT_REDIS_", "PREFECT_INTEGRATIONS_"))
    }
    assert found and {name for name in found if not hasattr(prefect.settings, name)} == set()
