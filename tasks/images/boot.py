"""Starting an exported domain aside, to see whether it boots: on overlays, without a network, gone without a trace.

libvirt itself starts it (`virt-qemu-run`: its QEMU driver without a daemon), so that the generated domain is what is
tested. It runs in namespaces of its own, as no privileged user: when their first process dies, the kernel ends all
that is in them, QEMU too, which libvirt detaches. What the texts mean is `boot_verdict`'s.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from tasks import process
from tasks.errors import ToolFailed, ToolMissing
from tasks.images import qemu
from tasks.images.boot_domain import Setting, boots_by_uefi, images_of, read_domain, set_aside
from tasks.images.boot_verdict import LINE_CHARACTERS, Finding, judge, picture_size, plain, text_screen
from tasks.images.qmp import Qmp
from tasks.models import Accelerator, BootCheck, BootWishes
from tasks.text import one_line

QEMU = "qemu-system-x86_64"
PACKAGES = {  # Debian's
    QEMU: "qemu-system-x86",
    "virt-qemu-run": "libvirt-daemon-driver-qemu",
    "qemu-img": "qemu-utils",
    "unshare": "util-linux",
}
FIRMWARE = Path("/usr/share/qemu/firmware")  # QEMU's docs/interop/firmware.json: where libvirt looks for UEFI
TIMEOUT_S = {"kvm": 120, "tcg": 300}
SETTLED_SHARE, SETTLED_S = 0.25, 30.0  # of the time-out, and at least so long, without anything new: it is stuck
START_S = 60.0  # for libvirt to ask QEMU what it can, and to start it
TRIAL_S = 20.0
POLL_S = 1.0
DRAWING_S = 1.0  # from a line on the serial port to the same on the screen
TAIL_BYTES = 256 * 1024
SHOWN_LINES = 40
TEXT_MEMORY, TEXT_MEMORY_BYTES = 0xB8000, 32 * 1024  # of a VGA in text mode; Linux scrolls through all of it
TEXT_SIZES = ((720, 400), (640, 400))
NOBODY = 65534

# Output of its own, not through virtlogd; no confinement of what is thrown away, which needs privileges.
_QEMU_CONF = 'stdio_handler = "file"\nsecurity_driver = "none"\n'
# Ends the namespaces and removes the folders once we end it, or die: then the kernel sends the signal. What it runs is
# not the first process of its namespace, since that one must reap what libvirt detaches. Nobody may read what it says.
_KEEPER = """
state=$1 overlays=$2; shift 2
trap 'exec >/dev/null 2>&1; kill -KILL $child; wait $child; rm -rf -- "$state" "$overlays"; exit 0' TERM
"$@" & child=$!
wait $child
echo $? >"$state/ended"
sleep infinity & child=$!
wait $child
"""
# Of libvirt's log, and of a shell whose child we end: not why a start was refused.
_NOISE = re.compile(r": (?:info|warning) :|^Terminated$")
_FIRST = 'virt-qemu-run "$@"; exit $?'


class Outcome(NamedTuple):
    """What came of a start. `png`: the last picture, empty where there was none."""

    check: BootCheck
    png: bytes
    said: str


def need_tools(*, uefi: bool) -> None:
    """Raise ToolMissing, naming the package, where this machine cannot start a domain aside."""
    for tool, package in PACKAGES.items():
        if not shutil.which(tool):
            raise ToolMissing(tool=tool, purpose="to check that a domain boots", package=package)
    if uefi and not any(FIRMWARE.glob("*.json")):
        raise ToolMissing(tool="UEFI firmware", purpose="to check that a UEFI domain boots", package="ovmf")


def boot(folder: Path, wishes: BootWishes, *, scratch: Path | None = None, stop: threading.Event) -> Outcome:
    """Start the domain of `folder` on overlays and watch it until something is clear, settled, or the time is up.

    scratch: where the overlays lie meanwhile; beside the images where it is not said. The images are only read.
    Raises ToolMissing, InvalidInput, FileLocked, UnsupportedDisk, ToolFailed, or Stopped once `stop` is set.
    """
    domain = read_domain(folder)
    need_tools(uefi=boots_by_uefi(domain))
    accelerator = working_accelerator() if wishes.accelerator == "auto" else wishes.accelerator
    with _place(scratch or folder) as place:
        setting = Setting(
            accelerator=accelerator,
            overlays=_overlays(images_of(domain), place.overlays),
            serial=place.serial,
            monitor=place.monitor,
            memory_kib=_spare_memory_kib(),
        )
        xml, notes = set_aside(domain, setting)
        place.domain.write_text(xml, encoding="utf-8")
        started = time.monotonic()
        with _started(place, stop) as guest:
            finding = guest.watch(wishes.expect, wishes.timeout_s or TIMEOUT_S[accelerator])
    check = BootCheck(
        domain=domain.findtext("name", ""),
        verdict=finding.verdict,
        recognised=one_line(finding.recognised),
        accelerator=accelerator,
        seconds=round(time.monotonic() - started, 1),
        serial_tail=_last_lines(guest.serial_text),
        screen_text=_last_lines(guest.screen_text),
        notes=notes,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    return Outcome(check, guest.png, guest.serial_text)


def working_accelerator() -> Accelerator:
    """Return kvm where QEMU starts a machine with it, found by trying: /dev/kvm may be there and of no use."""
    argv = [QEMU, "-accel", "kvm", "-cpu", "host", "-m", "16", "-nodefaults", "-display", "none", "-S", "-qmp", "stdio"]
    quit = b'{"execute": "qmp_capabilities"} {"execute": "quit"}'
    try:
        done = subprocess.run(process.dying_with_us(argv), input=quit, capture_output=True, timeout=TRIAL_S)
    except subprocess.TimeoutExpired:
        return "tcg"
    return "tcg" if done.returncode else "kvm"


# ── the place ────────────────────────────────────────────────────────────────────────────────────────


class _Place(NamedTuple):
    """The two folders of a start. `state` has a short path, since sockets lie there; `overlays` has room."""

    state: Path
    overlays: Path

    @property
    def domain(self) -> Path:
        return self.state / "domain.xml"

    @property
    def serial(self) -> Path:
        return self.state / "serial"

    @property
    def monitor(self) -> Path:
        return self.state / "qmp"

    @property
    def ended(self) -> Path:
        """Is there once libvirt has ended."""
        return self.state / "ended"


@contextmanager
def _place(beside: Path) -> Iterator[_Place]:
    """Make both folders, for nobody else's eyes; they are gone at the end."""
    with (
        tempfile.TemporaryDirectory(prefix="hyper2kvm-boot-", ignore_cleanup_errors=True) as state,
        tempfile.TemporaryDirectory(prefix=".hyper2kvm-boot-", dir=beside, ignore_cleanup_errors=True) as overlays,
    ):
        place = _Place(Path(state), Path(overlays))
        (place.state / "etc").mkdir()
        (place.state / "etc" / "qemu.conf").write_text(_QEMU_CONF)
        yield place


