"""What was found of VMs before anything is done to them, and what that means for a run: values, no judgement."""

from __future__ import annotations

from typing import Literal

from tasks.models import Value, VirtualDisk, VirtualMachine

Severity = Literal["no-go", "warning"]


class HostFacts(Value):
    """An ESXi host. version: of ESXi; "" where it does not say."""

    moref: str
    name: str
    version: str = ""
    connected: bool = True


class DatastoreFacts(Value):
    """A datastore; kind: `VMFS`, `NFS`, `vsan`, `VVOL`."""

    moref: str
    name: str
    kind: str
    free_bytes: int
    accessible: bool = True


class VmFacts(Value):
    """A VM as it is now. vm: None where vSphere cannot read it, and `unreadable` says why.

    disks: the live ones. committed_bytes: what it takes of its datastores. snapshots: their names, in their order.
    disabled: methods that vSphere refuses just now. lacks: (privilege, object) that the account does not have.
    """

    moref: str
    vm: VirtualMachine | None
    unreadable: str = ""
    disks: tuple[VirtualDisk, ...] = ()
    host: HostFacts | None = None
    datastores: tuple[DatastoreFacts, ...] = ()
    committed_bytes: int = 0
    snapshots: tuple[str, ...] = ()
    consolidation: bool = False
    connected: bool = True
    template: bool = False
    fault_tolerant: bool = False
    tools_run: bool = True
    disabled: tuple[str, ...] = ()
    lacks: tuple[tuple[str, str], ...] = ()

    @property
    def capacity_bytes(self) -> int:
        return sum(disk.capacity_bytes for disk in self.disks)


class Finding(Value):
    """Something that would stop a run (`no-go`), or that it should be known before (`warning`), and what to do."""

    code: str
    severity: Severity
    reason: str
    remedy: str


class Checked(Value):
    """A VM and what preflight found of it. bytes: that a run is expected to move."""

    moref: str
    name: str
    path: str
    mode: str
    road: str
    host: str = ""
    datastores: tuple[str, ...] = ()
    disks: int = 0
    capacity_bytes: int = 0
    bytes: int = 0
    output: str = ""
    findings: tuple[Finding, ...] = ()

    @property
    def go(self) -> bool:
        return all(finding.severity != "no-go" for finding in self.findings)


class Preflight(Value):
    """What preflight found of VMs, and, in `findings`, of all of them together."""

    vcenter: str
    created: str
    vms: tuple[Checked, ...]
    findings: tuple[Finding, ...] = ()

    @property
    def go(self) -> bool:
        """Whether a run of every one of them may begin."""
        return all(vm.go for vm in self.vms) and all(each.severity != "no-go" for each in self.findings)
