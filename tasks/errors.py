"""What can go wrong, a class for each cause that an operator can act on.

    Hyper2KvmError
    ├── InvalidInput                 an option or a name that cannot be used
    │   └── NotBuilt                 documented by the source, not built yet
    ├── ConnectionFailed             nobody answers, or not as a vCenter does
    │   ├── AuthenticationFailed
    │   ├── SessionExpired
    │   ├── CertificateUntrusted
    │   ├── ThumbprintMismatch
    │   └── PrefectUnreachable
    ├── VsphereFault                 a fault of vSphere that has no class of its own
    │   ├── PermissionMissing
    │   ├── LicenceForbids
    │   ├── LeaseRefused             vSphere gives no lease on an export
    │   └── SnapshotFailed
    ├── VmNotFound
    ├── AmbiguousVmName
    ├── UnsupportedDisk              cannot be copied by this road: why, and which road can
    ├── TrackingOff                  changed blocks are not tracked, and may not be, or cannot
    ├── ChangeIdInvalid              what changed since a copy cannot be told
    ├── CopyUnfit                    a copy that is here cannot be brought up to date
    ├── FenceClosed                  the VM's own state forbids a snapshot now
    ├── SnapshotChanged              what is being read is no longer the point in time it was
    ├── SourceChanged                the point in time of a copy is not at the source any more
    ├── NoRoad                       none of several roads reads the disks: why not, each
    ├── FileLocked
    ├── FileMissing                  a file that the VM's configuration names, or that was there a moment ago
    ├── FileUnfit                    a file of the VM whose name or size cannot be taken as it is
    ├── VddkUnavailable              no usable VDDK where we looked
    ├── VddkFailed                   a call of VDDK failed: which, and what its error code means
    │   ├── VddkOutOfMemory          as a rule the ESXi host, for NFC sessions
    │   ├── VddkCrashed              the process in which it runs ended by itself
    │   └── VddkReadsZeros           it is too old for the server: what is allocated reads as zeros
    ├── NbdFailed                    an NBD source: unreachable, not what it should be, or a request of it failed
    │   ├── NbdCommandEnded          the command that serves NBD ended by itself, with its last lines
    │   └── NbdTlsRefused            its certificate is not trusted, or one of both sides wants no TLS
    ├── SshFailed                    nobody answers at an ESXi host by SSH, or lets us in
    │   └── HostKeyChanged           the host, or somebody in between, shows another key than the pinned one
    ├── LeaseLost                    an export lease ended before the last byte came
    ├── BadLeaseStream               what a lease gives is no sound VMDK of the disk
    ├── TransferInterrupted          the source stopped answering; what arrived is kept
    ├── IntegrityMismatch            what was written is not what was read
    ├── JobLocked                    another run of the same job is at work
    ├── OutputExists
    ├── NotDefined                   an exported VM that is not put into libvirt
    ├── GuestStaysOn                 the source does not go off, or is not seen to be
    ├── WillNotConverge              a downtime that no number of rounds would bring below its budget
    ├── CutoverRefused               a person said no
    ├── NotRolledBack                the source cannot be put back as it was
    ├── DiskFull
    ├── BootFailed                   the copy is there, and its domain was seen not to start
    ├── BootUnproven                 the same, and nothing proves that it starts or that it does not
    ├── JanitorUnfinished            something could not be looked at, or not be removed
    ├── PreflightRefused             what would stop a run, found before it
    ├── WaveIncomplete               a wave that has ended, and not all of its VMs are done
    ├── NotApproved                  a gate of a wave that somebody did not let through
    ├── ToolMissing
    └── ToolFailed                   a program that we ran, with its last lines

A class's docstring is its message, with blanks for the fields given to it; ``remedy`` says what to do.
An error is raised where its cause is found, from the original, and never wrapped into something vaguer.
"""

from __future__ import annotations

from typing import Any, ClassVar

from tasks.text import one_line


