"""A Prefect process worker that drains: asked to end, it takes no more runs, and ends when those that it has are done.

Prefect's own (3.9.1) kills its runs when it is asked to end. Everything else is Prefect's own.
"""

from __future__ import annotations

import signal
import socket
from abc import ABC
from typing import Annotated

import anyio
from anyio.abc import TaskGroup
from cyclopts import App, Parameter
from prefect.client.schemas.objects import FlowRun
from prefect.workers.process import ProcessWorker

from deployments import POOL

POLL_S = 0.5

app = App(help=__doc__)


class DrainingWorker(ProcessWorker, ABC):
    """A process worker that can be told to take no more runs.

    `ABC`, which Prefect registers no worker type for: of type "process" there is one already, and this is it.
    """

    def __init__(self, *, work_pool_name: str, name: str, limit: int, work_queues: list[str]) -> None:
        super().__init__(
            work_pool_name=work_pool_name,
            name=name,
            limit=limit,
            work_queues=work_queues,
            create_pool_if_not_found=False,
        )
        self.draining = False
        self._asking = anyio.Lock()

    async def get_and_submit_flow_runs(self) -> list[FlowRun]:
        """Ask for runs and start them, unless draining."""
        async with self._asking:
            return [] if self.draining else await super().get_and_submit_flow_runs()

    async def drain(self) -> None:
        """Take no more runs, and return when those taken are done."""
        self.draining = True
        async with self._asking:  # one last question may be under way, and start what is answered
            pass
        while self.limiter.borrowed_tokens:  # noqa: ASYNC110 - Prefect tells nobody when a slot is free
            await anyio.sleep(POLL_S)


async def run(worker: DrainingWorker) -> None:
    """Run `worker` until SIGTERM and its last run's end; a second signal, or SIGINT, ends it with its runs."""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(_watch_signals, worker, tasks)
        await worker.start()


async def _watch_signals(worker: DrainingWorker, tasks: TaskGroup) -> None:
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for number in signals:
            if number == signal.SIGINT or worker.draining:
                print(f"Worker {worker.name!r} ends with its runs", flush=True)
                tasks.cancel_scope.cancel()
            else:
                print(f"Worker {worker.name!r} takes no more runs and waits for its own", flush=True)
                tasks.start_soon(_drain, worker, tasks)


async def _drain(worker: DrainingWorker, tasks: TaskGroup) -> None:
    await worker.drain()
    tasks.cancel_scope.cancel()


@app.default
def main(
    *,
    pool: str = POOL,
    name: Annotated[str, Parameter(help="As the UI shows it; each worker its own.")] = socket.gethostname(),
    limit: Annotated[int, Parameter(help="Runs at once: about 100 MB each.")] = 2,
    queue: Annotated[list[str] | None, Parameter(help="Only from this work queue; may be given again.")] = None,
) -> None:
    """Take runs from a work pool until SIGTERM, then end with the last of them."""
    anyio.run(run, DrainingWorker(work_pool_name=pool, name=name, limit=limit, work_queues=queue or []))


if __name__ == "__main__":
    app()
