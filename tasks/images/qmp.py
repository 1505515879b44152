"""A few words of QMP, QEMU's machine protocol, over a unix socket: ask for a picture, or for memory.

Follows docs/interop/qmp-spec.txt of QEMU: JSON objects, a line each; what is no answer to us is an event.
"""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any, Self

TIMEOUT_S = 30.0  # a guest that is busy under TCG holds the answer up, not for long


class Qmp:
    """A connection to one QEMU, a context manager. Methods raise OSError where it is gone."""

    def __init__(self, address: Path) -> None:
        """Connect, and leave the mode in which QEMU only negotiates."""
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(TIMEOUT_S)
        try:
            self._socket.connect(str(address))
            self._file = self._socket.makefile("rwb")
            self._answer("QMP")
            self.call("qmp_capabilities")
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._socket.close()

    def call(self, command: str, **arguments: Any) -> bool:
        """Have QEMU do something; tell whether it did."""
        self._file.write(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        self._file.flush()
        return "return" in self._answer("return", "error")

    def _answer(self, *kinds: str) -> dict[str, Any]:
        while line := self._file.readline():
            answer = json.loads(line)
            if any(kind in answer for kind in kinds):
                return dict(answer)
        raise ConnectionResetError("QEMU has ended")
