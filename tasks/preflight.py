"""Step: everything that would stop a run, found before it, by the checks that runs make themselves. Reads only."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger
from pydantic import Field

from blocks import VCenter
from tasks.disks import check_flat
from tasks.errors import Hyper2KvmError, TrackingOff, UnsupportedDisk
from tasks.facts import Checked, Finding, Preflight, Severity, VmFacts
from tasks.images.files import free_bytes, safe_name
from tasks.models import DiskJob, DownloadJob, JobOptions, SyncJob, Value, VddkJob
from tasks.reach import Reached, reach_all
from tasks.road import ROADS
from tasks.saved import Needs
from tasks.steps import in_thread, on_vcenter
from tasks.transports.folder import TICKET_BYTES
from tasks.transports.vddk_library import find_library
from tasks.transports.vixdisklib_abi import SERVES
from tasks.vsphere.changes import blind_tracking
from tasks.vsphere.machine import fence_problems
from tasks.vsphere.survey import survey
from tasks.wave.jobs import road_of

HTTPS, NFC = 443, 902  # ports of an ESXi host: its own /folder, and what VDDK reads by
SNAPSHOT_SHARE = 0.1  # of the disks' capacity: what the guest may write meanwhile, by rule of thumb
SNAPSHOT_LEAST = 64 << 20  # a delta begins with its tables
READ_VM = ("System.Read", "VirtualMachine.State.CreateSnapshot", "VirtualMachine.State.RemoveSnapshot")
READ_DATASTORE = ("Datastore.Browse", "Datastore.FileManagement")
BY_VDDK = (
    "VirtualMachine.Provisioning.DiskRandomRead",
    "VirtualMachine.Provisioning.GetVmFiles",
    "Global.DisableMethods",
    "Global.EnableMethods",
)
TRACKING = ("VirtualMachine.Config.ChangeTracking",)
ONLY_WARNS = ("Global.DisableMethods", "Global.EnableMethods")
SNAPSHOT_CALLS = ("CreateSnapshot_Task", "RemoveSnapshot_Task")


class Candidate(Value):
    """A VM that is to be run: by moref, in a mode, with the options of its run, and what its road needs here."""

    moref: str
    mode: str
    job: DiskJob | DownloadJob
    needs: Needs

    @property
    def road(self) -> str:
        return road_of(self.mode, self.job)


class Here(Value):
    """What was found on this machine. vddk: its major version, or why there is none and what to do, by libdir."""

    reached: dict[str, Reached] = Field(default_factory=dict)
    vddk: dict[str, int | tuple[str, str]] = Field(default_factory=dict)


@task(name="preflight", task_run_name="preflight of {vcenter.host}", cache_policy=NO_CACHE)
async def check(vcenter: VCenter, candidates: Sequence[Candidate]) -> Preflight:
    """Return what would stop each run, and all of them together; nothing is changed anywhere.

    Constant round trips for up to 500 VMs; each ESXi host's name and ports are tried once, side by side.
    """
    morefs = [each.moref for each in candidates]
    asked = _privileges(candidates)
    facts = await on_vcenter(vcenter, survey, morefs, on_vms=asked, on_datastores=READ_DATASTORE)
    here = await in_thread(_look_here, None, candidates, facts)
    pairs = list(zip(candidates, facts, strict=True))
    checked = [_checked(vcenter, candidate, fact, here) for candidate, fact in pairs]
    checked = list(_without_twins(checked))
    for vm in checked:
        for finding in vm.findings:
            get_run_logger().info("found vm=%r code=%s severity=%s", vm.name, finding.code, finding.severity)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return Preflight(
        vcenter=vcenter.host, created=now, vms=tuple(checked), findings=tuple(_room_for_all(checked, pairs))
    )


def _privileges(candidates: Iterable[Candidate]) -> tuple[str, ...]:
    wanted = dict.fromkeys(READ_VM)
    for each in candidates:
        wanted |= dict.fromkeys(BY_VDDK if each.road == "vddk" else ())
        wanted |= dict.fromkeys(TRACKING if isinstance(each.job, SyncJob) and each.job.enable_cbt else ())
    return tuple(wanted)


def _look_here(candidates: Sequence[Candidate], facts: Sequence[VmFacts]) -> Here:
    """Return what this machine reaches, and which VDDK it has, where a run needs that."""
    wanted: defaultdict[str, set[int]] = defaultdict(set)
    for candidate, fact in zip(candidates, facts, strict=True):
        if fact.host and candidate.road in ("vddk", "folder"):
            wanted[fact.host.name] |= {HTTPS, NFC} if candidate.road == "vddk" else {HTTPS}
        if candidate.needs.server:
            wanted[candidate.needs.server.host].add(candidate.needs.server.port)
    libdirs = {each.needs.libdir for each in candidates if each.road == "vddk"}
    return Here(reached=reach_all(wanted), vddk={each: _vddk_in(each) for each in libdirs})


def _vddk_in(libdir: str) -> int | tuple[str, str]:
    try:
        found = find_library(Path(libdir) if libdir else None)
    except Hyper2KvmError as error:
        return error.cause, error.remedy
    return int(found.version.partition(".")[0])


# ── one VM ───────────────────────────────────────────────────────────────────────────────────────────


def _checked(vcenter: VCenter, candidate: Candidate, fact: VmFacts, here: Here) -> Checked:
    vm = fact.vm
    name = vm.name if vm else fact.moref
    return Checked(
        moref=fact.moref,
        name=name,
        path=vm.inventory_path if vm else fact.moref,
        mode=candidate.mode,
        road=candidate.road,
        host=fact.host.name if fact.host else "",
        datastores=_stores_of(fact),
        disks=len(fact.disks),
        capacity_bytes=fact.capacity_bytes,
        bytes=_expected_bytes(candidate, fact),
        output=str(candidate.job.output_dir / safe_name(name)),
        findings=tuple(judge(vcenter, candidate, fact, here)),
    )


def _stores_of(fact: VmFacts) -> tuple[str, ...]:
    paths = (disk.datastore_path for disk in fact.disks)
    return tuple(dict.fromkeys(path[1:].partition("]")[0] for path in paths if path.startswith("[")))


def _expected_bytes(candidate: Candidate, fact: VmFacts) -> int:
    """Return what a first copy moves: all of a disk by the road folder, what is allocated where that can be known."""
    knows = ROADS[candidate.road].sparse or isinstance(candidate.job, SyncJob)
    return min(fact.capacity_bytes, fact.committed_bytes or fact.capacity_bytes) if knows else fact.capacity_bytes


def judge(vcenter: VCenter, candidate: Candidate, fact: VmFacts, here: Here) -> Iterator[Finding]:
    """Yield what would stop the run of one VM, or should be known before it."""
    if fact.vm is None or not fact.connected:
        why = fact.unreadable or "vSphere says that it is not connected (orphaned, inaccessible)"
        yield _no_go("inaccessible", why, "Look at the VM's state in vSphere; register it again if it is orphaned")
        return
    yield from _of_the_vm(fact, candidate)
    yield from _of_its_disks(fact, candidate)
    yield from _of_tracking(fact, candidate)
    yield from _of_its_devices(fact)
    yield from _of_its_tools(fact, candidate)
    yield from _of_datastores(fact)
    yield from _of_privileges(fact, candidate)
    yield from _of_the_host(vcenter, fact, candidate, here)
    yield from _of_the_server(candidate, here)
    yield from _of_room_here(fact, candidate)


def _no_go(code: str, reason: str, remedy: str) -> Finding:
    return Finding(code=code, severity="no-go", reason=reason, remedy=remedy)


def _warning(code: str, reason: str, remedy: str) -> Finding:
    return Finding(code=code, severity="warning", reason=reason, remedy=remedy)


def _as_finding(code: str, error: Hyper2KvmError, severity: Severity = "no-go") -> Finding:
    return Finding(code=code, severity=severity, reason=error.cause, remedy=error.remedy)


def _of_the_vm(fact: VmFacts, candidate: Candidate) -> Iterator[Finding]:
    if fact.template:
        yield _no_go("template", "it is a template, of which no snapshot is made", "Convert it to a VM, or clone one")
    if fact.fault_tolerant:
        yield _no_go("fault-tolerance", "fault tolerance is on, under which no snapshot is made", "Turn it off first")
    if off := [each for each in SNAPSHOT_CALLS if each in fact.disabled]:
        remedy = "Wait for the backup or migration that is at work, or enable the method (KB 2008957) if none is"
        yield _no_go("disabled-method", f"vSphere has {', '.join(off)} switched off for it", remedy)
    elif "RelocateVM_Task" in fact.disabled:
        remedy = "Look whether a backup is at work; a run that was killed by VDDK's road leaves it so until its next"
        yield _warning("disabled-method", "Storage vMotion is switched off for it: another tool may read it", remedy)
    if fact.vm and fact.vm.power_state == "suspended":
        yield _warning("suspended", "it is suspended: its memory is not copied", "Resume it, or shut it down, before")
    locked = fact.vm and fact.vm.power_state != "poweredOff"
    if locked and isinstance(candidate.job, DownloadJob) and not candidate.job.snapshot:
        remedy = "Power it off, or download from a snapshot (--snapshot)"
        yield _no_go("powered-on", "it runs, and its host locks its disks", remedy)


def _of_its_disks(fact: VmFacts, candidate: Candidate) -> Iterator[Finding]:
    """Yield what the fence of a snapshot, and the road, refuse: by the checks that runs make."""
    if not fact.disks:
        yield _no_go("no-disk", "it has no disk", "There is nothing to copy")
    chosen = getattr(candidate.job, "snapshot_moref", "")
    chains = ROADS[candidate.road].chains or bool(chosen)
    name = fact.vm.name if fact.vm else fact.moref
    flat = [disk.model_copy(update={"parents": ()}) for disk in fact.disks] if chains else fact.disks
    for error in fence_problems(name, fact.consolidation, flat):
        yield _as_finding(_code_of(error, fact), error)
    if fact.snapshots and not chosen and chains:
        words = ", ".join(fact.snapshots)
        yield _warning("existing-snapshot", f"it has snapshots: {words}", "Nothing; they are left alone")
    if isinstance(candidate.job, DownloadJob) or ROADS[candidate.road].chains:
        return
    for disk in fact.disks:
        try:
            if not (disk.problem or disk.parents):
                check_flat((disk,), None, road=candidate.road)
        except UnsupportedDisk as error:
            yield _as_finding("vsan-vvol" if disk.object_id else "no-flat-file", error)


def _code_of(error: Hyper2KvmError, fact: VmFacts) -> str:
    """Return the code of what the fence refuses."""
    kind = str(error.fields["kind"])
    return ("existing-snapshot" if fact.snapshots else "linked-clone") if kind == "snapshots" else kind


def _of_tracking(fact: VmFacts, candidate: Candidate) -> Iterator[Finding]:
    if not isinstance(candidate.job, SyncJob) or not fact.vm or fact.vm.cbt_enabled:
        return
    if not candidate.job.enable_cbt:
        yield _as_finding("cbt-off", TrackingOff(vm=fact.vm.name, why="changeTrackingEnabled is false"))
    elif fact.snapshots:
        yield _as_finding("cbt-below-snapshots", blind_tracking(fact.vm.name))
    else:
        yield _warning("cbt-off", "changed block tracking is off, and will be switched on", "Nothing: it was asked for")


def _of_its_devices(fact: VmFacts) -> Iterator[Finding]:
    models = {device.model: device.label for device in (fact.vm.devices if fact.vm else ())}
    if "VirtualTPM" in models:
        remedy = "Have the guest's recovery keys at hand (BitLocker), or take the TPM's secrets off it first"
        yield _warning("vtpm", "it has a virtual TPM, whose secrets are not carried over", remedy)
    if label := next((models[each] for each in models if each.startswith("VirtualPCIPassthrough")), ""):
        on = fact.vm is not None and fact.vm.power_state != "poweredOff"
        why = f"it has a passthrough device ({label})"
        if on:
            remedy = "Shut the VM down, or take the device off it"
            yield _no_go("passthrough", f"{why}, with which no snapshot of a running VM is made", remedy)
        else:
            yield _warning("passthrough", f"{why}, which is not carried over", "Give the domain another afterwards")


def _of_its_tools(fact: VmFacts, candidate: Candidate) -> Iterator[Finding]:
    if fact.tools_run or (fact.vm and fact.vm.power_state == "poweredOff"):
        return
    quiesce = getattr(candidate.job, "quiesce", False) and not getattr(candidate.job, "allow_crash_consistent", False)
    why = "VMware Tools do not run in it"
    if quiesce:
        remedy = "Start them, or allow a crash-consistent copy (--allow-crash-consistent)"
        yield _no_go("tools", f"{why}, so it cannot be quiesced", remedy)
    else:
        remedy = "Install or start them, for quiesced copies and a clean shutdown"
        yield _warning("tools", f"{why}: the copy is crash-consistent", remedy)


def _of_datastores(fact: VmFacts) -> Iterator[Finding]:
    for store in fact.datastores:
        if not store.accessible:
            yield _no_go("datastore", f"datastore {store.name} is not accessible", "Look at it in vSphere")
            continue
        on_it = sum(each.capacity_bytes for each in fact.disks if each.datastore_path.startswith(f"[{store.name}]"))
        why = f"datastore {store.name} has {store.free_bytes:,} bytes free for the snapshot"
        remedy = "Make room there, or move the VM (Storage vMotion)"
        if on_it and store.free_bytes < SNAPSHOT_LEAST:
            yield _no_go("datastore-room", why, remedy)
        elif store.free_bytes < on_it * SNAPSHOT_SHARE:
            yield _warning("datastore-room", f"{why}, less than {SNAPSHOT_SHARE:.0%} of its disks there", remedy)


def _of_privileges(fact: VmFacts, candidate: Candidate) -> Iterator[Finding]:
    enabling = isinstance(candidate.job, SyncJob) and candidate.job.enable_cbt
    needed = {
        *READ_VM,
        *READ_DATASTORE,
        *(BY_VDDK if candidate.road == "vddk" else ()),
        *(TRACKING if enabling else ()),
    }
    for privilege, where in fact.lacks:
        if privilege in needed:
            severity: Severity = "warning" if privilege in ONLY_WARNS else "no-go"
            remedy = "Add it to the account's role there"
            reason = f"the account lacks the privilege {privilege} on {where}"
            yield Finding(code="privilege", severity=severity, reason=reason, remedy=remedy)


def _of_the_host(vcenter: VCenter, fact: VmFacts, candidate: Candidate, here: Here) -> Iterator[Finding]:
    host = fact.host
    if host is None:
        return
    if not host.connected:
        yield _no_go("host", f"its ESXi host {host.name} is not connected", "Connect the host in vSphere")
    vddk, answer = candidate.road == "vddk", here.reached.get(host.name)
    version = here.vddk.get(candidate.needs.libdir) if vddk else None
    if isinstance(version, tuple):
        yield _no_go("vddk", *version)
    elif version and host.version and _older(host.version, SERVES[version]):
        remedy = "Take an older library (--vddk-libdir)"
        reason = f"VDDK {version} is for vSphere {SERVES[version]} and newer, and {host.name} runs {host.version}"
        yield _no_go("vddk-version", reason, remedy)
    large = any(disk.capacity_bytes >= TICKET_BYTES for disk in fact.disks)
    if answer and (vddk or (large and vcenter.host_tickets)):
        yield from _of_reaching(answer, vddk)


def _of_reaching(answer: Reached, vddk: bool) -> Iterator[Finding]:
    tell = _no_go if vddk else _warning
    effect = "which VDDK reads from" if vddk else "so large files come through the vCenter"
    if answer.unresolved:
        remedy = "Let this machine's DNS (or /etc/hosts) know it"
        yield tell("host-name", f"{answer.host} is no name here ({answer.unresolved}), {effect}", remedy)
    for port, why in answer.shut.items():
        remedy = f"Open port {port} between this machine and the host"
        say = tell if (port == NFC) == vddk else _warning
        yield say("host-port", f"port {port} of {answer.host} does not answer ({why}), {effect}", remedy)


def _of_the_server(candidate: Candidate, here: Here) -> Iterator[Finding]:
    """Yield why what the road ssh or nbd reads from is not there."""
    if not candidate.needs.server:
        return
    (host, port), road = (candidate.needs.server.host, candidate.needs.server.port), candidate.road
    answer = here.reached[host]
    if answer.unresolved:
        remedy = "Let this machine's DNS (or /etc/hosts) know it"
        yield _no_go("host-name", f"{host} is no name here ({answer.unresolved}), which {road} reads from", remedy)
    elif why := answer.shut.get(port):
        remedy = "Start SSH on the host (in vSphere: its Services)" if road == "ssh" else "Start the NBD server"
        reason = f"port {port} of {host} does not answer ({why}), which {road} reads from"
        yield _no_go("host-port", reason, f"{remedy}, or open the port between this machine and it")


def _older(version: str, than: str) -> bool:
    def numbers(text: str) -> list[int]:
        return [int(each) for each in text.split(".")[:2] if each.isdecimal()]

    return numbers(version) < numbers(than)


def _of_room_here(fact: VmFacts, candidate: Candidate) -> Iterator[Finding]:
    sure, most = _room_of(fact, candidate)
    have = free_bytes(candidate.job.output_dir.expanduser())
    why = f"{candidate.job.output_dir} has {have:,} bytes free"
    remedy = "Make room, or choose another output folder; for thick disks that are mostly zeros: --overcommit"
    if have < sure:
        yield _no_go("room-here", f"{why}, and its thick disks take {sure:,}", remedy)
    elif have < most:
        yield _warning("room-here", f"{why}, and its disks may take {most:,}", remedy)


def _room_of(fact: VmFacts, candidate: Candidate) -> tuple[int, int]:
    """Return what the copy is sure to take, and what it may."""
    thick = sum(disk.capacity_bytes for disk in fact.disks if not disk.thin)
    return 0 if candidate.job.overcommit else thick, fact.capacity_bytes


# ── all of them together ─────────────────────────────────────────────────────────────────────────────


def _without_twins(checked: Sequence[Checked]) -> Iterator[Checked]:
    """Yield the VMs; those that would go to the same folder, or are there twice, with what is wrong with that."""
    targets = Counter(vm.output for vm in checked)
    for vm in checked:
        if targets[vm.output] > 1:
            others = ", ".join(each.path for each in checked if each.output == vm.output and each is not vm)
            remedy = "Give one of them an output folder of its own"
            twin = _no_go("duplicate-target", f"{others} goes to {vm.output} too", remedy)
            yield vm.model_copy(update={"findings": (*vm.findings, twin)})
        else:
            yield vm


def _room_for_all(checked: Sequence[Checked], pairs: Sequence[tuple[Candidate, VmFacts]]) -> Iterator[Finding]:
    """Yield what is wrong with all that may run going to the same file systems."""
    sure: Counter[Path] = Counter()
    most: Counter[Path] = Counter()
    for vm, (candidate, fact) in zip(checked, pairs, strict=True):
        if vm.go:
            certain, possible = _room_of(fact, candidate)
            sure[candidate.job.output_dir] += certain
            most[candidate.job.output_dir] += possible
    for folder, need in sure.items():
        have = free_bytes(folder.expanduser())
        remedy = "Make room, split the wave, or overcommit"
        if have < need:
            yield _no_go(
                "room-here", f"{folder} has {have:,} bytes free, and the thick disks of all take {need:,}", remedy
            )
        elif have < most[folder]:
            why = f"{folder} has {have:,} bytes free, and the disks of all may take {most[folder]:,}"
            yield _warning("room-here", why, remedy)


def findings_of(checked: Iterable[Checked]) -> Mapping[str, int]:
    """Return how often each code was found."""
    return Counter(finding.code for vm in checked for finding in vm.findings)


def kind_of(job: JobOptions) -> DiskJob | DownloadJob:
    """Return a run's options as preflight takes them."""
    assert isinstance(job, DiskJob | DownloadJob | VddkJob)
    return job