class Hyper2KvmError(Exception):
    """{cause}"""

    remedy: str = ""
    exit_status: ClassVar[int] = 1

    def __init__(self, **fields: Any) -> None:
        """Fill the blanks of the message with `fields`, which become attributes; raise KeyError for one left out.

        The attributes are as given; the message is one line, whatever the names in it hold.
        """
        self.fields = fields
        self.cause = one_line((type(self).__doc__ or "").format(**fields))
        self.remedy = one_line(type(self).remedy.format(**fields))
        super().__init__(self.cause)

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["fields"][name]
        except KeyError:
            raise AttributeError(name) from None

    def __str__(self) -> str:
        """Cause and remedy on the first line; what a tool said itself on the lines after it."""
        first = f"{self.cause}. {self.remedy}" if self.remedy else self.cause
        return "\n".join([first, *self.detail])

    @property
    def detail(self) -> tuple[str, ...]:
        """The last lines of the tool or service that failed, where there is one."""
        return tuple(self.fields.get("last_lines", ()))

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.fields)


def _rebuild(cls: type[Hyper2KvmError], fields: dict[str, Any]) -> Hyper2KvmError:
    return cls(**fields)


class InvalidInput(Hyper2KvmError):
    """{what}: {why}"""

    remedy = "{remedy}"
    exit_status = 2


class NotBuilt(InvalidInput):
    """{what} is not built yet"""

    remedy = "Use {instead}"


class ConnectionFailed(Hyper2KvmError):
    """Cannot talk to {host}: {why}"""

    remedy = "Check the address and port, and that a vCenter or ESXi host answers there"


class AuthenticationFailed(ConnectionFailed):
    """{host} refused user {username}: wrong user name or password"""

    remedy = "Check both (it was tried once, so the account is not locked by us)"


class SessionExpired(ConnectionFailed):
    """{host} no longer accepts the session, and a new login did not help"""

    remedy = "Check that the account is still enabled, then run the same command again"


class CertificateUntrusted(ConnectionFailed):
    """The certificate of {host} is not trusted: {why}; its SHA-256 thumbprint is {actual}"""

    remedy = (
        "Give its CA (--ca-file), or, if the thumbprint is the one shown on the server itself, pin it (--thumbprint)"
    )


class ThumbprintMismatch(ConnectionFailed):
    """The certificate of {host} is not the pinned one: expected {expected}, actual {actual}"""

    remedy = "If the certificate was replaced on purpose, pin the actual one; if not, somebody is in between"


class PrefectUnreachable(ConnectionFailed):
    """No Prefect server answers at {url}: {why}"""

    remedy = "Start it, or unset PREFECT_API_URL to have a temporary one, and run again: what is copied is not lost"


class VsphereFault(Hyper2KvmError):
    """vSphere refused {action}: {fault}"""

    remedy = "{remedy}"


class PermissionMissing(VsphereFault):
    """The account lacks the privilege {privilege} on {object}"""

    remedy = "Add it to the account's role there, then run the same command again"


class LicenceForbids(VsphereFault):
    """The licence of {host} does not allow {action}"""

    remedy = "Power the VM off and take another road than nfc_lease (no snapshot is needed then), or license the host"


class LeaseRefused(VsphereFault):
    """vSphere gives no export lease on {vm}: {fault}"""

    remedy = "{remedy}"


class SnapshotFailed(VsphereFault):
    """The snapshot of {vm} could not be made: {fault}"""

    remedy = "{remedy}"


class VmNotFound(Hyper2KvmError):
    """There is no VM {wanted!r}{near_text}"""

    remedy = "List what there is with --vs-action list-vms"

    def __init__(self, *, wanted: str, near: tuple[str, ...] = (), **_: Any) -> None:
        near_text = f"; near it: {', '.join(near)}" if near else ""
        super().__init__(wanted=wanted, near=near, near_text=near_text)


class AmbiguousVmName(Hyper2KvmError):
    """{wanted!r} names {count} VMs: {candidates_text}"""

    remedy = "Name one by its inventory path or moref"

    def __init__(self, *, wanted: str, candidates: tuple[tuple[str, str], ...], **_: Any) -> None:
        """`candidates`: (inventory path, moref) of every VM of that name."""
        text = "; ".join(f"{path} ({moref})" for path, moref in candidates)
        super().__init__(wanted=wanted, candidates=candidates, count=len(candidates), candidates_text=text)


class UnsupportedDisk(Hyper2KvmError):
    """{disk} cannot be copied: {reason}"""

    remedy = "{remedy}"


class NoRoad(Hyper2KvmError):
    """No road reads the disks of {vm}: {reasons}"""

    remedy = "Mend what stands in the way of one of them, or name it (--transport) to be told what to do"


