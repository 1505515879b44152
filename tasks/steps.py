"""What all steps share: from a block to a connection, blocking work in threads, cancellation that waits, progress.

Prefect lives here and above; nothing here knows what a disk is.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar
from uuid import UUID

import httpx
from prefect.artifacts import acreate_progress_artifact, aupdate_progress_artifact
from prefect.exceptions import PrefectException
from prefect.logging import get_run_logger

from blocks import VCenter
from tasks.images.files import free_bytes, need_space
from tasks.models import Connection, Trust
from tasks.vsphere.session import Session, borrow

ARTIFACT_EVERY_S = 3.0
QUIETLY_S = 20.0
LAST_WORD_S = 5.0  # a server that does not answer holds nobody up longer

P = ParamSpec("P")
T = TypeVar("T")


def connection_of(vcenter: VCenter) -> Connection:
    """Return the plain value that the rooms below understand."""
    trust = Trust(ca_pem=vcenter.ca_bundle or None, thumbprint=vcenter.thumbprint, verify=vcenter.verify)
    return Connection(
        host=vcenter.host,
        port=vcenter.port,
        username=vcenter.username,
        password=vcenter.password,
        trust=trust,
        connections=vcenter.connections,
        host_tickets=vcenter.host_tickets,
    )


async def in_thread(
    function: Callable[P, T], stop: threading.Event | None = None, /, *args: P.args, **kwargs: P.kwargs
) -> T:
    """Run blocking code in a thread of its own. When cancelled, set `stop` and wait until the thread has ended.

    A thread of its own, since the loop's few shared ones would all be taken by transfers that last for hours.
    """
    call = partial(contextvars.copy_context().run, partial(function, *args, **kwargs))
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix=getattr(function, "__name__", "step"))
    future = asyncio.get_running_loop().run_in_executor(pool, call)
    pool.shutdown(wait=False)
    try:
        return await asyncio.shield(future)
    finally:
        if stop:
            stop.set()
        await _settled(future)


async def on_vcenter(
    vcenter: VCenter, function: Callable[Concatenate[Session, P], T], /, *args: P.args, **kwargs: P.kwargs
) -> T:
    """Run a function of the control-plane, which takes a session first, in a thread, with the run's session."""

    def call() -> T:
        with borrow(connection_of(vcenter)) as session:
            return function(session, *args, **kwargs)

    return await in_thread(call)


async def to_the_end(work: Coroutine[Any, Any, T]) -> T:
    """Await `work` even when cancelled, once or twice; the cancellation is raised after it."""
    task = asyncio.ensure_future(work)
    cancelled = await _settled(task)
    result = task.result()
    if cancelled:
        raise asyncio.CancelledError
    return result


async def _settled(future: asyncio.Future[Any]) -> bool:
    """Wait until `future` has ended, whatever happens; return whether we were cancelled meanwhile."""
    cancelled = False
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError:
            cancelled = True
    return cancelled


async def side_by_side(calls: Sequence[Callable[[], Awaitable[T]]], *, at_once: int) -> list[T]:
    """Await all `calls`, `at_once` of them at a time; the first failure cancels the others and is what is raised."""
    gate = asyncio.Semaphore(at_once)

    async def gated(call: Callable[[], Awaitable[T]]) -> T:
        async with gate:
            return await call()

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(gated(call)) for call in calls]
    except BaseExceptionGroup as failures:
        first = failures.exceptions[0]
        raise first from first.__cause__
    return [task.result() for task in tasks]


def check_room(folder: Path, *, sure_bytes: int, most_bytes: int) -> None:
    """Raise DiskFull where `folder` has less room than is sure to be taken; say so where it has less than may be."""
    need_space(folder, sure_bytes)
    if (have := free_bytes(folder)) < most_bytes:
        get_run_logger().warning(
            "may not fit folder=%s bytes=%d free=%d: what is zero takes none", folder, most_bytes, have
        )


class Meter:
    """How far a piece of work is; told from any thread."""

    def __init__(self, label: str, total_bytes: int) -> None:
        self.label, self.total_bytes = label, total_bytes
        self.done_bytes = 0
        self.started_at = time.monotonic()
        self.ended = self.complete = False
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        """Count `count` more bytes."""
        with self._lock:
            self.done_bytes += count

    def expect(self, total_bytes: int) -> None:
        """Say how much there really is to do: less than was thought, where an earlier run did a part."""
        self.total_bytes = total_bytes

    def percent(self, value: float) -> None:
        """Set the progress, 0 to 100."""
        self.done_bytes = int(self.total_bytes * value / 100)

    @property
    def fraction(self) -> float:
        """0 to 1; 1 only when the work has come to its end."""
        return 1.0 if self.complete else min(0.99, self.done_bytes / max(1, self.total_bytes))


METER_LISTENER: ContextVar[Callable[[Meter], None] | None] = ContextVar("METER_LISTENER", default=None)
"""Told of each meter as it starts: how a command line shows what its flow does."""


@asynccontextmanager
async def metered(label: str, total_bytes: int, *, key: str) -> AsyncIterator[Meter]:
    """Yield a meter whose state becomes a progress artifact of the run, refreshed every few seconds.

    `key`: of the artifact; lower-case letters, digits and dashes.
    """
    meter = Meter(label, total_bytes)
    if listener := METER_LISTENER.get():
        listener(meter)
    ended = asyncio.Event()
    refreshing = asyncio.create_task(_refresh(meter, key, ended))
    try:
        yield meter
        meter.complete = True
    finally:
        meter.ended = True
        ended.set()
        await _settled(asyncio.ensure_future(asyncio.wait([refreshing], timeout=LAST_WORD_S)))
        refreshing.cancel()


async def _refresh(meter: Meter, key: str, ended: asyncio.Event) -> None:
    artifact = await quietly(acreate_progress_artifact(progress=0.0, key=key, description=meter.label))
    shown = 0.0
    while isinstance(artifact, UUID) and not (ended.is_set() and shown == meter.fraction):
        with suppress(TimeoutError):
            await asyncio.wait_for(ended.wait(), ARTIFACT_EVERY_S)
        if shown != meter.fraction:
            shown = meter.fraction
            await quietly(aupdate_progress_artifact(artifact_id=artifact, progress=100 * shown))


async def quietly(call: Coroutine[Any, Any, T]) -> T | None:
    """Await a call to the Prefect API that no copy may fail, or wait long, for."""
    try:
        async with asyncio.timeout(QUIETLY_S):
            return await call
    except (httpx.HTTPError, PrefectException, TimeoutError) as error:
        get_run_logger().warning("not recorded by Prefect error=%s", type(error).__name__)
        return None
