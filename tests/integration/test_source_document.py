"""The source document's examples, as written, but for the address, the user name and the output folder."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.errors import InvalidInput
from tests.labs import ROOT, VDDK, Lab, running_lab
from tests.runs import assert_nothing_left

pytestmark = [pytest.mark.anyio, pytest.mark.live, pytest.mark.usefixtures("prefect_api")]

EXAMPLE_1 = r"""
python -m hyper2kvm vsphere \
  --vcenter vcenter.example.com \
  --username admin@vsphere.local \
  --password-file ~/.vcenter_pass \
  --vs-action export-vm \
  --vs-vm-name production-web \
  --output-dir /data/exports
"""
EXAMPLE_2 = r"""
python -m hyper2kvm vsphere \
  --vcenter vcenter.example.com \
  --username admin \
  --vs-action download-vm \
  --vs-vm-name backup-server \
  --output-dir /backups
"""
EXAMPLE_3 = r"""
python -m hyper2kvm vsphere \
  --vcenter vcenter.example.com \
  --username admin \
  --vs-action vddk-export \
  --vs-vm-name database-01 \
  --vddk-libdir /usr/lib/vmware-vix-disklib \
  --output-dir /data/vms
"""
EXAMPLE_4 = """
import asyncio

from hyper2kvm.vmware.clients.client import VMwareClient
from hyper2kvm.vmware.vsphere.mode import ExportOptions


async def main():
    # Initialize client
    client = VMwareClient(
        host='vcenter.example.com',
        user='admin@vsphere.local',
        pwd='password'
    )

    # Configure export
    options = ExportOptions(
        vm_name='web-server',
        output_dir='/data/exports',
        export_mode='export',
        transport='vddk',
        vddk_libdir='/usr/lib/vmware-vix-disklib'
    )

    # Execute export
    await client.async_export_vm(options)


asyncio.run(main())
"""


@pytest.fixture(scope="module")
def vcenter():
    machines = [{"name": name, "disks": [{"size": "2MiB"}]} for name in ("production-web", "web-server", "database-01")]
    machines.append({"name": "backup-server", "power": "off", "disks": [{"size": "2MiB"}]})
    site = {"datacenters": [{"name": "DC", "clusters": [{"name": "c", "hosts": ["esx1"]}], "vms": machines}]}
    with running_lab(scenario=site) as lab:
        yield lab


def adapted(example: str, lab: Lab, output_dir) -> str:
    for old, new in (
        ("vcenter.example.com", lab.address),
        ("admin@vsphere.local", lab.username),
        ("/data/exports", str(output_dir)),
        ("'password'", repr(lab.password)),
        ("/usr/lib/vmware-vix-disklib", str(VDDK)),
    ):
        example = example.replace(old, new)
    return example


def environment(lab: Lab, home, **more: str) -> dict[str, str]:
    from prefect.settings import PREFECT_API_URL

    return os.environ | {
        "HOME": str(home),
        "PREFECT_API_URL": PREFECT_API_URL.value(),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "VCENTER_CA_FILE": str(lab.ca_file),
        **more,
    }


def test_example_1_a_basic_export(vcenter, tmp_path):
    (tmp_path / ".vcenter_pass").write_text(f"{vcenter.password}\n")
    shell = adapted(EXAMPLE_1, vcenter, tmp_path / "exports")
    env = environment(vcenter, tmp_path)
    done = subprocess.run(["bash", "-c", shell], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "exports" / "production-web" / "manifest.json").read_text())
    assert manifest["consistent"] is True
    assert_nothing_left(vcenter)


def test_example_2_the_exact_bytes_of_a_folder(vcenter, tmp_path):
    example = EXAMPLE_2.replace("--username admin ", f"--username {vcenter.username} ")
    shell = adapted(example, vcenter, tmp_path).replace("/backups", str(tmp_path / "backups"))
    env = environment(vcenter, tmp_path, VCENTER_PASSWORD=vcenter.password)
    done = subprocess.run(["bash", "-c", shell], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    here, there = tmp_path / "backups" / "backup-server", Path(vcenter.state_dir) / "datastore1" / "backup-server"
    names = {path.name for path in there.iterdir()}
    assert {"backup-server.vmx", "backup-server-flat.vmdk"} <= names
    assert {path.name for path in here.iterdir()} == names | {"manifest.json", ".hyper2kvm.lock"}
    for name in names:
        assert (here / name).read_bytes() == (there / name).read_bytes(), name
    assert_nothing_left(vcenter)


def test_example_3_a_disk_through_vddk(vcenter, tmp_path):
    example = EXAMPLE_3.replace("--username admin ", f"--username {vcenter.username} ")
    shell = adapted(example, vcenter, tmp_path).replace("/data/vms", str(tmp_path / "vms"))
    env = environment(vcenter, tmp_path, VCENTER_PASSWORD=vcenter.password)
    done = subprocess.run(["bash", "-c", shell], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "vms" / "database-01" / "manifest.json").read_text())
    there = vcenter.sha256(manifest["vm"]["moref"], 0, manifest["snapshot"]["moref"])
    content = (tmp_path / "vms" / "database-01" / "disk-0.raw").read_bytes()
    assert hashlib.sha256(content).hexdigest() == there
    assert_nothing_left(vcenter)


def test_example_4_from_python_through_vddk(vcenter, tmp_path):
    program = adapted(EXAMPLE_4, vcenter, tmp_path / "exports")
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment(vcenter, tmp_path), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "exports" / "web-server" / "manifest.json").read_text())
    assert [disk["road"] for disk in manifest["disks"]] == ["vddk"]
    assert_nothing_left(vcenter)


async def test_a_transport_without_its_settings_is_refused_by_name_before_anything_is_connected(vcenter, tmp_path):
    from hyper2kvm.vmware.clients.client import VMwareClient
    from hyper2kvm.vmware.vsphere.mode import ExportOptions

    client = VMwareClient(host=vcenter.address, user=vcenter.username, pwd=vcenter.password)
    options = ExportOptions(vm_name="web-server", output_dir=tmp_path, export_mode="export", transport="ssh")
    vcenter.post("/stats/reset")
    with pytest.raises(InvalidInput, match="transport ssh: no ESXi host is given"):
        await client.async_export_vm(options)
    assert vcenter.stats()["soap_total"] == 0


def test_the_flags_of_every_example_are_known():
    from hyper2kvm.cli import app

    for example in (EXAMPLE_1, EXAMPLE_2, EXAMPLE_3):
        words = shlex.split(example.replace("\\\n", ""))[3:]
        app.parse_args(words)