class TrackingOff(Hyper2KvmError):
    """Changed blocks of {vm} are not tracked: {why}"""

    remedy = "Let it be switched on (--enable-cbt), which takes one snapshot and no reboot"


class ChangeIdInvalid(Hyper2KvmError):
    """What changed on {disk} since the last copy cannot be told: {reason}"""

    remedy = "All of it is read, and what differs is written"


class CopyUnfit(Hyper2KvmError):
    """The copy in {folder} cannot be brought up to date: {reason}"""

    remedy = "Choose another output folder, for a new whole copy"


class FenceClosed(Hyper2KvmError):
    """No snapshot of {vm} is taken now: {reason}"""

    remedy = "{remedy}"


class SnapshotChanged(Hyper2KvmError):
    """The snapshot {snapshot} of {vm} changed under the copy: {reason}"""

    remedy = "What was copied is discarded; find out who removed or consolidated it, then run again"


class SourceChanged(Hyper2KvmError):
    """The source no longer holds what was copied of {vm}: {reason}"""

    remedy = (
        "Verify without --against-source; to compare with the source later, export from a snapshot that you keep "
        "(--vs-snapshot-moref), or leave the VM off"
    )


class FileLocked(Hyper2KvmError):
    """{path} is locked by a running VM or another host"""

    remedy = "{remedy}"


class FileMissing(Hyper2KvmError):
    """{path} is not there: {why}"""

    remedy = "{remedy}"


class FileUnfit(Hyper2KvmError):
    """{path} cannot be downloaded: {reason}"""

    remedy = "{remedy}"


class VddkUnavailable(Hyper2KvmError):
    """VDDK cannot be used: {missing}; looked in {looked_in}"""

    remedy = (
        "Give the folder of VMware's unpacked vmware-vix-disklib-distrib (--vddk-libdir): of version 6 or 7 for "
        "vSphere 6.5 and newer, 8 for 6.7, 9 for 7.0; or take another road (--transport folder)"
    )


class VddkFailed(Hyper2KvmError):
    """VDDK's {call} failed for {source}: {words}"""

    remedy = "Mend what it says and run again, or take another road (--transport folder)"


class VddkOutOfMemory(VddkFailed):
    """VDDK's {call} failed for {source}: {words}"""

    remedy = "Copy fewer disks of that ESXi host at once (--parallel-disks), then run again"


class VddkCrashed(VddkFailed):
    """VDDK's process ended by itself at {source}, with {outcome}"""

    remedy = (
        "Try another version of VDDK that serves your vSphere, or take another road (--transport folder); what the "
        "library said last is below"
    )


class VddkReadsZeros(VddkFailed):
    """VDDK {version} reads nothing but zeros from {source}, at {count} places that the server calls allocated"""

    remedy = (
        "A library too old for its server does that: take a newer one. Where the disk really is empty, take another "
        "road (--transport folder)"
    )


class NbdFailed(Hyper2KvmError):
    """The NBD source of {source} ({server}) cannot be used: {why}"""

    remedy = "Mend what it says and run again, or take another road (--transport)"


class NbdCommandEnded(NbdFailed):
    """The command that serves {source} by NBD ended by itself, with {outcome}: {server}"""

    remedy = "What it said last is below; it must stay in the foreground (nbdkit: -f) for as long as it is read from"


class NbdTlsRefused(NbdFailed):
    """The NBD source of {source} ({server}) is not believed: {why}"""

    remedy = "Give the CA of its certificate, or, on a network that nobody else is on, an address without TLS (nbd://)"


class SshFailed(Hyper2KvmError):
    """SSH to {host} failed: {why}"""

    remedy = "See that SSH is on at the host (Actions, Services), and check user, key and password"


class HostKeyChanged(SshFailed):
    """The SSH host key of {host} is not the pinned one: expected {expected}, actual {actual}"""

    remedy = "If the host was reinstalled on purpose, pin the actual one; if not, somebody is in between"


class LeaseLost(Hyper2KvmError):
    """The export lease on {vm} ended before the last byte: {reason}"""

    remedy = "Nothing of the copy is kept. Run again; if it comes again, see the VM's tasks and events in vSphere"


