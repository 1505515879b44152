"""Domains of ten VMs that are not alike: libvirt's schema takes them, and its ESX driver sees the same machines."""

from __future__ import annotations

import asyncio
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import pytest
from pyVmomi import vim

from tasks.errors import NotDefined, ToolFailed
from tasks.images.manifest import read_manifest
from tasks.report import markdown
from tasks.vsphere import machine, session
from tasks.vsphere.disks import live_disks
from tasks.vsphere.properties import retrieve
from tests.domains import HOSTILE, SCENARIO, TEN, assert_valid, described
from tests.integration.test_inventory import virsh
from tests.integration.test_scenarios import refused_before_the_first_byte
from tests.labs import running_lab
from tests.runs import assert_nothing_left, export, faults
from tests.unit.images.test_esp import disk
from tests.waits import await_that

pytestmark = [pytest.mark.anyio, pytest.mark.live]


@pytest.fixture(scope="module")
def ten():
    with running_lab(scenario=SCENARIO) as lab:
        yield lab


@pytest.fixture(scope="module")
def live(ten):
    with session.borrow(ten.connection()) as borrowed:
        yield borrowed


@pytest.fixture
def domain_of(ten, live, tmp_path):
    """Return the VM of a name, its disks, what its domain is, and its valid XML."""

    def make(name: str, networks: dict[str, str] | None = None):
        vm = machine.describe_vm(live, ten.vm(name)["moref"])
        disks = live_disks(live, vm)
        return vm, disks, *described(vm, disks, tmp_path, networks or {})

    return make


@pytest.mark.parametrize("name", TEN, ids=[*map(ascii, TEN)])
def test_libvirts_schema_takes_it_and_its_esx_driver_sees_the_same_machine(ten, domain_of, tmp_path, name):
    vm, disks, made, ours = domain_of(name)
    told = virsh(ten, vm.vpx_uri, tmp_path, "dumpxml", vm.bios_uuid)
    assert told.returncode == 0, told.stderr
    theirs = ElementTree.fromstring(told.stdout)
    assert theirs.findtext("name") == vm.name
    assert (made.name == vm.name) == (name != HOSTILE)
    assert ours.findtext("uuid") == theirs.findtext("uuid") == made.uuid
    assert ours.findtext("vcpu") == theirs.findtext("vcpu")
    assert int(ours.findtext("memory", "")) * 1024 == int(theirs.findtext("memory", ""))  # MiB and KiB
    assert macs(ours) == macs(theirs)
    assert ours.find("os").get("firmware") == theirs.find("os").get("firmware")
    assert cores(ours) == cores(theirs)
    if name != "no twin":
        assert buses(ours, {f"{tmp_path}/disk-{disk.index}.qcow2": disk.datastore_path for disk in disks}) == buses(
            theirs
        )
        assert scsi_models(ours) == scsi_models(theirs)


def macs(domain: Element) -> list[str | None]:
    return [mac.get("address") for mac in domain.findall("devices/interface/mac")]


def cores(domain: Element) -> tuple[str, str]:
    """Return sockets and cores. None said, and none that fit the CPUs, are one a socket."""
    told = domain.find("cpu/topology")
    cpus = domain.findtext("vcpu", "")
    return (cpus, "1") if told is None else (told.get("sockets", ""), told.get("cores", ""))


def buses(domain: Element, called: dict[str, str] | None = None) -> dict[str, str | None]:
    """Return the bus of each disk by its file, or by what that is called."""
    disks = [disk for disk in domain.findall("devices/disk") if disk.get("device") == "disk"]
    files = [disk.find("source").get("file", "") for disk in disks]
    return {
        (called or {}).get(file, file): disk.find("target").get("bus") for file, disk in zip(files, disks, strict=True)
    }


def scsi_models(domain: Element) -> set[str | None]:
    return {each.get("model") for each in domain.findall("devices/controller[@type='scsi']")}


