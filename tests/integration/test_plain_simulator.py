"""Our client asks no more of a vCenter than a plain simulator gives: what the lab adds is never what makes it work."""

from __future__ import annotations

import pytest
from pydantic import SecretStr

from blocks import VCenter
from flows.export import export_vm
from tasks import errors
from tasks.models import Connection, ExportJob, Trust
from tasks.vsphere import lookup, machine, session, snapshots
from tasks.vsphere.disks import check_unchanged, snapshot_disks
from tests.labs import plain_simulator

pytestmark = [pytest.mark.anyio, pytest.mark.live]


@pytest.fixture(scope="module")
def plain():
    with plain_simulator() as ready:
        yield ready


def test_connect_list_resolve_snapshot_and_enumerate(plain):
    connection = Connection(
        host=plain["host"],
        port=plain["port"],
        username=plain["username"],
        password=SecretStr(plain["password"]),
        trust=Trust(verify=False),
    )
    with session.borrow(connection) as live:
        listed = [entry for page in lookup.list_vms(live) for entry in page]
        assert len(listed) == 4
        for entry in listed:
            vm = machine.describe_vm(live, lookup.find_vm(live, entry.path))
            assert (vm.moref, vm.inventory_path) == (entry.moref, entry.path)
            for wanted in (vm.name, vm.moref, vm.instance_uuid, vm.bios_uuid):
                assert lookup.find_vm(live, wanted) == vm.moref
            made = snapshots.take_snapshot(
                live, vm, name="hyper2kvm-plain", description="{}", quiesce=False, or_crash_consistent=False
            )
            disks = snapshot_disks(live, made)
            assert [disk.backing for disk in disks] == ["FlatVer2BackingInfo"]
            check_unchanged(live, vm, made, disks)
            snapshots.drop_snapshot(live, vm.moref, name="hyper2kvm-plain")
            assert snapshots.find_snapshot(live, vm.moref, name="hyper2kvm-plain") is None


async def test_an_export_finds_its_disks_empty_and_says_so(plain, prefect_api, tmp_path):
    vcenter = VCenter(
        host=plain["host"], port=plain["port"], username=plain["username"], password=plain["password"], verify=False
    )
    with pytest.raises(errors.UnsupportedDisk) as caught:
        await export_vm(
            vcenter=vcenter, options=ExportJob(vm_name="DC0_H0_VM0", output_dir=tmp_path, transport="folder")
        )
    print(caught.value)
