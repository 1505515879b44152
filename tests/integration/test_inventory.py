"""Where VMs lie and what they are called: a lone ESXi host, hostile names, ten thousand VMs, vApps."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import unicodedata

import pytest
from markdown_it import MarkdownIt
from pyVmomi import vim

from tasks import errors
from tasks.images.files import safe_name
from tasks.report import markdown
from tasks.vsphere import lookup, machine, names, session
from tasks.vsphere.properties import ancestors
from tests.domains import assert_valid
from tests.integration.test_scenarios import assert_equal_to_qemu_imgs_reading, refused_before_the_first_byte
from tests.labs import ROOT, Lab, running_lab
from tests.runs import assert_nothing_left, command, export, faults, run_command

pytestmark = [pytest.mark.anyio, pytest.mark.live]

needs_prefect = pytest.mark.usefixtures("prefect_api")
TINY = [{"size": "1MiB"}]


def virsh(lab: Lab, uri: str, tmp_path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run libvirt's own ESX driver: an outside judge of our URIs. It takes the password from a file."""
    auth = tmp_path / "auth.conf"
    login = f"username={lab.username}\npassword={lab.password}"
    auth.write_text(f"[credentials-lab]\n{login}\n[auth-esx-{lab.host}]\ncredentials=lab\n")
    argv = ["virsh", "-q", "-c", f"{uri}?no_verify=1", *words]
    environment = os.environ | {"LIBVIRT_AUTH_FILE": str(auth)}
    return subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=60)


def calls_of(lab: Lab, live, *wanted: str) -> list[dict[str, int]]:
    """Return the SOAP calls, by method, that it takes to find and describe each VM."""
    counts = []
    for each in wanted:
        lab.post("/stats/reset")
        machine.describe_vm(live, lookup.find_vm(live, each))
        counts.append(dict(lab.stats()["soap_calls"]))
    return counts


# ── a lone ESXi host ─────────────────────────────────────────────────────────────────────────────────

ESX = {
    "keep_frozen": True,
    "datacenters": [
        {
            "name": "ha-datacenter",
            "standalone_hosts": ["esx0.lab"],
            "vms": [
                {"name": "web", "disks": [*TINY, {"size": "2MiB"}]},
                {"name": "50%25 a%2fb", "power": "off", "disks": TINY},
            ],
        }
    ],
}


@pytest.fixture(scope="module")
def esx():
    with running_lab("-esx", scenario=ESX) as lab:
        yield lab


def test_a_lone_host_is_known_by_its_hardware_at_the_price_of_one_call(esx):
    esx.post("/stats/reset")
    with session.borrow(esx.connection()) as live:
        calls = esx.stats()["soap_calls"]
        told = live.info
    assert told.is_vcenter is False
    assert told.uuid == esx.govc("object.collect", "-s", "HostSystem:ha-host", "hardware.systemInfo.uuid").strip()
    assert calls == {"RetrieveServiceContent": 1, "Login": 1, "RetrievePropertiesEx": 1}


def test_a_host_that_does_not_say_which_it_is_keeps_no_session_of_ours(esx):
    fault = {"method": "RetrievePropertiesEx", "fault": "InvalidProperty", "count": 1}
    with faults(esx, fail_method=fault):
        with pytest.raises(errors.VsphereFault, match="InvalidProperty"), session.borrow(esx.connection()):
            pass
    assert_nothing_left(esx)


def test_on_a_lone_host_a_vm_is_found_by_path_moref_uuid_and_name(esx):
    with session.borrow(esx.connection()) as live:
        vm = machine.describe_vm(live, lookup.find_vm(live, "web"))
        assert vm.inventory_path == "/ha-datacenter/vm/web"
        for wanted in (vm.inventory_path, vm.moref, vm.instance_uuid, vm.bios_uuid):
            assert lookup.find_vm(live, wanted) == vm.moref
        for wanted in ("50% a/b", "/ha-datacenter/vm/50% a%2fb", "/ha-datacenter/vm/50%25 a%2fb"):
            assert machine.describe_vm(live, lookup.find_vm(live, wanted)).name == "50% a/b"


