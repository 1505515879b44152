"""`tasks.errors`: each class makes its message, survives a pickle, and is in the map of the module's docstring."""

import inspect
import pickle

import pytest

from tasks import errors

EXAMPLES = {
    errors.Hyper2KvmError: {"cause": "broken"},
    errors.InvalidInput: {"what": "--port", "why": "no number", "remedy": "Give one"},
    errors.NotBuilt: {"what": "the transport 'ssh'", "instead": "'folder'"},
    errors.ConnectionFailed: {"host": "vc:443", "why": "refused"},
    errors.AuthenticationFailed: {"host": "vc:443", "username": "admin"},
    errors.SessionExpired: {"host": "vc:443"},
    errors.CertificateUntrusted: {"host": "vc:443", "why": "self-signed", "actual": "AA:BB"},
    errors.ThumbprintMismatch: {"host": "vc:443", "expected": "AA", "actual": "BB"},
    errors.PrefectUnreachable: {"url": "http://127.0.0.1:4200/api", "why": "refused"},
    errors.VsphereFault: {"action": "a look", "fault": "FileFault", "remedy": "Look"},
    errors.PermissionMissing: {"privilege": "VirtualMachine.State.CreateSnapshot", "object": "VirtualMachine vm-1"},
    errors.LicenceForbids: {"host": "esx", "action": "a snapshot"},
    errors.LeaseRefused: {"vm": "web", "fault": "InvalidPowerState", "remedy": "Power it off"},
    errors.LeaseLost: {"vm": "web", "reason": "Timedout"},
    errors.BadLeaseStream: {"source": "[ds] web/web.vmdk", "why": "it ends without a footer"},
    errors.SnapshotFailed: {"vm": "web", "fault": "FileFault", "remedy": "Look", "quiescing": False},
    errors.VmNotFound: {"wanted": "wbe", "near": ("web",)},
    errors.AmbiguousVmName: {"wanted": "web", "candidates": (("/DC/vm/a/web", "vm-1"), ("/DC/vm/b/web", "vm-2"))},
    errors.UnsupportedDisk: {"disk": "Hard disk 1", "reason": "it is an RDM", "remedy": "Map it"},
    errors.TrackingOff: {"vm": "web", "why": "it is off"},
    errors.ChangeIdInvalid: {"disk": "Hard disk 1", "reason": "unknown"},
    errors.CopyUnfit: {"folder": "/data/web", "reason": "it is of another VM"},
    errors.FenceClosed: {"vm": "web", "reason": "it needs consolidation", "remedy": "Consolidate"},
    errors.SnapshotChanged: {"snapshot": "s", "vm": "web", "reason": "it is gone"},
    errors.SourceChanged: {"vm": "web", "reason": "it is gone"},
    errors.FileLocked: {"path": "[ds] web/web-flat.vmdk", "remedy": "Wait"},
    errors.FileMissing: {"path": "[ds] web/web.vmdk", "why": "it was moved", "remedy": "Look"},
    errors.FileUnfit: {"path": "'../x'", "reason": "its name leads out", "remedy": "Rename it"},
    errors.NbdFailed: {"source": "[ds] a.vmdk", "server": "nbd://host", "why": "no newstyle greeting"},
    errors.NbdCommandEnded: {"source": "[ds] a.vmdk", "server": "nbdkit", "outcome": "exit status 1"},
    errors.NbdTlsRefused: {"source": "[ds] a.vmdk", "server": "nbds://host", "why": "self-signed certificate"},
    errors.SshFailed: {"host": "esx1:22", "why": "Permission denied"},
    errors.HostKeyChanged: {"host": "esx1:22", "expected": "SHA256:a", "actual": "SHA256:b"},
    errors.NoRoad: {"vm": "web", "reasons": "vddk: no library; folder: locked"},
    errors.VddkUnavailable: {"missing": "there is no libvixDiskLib.so.8", "looked_in": "/opt/vddk"},
    errors.VddkFailed: {"call": "Open", "source": "[ds] web/web.vmdk", "words": "the file is locked, VIX error 15"},
    errors.VddkOutOfMemory: {"call": "Open", "source": "[ds] web/web.vmdk", "words": "out of memory, VIX error 2"},
    errors.VddkCrashed: {"source": "[ds] web/web.vmdk", "outcome": "signal 11"},
    errors.VddkReadsZeros: {"source": "[ds] web/web.vmdk", "version": "6.7.3", "count": 32},
    errors.TransferInterrupted: {"source": "web", "resumable_at": 4096, "why": "reset"},
    errors.IntegrityMismatch: {"path": "disk-0.raw", "where": "offset 0"},
    errors.JobLocked: {"path": "/data/web", "holder": "pid 7"},
    errors.OutputExists: {"path": "/data/web", "why": "an earlier export"},
    errors.NotDefined: {"name": "web", "uri": "qemu:///system", "reason": "it is there", "remedy": "Rename it"},
    errors.GuestStaysOn: {"vm": "web", "why": "it has no VMware Tools", "remedy": "Install them"},
    errors.WillNotConverge: {"vm": "web", "budget_s": 30.0, "why": "the guest changes more than is read"},
    errors.CutoverRefused: {"vm": "web", "why": "stopped in the form"},
    errors.NotRolledBack: {"vm": "web", "why": "its copy runs", "remedy": "Shut it down"},
    errors.DiskFull: {"path": "/data", "need": 10, "have": 5},
    errors.BootFailed: {"domain": "web", "recognised": "No bootable device.", "folder": "/data/web"},
    errors.BootUnproven: {"domain": "web", "recognised": "nothing was recognised", "folder": "/data/web"},
    errors.JanitorUnfinished: {"count": 2, "first": "vcenter.example.com:443: it does not answer", "found": None},
    errors.PreflightRefused: {"count": 1, "all": 2, "names": "web"},
    errors.WaveIncomplete: {"wave": "one", "done": 1, "all": 2, "rest": "1 failed"},
    errors.NotApproved: {"what": "plan of wave one", "why": ": not today"},
    errors.ToolMissing: {"tool": "virt-qemu-run", "purpose": "to look", "package": "libvirt-daemon-driver-qemu"},
    errors.ToolFailed: {"argv": ("qemu-img", "convert"), "status": 1, "last_lines": ("no such file",)},
}
CLASSES = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, Exception)]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_it_names_cause_and_fields_and_survives_a_pickle(cls):
    error = cls(**EXAMPLES[cls])
    for name, value in EXAMPLES[cls].items():
        assert getattr(error, name) == value
    assert error.cause
    assert "{" not in str(error)
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), copy.fields) == (cls, str(error), error.fields)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_it_says_what_to_do(cls):
    assert cls is errors.Hyper2KvmError or cls(**EXAMPLES[cls]).remedy or cls is errors.ToolFailed


def test_the_map_in_the_docstring_has_every_class():
    for cls in CLASSES:
        assert f"{cls.__name__}" in errors.__doc__


def test_a_field_left_out_is_a_bug_and_shows_as_one():
    with pytest.raises(KeyError):
        errors.FileLocked(path="x")
    with pytest.raises(AttributeError):
        _ = errors.JobLocked(path="x", holder="y").colour


def test_a_tools_last_lines_follow_the_first():
    error = errors.ToolFailed(argv=("qemu-img",), status=-9, last_lines=("one", "two"))
    assert str(error).splitlines() == ["qemu-img failed with signal 9: two", "one", "two"]


def test_a_message_is_one_line_whatever_a_name_holds_and_the_field_stays_as_it_is():
    error = errors.FenceClosed(vm="web\nINFO forged", reason="\x1b[2Jit is\u2028so", remedy="Do\rthis")
    assert str(error) == r"No snapshot of web\nINFO forged is taken now: \x1b[2Jit is\u2028so. Do\rthis"
    assert error.vm == "web\nINFO forged"
