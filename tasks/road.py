"""The roads that the disks of a job may take out of vSphere: what each can, and how a disk is opened by it.

A road is a class of settings (`tasks.models.RoadSettings`), a value that says where a disk is found, a reader of
that (`tasks.transports`), and a line of `ROADS`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

from tasks import tls
from tasks.errors import VddkFailed
from tasks.images.state import JobState
from tasks.models import Connection, NbdSettings, SshSettings, VddkSettings, VirtualDisk
from tasks.reader import Reader
from tasks.slots import halve, one_of
from tasks.transports.bulk import Shared
from tasks.transports.folder import FolderDisk, FolderReader
from tasks.transports.nbd import NbdDisk, NbdReader
from tasks.transports.nfc_lease import LeaseDisk, LeaseReader
from tasks.transports.ssh import SshDisk, SshReader
from tasks.transports.vddk import SHA1_DIGITS, VddkDisk, VddkReader
from tasks.vsphere import tickets
from tasks.vsphere.leases import Leases
from tasks.vsphere.session import Session, borrow

VDDK_DISKS_A_HOST = 10  # the NFC memory of an ESXi host is for some 50 sessions, and others want some


class Opening:
    """One disk of a job, about to be read.

    probing: it is only to be seen whether it can be. scattered: a little of it is to be read, here and there.
    """

    def __init__(
        self,
        disk: VirtualDisk,
        job: JobState,
        connection: Connection,
        *,
        stop: threading.Event,
        probing: bool = False,
        scattered: bool = False,
    ) -> None:
        self.disk, self.job, self.connection, self.stop = disk, job, connection, stop
        self.probing, self.scattered = probing, scattered


def _nothing_to_hold(job: JobState, connection: Connection) -> AbstractContextManager[object]:
    return nullcontext()


@dataclass(frozen=True)
class Road:
    """What a road can, and how it is taken.

    opened: yields an entered reader of one disk, in the thread that reads. chains: it reads what lies in chains of redo
    logs, or in no file, as well. sparse: it knows what is allocated, and reads nothing else, so that a disk takes no
    more room here than that. held: what all disks of a job share for as long as any is probed or read, entered
    before the first of them and left after the last, before the snapshot goes; in another thread than the readers'.
    """

    opened: Callable[[Opening], AbstractContextManager[Reader]]
    chains: bool = False
    sparse: bool = False
    held: Callable[[JobState, Connection], AbstractContextManager[object]] = _nothing_to_hold


def road_of(job: JobState) -> Road:
    """Return the road that a job's disks take."""
    return ROADS[job.road.road]


def opened(
    disk: VirtualDisk,
    job: JobState,
    connection: Connection,
    *,
    stop: threading.Event,
    probing: bool = False,
    scattered: bool = False,
) -> AbstractContextManager[Reader]:
    """Return what yields, for a block, an entered reader of a disk by its job's road; see `Opening`."""
    return road_of(job).opened(Opening(disk, job, connection, stop=stop, probing=probing, scattered=scattered))


def _by_folder(wanted: Opening) -> AbstractContextManager[Reader]:
    source = FolderDisk.of(wanted.disk, vm=wanted.job.vm, connection=wanted.connection)
    by_ticket = not (wanted.probing or wanted.scattered)  # a ticket is worth its price for large parts only
    return from_folder(source, depth=1 if wanted.probing else None, by_ticket=by_ticket)


@contextmanager
def from_folder(source: FolderDisk, *, depth: int | None = None, by_ticket: bool = True) -> Iterator[Reader]:
    """Yield an entered reader of a disk or file, which borrows the process's session."""
    with (
        borrow(source.connection) as session,
        folder_reader(source, session, depth=depth, by_ticket=by_ticket) as reader,
    ):
        yield reader


def folder_reader(
    source: FolderDisk, session: Session, *, depth: int | None = None, by_ticket: bool = True
) -> FolderReader:
    """Return a reader with the session's cookie, trust and connections, and tickets where hosts may be asked."""
    by_ticket = by_ticket and session.info.is_vcenter and source.connection.host_tickets
    return FolderReader(
        source,
        cookie=lambda: session.cookie,
        renew=session.renew,
        acquire=partial(tickets.acquire, session) if by_ticket else None,
        shared=session.companion(Shared),
        depth=depth,
    )


