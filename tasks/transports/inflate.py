"""The blocks of a disk out of its stream-optimised VMDK: inflated by several threads, given in order, a few ahead.

Where the stream comes from, and what is done when it breaks, is not known here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from queue import Full, Queue
from typing import Self

from tasks.reader import Buffer, Hole, aligned_buffer
from tasks.transports.streamvmdk import Grain, StreamVmdk

BLOCK_BYTES = 1024 * 1024  # four leaves, put together by one thread; the longest grain
AHEAD = 8  # blocks that are on their way, of each disk
POLL_S = 0.1

_ZEROS = bytes(BLOCK_BYTES)


class Blocks:
    """The blocks of a disk of `size` bytes from the one that holds byte `start` on; a context manager, used as

        with Blocks(read_into, size=size) as blocks:
            for offset, buffer in blocks: …

    They come in order and without a gap, holes as such; a buffer is good until the next is asked for. The last of them
    comes only once the stream has come to a sound end. Raises BadStream, and what `read_into` raises; who leaves early
    sees to it that `read_into` returns.
    """

    def __init__(self, read_into: Callable[[memoryview], int], *, size: int, start: int = 0, threads: int) -> None:
        self._read_into, self._size = read_into, size
        self._start = start // BLOCK_BYTES * BLOCK_BYTES
        self._ahead: Queue[tuple[int, Future[memoryview]] | BaseException | None] = Queue(AHEAD)
        self._spare: list[memoryview] = []
        self._left = threading.Event()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="inflate")
        self._feeder = threading.Thread(target=self._feed, name="inflate-feeder")

    def __enter__(self) -> Self:
        self._feeder.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._left.set()
        self._feeder.join()
        self._pool.shutdown(cancel_futures=True)

    def __iter__(self) -> Iterator[tuple[int, Buffer]]:
        at = self._start
        while item := self._ahead.get():
            if isinstance(item, BaseException):
                raise item
            offset, block = item
            if at < offset:
                yield at, Hole(offset - at)
            content = block.result()
            yield offset, content
            at = offset + len(content)
            self._spare.append(content)
        if at < self._size:
            yield at, Hole(self._size - at)

    def _feed(self) -> None:
        """Take the stream apart, and have its blocks made, as far ahead as is allowed."""
        try:
            vmdk = StreamVmdk(self._read_into, capacity_bytes=self._size)
            for offset, grains in _by_block(vmdk.grains()):
                if self._left.is_set():
                    return
                if offset >= self._start:
                    self._put((offset, self._pool.submit(self._block, vmdk, offset, grains)))
            self._put(None)
        except BaseException as error:  # noqa: BLE001 - the edge of a thread
            self._put(error)

    def _put(self, item: tuple[int, Future[memoryview]] | BaseException | None) -> None:
        while not self._left.is_set():
            try:
                self._ahead.put(item, timeout=POLL_S)
            except Full:
                continue
            return

    def _block(self, vmdk: StreamVmdk, offset: int, grains: list[Grain]) -> memoryview:
        """Return the content of a block, of which nothing but `grains` is stored."""
        length = min(BLOCK_BYTES, self._size - offset)
        block = self._spare.pop() if self._spare and length == BLOCK_BYTES else aligned_buffer(length)
        if len(grains) * vmdk.grain_bytes < length:
            block[:] = memoryview(_ZEROS)[:length]
        for grain in grains:
            content = vmdk.inflate(grain)
            at = grain.offset - offset
            block[at : at + len(content)] = content
        return block


def _by_block(grains: Iterator[Grain]) -> Iterator[tuple[int, list[Grain]]]:
    """Yield the grains of each block that has any, once none of it can follow."""
    offset, together = 0, list[Grain]()
    for grain in grains:
        block = grain.offset // BLOCK_BYTES * BLOCK_BYTES
        if together and block != offset:
            yield offset, together
            together = []
        offset = block
        together.append(grain)
    if together:
        yield offset, together
