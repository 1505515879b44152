"""A warm migration into a libvirtd: its domain defined, and a rollback that waits until that has ended."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.rollback import rollback
from flows.warm_migration import warm_migration
from tasks.errors import NotRolledBack
from tasks.models import RollbackJob, WarmJob
from tests.e2e.libvirtd import private_libvirt, virsh
from tests.e2e.test_domain import for_any_machine
from tests.labs import Lab, running_lab
from tests.runs import vcenter_of

pytestmark = [pytest.mark.anyio, pytest.mark.e2e, pytest.mark.live, pytest.mark.usefixtures("prefect_api")]


@pytest.fixture
def lab() -> Iterator[Lab]:
    vm = {"name": "web", "cbt": True, "shutdown_s": 0.3, "disks": [{"size": "8MiB"}]}
    with running_lab(scenario={"datacenters": [{"name": "DC", "standalone_hosts": ["esx1"], "vms": [vm]}]}) as lab:
        yield lab


async def test_the_domain_is_defined_and_a_rollback_undefines_it_unless_it_runs(lab, tmp_path):
    folder = tmp_path / "web"
    undo = {"vcenter": vcenter_of(lab), "options": RollbackJob(folder=folder)}
    boot = {"boot_check": True, "boot": {"expect": "HYPER2KVM BOOT OK", "accelerator": "tcg"}}
    with tempfile.TemporaryDirectory(prefix="lv-") as place, private_libvirt(Path(place)) as uri:
        words = {"cutover": "auto", "shut_down_source": True, "define": True, "libvirt_uri": uri, "pause": 0} | boot
        options = WarmJob(vm_name="web", output_dir=tmp_path, downtime_budget=300, expected_shutdown=1, **words)
        made = await warm_migration(vcenter=vcenter_of(lab), options=options)
        assert {"preparing", "define"} <= set(made.parts)
        (drive,) = virsh(uri, "domblklist", "web").splitlines()
        assert drive.split(maxsplit=1)[1] == os.fspath(folder / "cutover" / "disk-0.qcow2")
        virsh(uri, "define", os.fspath(for_any_machine(folder / "cutover" / "domain.xml")))
        virsh(uri, "start", "--paused", "web")
        with pytest.raises(NotRolledBack, match="its copy runs: the domain web is paused"):
            await rollback(**undo)
        assert "poweredOff" in lab.govc("vm.info", "/DC/vm/web")
        virsh(uri, "destroy", "web")
        assert await rollback(**undo) == ("powered on",)
        assert virsh(uri, "list", "--all", "--name") == ""
        assert "poweredOn" in lab.govc("vm.info", "/DC/vm/web")
