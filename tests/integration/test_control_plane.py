"""The control-plane against a live lab: how often it asks, what it says, one session, outside judges."""

from __future__ import annotations

import os
import subprocess
import threading

import pytest

from tasks import errors
from tasks.vsphere import lookup, machine, session, snapshots
from tasks.vsphere.disks import check_unchanged, snapshot_disks
from tests.labs import running_lab
from tests.runs import assert_nothing_left, faults

pytestmark = [pytest.mark.live]

SITE = {
    "datacenters": [
        {
            "name": "DC0",
            "folder": "europe/north",
            "clusters": [{"name": "cluster 0", "folder": "racks", "hosts": ["esx1"]}],
            "standalone_hosts": ["esx9"],
            "vms": [
                {"name": "web", "folder": "prod", "host": "esx1", "disks": [{"size": "1MiB"}]},
                {"name": "alone", "host": "esx9", "disks": [{"size": "1MiB"}]},
            ],
        },
        {"name": "DC1", "clusters": [{"name": "c", "hosts": ["esx2"]}], "vms": [{"name": "far", "disks": []}]},
    ]
}
CROWD = {
    "datacenters": [
        {
            "name": "DC0",
            "clusters": [{"name": "c", "hosts": ["esx1"]}],
            "vms": [{"name": "web", "folder": "prod", "disks": [{"size": "1MiB"}]}]
            + [{"name": f"vm {number}", "folder": "crowd", "disks": []} for number in range(40)],
        }
    ]
}


@pytest.fixture(scope="module")
def site():
    with running_lab(scenario=SITE) as lab:
        yield lab


def calls_of(lab, live, wanted: str) -> dict[str, int]:
    lab.post("/stats/reset")
    machine.describe_vm(live, lookup.find_vm(live, wanted))
    return dict(lab.stats()["soap_calls"])


def test_a_lookup_costs_as_many_calls_among_40_vms_as_alone(site):
    with running_lab(scenario=CROWD) as crowd:
        counts = []
        for lab in (site, crowd):
            with session.borrow(lab.connection()) as live:
                vm = machine.describe_vm(live, lookup.find_vm(live, "web"))
                counts.append(
                    {
                        wanted: calls_of(lab, live, getattr(vm, wanted))
                        for wanted in ("inventory_path", "moref", "instance_uuid", "bios_uuid", "name")
                    }
                )
        assert counts[0] == counts[1]
    by = counts[0]
    assert by["inventory_path"] == {"FindByInventoryPath": 1, "RetrievePropertiesEx": 2}
    assert by["moref"] == {"RetrievePropertiesEx": 3}
    assert by["instance_uuid"] == {"FindAllByUuid": 1, "RetrievePropertiesEx": 2}
    assert by["bios_uuid"] == {"FindAllByUuid": 2, "RetrievePropertiesEx": 2}
    assert by["name"] == {"CreateContainerView": 1, "DestroyView": 1, "RetrievePropertiesEx": 3}


def test_a_list_in_pages_has_every_vm_once(monkeypatch):
    with running_lab(scenario=CROWD) as crowd, session.borrow(crowd.connection()) as live:
        monkeypatch.setattr("tasks.vsphere.properties.PAGE_OBJECTS", 7)
        pages = list(lookup.list_vms(live))
        assert max(len(page) for page in pages) <= 7
        paths = [vm.path for page in pages for vm in page]
        assert sorted(paths) == sorted(vm["path"] for vm in crowd.vms)


def test_threads_share_one_session_and_the_last_one_ends_it(site):
    site.post("/stats/reset")
    here = threading.Barrier(4)

    def work() -> None:
        with session.borrow(site.connection()) as live:
            here.wait(20)
            lookup.find_vm(live, "web")
            here.wait(20)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert site.stats()["logins"] == 1
    assert_nothing_left(site)


def test_a_session_that_died_is_renewed_once_for_all(site):
    with session.borrow(site.connection()) as live:
        site.post("/stats/reset")
        site.post("/faults", expire_sessions=True)
        assert lookup.find_vm(live, "/europe/north/DC0/vm/prod/web")
        assert lookup.find_vm(live, "web")
        assert site.stats()["logins"] == 1
    assert_nothing_left(site)


def test_a_session_that_cannot_be_renewed_is_named(site):
    with session.borrow(site.connection()) as live:
        site.post("/faults", expire_forever=True)
        with pytest.raises(errors.SessionExpired):
            lookup.find_vm(live, "web")
        site.post("/faults", clear=True)
    assert site.stats()["live_sessions"] == 0


@pytest.mark.parametrize("fault", ["HostCommunication", "TaskInProgress"])
def test_a_transient_fault_is_asked_again(site, fault):
    with (
        session.borrow(site.connection()) as live,
        faults(site, fail_method={"method": "FindByInventoryPath", "fault": fault, "count": 2}),
    ):
        assert lookup.find_vm(live, "/europe/north/DC0/vm/prod/web")


