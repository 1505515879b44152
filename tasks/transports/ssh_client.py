"""OpenSSH's client to one host: one connection, over which any number of commands run side by side.

Secrets are in memory files of ours, which ssh and its askpass helper open by their path below /proc: never in an
argument, an environment or a file on disk. The host key is pinned; nobody's configuration or agent is used.
"""

from __future__ import annotations

import base64
import hashlib
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Self

from pydantic import SecretStr

from tasks.errors import HostKeyChanged, SshFailed, ToolFailed
from tasks.models import SshSettings
from tasks.process import LastWords, child, environment_without_secrets, run, wait_for_end

PACKAGE = "openssh-client"
START_S = 60.0
SCAN_S = 15
POLL_S = 0.01
FINGERPRINT = "SHA256:"  # what a pinned key begins with that is not whole
CIPHER = "aes128-gcm@openssh.com"  # the fastest where the processor knows AES: 650 MB/s where others gave 300


class SshClient:
    """One connection to a host, for a block. Enter it in a thread that lives as long: it ends with that one.

    Entering raises HostKeyChanged, SshFailed, and ToolFailed where there is no OpenSSH.
    """

    def __init__(self, settings: SshSettings) -> None:
        self._settings, self._own = settings, ExitStack()
        self.address = f"{settings.host}:{settings.port}"

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="hyper2kvm-ssh-")))
            self._environment, self._words = environment_without_secrets(), self._options(folder, stack)
            self._environment.pop("SSH_AUTH_SOCK", None)
            self._environment |= {"SSH_ASKPASS": str(folder / "askpass"), "SSH_ASKPASS_REQUIRE": "force"}
            self._connect(folder / "connection", stack)
            self._own = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._own.close()

    def running(
        self, command: str, *, stdout: int = subprocess.PIPE
    ) -> AbstractContextManager[subprocess.Popen[bytes]]:
        """Return what runs `command` in the host's shell for a block; its exit status is that, or 255 for ssh's own."""
        argv = [*self._words, "-o", "ControlMaster=no", *self._where, command]
        return child(argv, env=self._environment, stdout=stdout)

    @property
    def _where(self) -> list[str]:
        return ["-l", self._settings.user, "-p", str(self._settings.port), "--", self._settings.host]

    def _options(self, folder: Path, stack: ExitStack) -> list[str]:
        settings = self._settings
        known_hosts = folder / "known_hosts"
        pinned = self._shown_key() if settings.host_key.startswith(FINGERPRINT) else settings.host_key
        known_hosts.write_text(f"{_bracketed(settings)} {pinned}\n")
        options = {
            "ControlPath": str(folder / "connection"),
            "StrictHostKeyChecking": "yes",
            "UserKnownHostsFile": str(known_hosts),
            "GlobalKnownHostsFile": "/dev/null",
            "UpdateHostKeys": "no",
            "IdentitiesOnly": "yes",
            "IdentityAgent": "none",
            "IdentityFile": _shown(settings.key, stack) if settings.key else "none",
            "PreferredAuthentications": "publickey" if settings.key else "keyboard-interactive,password",
            "NumberOfPasswordPrompts": "1",
            "BatchMode": "no" if settings.password else "yes",
            "Ciphers": f"^{CIPHER}",
            "Compression": "no",
            "ConnectTimeout": str(SCAN_S),
            "ServerAliveInterval": "15",
            "ServerAliveCountMax": "4",
            "LogLevel": "ERROR",
        }
        if settings.password:
            askpass = folder / "askpass"
            askpass.write_text(f"#!/bin/sh\nexec cat {_shown(settings.password, stack)}\n")
            askpass.chmod(0o700)
        return ["ssh", "-F", "none", "-T", *(word for item in options.items() for word in ("-o", "=".join(item)))]

    def _shown_key(self) -> str:
        """Return the key that the host shows and that is the pinned one. Raises HostKeyChanged, SshFailed.

        It costs a connection for each type of keys: not for a pinned key that is whole.
        """
        pinned, shown = self._settings.host_key, self._scan()
        for key in shown:
            if pinned in (key, fingerprint(key)):
                return key
        if not shown:
            raise SshFailed(host=self.address, why="no SSH server answers there")
        expected = pinned if pinned.startswith(FINGERPRINT) else fingerprint(pinned)
        raise HostKeyChanged(host=self.address, expected=expected, actual=", ".join(map(fingerprint, shown)))

    def _scan(self) -> tuple[str, ...]:
        """Return the keys that the host shows, each as type and base64."""
        argv = ["ssh-keyscan", "-T", str(SCAN_S), "-p", str(self._settings.port), self._settings.host]
        try:
            said = run(argv, package=PACKAGE)
        except ToolFailed as error:
            if error.status > 1:  # 1: nobody answered
                raise
            return ()
        lines = (line.split() for line in said.splitlines() if not line.startswith("#"))
        return tuple(" ".join(words[1:3]) for words in lines if len(words) >= 3)

    def _connect(self, control: Path, stack: ExitStack) -> None:
        """Start the connection that the commands share. Raises SshFailed, HostKeyChanged."""
        argv = [*self._words, "-o", "ControlMaster=yes", "-N", *self._where]
        master = stack.enter_context(child(argv, env=self._environment))
        words, deadline = LastWords(master), time.monotonic() + START_S
        while not control.exists():
            if wait_for_end(master, POLL_S) or time.monotonic() > deadline:
                said = words.lines(POLL_S)
                self._shown_key()  # a host of another key, or none there, is the better word
                why = said[-1] if said else "ssh does not say why"
                raise SshFailed(host=self.address, why=f"{self._settings.user}: {why}", last_lines=said)


def fingerprint(key: str) -> str:
    """Return `SHA256:…` of a public key, as OpenSSH shows it."""
    digest = hashlib.sha256(base64.b64decode(key.split()[1])).digest()
    return f"SHA256:{base64.b64encode(digest).decode().rstrip('=')}"


def _bracketed(settings: SshSettings) -> str:
    """Return how known_hosts names a host. Source: sshd(8), "SSH_KNOWN_HOSTS FILE FORMAT"."""
    return settings.host if settings.port == 22 else f"[{settings.host}]:{settings.port}"


def _shown(secret: SecretStr, stack: ExitStack) -> str:
    """Return a path at which a secret can be read by this user's processes, for as long as `stack` is open."""
    fd = stack.enter_context(_in_memory(secret.get_secret_value()))
    return f"/proc/{os.getpid()}/fd/{fd}"


@contextmanager
def _in_memory(text: str) -> Iterator[int]:
    fd = os.memfd_create("secret")
    try:
        os.fchmod(fd, 0o600)  # ssh takes no key that others may read
        os.write(fd, text.encode().rstrip() + b"\n")
        yield fd
    finally:
        os.close(fd)
