"""`tasks.vsphere.names`: stored and shown names, paths, vpx URIs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr
from pyVmomi import vim

from tasks.models import Connection
from tasks.vsphere import names


@pytest.mark.parametrize(
    ("stored", "shown"),
    [("a%2fb", "a/b"), ("a%5Cb", "a\\b"), ("50%25", "50%"), ("a%252fb", "a%2fb"), ("plain", "plain"), ("%zz", "%zz")],
)
def test_a_stored_name_is_shown_as_the_client_shows_it(stored, shown):
    assert names.shown(stored) == shown


@given(st.text())
def test_what_vsphere_stores_is_shown_as_it_was_given(name):
    stored = name.replace("%", "%25").replace("/", "%2f").replace("\\", "%5c")
    assert names.shown(stored) == name


@pytest.mark.parametrize(
    ("given_path", "stored"),
    [
        ("/DC0/vm/web", "DC0/vm/web"),
        ("DC0/vm/50%/", "DC0/vm/50%25"),
        ("/DC0/vm/a%2fb", "DC0/vm/a%2fb"),
        ("/DC0/vm/a%25b", "DC0/vm/a%25b"),
        ("/DC0/vm/a\\b", "DC0/vm/a%5cb"),
    ],
)
def test_a_path_is_given_to_vsphere_in_stored_form(given_path, stored):
    assert names.as_stored_path(given_path) == stored


def test_names_are_the_same_in_either_unicode_form():
    assert names.same_name("café", "cafe\u0301")
    assert not names.same_name("cafe", "café")


ROOT = vim.Folder("group-d1")
DC_FOLDER, DC = vim.Folder("group-d2"), vim.Datacenter("datacenter-3")
HOSTS, HOST_FOLDER = vim.Folder("group-h4"), vim.Folder("group-h5")
CLUSTER, ALONE = vim.ClusterComputeResource("domain-c6"), vim.ComputeResource("domain-s7")
ESX1, ESX2 = vim.HostSystem("host-8"), vim.HostSystem("host-9")
KNOWN = {
    ROOT: {"name": "Datacenters"},
    DC_FOLDER: {"name": "Europe", "parent": ROOT},
    DC: {"name": "DC%2f1", "parent": DC_FOLDER},
    HOSTS: {"name": "host", "parent": DC},
    HOST_FOLDER: {"name": "racks", "parent": HOSTS},
    CLUSTER: {"name": "prod cluster", "parent": HOST_FOLDER},
    ESX1: {"name": "esx1.example.com", "parent": CLUSTER},
    ALONE: {"name": "esx2", "parent": HOSTS},
    ESX2: {"name": "esx2", "parent": ALONE},
}


def connection(**changes):
    return Connection(**{"host": "vc", "username": "admin@vsphere.local", "password": SecretStr("x")} | changes)


def test_the_host_system_path_goes_down_to_the_host():
    assert names.inventory_path(ESX1, KNOWN) == "/Europe/DC%2f1/host/racks/prod cluster/esx1.example.com"
    assert names.inventory_path(ESX2, KNOWN) == "/Europe/DC%2f1/host/esx2/esx2"
    assert names.datacenter_of(ESX1, KNOWN) == DC


def test_the_vpx_uri_leaves_out_the_hidden_folder_and_a_standalone_hosts_compute_resource():
    at = "vpx://admin%40vsphere.local@vc"
    assert names.vpx_uri(connection(), ESX1, KNOWN) == f"{at}/Europe/DC%252f1/racks/prod%20cluster/esx1.example.com"
    assert names.vpx_uri(connection(port=8443), ESX2, KNOWN) == f"{at}:8443/Europe/DC%252f1/esx2"


def test_the_vpx_uri_of_an_ipv6_vcenter_keeps_its_brackets():
    assert names.vpx_uri(connection(host="::1"), ESX2, KNOWN).startswith("vpx://admin%40vsphere.local@[::1]/Europe")


@pytest.mark.parametrize("port", [443, 8443])
def test_a_lone_hosts_uri_has_no_path(port):
    where = "esx://root@esx" if port == 443 else f"esx://root@esx:{port}"
    alone = connection(host="esx", username="root", port=port)
    assert names.esx_uri(alone) == f"{where}/"
    assert names.libvirt_uri(alone, ESX2, KNOWN, lone_host=True) == f"{where}/"
    assert names.libvirt_uri(alone, ESX2, KNOWN, lone_host=False).startswith("vpx://")


@pytest.mark.parametrize(
    ("text", "is_one"),
    [("/DC/vm/web", True), ("/a/DC/vm/b/web/", True), ("/web", False), ("/a/b", False), ("web", False), ("", False)],
)
def test_an_inventory_path_has_a_datacenter_a_folder_and_a_name(text, is_one):
    assert names.is_path(text) is is_one


@given(st.text())
def test_the_spellings_of_a_text_are_few_look_the_same_and_begin_with_itself(text):
    spellings = names.spellings(text)
    assert spellings[0] == text
    assert len(set(spellings)) == len(spellings) <= 3
    assert all(names.same_name(text, each) for each in spellings)
    assert not text.isascii() or spellings == [text]


def test_a_vm_in_nested_vapps_has_the_path_that_the_inventory_shows():
    """`ancestors` gives a vApp its folder, or the vApp around it, as its parent."""
    vms, shop, web = vim.Folder("group-v10"), vim.VirtualApp("resgroup-v11"), vim.VirtualApp("resgroup-v12")
    vm = vim.VirtualMachine("vm-13")
    known = KNOWN | {
        vms: {"name": "vm", "parent": DC},
        shop: {"name": "shop", "parent": vms},
        web: {"name": "web tier", "parent": shop},
        vm: {"name": "db", "parent": names.home({"parentVApp": web})},
    }
    assert names.inventory_path(vm, known) == "/Europe/DC%2f1/vm/shop/web tier/db"


def test_an_orphan_lies_nowhere():
    assert names.home({}) is None
    assert names.inventory_path(None, KNOWN) == ""