class BadLeaseStream(Hyper2KvmError):
    """What the host sends of {source} is no sound stream-optimised VMDK of it: {why}"""

    remedy = "Nothing of the copy is kept. Run again; if it comes again, take another road (--transport folder)"


class TransferInterrupted(Hyper2KvmError):
    """The transfer of {source} stopped at byte {resumable_at}: {why}"""

    remedy = "Run the same command again once the cause is gone"


class IntegrityMismatch(Hyper2KvmError):
    """{path} does not hold what was read from the source: {where}"""

    remedy = "{remedy}"

    def __init__(
        self,
        *,
        path: object,
        where: str,
        remedy: str = "The copy was not given its final name; check the storage below it, then run again",
        **more: Any,
    ) -> None:
        super().__init__(path=path, where=where, remedy=remedy, **more)


class JobLocked(Hyper2KvmError):
    """Another run is at work on {path}: {holder}"""

    remedy = "Wait for it to end, or end it, then run again"


class OutputExists(Hyper2KvmError):
    """{path} exists already: {why}"""

    remedy = "Choose another output folder, or move it away (a finished copy is never deleted by us)"


class NotDefined(Hyper2KvmError):
    """{name} is not defined in libvirt ({uri}): {reason}"""

    remedy = "{remedy}"


class GuestStaysOn(Hyper2KvmError):
    """{vm} is not shut down: {why}"""

    remedy = "{remedy}"


class WillNotConverge(Hyper2KvmError):
    """The downtime of {vm} will not come below {budget_s:.0f} s: {why}"""

    remedy = (
        "Allow more (--downtime-budget), read faster (--connections, --parallel-disks), or let a person decide "
        "(--cutover approval); the copy is as of the last round, and the source runs"
    )


class CutoverRefused(Hyper2KvmError):
    """The cutover of {vm} was not approved: {why}"""

    remedy = "The copy is as of the last round, and the source runs; run again to go on with it"


class NotRolledBack(Hyper2KvmError):
    """{vm} is not put back: {why}"""

    remedy = "{remedy}"


class DiskFull(Hyper2KvmError):
    """{path} has not enough room: {need} bytes needed, {have} there"""

    remedy = "Make room, or choose another output folder; for thick disks that are mostly zeros: --overcommit"


class BootFailed(Hyper2KvmError):
    """{domain} does not boot: {recognised}"""

    remedy = "The copy is kept; see boot-check.png and boot-check.log in {folder}"


class BootUnproven(Hyper2KvmError):
    """Nothing proves that {domain} boots: {recognised}"""

    remedy = (
        "Look at boot-check.png and boot-check.log in {folder}; name what it should say on its serial port "
        "(--boot-expect), or give it more time (--boot-timeout)"
    )


class JanitorUnfinished(Hyper2KvmError):
    """{count} things could not be looked at or removed, the first: {first}"""

    remedy = "See the report for all of them; what could be done was"


class ToolMissing(Hyper2KvmError):
    """{tool} is needed {purpose}, and is not installed"""

    remedy = "Install the package {package} (its name on Debian)"


class ToolFailed(Hyper2KvmError):
    """{tool} failed with {outcome}{last_line}"""

    remedy = "{remedy}"

    def __init__(
        self, *, argv: tuple[str, ...], status: int, last_lines: tuple[str, ...] = (), remedy: str = "", **_: Any
    ) -> None:
        """`status`: the exit status, or minus the signal's number; `last_lines`: the last of its output."""
        outcome = f"signal {-status}" if status < 0 else f"exit status {status}"
        last_line = f": {last_lines[-1]}" if last_lines else ""
        super().__init__(
            argv=argv, status=status, last_lines=last_lines, remedy=remedy,
            tool=argv[0], outcome=outcome, last_line=last_line,
        )  # fmt: skip


class PreflightRefused(Hyper2KvmError):
    """{count} of {all} VMs cannot be run: {names}"""

    remedy = "Do what the report says of each, then run again"


class WaveIncomplete(Hyper2KvmError):
    """Wave {wave}: {done} of {all} VMs are done; {rest}"""

    remedy = "See the wave's report for each; Retry (or the same command) runs what is not done, and nothing twice"


class NotApproved(Hyper2KvmError):
    """{what} was not approved{why}"""

    remedy = "Run again, and approve it, once what was missing is there"