def test_a_fault_that_is_not_transient_is_not_asked_again(site):
    with session.borrow(site.connection()) as live:
        site.post("/stats/reset")
        with (
            faults(site, fail_method={"method": "FindByInventoryPath", "fault": "InvalidProperty", "count": 9}),
            pytest.raises(errors.VsphereFault, match="InvalidProperty"),
        ):
            lookup.find_vm(live, "/europe/north/DC0/vm/prod/web")
        assert site.stats()["soap_calls"]["FindByInventoryPath"] == 1


def test_nobody_at_the_address_and_somebody_else_at_it_are_named(site):
    with pytest.raises(errors.ConnectionFailed, match="refused"), session.borrow(site.connection(port=9)):
        pass
    port = int(site.admin_url.rstrip("/").rpartition(":")[2])
    with pytest.raises(errors.ConnectionFailed), session.borrow(site.connection(port=port)):
        pass


def test_a_snapshot_is_made_found_described_and_removed(site):
    with session.borrow(site.connection()) as live:
        vm = machine.describe_vm(live, lookup.find_vm(live, "web"))
        made = snapshots.take_snapshot(
            live, vm, name="hyper2kvm-test", description="x", quiesce=True, or_crash_consistent=False
        )
        assert snapshots.find_snapshot(live, vm.moref, name="hyper2kvm-test") == made
        disks = snapshot_disks(live, made)
        assert [disk.datastore_path for disk in disks] == ["[datastore1] web/web.vmdk"]
        assert disks[0].parents == ()
        check_unchanged(live, vm, made, disks)
        with pytest.raises(errors.FenceClosed):
            machine.check_fence(live, vm)
        snapshots.drop_snapshot(live, vm.moref, name="hyper2kvm-test")
        with pytest.raises(errors.SnapshotChanged, match="it is gone"):
            check_unchanged(live, vm, made, disks)
        snapshots.drop_snapshot(live, vm.moref, name="hyper2kvm-test")
    assert_nothing_left(site)


def test_a_snapshot_is_never_asked_for_twice(site):
    with session.borrow(site.connection()) as live:
        vm = machine.describe_vm(live, lookup.find_vm(live, "alone"))
        site.post("/stats/reset")
        with faults(site, fail_method={"method": "CreateSnapshot_Task", "fault": "HostCommunication", "count": 1}):
            with pytest.raises(errors.VsphereFault):
                snapshots.create_snapshot(live, vm, name="once", description="", quiesce=False)
        assert site.stats()["soap_calls"]["CreateSnapshot_Task"] == 1
    assert_nothing_left(site)


# ── outside judges ───────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def virsh(site, tmp_path):
    """Run libvirt's own ESX driver against the lab; it takes the password from a file."""
    auth = tmp_path / "auth.conf"
    auth.write_text(
        f"[credentials-lab]\nusername={site.username}\npassword={site.password}\n[auth-esx-{site.host}]\ncredentials=lab\n"
    )

    def run(uri: str, *words: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"LIBVIRT_AUTH_FILE": str(auth)}
        argv = ["virsh", "-q", "-c", f"{uri}?no_verify=1", *words]
        return subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=60)

    return run


@pytest.mark.parametrize("name", ["web", "alone", "far"])
def test_libvirt_accepts_the_uri_and_describes_the_same_machine(site, virsh, name):
    with session.borrow(site.connection()) as live:
        vm = machine.describe_vm(live, lookup.find_vm(live, name))
    listed = virsh(vm.vpx_uri, "list", "--all", "--name")
    assert listed.returncode == 0, listed.stderr
    assert name in listed.stdout.split()
    described = virsh(vm.vpx_uri, "dumpxml", name)
    assert described.returncode == 0, described.stderr
    assert f"<name>{name}</name>" in described.stdout
    assert f"<uuid>{vm.bios_uuid}</uuid>" in described.stdout


def test_libvirt_refuses_a_path_that_names_no_host_or_too_much(site, virsh):
    base = f"vpx://{site.username}@{site.address}/europe/north/DC0"
    cluster_only = virsh(f"{base}/racks/cluster%200", "list")
    assert "does not specify a host system" in cluster_only.stderr
    too_much = virsh(f"{base}/esx9/esx9", "list")
    assert "ends with an excess item" in too_much.stderr


def test_govc_sees_the_machines_and_our_snapshot(site):
    with session.borrow(site.connection()) as live:
        vm = machine.describe_vm(live, lookup.find_vm(live, "web"))
        made = snapshots.create_snapshot(live, vm, name="hyper2kvm-seen", description="", quiesce=False)
        assert "hyper2kvm-seen" in site.govc("snapshot.tree", "-vm", vm.inventory_path)
        assert vm.inventory_path in site.govc("find", "/", "-type", "m").splitlines()
        snapshots.drop_snapshot(live, vm.moref, name=made.name)
    assert "hyper2kvm-seen" not in site.govc("snapshot.tree", "-vm", vm.inventory_path)
