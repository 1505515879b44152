"""A command that serves NBD, on its stdin and stdout or on a socket that we name: started, watched, ended."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from pydantic import SecretStr

from tasks.errors import NbdCommandEnded, NbdFailed
from tasks.models import BLANK
from tasks.nbd import Address
from tasks.process import LastWords, child, environment_without_secrets, outcome_of, wait_for_end

START_S = 60.0  # a server that logs in somewhere first takes its time
POLL_S = 0.05
ENDING_S = 2.0  # between the end of its connection and its own


class Command:
    """A command at work. address: where it serves, or the one connection that it serves on (`single`)."""

    def __init__(self, process: subprocess.Popen[bytes], address: Address, *, words: str, source: str) -> None:
        self.address, self.single = address, isinstance(address, socket.socket)
        self._process, self._words, self._source = process, words, source
        self._heard = LastWords(process)

    def check(self, *, within_s: float = 0.0) -> None:
        """Raise NbdCommandEnded where it has ended, or does so `within_s` seconds."""
        if not wait_for_end(self._process, within_s):
            return
        raise NbdCommandEnded(
            source=self._source,
            server=self._words,
            outcome=outcome_of(self._process),
            last_lines=self._heard.lines(ENDING_S),
        )

    def await_socket(self) -> None:
        """Wait until its socket is there and listens. Raises NbdCommandEnded, NbdFailed."""
        deadline = time.monotonic() + START_S
        while not _listens(self.address):
            self.check(within_s=POLL_S)
            if time.monotonic() > deadline:
                why = f"it does not listen on its socket after {START_S:.0f} s"
                raise NbdFailed(source=self._source, server=self._words, why=why, last_lines=self._heard.lines())


@contextmanager
def serving(
    words: Sequence[str], blanks: Mapping[str, str], secrets: Mapping[str, SecretStr], *, source: str
) -> Iterator[Command]:
    """Have a command run for the block, its blanks filled; it dies with the thread that enters.

    secrets: by the blanks that stand for the file descriptors that they are read from. source: what it is to serve, for
    messages. Raises NbdCommandEnded, NbdFailed.
    """
    with ExitStack() as stack:
        folder = stack.enter_context(TemporaryDirectory(prefix="hyper2kvm-nbd-"))
        path = Path(folder) / "nbd"
        used = {name: secret for name, secret in secrets.items() if any(f"{{{name}}}" in word for word in words)}
        fds = {name: stack.enter_context(_readable(secret)) for name, secret in used.items()}
        known = {**blanks, "socket": str(path), **{name: str(fd) for name, fd in fds.items()}}
        argv = [filled(word, known) for word in words]
        on_socket = any("{socket}" in word for word in words)
        ours, theirs = socket.socketpair()
        stack.enter_context(closing(ours))
        with closing(theirs):
            stdio = subprocess.DEVNULL if on_socket else theirs.fileno()
            process = stack.enter_context(
                child(argv, stdin=stdio, stdout=stdio, env=environment_without_secrets(), pass_fds=tuple(fds.values()))
            )
        command = Command(process, path if on_socket else ours, words=shlex.join(argv), source=source)
        if on_socket:
            command.await_socket()
        yield command


def filled(text: str, blanks: Mapping[str, str]) -> str:
    """Return `text` with its blanks (`{moref}`) filled; braces around anything else stay."""
    return BLANK.sub(lambda match: blanks.get(match[1], match[0]), text)


@contextmanager
def _readable(secret: SecretStr) -> Iterator[int]:
    """Yield a file descriptor that a secret can be read from, once."""
    reading, writing = os.pipe()
    with open(reading, "rb"), open(writing, "wb") as pipe:  # noqa: PTH123 - of descriptors
        pipe.write(secret.get_secret_value().encode())
        pipe.close()
        yield reading


def _listens(address: Address) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(address)) == 0