def vddk_disk(disk: VirtualDisk, job: JobState, connection: Connection) -> VddkDisk:
    """Return where VDDK finds a disk of a job that takes this road, and under which identity it prepares the VM."""
    assert isinstance(job.road, VddkSettings)
    return VddkDisk(
        connection=connection,
        settings=job.road,
        host_name=job.vm.host_name,
        vm_moref=job.vm.moref,
        snapshot_moref=job.snapshot.moref if job.snapshot else "",
        datastore_path=disk.datastore_path,
        capacity_bytes=disk.capacity_bytes,
        identity=f"hyper2kvm-{job.job_id}-disk-{disk.index}",
    )


def end_access(job: JobState, connection: Connection) -> None:
    """Have the server allow again what VDDK had it forbid (Storage vMotion) for a run of a job, which is dead.

    Raises VddkFailed where VDDK does not say that it did, or what `VddkReader.end_access` raises.
    """
    for disk in job.disks:
        reader = VddkReader(vddk_disk(disk, job, connection))
        if not reader.end_access():
            raise VddkFailed(call="EndAccess", source=reader.source, words="the VM may still be kept from moving")


@contextmanager
def _by_vddk(wanted: Opening) -> Iterator[Reader]:
    """It waits its turn, where many disks of that ESXi host are open on this machine: fewer, where it had no memory."""
    source = vddk_disk(wanted.disk, wanted.job, wanted.connection)
    limit = (VDDK_DISKS_A_HOST, f"vddk-{source.host_name}")
    with (
        one_of(*limit, stop=wanted.stop),
        VddkReader(source, stop=wanted.stop, when_full=partial(halve, *limit)) as reader,
    ):
        yield reader


@contextmanager
def _by_nbd(wanted: Opening) -> Iterator[Reader]:
    job, disk, connection = wanted.job, wanted.disk, wanted.connection
    assert isinstance(job.road, NbdSettings)
    needs_thumbprint = any("{thumbprint}" in word for word in (job.road.uri, *job.road.command))
    shown = tls.believed_certificate(connection) if needs_thumbprint else b""
    blanks = {
        "host": connection.host,
        "port": str(connection.port),
        "user": connection.username,
        "esxi": job.vm.host_name,
        "moref": job.vm.moref,
        "snapshot": job.snapshot.moref if job.snapshot else "",
        "path": disk.datastore_path,
        "key": str(disk.key),
        "number": str(disk.index),
        "thumbprint": tls.colons(tls.thumbprint_of(shown, like=SHA1_DIGITS)) if shown else "",
    }
    source = NbdDisk(
        settings=job.road,
        blanks=blanks,
        password=connection.password,
        datastore_path=disk.datastore_path,
        capacity_bytes=disk.capacity_bytes,
    )
    with NbdReader(source, stop=wanted.stop) as reader:
        yield reader


@contextmanager
def _by_ssh(wanted: Opening) -> Iterator[Reader]:
    assert isinstance(wanted.job.road, SshSettings)
    disk = wanted.disk
    source = SshDisk(settings=wanted.job.road, datastore_path=disk.datastore_path, capacity_bytes=disk.capacity_bytes)
    with SshReader(source) as reader:
        yield reader


@contextmanager
def _by_lease(wanted: Opening) -> Iterator[Reader]:
    """The lease is the job's, and held already."""
    with borrow(wanted.connection) as session:
        lease = session.companion(Leases).of(wanted.job.vm)
        device = lease.device_of(wanted.disk, among=wanted.job.disks)
        source = LeaseDisk(
            connection=wanted.connection,
            url=device.url,
            thumbprint=device.thumbprint,
            datastore_path=wanted.disk.datastore_path,
            capacity_bytes=wanted.disk.capacity_bytes,
        )
        with LeaseReader(source, alive=lease.check, progress=lease.add) as reader:
            yield reader


@contextmanager
def _leased(job: JobState, connection: Connection) -> Iterator[None]:
    with borrow(connection) as session, session.companion(Leases).held(session, job.vm, job.snapshot):
        yield


ROADS: dict[str, Road] = {
    "vddk": Road(_by_vddk, chains=True, sparse=True),
    "nbd": Road(_by_nbd, chains=True, sparse=True),
    "folder": Road(_by_folder),
    "ssh": Road(_by_ssh),
    "nfc_lease": Road(_by_lease, chains=True, sparse=True, held=_leased),
}
"""By name; in the order in which `auto` prefers them."""
