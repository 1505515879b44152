"""The second road of the `/folder` reader: large files from the ESXi host itself, a ticket a request."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tasks.images.digests import LEAF_BYTES
from tasks.models import Extent, ServiceTicket
from tasks.road import folder_reader
from tasks.transports.folder import FolderDisk, FolderFile, FolderReader
from tasks.vsphere import tickets
from tasks.vsphere.session import borrow
from tests.integration.test_folder_reader import copy_to, sha256
from tests.labs import Lab, running_lab
from tests.runs import assert_equal_to_the_guests_disks, assert_nothing_left, export, faults, run_command

pytestmark = pytest.mark.live

MIB = 1024 * 1024
GIB = 1024 * MIB
TICKET_BYTES = 4 * MIB  # a small disk is large here: all else is as in a run


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    vms = [
        {"name": "off", "power": "off", "disks": [{"size": "16MiB", "thin": False}]},
        {"name": "large", "disks": [{"size": "2GiB"}, {"size": "4MiB"}]},
    ]
    with running_lab(scenario={"datacenters": [{"name": "DC", "standalone_hosts": ["esx1"], "vms": vms}]}) as lab:
        yield lab


@contextmanager
def reading(lab: Lab, **more: Any) -> Iterator[FolderReader]:
    """Read the disk of the VM `off`, large by our measure; yield the entered reader."""
    to, disk = lab.connection(), lab.vm("off")["disks"][0]
    source = FolderDisk(
        connection=to,
        datacenter_path="DC",
        datastore_path=disk["datastore_path"],
        capacity_bytes=disk["capacity_bytes"],
        host_name="esx1",
    )
    lab.post("/stats/reset")
    with borrow(to) as session:
        reader = FolderReader(
            source,
            cookie=lambda: session.cookie,
            renew=session.renew,
            acquire=lambda url: tickets.acquire(session, url),
            **({"ticket_bytes": TICKET_BYTES} | more),
        )
        with reader:
            yield reader


def test_a_large_file_comes_from_the_host_in_a_few_ranges_with_a_ticket_each(lab, tmp_path):
    with reading(lab) as reader:
        copy_to(tmp_path, reader)
    assert sha256(tmp_path / "x.raw") == lab.sha256(lab.vm("off")["moref"], 0)
    assert (reader.road, reader.preferred_extent_bytes) == ("host", 4 * MIB)
    stats = lab.stats()
    assert (stats["tickets_used"], stats["tickets_refused"]) == (4, 0)


def test_what_is_smaller_than_a_ticket_is_worth_comes_by_the_cookie(lab, tmp_path):
    with reading(lab) as reader:
        assert b"".join(bytes(part) for _, part in reader.stream(Extent(start=MIB, length=MIB)))
    assert reader.road == "host"
    assert lab.stats()["tickets_used"] == 0
    with reading(lab, ticket_bytes=GIB) as reader:
        copy_to(tmp_path, reader)
    assert (reader.road, lab.stats()["tickets_issued"]) == ("folder", 0)
    assert "smaller" in reader.road_reason


def test_a_range_that_was_cut_goes_on_at_the_byte_reached_with_a_new_ticket_or_by_the_cookie(lab, tmp_path):
    with faults(lab, cut_after=3 * MIB, count=1), reading(lab, ticket_bytes=8 * MIB) as reader:
        result = copy_to(tmp_path, reader)
    assert sha256(tmp_path / "x.raw") == lab.sha256(lab.vm("off")["moref"], 0)
    assert result.bytes_transferred <= reader.size + LEAF_BYTES  # the leaf that was cut, at most
    assert (lab.stats()["tickets_used"], lab.stats()["tickets_refused"]) == (2, 0)


@pytest.mark.parametrize(
    ("trouble", "why"),
    [
        ("down", "refused"),
        ("strange", "not the pinned one"),
        ("unnamed", "does not say which certificate"),
        ("busy", "status 503"),
    ],
)
def test_a_host_that_does_not_let_us_read_is_left_for_the_vcenter(lab, tmp_path, trouble, why):
    with faults(lab, hosts=trouble), reading(lab) as reader:
        copy_to(tmp_path, reader)
    assert sha256(tmp_path / "x.raw") == lab.sha256(lab.vm("off")["moref"], 0)
    assert reader.road == "folder"
    assert why in reader.road_reason.lower()


def test_no_ticket_given_is_no_end_of_the_run(lab, tmp_path):
    fault = {"method": "AcquireGenericServiceTicket", "fault": "NoPermission", "count": 0}
    with faults(lab, fail_method=fault), reading(lab) as reader:
        copy_to(tmp_path, reader)
    assert sha256(tmp_path / "x.raw") == lab.sha256(lab.vm("off")["moref"], 0)
    assert reader.road_reason.startswith("no ticket: ")


def test_a_ticket_opens_its_url_once_and_the_sessions_cookie_opens_nothing_at_the_host(lab):
    with reading(lab) as reader:
        assert reader._host
        first = reader._host._ticket()
        reader._host._acquire = lambda url: first
        with reader._host.get(Extent(start=0, length=512)) as response:
            assert response.status_code == 206
        with pytest.raises(Exception, match="status 401"), reader._host.get(Extent(start=0, length=512)):
            pass
        stranger = ServiceTicket(**first.model_dump(exclude={"id"}), id=reader._cookie().partition("=")[2].strip('"'))
        reader._host._acquire = lambda url: stranger
        with pytest.raises(Exception, match="status 401"), reader._host.get(Extent(start=0, length=512)):
            pass


def test_a_host_of_any_name_is_asked_for_by_its_url_and_the_file_without_its_datacenter(lab):
    disk = FolderFile(
        connection=lab.connection(),
        datacenter_path="/a/DC%2f1",
        datastore_path="[ds +1] web &1/x#.iso",
        capacity_bytes=1,
        host_name="fe80::1",
    )
    assert str(disk.url_at_host()) == "https://[fe80::1]/folder/web%20%261/x%23.iso?dsName=ds%20%2B1"


def test_tickets_are_asked_of_a_vcenter_that_allows_it_and_not_of_a_lone_host(lab):
    for options, wanted in (({}, True), ({"host_tickets": False}, False)):
        to = lab.connection(**options)
        source = FolderDisk(
            connection=to, datacenter_path="DC", datastore_path="[d] a/a.vmdk", capacity_bytes=GIB, host_name="esx1"
        )
        with borrow(to) as session:
            assert (folder_reader(source, session)._acquire is not None) is wanted
    with running_lab("-esx", "-disks", "1", "-disk-size", "1MiB") as esx:
        to = esx.connection()
        with borrow(to) as session:
            source = source.model_copy(update={"connection": to})
            assert folder_reader(source, session)._acquire is None


@pytest.mark.anyio
@pytest.mark.usefixtures("prefect_api")
async def test_an_export_says_which_road_each_disk_took_and_why(lab, tmp_path):
    lab.post("/stats/reset")
    manifest = await export(lab, tmp_path, "large", format="raw")
    assert_equal_to_the_guests_disks(lab, manifest, tmp_path / "large", tmp_path)
    assert [image.road for image in manifest.disks] == ["host", "folder"]
    assert "a ticket a request" in manifest.disks[0].road_reason
    assert "smaller" in manifest.disks[1].road_reason
    stats = lab.stats()
    assert (stats["tickets_used"], stats["tickets_refused"], stats["logins"]) == (2, 0, 1)
    assert_nothing_left(lab)


def test_the_command_line_keeps_to_the_vcenter_where_it_is_told_to(lab, tmp_path, api):
    lab.post("/stats/reset")
    words = ("--vs-vm-name", "off", "--output-dir", str(tmp_path), "--no-host-tickets", "--connections", "2")
    done = run_command(lab, "export-vm", *words, "--json", env=api)
    assert done.returncode == 0, done.stderr
    assert '"road": "folder"' in done.stdout
    assert lab.stats()["tickets_issued"] == 0
