"""Running a flow with or without a Prefect server: the one that PREFECT_API_URL names, else a temporary one of ours.

Starting a temporary one is the slow part of a short run, so it is said what is waited for.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import httpx
from prefect.settings import PREFECT_API_URL, temporary_settings

from tasks.errors import PrefectUnreachable
from tasks.models import ExportOptions, JobOptions, RoutedJob, VddkJob

if TYPE_CHECKING:
    from blocks import VCenter

START_TIMEOUT_S = 90  # Prefect's own default of 20 s is too short for a first run, which migrates the database
ANSWER_TIMEOUT_S = 10.0

T = TypeVar("T")


def flow_of(options: ExportOptions, vcenter: VCenter) -> Callable[[], Awaitable[Any]]:
    """Return the flow of the mode that the options name, ready to be called. Raises NotBuilt, InvalidInput."""
    return flow_for(options.export_mode, vcenter, options.job(), options)


def flow_for(mode: str, vcenter: VCenter, job: JobOptions, options: ExportOptions) -> Callable[[], Awaitable[Any]]:
    """Return the flow of a mode, ready to be called. options: say what roads need beside the mode's own options."""
    from blocks import VddkToolkit
    from flows.cbt_sync import cbt_sync
    from flows.download_only import download_only
    from flows.export import export_vm
    from flows.means import road_blocks, saved_blocks
    from flows.vddk_download import vddk_download
    from flows.warm_migration import warm_migration

    if isinstance(job, VddkJob):
        toolkit = VddkToolkit(libdir=options.vddk_libdir)
        return partial(vddk_download, vcenter=vcenter, toolkit=toolkit, options=job)
    flows: dict[str, Callable[..., Awaitable[Any]]] = {
        "export": export_vm,
        "download_only": download_only,
        "cbt_sync": cbt_sync,
        "warm_migration": warm_migration,
    }
    flow = partial(flows[mode], vcenter=vcenter, options=job)
    if not isinstance(job, RoutedJob):
        return flow
    given = road_blocks(options)

    async def by_a_road() -> Any:
        return await flow(**(given | await saved_blocks(options)))

    return by_a_road


async def run_flow(flow: Callable[..., Awaitable[T]], *, say: Callable[[str], None], **parameters: Any) -> T:
    """Run a flow to its end and return its result; raise what it raises. `say` is told what is waited for.

    Raises PrefectUnreachable where the server is not there, or not there any more.
    """
    with prefect_api(say):
        try:
            return await flow(**parameters)
        except httpx.TransportError as error:
            raise PrefectUnreachable(url=PREFECT_API_URL.value(), why=str(error) or type(error).__name__) from error


@contextlib.contextmanager
def prefect_api(say: Callable[[str], None]) -> Iterator[None]:
    """Have a Prefect API for the block; the temporary one ends with this process, however that ends."""
    if url := PREFECT_API_URL.value():
        _check_answers(url)
        yield
        return
    from flows.own_server import OwnServer  # all of Prefect's server: two seconds of CPU, for nothing else

    say(f"Starting a temporary Prefect server (up to {START_TIMEOUT_S} s; set PREFECT_API_URL to use a running one)")
    logging.getLogger("prefect.server.api.server").setLevel(logging.WARNING)
    server = OwnServer()
    server.start(timeout=START_TIMEOUT_S)
    with temporary_settings({PREFECT_API_URL: server.api_url}):
        yield


def _check_answers(url: str) -> None:
    try:
        httpx.get(f"{url.rstrip('/')}/health", timeout=ANSWER_TIMEOUT_S).raise_for_status()
    except httpx.HTTPError as error:
        raise PrefectUnreachable(url=url, why=str(error) or type(error).__name__) from error
