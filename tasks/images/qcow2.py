"""Writing a qcow2 image as the bytes arrive, through qemu-nbd: what it does with clusters is QEMU's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from queue import LifoQueue
from typing import Any, Self

from tasks.images.digests import Buffer
from tasks.images.files import naming_full_disk
from tasks.images.qemu import CONNECTIONS, create, qemu_nbd
from tasks.nbd import NbdClient


class Qcow2Writer:
    """A qcow2 image; clusters are allocated where something was written. See `tasks.images.writer.Writer`.

    It ends with the thread that made it, and so does its qemu-nbd. Every method but `close` raises ToolFailed where
    that has died, at the latest when the context is left.
    """

    def __init__(self, path: Path, *, empty: bool) -> None:
        """Made by `create` and `open`. `empty`: all of it reads as zeros, and each range is written once at most."""
        self.path = path
        self._empty = empty
        self._free: LifoQueue[NbdClient] = LifoQueue()
        with ExitStack() as stack:
            address = stack.enter_context(qemu_nbd(path, format="qcow2", read_only=False))
            self._clients = [stack.enter_context(NbdClient(address)) for _ in range(CONNECTIONS)]
            self._stack = stack.pop_all()
        for client in self._clients:
            self._free.put(client)

    @classmethod
    def create(cls, path: Path, *, size: int) -> Self:
        """Start an empty image of `size` bytes; a left-over of that name (a `*.part`) goes first. Raises FileLocked."""
        create(path, size=size)
        return cls(path, empty=True)

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open an image that holds something: zeros are written to it, as holes where that can be."""
        return cls(path, empty=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: Any) -> None:
        self._stack.__exit__(kind, *exc)

    def write(self, offset: int, buffer: Buffer) -> None:
        """Write all of `buffer` at `offset`. Raises DiskFull."""
        with self._client(need=len(buffer)) as client:
            client.write(offset, memoryview(buffer))

    def zero(self, offset: int, length: int) -> None:
        """Make the range read as zeros: left unwritten in an empty image, else a hole. Raises DiskFull."""
        if not self._empty:
            with self._client(need=0) as client:
                client.zero(offset, length)

    def read_into(self, offset: int, target: memoryview) -> None:
        """Fill `target` with the guest-visible bytes at `offset`."""
        with self._client(need=0) as client:
            client.read_into(offset, target)

    def flush(self) -> None:
        """Return once everything written is durable, the image's own metadata too. Raises DiskFull."""
        if self._clients[0].can_multi_conn:
            with self._client(need=0) as client:
                client.flush()
            return
        with ExitStack() as stack:
            for client in [stack.enter_context(self._client(need=0)) for _ in self._clients]:
                client.flush()

    def close(self) -> None:
        """Give the image up; not flushed. May be called twice."""
        self._stack.close()

    @contextmanager
    def _client(self, *, need: int) -> Iterator[NbdClient]:
        """Yield a connection that no other thread uses, waiting for one."""
        client = self._free.get()
        try:
            with naming_full_disk(self.path, need=need):
                yield client
        finally:
            self._free.put(client)
