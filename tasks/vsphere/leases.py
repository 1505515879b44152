"""NFC leases: got for the disks of a snapshot, or of a VM that is off; kept alive while they are read; given back.

Not a byte of a disk passes here. Rests on VirtualMachine.ExportVm, VirtualMachineSnapshot.ExportSnapshot and
HttpNfcLease, vSphere Web Services API.
"""

from __future__ import annotations

import logging
import re
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pydantic import SecretStr
from pyVmomi import vim, vmodl

from tasks import tls
from tasks.errors import ConnectionFailed, Hyper2KvmError, LeaseLost, LeaseRefused, UnsupportedDisk, VsphereFault
from tasks.models import LeasedDevice, Snapshot, VirtualDisk, VirtualMachine
from tasks.vsphere.faults import caused_by, describe
from tasks.vsphere.properties import retrieve
from tasks.vsphere.session import Session

READY_TIMEOUT_S = 600.0  # vSphere prepares the export of many disks for minutes
BUSY_TIMEOUT_S = 330.0  # the lease of a run that was killed ends by itself, after five minutes as a rule
POLL_S, LAST_POLL_S = 0.1, 2.0
BEATS = 5  # in the time after which a lease that nobody renews ends
LONGEST_BEAT_S = 30.0
OTHER_ROAD = "Take another road (--transport folder)"

# The last part of a device's key: the class of its controller, the bus's number, the unit (observed: `/vm-42/…1:0`).
_KEY = re.compile(r"(?P<kind>[A-Za-z]+)(?P<bus>\d+):(?P<unit>\d+)$")
_FIRST_KEYS = {"IDE": 200, "AHCI": 15000, "SATA": 15000, "NVME": 31000}  # of controllers; of SCSI's: 1000

log = logging.getLogger(__name__)