def test_cards_are_on_the_networks_that_they_are_mapped_to_whatever_kind_those_are_of(domain_of):
    vm, _, made, xml = domain_of("many cards", {"dv lan": "one", "dv/lan": "two", "old <lan>": "three"})
    assert [nic.network for nic in vm.nics] == ["lan"] * 4 + ["storage", "old <lan>", "dv lan", "dv/lan"]
    cards = [(each.find("source").get("network"), each.find("model").get("type")) for each in xml.iter("interface")]
    on_default = [("default", model) for model in ("vmxnet3", "e1000e", "e1000", "pcnet", "e1000e")]
    assert cards == [*on_default, ("three", "e1000"), ("one", "vmxnet3"), ("two", "vmxnet3")]
    assert made.networks == {
        "lan": "default", "storage": "default", "old <lan>": "three", "dv lan": "one", "dv/lan": "two"
    }  # fmt: skip
    assert [each.find("link") is not None for each in xml.iter("interface")] == [False] * 6 + [True, False]


def test_a_portgroup_that_the_account_may_not_see_costs_its_name_and_no_more(ten, live):
    entity = live.entity(vim.VirtualMachine, ten.vm("many cards")["moref"])
    networks = retrieve(live, [entity], ("network",))[entity]["network"]
    assert sorted(machine.portgroup_names(live, networks).values()) == ["dv lan", "dv/lan"]
    with faults(ten, fail_method={"method": "RetrievePropertiesEx", "fault": "NoPermission", "count": 1}):
        assert machine.portgroup_names(live, networks) == {}


def test_what_does_not_come_along_is_named(domain_of):
    _, _, made, _ = domain_of("devices")
    assert made.not_carried == (
        "The medium of CD/DVD drive 1 ([datastore1] iso/install.iso): the drive is empty",
        "Floppy drive 1 (VirtualFloppy)",
        "PCI device 0 (VirtualPCIPassthrough, Tesla V100)",
        "Sound card (VirtualHdAudioCard)",
        "USB 1 (VirtualUSB, path:1/0/1)",
    )
    assert len([line for line in made.changed if "is a pty: it was telnet://:7001" in line]) == 2
    _, _, made, xml = domain_of("secure")
    assert [line.partition(":")[0] for line in made.not_carried] == [
        "The secrets in the virtual TPM", "UEFI variables, such as boot entries"
    ]  # fmt: skip
    assert xml.find("devices/tpm/backend").get("version") == "2.0"


# ── what an export leaves ────────────────────────────────────────────────────────────────────────────


@pytest.mark.usefixtures("prefect_api")
@pytest.mark.parametrize("loader", ["EFI/BOOT/BOOTX64.EFI", None], ids=["with a loader", "with none"])
async def test_an_export_names_the_images_and_says_whether_the_firmware_finds_a_loader(new_lab, tmp_path, loader):
    vm = {"name": "uefi", "firmware": "efi", "power": "off", "disks": [{"from": str(disk(tmp_path, loader=loader))}]}
    lab = new_lab(scenario=one_vm(vm))
    manifest = await export(lab, tmp_path / "out", "uefi", network_map=("VM Network:lan",))
    folder = tmp_path / "out" / "uefi"
    assert_valid(folder / "domain.xml")
    xml = ElementTree.parse(folder / "domain.xml")
    assert xml.find("devices/disk/source").get("file") == str(folder / "disk-0.qcow2")
    assert xml.find("devices/interface/source").get("network") == "lan"
    assert xml.findtext("uuid") == manifest.domain.uuid == manifest.vm.bios_uuid
    assert read_manifest(folder).domain == manifest.domain
    missing = [line for line in manifest.domain.not_carried if line.startswith("A boot entry:")]
    assert len(missing) == (loader is None)
    report = markdown(manifest, folder)
    assert "| Network | VM Network → lan |" in report
    assert report.count("\n- ") == len(manifest.domain.not_carried)


