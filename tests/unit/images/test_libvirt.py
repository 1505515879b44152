"""`tasks.images.libvirt` against libvirt's own test driver, whose one domain `test` is on /guest/diskimage1."""

import socket
from pathlib import Path

import pytest

from tasks.errors import NotDefined, ToolFailed
from tasks.images import libvirt
from tasks.images.libvirt import define, refuse_others

URI, UUID, OTHER = "test:///default", "6695eb01-f6a4-8304-79aa-97f2502e193f", "4221b0f1-9c77-42e5-8f5e-0123456789ab"


@pytest.mark.parametrize(
    ("name", "uuid", "folder"),
    [("test", OTHER, "/guest"), ("web", UUID, "/guest"), ("test", UUID, "/data/test")],
    ids=["its name", "its UUID", "both, on other images"],
)
def test_a_domain_that_is_not_ours_is_refused_and_named(name, uuid, folder):
    with pytest.raises(NotDefined, match=f"a domain 'test' with UUID {UUID} already"):
        refuse_others(URI, name=name, uuid=uuid, folder=Path(folder))


@pytest.mark.parametrize(("name", "uuid"), [("test", UUID), ("web", OTHER), ("tes", OTHER)])
def test_ours_and_a_new_one_are_not(name, uuid):
    refuse_others(URI, name=name, uuid=uuid, folder=Path("/guest"))


def test_among_more_domains_than_a_tools_last_lines_each_is_seen(tmp_path):
    one = "<domain type='test'><name>a {0}</name><uuid>4221b0f1-9c77-42e5-8f5e-0123456{0:05}</uuid><memory>1</memory>"
    many = "".join(one.format(number) + "<os><type>hvm</type></os></domain>" for number in range(200))
    (tmp_path / "node.xml").write_text(f"<node>{many}</node>")
    with pytest.raises(NotDefined, match="'a 0'"):
        refuse_others(f"test://{tmp_path}/node.xml", name="a 0", uuid=OTHER, folder=tmp_path)


def test_a_libvirt_that_is_silent_is_not_waited_for_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(libvirt, "ANSWER_S", 0.5)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "sock"))
        silent.listen()
        with pytest.raises(ToolFailed, match="no answer within") as raised:
            uri = f"qemu+unix:///system?socket={tmp_path}/sock"
            refuse_others(uri, name="web", uuid=OTHER, folder=Path("/guest"))
    assert raised.value.remedy == f"See that libvirt answers: virsh --connect {uri} list"


def test_a_libvirt_that_does_not_answer_is_its_own_error():
    with pytest.raises(ToolFailed, match="virsh failed"):
        refuse_others("qemu+unix:///system?socket=/nowhere/sock", name="web", uuid=OTHER, folder=Path("/guest"))


def test_what_is_no_domain_is_not_defined(tmp_path):
    (tmp_path / "domain.xml").write_text("<domain type='kvm'><name>web</name><nonsense/></domain>")
    with pytest.raises(ToolFailed, match="virsh failed"):
        define(URI, tmp_path / "domain.xml")