class Lease:
    """One lease that is ready. devices: what it gives, each with a URL that is good for as long as it lives."""

    def __init__(self, session: Session, vm: VirtualMachine, entity: Any, info: Any) -> None:
        self.devices = tuple(_device(each) for each in info.deviceUrl or () if each.disk is not False)
        self.timeout_s = float(info.leaseTimeout or 0) or 300.0
        self._session, self._vm, self._entity = session, vm, entity
        self._total = max(1, info.totalDiskCapacityInKB * 1024)
        self._done = 0
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._beating = threading.Thread(target=self._beat, name="vcenter-lease", daemon=True)

    def device_of(self, disk: VirtualDisk, *, among: tuple[VirtualDisk, ...]) -> LeasedDevice:
        """Return the device that is a disk: by its place, or, where keys do not say that, the only one there can be.

        Raises UnsupportedDisk where that is none.
        """
        placed = {_place(each.key): each for each in self.devices}
        if None not in placed:
            found = placed.get((disk.controller_key or 0, disk.unit_number or 0))
        else:
            found = self.devices[0] if len(self.devices) == len(among) == 1 else None
        if not found:
            keys = ", ".join(each.key for each in self.devices) or "none"
            reason = f"the export lease does not give it, or does not say so (it gives: {keys})"
            raise UnsupportedDisk(disk=disk.title, reason=reason, remedy=OTHER_ROAD)
        return found

    def check(self) -> None:
        """Ask vSphere. Raises LeaseLost where the lease is not what readers may read by."""
        try:
            found = retrieve(self._session, [self._entity], ("state", "error")).get(self._entity, {})
        except VsphereFault as error:
            raise self._lost(error.fault) from error
        if str(found.get("state")) != "ready":
            raise self._lost(_said(found))

    def add(self, count: int) -> None:
        """Count bytes of disks that were read: what vSphere shows as the task's progress."""
        with self._lock:
            self._done += count

    def start(self) -> None:
        """Keep the lease alive until `stop`."""
        self._beating.start()

    def stop(self, *, complete: bool) -> None:
        """Give the lease back. What vSphere says to that is logged, not raised: it ends by itself."""
        self._ended.set()
        self._beating.join()
        give_back = self._entity.HttpNfcLeaseComplete if complete else self._entity.HttpNfcLeaseAbort
        try:
            self._session.call("the end of the export lease", give_back)
        except Hyper2KvmError as error:
            log.warning("lease not given back vm=%s error=%s", self._vm.moref, error.cause)
        else:
            log.info("lease %s vm=%s", "completed" if complete else "aborted", self._vm.moref)

    def _beat(self) -> None:
        """Say how far it is, at least five times in a lease's time: saying that is what renews it."""
        pause_s = min(self.timeout_s / BEATS, LONGEST_BEAT_S)
        while not self._ended.wait(pause_s):
            percent = min(99, 100 * self._done // self._total)
            try:
                self._session.call("an export lease to be kept", lambda: self._entity.HttpNfcLeaseProgress(percent))  # noqa: B023
            except ConnectionFailed as error:
                log.warning("lease not renewed, trying again vm=%s error=%s", self._vm.moref, error.cause)
            except Hyper2KvmError as error:
                log.warning("lease lost vm=%s error=%s", self._vm.moref, error.cause)
                return

    def _lost(self, reason: str) -> LeaseLost:
        return LeaseLost(vm=self._vm.name, reason=reason)


class Leases:
    """The leases that one session holds, by VM: a companion of the session (`Session.companion`)."""

    def __init__(self, _: ssl.SSLContext) -> None:
        self._held: dict[str, Lease] = {}

    def of(self, vm: VirtualMachine) -> Lease:
        """Return the lease that is held on a VM. Raises LeaseLost where none is."""
        try:
            return self._held[vm.moref]
        except KeyError:
            raise LeaseLost(vm=vm.name, reason="none is held") from None

    def close(self) -> None:
        """Nothing is left: who holds a lease gives it back."""

    @contextmanager
    def held(self, session: Session, vm: VirtualMachine, snapshot: Snapshot | None) -> Iterator[Lease]:
        """Hold a lease on all disks of a snapshot (None: of a VM that is off) for the block.

        Completed where the block ends well, aborted otherwise. Raises LeaseRefused, PermissionMissing, LicenceForbids.
        """
        lease = _acquired(session, vm, snapshot)
        lease.start()
        self._held[vm.moref] = lease
        complete = False
        try:
            yield lease
            complete = True
        finally:
            del self._held[vm.moref]
            lease.stop(complete=complete)


def _acquired(session: Session, vm: VirtualMachine, snapshot: Snapshot | None) -> Lease:
    """Return a lease that is ready; one that does not become so is aborted."""
    entity = _asked_for(session, vm, snapshot)
    try:
        info = _ready(session, vm, entity)
    except BaseException:
        _abort(session, entity)
        raise
    lease = Lease(session, vm, entity, info)
    log.info("lease held vm=%s disks=%d timeout_s=%.0f", vm.moref, len(lease.devices), lease.timeout_s)
    return lease


def _asked_for(session: Session, vm: VirtualMachine, snapshot: Snapshot | None) -> Any:
    """Ask for a lease; wait where another one, perhaps that of a run that was killed, still stands in the way."""
    ask: Callable[[], Any]
    if snapshot:
        ask = session.entity(vim.vm.Snapshot, snapshot.moref).ExportSnapshot
    else:
        ask = session.entity(vim.VirtualMachine, vm.moref).ExportVm
    deadline = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            return session.call(f"an export lease on {vm.name}", ask, repeatable=False)
        except VsphereFault as error:
            waits = caused_by(error, vim.fault.TaskInProgress) and time.monotonic() < deadline
            if type(error) is not VsphereFault:
                raise
            if not waits:
                raise LeaseRefused(vm=vm.name, fault=error.fault, remedy=_remedy(error)) from error.__cause__
            log.info("the VM is busy, perhaps with the lease of a run that was killed; asking again vm=%s", vm.moref)
        time.sleep(LAST_POLL_S)


def _remedy(error: VsphereFault) -> str:
    if caused_by(error, vim.fault.InvalidPowerState):
        return "Only a VM that is off is exported without a snapshot: power it off, or let a snapshot be taken"
    if caused_by(error, vim.fault.TaskInProgress):
        return "Wait for the VM's other tasks in vSphere to end, then run again"
    return f"See the VM's tasks and events in vSphere. {OTHER_ROAD}"


def _ready(session: Session, vm: VirtualMachine, entity: Any) -> Any:
    """Wait until the lease is ready; return what it gives."""
    deadline, pause_s = time.monotonic() + READY_TIMEOUT_S, POLL_S
    while time.monotonic() < deadline:
        found = retrieve(session, [entity], ("state", "info", "error")).get(entity, {})
        state = str(found.get("state"))
        if state == "ready":
            return found["info"]
        if state != "initializing":
            raise LeaseRefused(vm=vm.name, fault=_said(found), remedy="See the VM's tasks and events in vSphere")
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, LAST_POLL_S)
    raise LeaseRefused(vm=vm.name, fault=f"it is not ready within {READY_TIMEOUT_S:.0f} s", remedy="Run again later")


def _abort(session: Session, entity: Any) -> None:
    try:
        session.call("the end of the export lease", entity.HttpNfcLeaseAbort)
    except Hyper2KvmError as error:
        log.warning("lease not aborted error=%s", error.cause)


def _said(found: dict[str, Any]) -> str:
    """Return why a lease is in its state, as far as it says."""
    error = found.get("error")
    return describe(error) if isinstance(error, vmodl.MethodFault) else f"its state is {found.get('state')}"


def _device(each: Any) -> LeasedDevice:
    """Return a device of a lease; its certificate is known by the strongest of the ways in which servers say it."""
    certificate = getattr(each, "sslCertificate", None)  # 9.0
    thumbprint = (
        tls.thumbprint_of(ssl.PEM_cert_to_DER_cert(certificate), like="SHA-256") if certificate else each.sslThumbprint
    )
    return LeasedDevice(key=each.key, url=SecretStr(each.url), thumbprint=thumbprint or "")


def _place(key: str) -> tuple[int, int] | None:
    """Return key of the controller and number of the unit that the key of a device speaks of; None if of none."""
    match = _KEY.search(key)
    if not match:
        return None
    kind = match["kind"].upper()
    first = next((first for word, first in _FIRST_KEYS.items() if word in kind), 1000)
    return first + int(match["bus"]), int(match["unit"])