def test_a_number_is_looked_up_as_a_lone_hosts_moref_before_the_names_are_read(esx):
    with session.borrow(esx.connection()) as live:
        esx.post("/stats/reset")
        with pytest.raises(errors.VmNotFound):
            lookup.find_vm(live, "4711")
        assert esx.stats()["soap_calls"] == {"RetrievePropertiesEx": 2, "CreateContainerView": 1, "DestroyView": 1}


def test_a_lone_hosts_uri_and_paths_are_its_own_and_libvirt_accepts_them(esx, tmp_path):
    with session.borrow(esx.connection()) as live:
        vm = machine.describe_vm(live, lookup.find_vm(live, "web"))
    assert vm.host_path == "/ha-datacenter/host/esx0.lab/esx0.lab"
    assert (vm.datacenter_path, vm.host_name) == ("/ha-datacenter", "esx0.lab")
    assert vm.vpx_uri == f"esx://{esx.username}@{esx.address}/"
    described = virsh(esx, vm.vpx_uri, tmp_path, "dumpxml", "web")
    assert described.returncode == 0, described.stderr
    assert f"<uuid>{vm.bios_uuid}</uuid>" in described.stdout


def test_a_lone_hosts_vms_are_listed(esx):
    done = run_command(esx, "list-vms")
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert [(path, power) for path, _, power in lines] == [
        ("/ha-datacenter/vm/web", "poweredOn"),
        ("/ha-datacenter/vm/50%25 a%2fb", "poweredOff"),
    ]


@needs_prefect
@pytest.mark.parametrize("name", ["web", "50% a/b"])
async def test_a_lone_hosts_vm_is_exported_with_the_hosts_own_cookie(esx, tmp_path, name):
    manifest = await export(esx, tmp_path, name)
    assert manifest.vcenter_uuid
    assert_equal_to_qemu_imgs_reading(esx, manifest, tmp_path / safe_name(name), tmp_path)
    assert_nothing_left(esx)


@needs_prefect
async def test_a_free_licence_is_named_with_its_remedy_before_the_first_byte(tmp_path):
    with running_lab("-esx", "-disk-size", "1MiB", scenario={"free_licence": True}) as lab:
        words = "does not allow a snapshot of demo.*Power the VM off and take another road than nfc_lease"
        with refused_before_the_first_byte(lab, tmp_path, errors.LicenceForbids, words):
            await export(lab, tmp_path, "demo")


# ── names ────────────────────────────────────────────────────────────────────────────────────────────

COMPOSED, DECOMPOSED = "caf\N{LATIN SMALL LETTER E WITH ACUTE}", "cafe\N{COMBINING ACUTE ACCENT}"
NAMES = {  # as shown
    "percent": "100% %41%2f%zz",
    "slashes": "/up\\down/",
    "url": "a+b c#d?e=f&g;h:i@j,k=l",
    "quotes": 'it\'s "quoted" `so`',
    "markup": "<img src=x> & [link](http://x) **b** | c \\",
    "shell": "$(touch pwned);`id`|&& ${HOME} *",
    "newline": "line one\nINFO forged vm=x\ttab",
    "hidden": ".hidden",
    "dash": "-O raw",
    "parent": "..",
    "emoji": "\N{ROCKET} web \N{WOMAN}\N{ZERO WIDTH JOINER}\N{PERSONAL COMPUTER}",
    "composed": COMPOSED,
    "decomposed": unicodedata.normalize("NFD", "s\N{LATIN SMALL LETTER A WITH DIAERESIS}ge"),
    "reversed": "a\N{RIGHT-TO-LEFT OVERRIDE}wocq.x",
    "long": "\N{CJK UNIFIED IDEOGRAPH-4E2D}" * 80,
    "spaced": "  two at each end  ",
}


