"""An sshd of the tests' own on a loopback port, whose shell is busybox and whose /vmfs/volumes is a folder here.

What is played, and on what grounds, is in `lab/FACTS.md`. It runs as the user who runs the tests, and lets in that one
only, by a key made for it.
"""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from tasks.models import SshSettings

SSHD = "/usr/sbin/sshd"  # which wants to be called by its whole path
APPLETS = ("sh", "stat", "cat", "head", "sleep", "grep", "test")
PASSPHRASE = "open sesame"
CONFIG = """\
Port {port}
ListenAddress 127.0.0.1
HostKey {folder}/host
AuthorizedKeysFile {folder}/authorized
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
PidFile none
ForceCommand {folder}/command
"""
COMMAND = """\
#!/bin/sh
command=$(printf %s "$SSH_ORIGINAL_COMMAND" | sed 's#/vmfs/volumes#{volumes}#g')
exec env -i PATH={folder}/bin TROUBLE={folder}/trouble {folder}/bin/sh -c "$command"
"""
# VMFS locks belong to hosts, and no file system here has such: the first line of the file of troubles names one.
DD = """\
#!{busybox} sh
trouble=$(cat "$TROUBLE" 2>/dev/null)
case "$trouble $*" in
busy*) echo "dd: can't open '${{1#if=}}': Device or resource busy" >&2; exit 1;;
*of=/dev/null*) ;;
taken*) echo "dd: can't open '${{1#if=}}': Device or resource busy" >&2; exit 1;;
stall*) {busybox} dd "$@" 2>/dev/null | head -c 4096; exec sleep 1000;;
cut*) {busybox} dd "$@" 2>/dev/null | head -c 7000000; exit 1;;
broken*) echo "dd: error reading '${{1#if=}}': Input/output error" >&2; exit 1;;
esac
exec {busybox} dd "$@"
"""


@dataclass(frozen=True)
class EsxiHost:
    """A running one. port: on loopback. host_key, other_key: its public key, and one that is not its."""

    folder: Path
    port: int
    pid: int

    def settings(self, **changes: Any) -> SshSettings:
        """Return who logs in here, and why the host is believed."""
        fields: dict[str, Any] = {
            "host": "127.0.0.1",
            "port": self.port,
            "user": getpass.getuser(),
            "host_key": self.host_key,
            "key": SecretStr((self.folder / "user").read_text()),
        }
        return SshSettings(**(fields | changes))

    @property
    def host_key(self) -> str:
        return (self.folder / "host.pub").read_text()

    @contextmanager
    def trouble(self, kind: str) -> Iterator[None]:
        """Have each dd end badly for the block: `busy`; all but one that tries: `taken`, `stall`, `cut`, `broken`."""
        path = self.folder / "trouble"
        path.write_text(kind)
        try:
            yield
        finally:
            path.unlink()


def make_key(path: Path, *, passphrase: str = "") -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", passphrase, "-f", str(path)], check=True)


@contextmanager
def esxi_host(folder: Path, volumes: Path) -> Iterator[EsxiHost]:
    """Have a host for the block whose datastores are the folders in `volumes`."""
    busybox = shutil.which("busybox")
    assert busybox, "busybox is missing: run `make setup-test`"
    (folder / "bin").mkdir(parents=True)
    for applet in APPLETS:
        (folder / "bin" / applet).symlink_to(busybox)
    scripts = {"bin/dd": DD.format(busybox=busybox), "command": COMMAND.format(folder=folder, volumes=volumes)}
    for name, text in scripts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    make_key(folder / "host")
    make_key(folder / "user")
    make_key(folder / "locked", passphrase=PASSPHRASE)
    (folder / "authorized").write_text("".join((folder / f"{name}.pub").read_text() for name in ("user", "locked")))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (folder / "config").write_text(CONFIG.format(folder=folder, port=port))
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # where root's sshd locks itself in
    with (folder / "sshd.log").open("w") as log:
        argv = ["setpriv", "--pdeathsig", "KILL", SSHD, "-D", "-e", "-f", str(folder / "config")]
        server = subprocess.Popen(argv, stderr=log, stdin=subprocess.DEVNULL)
    try:
        _await_port(server, port, folder / "sshd.log")
        yield EsxiHost(folder, port, server.pid)
    finally:
        server.terminate()
        server.wait(20)


def _await_port(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + 30
    with socket.socket() as probe:
        while probe.connect_ex(("127.0.0.1", port)):
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)
