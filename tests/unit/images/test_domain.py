"""`tasks.images.domain`: each made with libvirt's schema looking on."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.images.domain import describe, domain_name
from tasks.models import Controller, Device, Nic
from tests.domains import assert_valid
from tests.unit.images.test_manifest import DISK, VM

PVSCSI = Controller(key=1000, model="ParaVirtualSCSIController", bus=0)
DISKS = tuple(
    DISK.model_copy(
        update={"index": n, "disk_key": 2001 - n, "controller_key": 1000, "unit_number": 1 - n, "path": f"disk-{n}.raw"}
        | {"format": "raw"}
    )
    for n in range(2)
)
CARD = Nic(key=4000, label="Network adapter 1", model="VirtualVmxnet3", mac="00:50:56:00:00:01", network="lan")


@pytest.fixture
def xml_of(tmp_path):
    """Return what the domain of a changed VM is, and its valid XML."""

    def make(images=DISKS, networks=None, **changes):
        vm = VM.model_copy(
            update={"bios_uuid": "4221b0f1-9c77-42e5-8f5e-0123456789ab", "controllers": (PVSCSI,)} | changes
        )
        domain, xml = describe(vm, images, tmp_path, networks or {})
        (path := tmp_path / "domain.xml").write_text(xml)
        assert_valid(path)
        return domain, ElementTree.fromstring(xml)

    return make


def orders(xml) -> dict[str, str]:
    """Return the boot order of each device by its name or MAC."""
    found = {}
    for device in xml.find("devices"):
        if (boot := device.find("boot")) is not None:
            name = device.find("target") if device.tag == "disk" else device.find("mac")
            found[name.get("dev") or name.get("address")] = boot.get("order")
    return found


def test_images_are_named_by_their_absolute_paths_in_the_order_of_their_units(xml_of, tmp_path):
    _, xml = xml_of()
    disks = [(disk.find("source").get("file"), disk.find("driver").get("type")) for disk in xml.iter("disk")]
    assert disks == [(f"{tmp_path}/disk-1.raw", "raw"), (f"{tmp_path}/disk-0.raw", "raw")]
    assert [disk.find("address").get("target") for disk in xml.iter("disk")] == ["0", "1"]
    assert Path(disks[0][0]).is_absolute()


def test_disks_boot_in_the_order_of_their_keys_unless_the_vm_was_told_otherwise(xml_of):
    assert orders(xml_of()[1]) == {"sda": "1", "sdb": "2"}
    told = xml_of(nics=(CARD,), boot_keys=(4000, 2001, 4711))[1]
    assert orders(told) == {"00:50:56:00:00:01": "1", "sdb": "2", "sda": "3"}


@pytest.mark.parametrize(
    ("model", "addressed"), [("VirtualLsiLogicSASController", True), ("ParaVirtualSCSIController", False)]
)
def test_disks_on_sas_have_addresses_of_their_own_without_which_linux_does_not_see_them(xml_of, model, addressed):
    disks = tuple(disk.model_copy(update={"uuid": f"6000C29{disk.index}"}) for disk in DISKS)
    xml = xml_of(disks, controllers=(Controller(key=1000, model=model, bus=0),))[1]
    assert len({disk.text for disk in xml.iterfind("devices/disk/wwn")}) == (2 if addressed else 0)


@pytest.mark.parametrize(
    ("firmware", "secure", "feature"), [("bios", False, {}), ("efi", False, {"secure-boot": "no"}),
    ("efi", True, {"secure-boot": "yes", "enrolled-keys": "yes"})],
)  # fmt: skip
def test_the_firmware_is_libvirts_to_choose(xml_of, firmware, secure, feature):
    domain, xml = xml_of(firmware=firmware, secure_boot=secure)
    assert xml.find("os").get("firmware") == (None if firmware == "bios" else "efi")
    assert {each.get("name"): each.get("enabled") for each in xml.iterfind("os/firmware/feature")} == feature
    assert (xml.find("features/smm") is not None) == secure
    assert domain.machine == ("pc" if firmware == "bios" else "q35")
    assert any("NVRAM" in line for line in domain.not_carried) == (firmware == "efi")


@pytest.mark.parametrize(("secure", "machine", "bus"), [(False, "pc", "ide"), (True, "q35", "sata")])
def test_a_disk_on_ide_keeps_it_beside_uefi_unless_secure_boot_forbids(xml_of, secure, machine, bus):
    ide = Controller(key=200, model="VirtualIDEController", bus=0)
    disk = DISK.model_copy(update={"disk_key": 3000, "controller_key": 200, "unit_number": 0})
    domain, xml = xml_of((disk,), controllers=(ide,), secure_boot=secure)
    assert (domain.machine, xml.find("devices/disk/target").get("bus")) == (machine, bus)
    assert len(domain.changed) == secure


@pytest.mark.parametrize(
    ("cpus", "cores", "topology"), [(8, 4, ("2", "4")), (4, 0, None), (3, 2, None), (2, 1, ("2", "1"))]
)
def test_cores_are_in_sockets_as_they_were_where_that_comes_out_even(xml_of, cpus, cores, topology):
    told = xml_of(cpus=cpus, cores_per_socket=cores)[1].findall("cpu/topology")
    assert [(each.get("sockets"), each.get("cores")) for each in told] == ([topology] if topology else [])


@pytest.mark.parametrize(
    ("guest", "offset"), [("windows9_64Guest", "localtime"), ("debian12_64Guest", "utc"), ("", "utc")]
)
def test_the_clock_is_set_as_vmware_sets_it(xml_of, guest, offset):
    assert xml_of(guest_id=guest)[1].find("clock").get("offset") == offset


def test_a_serial_port_is_there_in_any_case_and_as_many_as_there_were(xml_of):
    ports = tuple(Device(key=n, label=f"Serial port {n}", model="VirtualSerialPort") for n in range(3))
    assert [len(xml_of(devices=ports[:n])[1].findall("devices/serial")) for n in (0, 1, 3)] == [1, 1, 3]


def test_a_card_keeps_its_address_and_its_cable(xml_of):
    unplugged = CARD.model_copy(update={"key": 4001, "mac": None, "network": None, "connected": False})
    domain, xml = xml_of(nics=(CARD, unplugged), networks={"lan": "br"})
    first, second = xml.iter("interface")
    assert (first.find("mac").get("address"), first.find("source").get("network")) == ("00:50:56:00:00:01", "br")
    assert first.find("link") is None
    assert (second.find("mac"), second.find("link").get("state")) == (None, "down")
    assert domain.networks == {"lan": "br", "": "default"}


def test_a_name_that_libvirt_does_not_take_is_mapped_and_that_is_said(xml_of):
    domain, xml = xml_of(name="a/b\nc\x07\ufffe")
    assert domain.name == xml.findtext("name")
    assert "/" not in domain.name and domain.name.isprintable()
    (said,) = domain.changed
    assert r"a/b\nc\x07" in said
    assert not xml_of()[0].changed


@given(st.text(min_size=1))
def test_any_name_is_a_name_for_libvirt_and_for_xml(name):
    fit = domain_name(name)
    assert ElementTree.fromstring(f"<x>{ElementTree.tostring(_text(fit), encoding='unicode')}</x>")[0].text == fit
    assert not set("/\n") & set(fit)
    assert fit.strip()


def _text(text: str) -> ElementTree.Element:
    element = ElementTree.Element("name")
    element.text = text
    return element
