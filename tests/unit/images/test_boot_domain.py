"""`tasks.images.boot_domain`: what of a domain is kept when it is started aside, with libvirt's schema looking on."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from tasks.errors import InvalidInput
from tasks.images.boot_domain import Setting, boots_by_uefi, images_of, read_domain, set_aside
from tasks.images.domain import DOMAIN, describe
from tasks.models import Controller, Device, Nic
from tests.domains import assert_valid
from tests.unit.images.test_manifest import DISK, VM

PVSCSI = Controller(key=1000, model="ParaVirtualSCSIController", bus=0)
CARD = Nic(key=4000, label="Network adapter 1", model="VirtualVmxnet3", mac="00:50:56:00:00:01", network="lan")
UUID = "4221b0f1-9c77-42e5-8f5e-0123456789ab"
TPM = Device(key=11000, label="Virtual TPM", model="VirtualTPM")


@pytest.fixture
def aside(tmp_path):
    """Return the domain of a changed VM set aside, as valid XML, and what is otherwise in it."""

    def make(accelerator="tcg", memory_kib=1 << 30, edit=lambda xml: xml, **changes):
        vm = VM.model_copy(
            update={"bios_uuid": UUID, "firmware": "bios", "controllers": (PVSCSI,), "nics": (CARD,)} | changes
        )
        disk = DISK.model_copy(update={"controller_key": 1000, "unit_number": 0})
        (tmp_path / DOMAIN).write_text(edit(describe(vm, (disk,), tmp_path, {})[1]))
        domain = read_domain(tmp_path)
        setting = Setting(
            accelerator=accelerator,
            overlays={image: tmp_path / "overlay" for image in images_of(domain)},
            serial=tmp_path / "serial",
            monitor=tmp_path / "qmp",
            memory_kib=memory_kib,
        )
        xml, notes = set_aside(domain, setting)
        (tmp_path / "aside.xml").write_text(xml)
        assert_valid(tmp_path / "aside.xml")
        return ElementTree.fromstring(xml), notes

    return make


def test_the_machine_is_the_domains_own(aside):
    xml, notes = aside()
    assert xml.find("devices/controller").attrib == {"type": "scsi", "index": "0", "model": "vmpvscsi"}
    assert xml.find("devices/interface/model").get("type") == "vmxnet3"
    assert xml.find("devices/interface/mac").get("address") == CARD.mac
    assert xml.find("os/type").get("machine") == "pc"
    assert xml.findtext("uuid") == UUID
    assert notes == ()


def test_disks_are_overlays_and_the_image_is_named_nowhere(aside, tmp_path):
    xml, _ = aside()
    assert xml.find("devices/disk/source").get("file") == str(tmp_path / "overlay")
    assert xml.find("devices/disk/driver").get("type") == "qcow2"
    assert DISK.path not in ElementTree.tostring(xml, encoding="unicode")


def test_the_network_leads_nowhere_and_no_port_is_opened(aside):
    xml, _ = aside()
    (card,) = xml.iterfind("devices/interface")
    assert (card.get("type"), card.find("link").get("state"), card.find("source")) == ("user", "down", None)
    assert xml.find("devices/graphics") is None


def test_the_one_serial_port_is_a_file_and_the_bios_says_there_what_it_shows(aside, tmp_path):
    xml, _ = aside()
    (port,) = xml.iterfind("devices/serial")
    assert (port.get("type"), port.find("source").get("path")) == ("file", str(tmp_path / "serial"))
    assert xml.find("os/bios").get("useserial") == "yes"


def test_uefi_is_chosen_by_libvirt_and_no_variables_of_the_host_are_touched(aside):
    there = "<os firmware='efi'><nvram>/var/lib/libvirt/qemu/nvram/web_VARS.fd</nvram>"
    xml, _ = aside(firmware="efi", edit=lambda xml: xml.replace('<os firmware="efi">', there))
    assert boots_by_uefi(xml)
    assert "web_VARS" not in ElementTree.tostring(xml, encoding="unicode")
    assert xml.find("os/bios") is None


@pytest.mark.parametrize(("accelerator", "kind", "cpu"), [("kvm", "kvm", "host-model"), ("tcg", "qemu", "maximum")])
def test_the_processor_is_the_domains_where_it_can_be(aside, accelerator, kind, cpu):
    xml, _ = aside(accelerator, cores_per_socket=1)
    assert (xml.get("type"), xml.find("cpu").get("mode")) == (kind, cpu)
    assert xml.find("cpu/topology").get("cores") == "1"


def test_it_gets_no_more_memory_than_there_is_and_that_is_said(aside):
    xml, notes = aside(memory_mib=4096, memory_kib=1 << 20)
    assert (xml.findtext("memory"), xml.find("memory").get("unit")) == ("1048576", "KiB")
    assert "1024 MiB" in notes[0]


def test_what_is_left_out_of_the_machine_is_said(aside):
    xml, notes = aside(devices=(TPM,))
    assert xml.find("devices/tpm") is None
    assert notes == ("It had no tpm",)


def test_nothing_that_an_edited_domain_runs_or_names_on_the_host_is_kept(aside):
    def edit(xml: str) -> str:
        return xml.replace("<devices>", "<devices><emulator>/tmp/evil</emulator><hostdev mode='subsystem' type='pci'/>")

    xml, notes = aside(edit=edit)
    assert "evil" not in ElementTree.tostring(xml, encoding="unicode")
    assert notes == ("It had no hostdev",)


@pytest.mark.parametrize("content", [None, "", "<domain", "<network/>", "<domain><devices/></domain>"])
def test_what_is_no_domain_is_refused_by_name(tmp_path, content):
    if content is not None:
        (tmp_path / DOMAIN).write_text(content)
    with pytest.raises(InvalidInput, match=DOMAIN):
        read_domain(tmp_path)


@pytest.mark.parametrize("source", ["<source dev='/dev/sda'/>", "", "<source file='disk-0.qcow2'/>"])
def test_a_disk_that_is_not_in_a_file_of_a_whole_path_is_refused(source):
    xml = f"<domain><os/><devices><disk type='block' device='disk'>{source}</disk></devices></domain>"
    with pytest.raises(InvalidInput, match="not an image in a file"):
        images_of(ElementTree.fromstring(xml))


def test_drives_for_media_are_kept_and_empty(aside):
    drive = Device(key=3000, label="CD/DVD drive 1", model="VirtualCdrom", controller_key=1000)
    xml, _ = aside(devices=(drive,))
    (found,) = (disk for disk in xml.iterfind("devices/disk") if disk.get("device") == "cdrom")
    assert found.find("source") is None
