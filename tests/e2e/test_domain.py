"""Ten VMs that are not alike: libvirt defines each from its `domain.xml`, and QEMU starts it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tasks.errors import NotDefined
from tasks.images.libvirt import refuse_others
from tasks.images.qemu import create
from tasks.vsphere import machine, session
from tasks.vsphere.disks import live_disks
from tests.domains import SCENARIO, TEN, described
from tests.e2e.libvirtd import private_libvirt, virsh
from tests.labs import running_lab
from tests.runs import export

pytestmark = [pytest.mark.e2e, pytest.mark.live]


@pytest.fixture(scope="module")
def lab():
    with running_lab(scenario=SCENARIO) as lab:
        yield lab


@pytest.fixture(scope="module")
def libvirt():
    with tempfile.TemporaryDirectory(prefix="lv-") as folder, private_libvirt(Path(folder)) as uri:
        yield uri


def for_any_machine(domain_xml: Path) -> Path:
    """Return a copy of a domain that asks for no KVM, which not every machine has."""
    text = domain_xml.read_text()
    assert text.startswith('<domain type="kvm">')
    (copy := domain_xml.with_suffix(".tcg.xml")).write_text(text.replace('type="kvm"', 'type="qemu"', 1))
    return copy


@pytest.fixture(scope="module")
def live(lab):
    with session.borrow(lab.connection()) as borrowed:
        yield borrowed


@pytest.mark.parametrize("name", TEN, ids=[*map(ascii, TEN)])
def test_libvirt_defines_it_and_qemu_starts_it(lab, live, libvirt, tmp_path, name):
    vm = machine.describe_vm(live, lab.vm(name)["moref"])
    disks = live_disks(live, vm)
    for disk in disks:
        create(tmp_path / f"disk-{disk.index}.qcow2", size=disk.capacity_bytes)
    made, _ = described(vm, disks, tmp_path, {})
    with started(libvirt, tmp_path / "domain.xml", made.uuid):
        assert virsh(libvirt, "domname", made.uuid) == made.name
        assert virsh(libvirt, "domstate", made.uuid) == "paused"


@contextmanager
def started(libvirt: str, domain_xml: Path, uuid: str) -> Iterator[None]:
    """Have a domain defined, and started but for its first instruction."""
    virsh(libvirt, "define", "--validate", os.fspath(for_any_machine(domain_xml)))
    try:
        virsh(libvirt, "start", "--paused", uuid)
        yield
        virsh(libvirt, "destroy", uuid)
    finally:
        virsh(libvirt, "undefine", "--nvram", uuid)


@pytest.mark.anyio
@pytest.mark.usefixtures("prefect_api")
async def test_an_exported_vm_starts_from_its_images_and_a_second_copy_is_not_defined_beside_it(lab, libvirt, tmp_path):
    manifest = await export(lab, tmp_path, "many disks")
    folder, domain = tmp_path / "many disks", manifest.domain
    with started(libvirt, folder / "domain.xml", domain.uuid):
        files = {line.split(maxsplit=1)[1] for line in virsh(libvirt, "domblklist", domain.uuid).splitlines()}
        assert files == {os.fspath(folder / image.path) for image in manifest.disks}
        with pytest.raises(NotDefined, match="there is a domain 'many disks'"):
            await export(lab, tmp_path / "again", "many disks", define=True, libvirt_uri=libvirt)
        refuse_others(libvirt, name=domain.name, uuid=domain.uuid, folder=folder)