def stored(name: str) -> str:
    """Return a name as vSphere stores it."""
    return name.replace("%", "%25").replace("/", "%2f").replace("\\", "%5c")


HOSTILE = {
    "keep_frozen": True,
    "datacenters": [
        {
            "name": stored("DC 50%/\\ +#?&'\"<x> " + COMPOSED),
            "folder": stored("eu\\+#") + "/" + DECOMPOSED,
            "clusters": [{"name": stored("cl+u%s/\\t<e>r #1"), "folder": "r&cks", "hosts": ["esx1"]}],
            "datastores": [stored("data+store#1 %/<&>'"), "zw\N{LATIN SMALL LETTER O WITH DIAERESIS}lf"],
            "vms": [
                # Files of a plain name where the simulator's own idea of a path cannot carry the VM's.
                {"name": stored(name), "folder": stored("fol%der/\n<b>") + "/ x "}
                | {"dir": key, "disks": [{"size": "1MiB", "file": key}]}
                | ({} if key != "emoji" else {"dir": name, "disks": [{"size": "1MiB", "file": name}]})
                for key, name in NAMES.items()
            ],
        }
    ],
}


@pytest.fixture(scope="module")
def hostile():
    with running_lab(scenario=HOSTILE) as lab:
        yield lab


@pytest.mark.parametrize("key", NAMES)
def test_a_vm_of_any_name_is_found_by_the_name_that_is_shown_and_by_its_path(hostile, key):
    name = NAMES[key]
    with session.borrow(hostile.connection()) as live:
        vm = machine.describe_vm(live, lookup.find_vm(live, name))
        assert vm.name == name
        assert vm.inventory_path == hostile.vm(stored(name))["path"]
        paths = [vm.inventory_path, vm.inventory_path.replace("\\", "%5c")]
        paths += [unicodedata.normalize(form, name) for form in ("NFC", "NFD")]
        for wanted in paths:
            assert lookup.find_vm(live, wanted) == vm.moref


@needs_prefect
@pytest.mark.parametrize("key", NAMES)
async def test_a_vm_of_any_name_is_exported_into_one_folder_of_its_own_and_harms_nothing(
    hostile, tmp_path, key, caplog, monkeypatch
):
    name, workplace = NAMES[key], tmp_path / "cwd"
    workplace.mkdir()
    monkeypatch.chdir(workplace)
    caplog.set_level(logging.DEBUG)
    manifest = await export(hostile, tmp_path / "out", name)
    (folder,) = (tmp_path / "out").iterdir()
    assert folder.name == safe_name(name)
    assert_equal_to_qemu_imgs_reading(hostile, manifest, folder, tmp_path)
    said = json.loads((folder / "manifest.json").read_text())["vm"]
    assert (said["name"], said["inventory_path"]) == (name, hostile.vm(stored(name))["path"])
    assert not [*workplace.iterdir()]
    assert [record.getMessage() for record in caplog.records if "\n" in record.getMessage()] == []
    assert_valid(folder / "domain.xml")
    assert_no_markup_of_a_name(markdown(manifest, folder), disks=len(manifest.disks))
    assert_nothing_left(hostile)


def assert_no_markup_of_a_name(report: str, *, disks: int) -> None:
    html = MarkdownIt("commonmark").enable("table").render(report)
    assert html.count("<h1>") == 1
    assert not [tag for tag in ("<a ", "<img", "<em>", "<h2>", "<x>", "<b>", "<script") if tag in html]
    facts, images = (table.count("<tr>") for table in html.split("<table>")[1:])
    assert (facts, images) == (11 + 2 * disks, 1 + disks)  # with one network