@pytest.mark.usefixtures("prefect_api")
async def test_a_missing_tool_costs_the_look_at_the_loader_and_not_the_export(tmp_path, monkeypatch):
    monkeypatch.setattr("tasks.images.esp._MTOOLS", ["env", "nobody-has-this"])
    image = disk(tmp_path)
    lab_vm = {"name": "uefi", "firmware": "efi", "power": "off", "disks": [{"from": str(image)}]}
    with running_lab(scenario=one_vm(lab_vm)) as lab:
        manifest = await export(lab, tmp_path / "out", "uefi")
    assert any("was not looked for" in line for line in manifest.domain.not_carried)


@pytest.mark.usefixtures("prefect_api")
async def test_a_copy_of_somebody_elses_snapshot_says_that_the_others_stay(new_lab, tmp_path):
    vm = {"name": "old", "snapshots": [{"name": "before", "writes": "64KiB"}], "disks": [{"size": "1MiB"}]}
    lab = new_lab(scenario=one_vm(vm))
    moref = lab.govc("snapshot.tree", "-vm", "old", "-i").split("[")[1].partition("]")[0]
    manifest = await export(lab, tmp_path, "old", snapshot_moref=moref)
    assert "The VM's snapshots: the disks are those of before" in manifest.domain.not_carried


def one_vm(vm: dict) -> dict:
    return {"datacenters": [{"name": "DC", "clusters": [{"name": "c", "hosts": ["esx1"]}], "vms": [vm]}]}


# ── into libvirt ─────────────────────────────────────────────────────────────────────────────────────

TWINS = {"vms": [{"name": name, "power": power, "disks": [{"size": "1MiB"}]} for name, power in
         (("off", "off"), ("on", "on"), ("test", "off"))]}  # fmt: skip
LIBVIRT = "test:///default"  # libvirt's own, which has a domain named test


@pytest.fixture(scope="module")
def twins():
    site = {"name": "DC", "clusters": [{"name": "c", "hosts": ["esx1"]}]}
    with running_lab(scenario={"datacenters": [site | TWINS]}) as lab:
        yield lab


@pytest.mark.usefixtures("prefect_api")
async def test_a_domain_is_defined_unless_its_source_runs_and_then_when_told_to(twins, tmp_path):
    await export(twins, tmp_path, "off", define=True, libvirt_uri=LIBVIRT)
    with refused_before_the_first_byte(twins, tmp_path / "no", NotDefined, "on is not .*powered on") as caught:
        await export(twins, tmp_path / "no", "on", define=True, libvirt_uri=LIBVIRT)
    assert "--define-while-source-runs" in caught.value.remedy
    await export(twins, tmp_path, "on", define=True, libvirt_uri=LIBVIRT, define_while_source_runs=True)
    assert_nothing_left(twins)


@pytest.mark.usefixtures("prefect_api")
@pytest.mark.parametrize(("uri", "kind", "why"), [
    (LIBVIRT, NotDefined, "there is a domain 'test'"), ("test:///nowhere", ToolFailed, "virsh failed"),
])  # fmt: skip
async def test_what_stands_in_a_domains_way_is_found_before_the_first_byte(twins, tmp_path, uri, kind, why):
    with refused_before_the_first_byte(twins, tmp_path, kind, why):
        await export(twins, tmp_path, "test", define=True, libvirt_uri=uri)


@pytest.mark.usefixtures("prefect_api")
async def test_a_source_that_was_started_meanwhile_keeps_its_copy_from_being_defined(twins, tmp_path):
    with faults(twins, throttle_bytes_per_s=200_000):
        copying = asyncio.create_task(export(twins, tmp_path, "off", define=True, libvirt_uri=LIBVIRT))
        await asyncio.to_thread(await_that, (tmp_path / "off" / "disk-0.journal").exists, 60)
        twins.govc("vm.power", "-on", "off")
        try:
            with pytest.raises(NotDefined, match=r"powered on.*the export itself is complete") as caught:
                await copying
        finally:
            twins.govc("vm.power", "-off", "off")
    assert f"virsh -c {LIBVIRT} define {tmp_path}/off/domain.xml" in caught.value.remedy
    assert read_manifest(tmp_path / "off").domain
    assert_nothing_left(twins)
