"""Threads that share a queue of work: the first error is the one that is raised, and it ends them all."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Generic, TypeVar

from tasks.process import Stopped

POLL_S = 0.1

T = TypeVar("T")


def _nothing() -> None:
    pass


class Pool(Generic[T]):
    """One use of a few threads.

    stop: the caller's wish to end. interrupt: wakes workers that wait for a source or a server; called, perhaps
    more than once, when the end has come early. ended: set then, for workers to look at and to wait on.
    """

    def __init__(self, *, stop: threading.Event | None = None, interrupt: Callable[[], object] = _nothing) -> None:
        self.ended = threading.Event()
        self._stop = stop or threading.Event()
        self._interrupt = interrupt
        self._first: BaseException | None = None
        self._news = threading.Event()
        self._at_their_end = 0
        self._lock = threading.Lock()

    def check(self) -> None:
        """Raise Stopped where the end has come: for workers, between two steps."""
        if self.ended.is_set():
            raise Stopped

    def wake(self) -> None:
        """Have `meanwhile` called at once: for workers."""
        self._news.set()

    def run(
        self,
        items: Iterable[T],
        workers: Sequence[Callable[[T], None]],
        *,
        meanwhile: Callable[[], object] = _nothing,
    ) -> None:
        """Give each of `items` to one of `workers` (a thread each); return when all are done and every thread is gone.

        meanwhile: called by this thread, again and again, while the workers are at it.
        Raises the first error that came up anywhere, or Stopped.
        """
        shared = _Shared(items)
        threads = [threading.Thread(target=self._work, args=(worker, shared)) for worker in workers]
        try:
            self._obey_stop()
            for thread in threads:
                thread.start()
            self._join(threads, meanwhile)
            self._obey_stop()
        except BaseException as error:  # noqa: BLE001 - whatever it is (Ctrl-C), the threads end first
            self._fail(error)
            self._join([thread for thread in threads if thread.ident])
        if self._first:
            raise self._first

    def _work(self, worker: Callable[[T], None], shared: _Shared[T]) -> None:
        try:
            for item in shared:
                self.check()
                worker(item)
        except BaseException as error:  # noqa: BLE001 - the edge of a thread
            self._fail(error)
        with self._lock:
            self._at_their_end += 1
        self.wake()

    def _join(self, threads: Sequence[threading.Thread], meanwhile: Callable[[], object] = _nothing) -> None:
        while self._at_their_end < len(threads):
            self._news.wait(POLL_S)
            self._news.clear()
            self._obey_stop()
            if self.ended.is_set():
                self._interrupt()
            else:
                meanwhile()
        for thread in threads:
            thread.join()

    def _obey_stop(self) -> None:
        if self._stop.is_set():
            self._fail(Stopped())

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            self._first = self._first or error
        self.ended.set()


class _Shared(Generic[T]):
    """An iterator that several threads take from."""

    def __init__(self, items: Iterable[T]) -> None:
        self._items = iter(items)
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        with self._lock:
            return next(self._items)