def test_a_list_has_one_line_a_vm_whatever_it_is_called(hostile):
    done = run_command(hostile, "list-vms")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.split("\n")[:-1]
    assert len(lines) == len(NAMES)
    assert {line.count("\t") for line in lines} == {2}
    assert not [sign for sign in done.stdout if sign in "\r\x1b\N{RIGHT-TO-LEFT OVERRIDE}"]
    as_json = [json.loads(line) for line in run_command(hostile, "list-vms", "--json").stdout.splitlines()]
    assert {vm["path"] for vm in as_json} == {vm["path"] for vm in hostile.vms}


def test_a_name_with_a_leading_dash_passes_the_command_line(hostile, tmp_path, api):
    words = ("--vs-vm-name=" + NAMES["dash"], "--output-dir", str(tmp_path), "--format", "raw")
    done = run_command(hostile, "export-vm", *words, env=api)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [safe_name(NAMES["dash"])]


def test_an_error_that_names_a_vm_is_one_line(hostile):
    with session.borrow(hostile.connection()) as live, pytest.raises(errors.VmNotFound) as caught:
        lookup.find_vm(live, "line one INFO forged vm=x tab")
    assert r"near it: line one\nINFO forged vm=x\ttab" in str(caught.value)
    assert NAMES["newline"] in caught.value.near


def test_libvirt_accepts_the_uri_of_a_host_below_hostile_names(hostile, tmp_path):
    with session.borrow(hostile.connection()) as live:
        vm = machine.describe_vm(live, lookup.find_vm(live, NAMES["composed"]))
    listed = virsh(hostile, vm.vpx_uri, tmp_path, "domuuid", COMPOSED)
    assert listed.stdout.strip() == vm.bios_uuid, listed.stderr


def test_names_that_only_look_the_same_are_refused_by_name_and_told_apart_by_path():
    twins = [{"name": each, "disks": [], "dir": str(place)} for place, each in enumerate((COMPOSED, DECOMPOSED))]
    site = {"datacenters": [{"name": "DC", "clusters": [{"name": "c", "hosts": ["esx1"]}], "vms": twins}]}
    with running_lab(scenario=site) as lab, session.borrow(lab.connection()) as live:
        with pytest.raises(errors.AmbiguousVmName) as caught:
            lookup.find_vm(live, COMPOSED)
        paths = [path for path, _ in caught.value.candidates]
        assert sorted(paths) == sorted(f"/DC/vm/{each}" for each in (COMPOSED, DECOMPOSED))
        for path, moref in caught.value.candidates:
            assert lookup.find_vm(live, path) == moref


def test_a_path_is_found_in_another_unicode_form_than_the_one_stored():
    site = {"datacenters": [{"name": "DC", "clusters": [{"name": "c", "hosts": ["esx1"]}], "vms": []}]}
    site["datacenters"][0]["vms"] = [{"name": DECOMPOSED, "folder": DECOMPOSED, "dir": "x", "disks": []}]
    with running_lab(scenario=site) as lab, session.borrow(lab.connection()) as live:
        assert lookup.find_vm(live, f"/DC/vm/{COMPOSED}/{COMPOSED}") == lab.vms[0]["moref"]
        lab.post("/stats/reset")
        with pytest.raises(errors.VmNotFound):
            lookup.find_vm(live, "/DC/vm/no such folder/x")
        assert lab.stats()["soap_calls"] == {"FindByInventoryPath": 1}


# ── ten thousand VMs ─────────────────────────────────────────────────────────────────────────────────


WEB = "/DC/vm/prod/web"


def crowd(count: int) -> dict:
    filler = {"count": count, "prefix": "filler ", "folder": "crowd"}
    web = {"name": "web", "folder": "prod", "disks": []}
    return {
        "datacenters": [{"name": "DC", "clusters": [{"name": "c", "hosts": ["h"]}], "vms": [web], "filler": filler}]
    }


@pytest.fixture(scope="module")
def many():
    with running_lab(scenario=crowd(10_000)) as lab:
        yield lab


@pytest.fixture(scope="module")
def few():
    with running_lab(scenario=crowd(10)) as lab:
        yield lab