def _overlays(images: dict[Path, str], folder: Path) -> dict[Path, Path]:
    overlays = {image: folder / f"{number}.qcow2" for number, image in enumerate(images)}
    for image, overlay in overlays.items():
        qemu.overlay(image, overlay, format=images[image])
    return overlays


def _spare_memory_kib() -> int:
    """Return three quarters of what this machine could give a program now."""
    free = re.search(r"^MemAvailable:\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return int(free[1]) * 3 // 4 if free else 1 << 20


# ── the guest ────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def _started(place: _Place, stop: threading.Event) -> Iterator[_Guest]:
    """Start the domain that lies in `place`, for the block. Raises ToolFailed where libvirt or QEMU refuses it."""
    user = str(os.geteuid() or NOBODY), str(os.getegid() or NOBODY)
    spaces = ["unshare", "--user", f"--map-user={user[0]}", f"--map-group={user[1]}", "--net", "--pid", "--fork"]
    inside = ["--kill-child", "--mount-proc", "sh", "-c", _FIRST, "sh", "-r", str(place.state), str(place.domain)]
    keeper = ["sh", "-c", _KEEPER, "sh", str(place.state), str(place.overlays)]
    with (
        process.child([*keeper, *spaces, *inside], by="TERM") as running,
        _monitor_of(place, running, stop) as monitor,
    ):
        yield _Guest(place, monitor, stop)


def _monitor_of(place: _Place, running: subprocess.Popen[bytes], stop: threading.Event) -> Qmp:
    """Return a connection to QEMU once it talks. It may open the socket, and then find that it cannot start."""
    deadline = time.monotonic() + START_S
    while True:
        with suppress(OSError):
            return Qmp(place.monitor)
        if stop.wait(0.1):
            raise process.Stopped
        if place.ended.exists() or time.monotonic() > deadline:
            raise _refused(running)


def _refused(running: subprocess.Popen[bytes]) -> ToolFailed:
    assert running.stderr
    process.end_group(running, close=False)
    said = running.stderr.read().decode(errors="replace").splitlines()
    lines = [line for line in said if not _NOISE.search(line)]
    remedy = "Define the domain by hand to look into it; where it is KVM that fails, give --boot-accelerator tcg"
    return ToolFailed(argv=("virt-qemu-run",), status=1, last_lines=tuple(lines[-process.LAST_LINES :]), remedy=remedy)


class _Guest:
    """A guest that runs: what it has said and shown up to the last look."""

    def __init__(self, place: _Place, monitor: Qmp, stop: threading.Event) -> None:
        self._place, self._monitor, self._stop = place, monitor, stop
        self._picture = b""
        self.serial_text = self.screen_text = ""
        self.png = b""

    def watch(self, expect: str, timeout_s: float) -> Finding:
        """Look until there is a verdict, nothing new has come for long, the guest has ended or the time is up."""
        began = changed = time.monotonic()
        seen: set[int] = set()
        while True:
            ended = not self._look()
            now, state = time.monotonic(), hash((self.serial_text, self._picture))
            if state not in seen:  # a cursor that blinks shows nothing new
                seen.add(state)
                changed = now
            at_end = ended or now - began > timeout_s or now - changed > max(SETTLED_S, SETTLED_SHARE * timeout_s)
            finding = judge(self._text, expect=expect, at_end=at_end, picture=self._picture)
            if finding:
                return self._last_look(finding)
            if self._stop.wait(POLL_S):
                raise process.Stopped

    @property
    def _text(self) -> str:
        return f"{self.serial_text}\n{self.screen_text}"

    def _last_look(self, finding: Finding) -> Finding:
        """Take the picture that is kept, once the screen shows what the serial port said."""
        self._stop.wait(DRAWING_S)
        self._look()
        return finding

    def _look(self) -> bool:
        """Take in what there is to be read and seen now; return False once the guest has ended."""
        self.serial_text = plain(_tail(self._place.serial))
        try:
            self._picture = self._shot("screen.ppm", "screendump", format="ppm") or self._picture
            self.png = self._shot("screen.png", "screendump", format="png") or self.png
            if picture_size(self._picture) in TEXT_SIZES:
                where = {"val": TEXT_MEMORY, "size": TEXT_MEMORY_BYTES}
                self.screen_text = text_screen(self._shot("screen.txt", "pmemsave", **where))
        except OSError:
            return False
        return not self._place.ended.exists()

    def _shot(self, name: str, command: str, **arguments: Any) -> bytes:
        """Return what QEMU puts in a file; nothing where it cannot, such as a picture of no screen."""
        path = self._place.state / name
        return path.read_bytes() if self._monitor.call(command, filename=str(path), **arguments) else b""


def _tail(path: Path) -> bytes:
    if not path.exists():
        return b""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        return file.read()


def _last_lines(text: str) -> tuple[str, ...]:
    """Return the last lines of a text that have words in them, each on a line of its own and not too long."""
    lines = [one_line(line.rstrip())[:LINE_CHARACTERS] for line in text.split("\n") if line.strip()]
    return tuple(lines[-SHOWN_LINES:])