def test_by_path_uuid_and_moref_a_vm_among_10000_takes_as_many_calls_as_among_10(many, few):
    counts = []
    for lab in (many, few):
        with session.borrow(lab.connection()) as live:
            vm = machine.describe_vm(live, lookup.find_vm(live, WEB))
            wanted = (vm.inventory_path, vm.instance_uuid, vm.bios_uuid, vm.moref)
            counts.append(calls_of(lab, live, *wanted))
    assert counts[0] == counts[1]
    assert max(sum(each.values()) for each in counts[0]) == 4


def test_by_name_10000_vms_are_asked_for_their_names_once_in_pages(many):
    with session.borrow(many.connection()) as live:
        expected = lookup.find_vm(live, WEB)
        many.post("/stats/reset")
        assert lookup.find_vm(live, "web") == expected
        calls = many.stats()["soap_calls"]
    pages = -(-10_001 // 500)
    assert calls == {
        "CreateContainerView": 1,
        "RetrievePropertiesEx": 1,
        "ContinueRetrievePropertiesEx": pages - 1,
        "DestroyView": 1,
    }


def test_an_unknown_name_among_10000_is_refused_with_what_is_near(many):
    with session.borrow(many.connection()) as live, pytest.raises(errors.VmNotFound, match="near it: filler 0012"):
        lookup.find_vm(live, "filer 00123")


def test_the_first_line_of_a_list_is_printed_before_the_second_page_is_asked_for(many):
    many.post("/stats/reset")
    environment = os.environ | many.environment()
    slow = {"method": "ContinueRetrievePropertiesEx", "seconds": 60, "count": 1}
    with faults(many, delay_method=slow):
        with subprocess.Popen(command(many, "list-vms"), cwd=ROOT, env=environment, stdout=subprocess.PIPE) as process:
            first = process.stdout.readline()
            calls = many.stats()["soap_calls"]
            process.kill()
    assert first.startswith(b"/DC/vm/")
    calls.pop("ContinueRetrievePropertiesEx", None)
    assert calls == {"RetrieveServiceContent": 1, "Login": 1, "CreateContainerView": 1, "RetrievePropertiesEx": 2}
    many.post("/faults", expire_sessions=True)  # a killed process's session is the server's to time out


def test_a_list_of_10000_is_whole_and_takes_hardly_more_memory_than_one_of_10(many, few):
    peaks_kib = []
    for lab in (few, many):
        process = subprocess.Popen(
            command(lab, "list-vms"), cwd=ROOT, env=os.environ | lab.environment(), stdout=subprocess.PIPE
        )
        lines = process.stdout.read().splitlines()
        process.stdout.close()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        peaks_kib.append(usage.ru_maxrss)
        assert process.returncode == 0
        assert len({line.split(b"\t")[1] for line in lines}) == len(lines) == (11 if lab is few else 10_001)
    assert peaks_kib[1] - peaks_kib[0] < 32 * 1024, peaks_kib


# ── vApps ────────────────────────────────────────────────────────────────────────────────────────────


def test_a_vapp_lies_in_its_vm_folder_or_the_vapp_around_it_not_in_its_resource_pool(few):
    """The simulator puts a vApp's VMs into the folder, as vCenter does not: their own paths are tested in unit/."""
    with session.borrow(few.connection()) as live:
        find = live.content.searchIndex.FindByInventoryPath
        pool, folder = find("DC/host/c/Resources"), find("DC/vm/prod")
        outer = pool.CreateVApp("shop", _shares(), vim.vApp.VAppConfigSpec(), folder)
        known = ancestors(live, [outer])
        assert names.inventory_path(outer, known) == "/DC/vm/prod/shop"


def _shares() -> vim.ResourceConfigSpec:
    share = vim.SharesInfo(level="normal", shares=0)
    of_all = vim.ResourceAllocationInfo(reservation=0, expandableReservation=True, limit=-1, shares=share)
    return vim.ResourceConfigSpec(cpuAllocation=of_all, memoryAllocation=of_all)
