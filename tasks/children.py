"""The runs of a wave's VMs under Prefect: created once each, watched by one query, cancelled with the wave."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Container, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol
from uuid import UUID

import httpx
from prefect import Flow, State
from prefect.blocks.core import Block
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId, FlowRunFilterTags
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.deployments.flow_runs import arun_deployment
from prefect.exceptions import ObjectNotFound
from prefect.logging import get_run_logger
from prefect.logging.loggers import flow_run_logger
from prefect.states import Cancelled, Cancelling

from blocks import VCenter
from tasks import limits
from tasks.errors import Hyper2KvmError, InvalidInput
from tasks.images.job import lock_holder
from tasks.models import Value
from tasks.saved import BLOCKS, saved_block
from tasks.steps import quietly
from tasks.text import one_line
from tasks.wave.course import Attempt, Ending
from tasks.wave.jobs import BESIDE, JOBS, deployment_of
from tasks.wave.plan import Plan, Planned

TAG = "hyper2kvm-wave"
PAGE = 200
ENDINGS: Mapping[StateType, Ending] = {
    StateType.COMPLETED: "done",
    StateType.FAILED: "failed",
    StateType.CRASHED: "failed",
    StateType.CANCELLED: "skipped",
}


class Watched(Value):
    """A run as it is now. seconds: that it has run so far."""

    run_id: str
    ending: Ending | None = None
    crashed: bool = False
    message: str = ""
    seconds: float = 0.0


class Runner(Protocol):
    """What starts the runs of VMs and says what has become of them."""

    async def known(self) -> list[Attempt]:
        """Return the attempts of this wave's life before."""

    async def start(self, vm: Planned, number: int) -> str:
        """Start the attempt of that number; return its run's id. Called again for the same, it starts nothing twice."""

    async def watch(self, run_ids: Iterable[str]) -> list[Watched]:
        """Return the runs as they are now."""

    async def held_back(self) -> str:
        """Return by what somebody holds back what would be started now, or ""."""

    async def close(self) -> None:
        """End what runs, where it cannot outlive us."""


def tag_of(wave_run_id: str) -> str:
    """Return the tag that all runs of a wave's run have."""
    return f"wave:{wave_run_id}"


class OnWorkers:
    """Runs of deployments, on whichever workers take them."""

    def __init__(self, plan: Plan, wave_run_id: str, vcenter: VCenter, blocks: Mapping[tuple[str, str], Any]) -> None:
        """Keep what runs are made of; blocks: references to what VMs' options name, see `references`."""
        self._plan, self._run_id, self._vcenter, self._blocks = plan, wave_run_id, vcenter, blocks
        self._parameters: dict[str, frozenset[str]] = {}  # of modes

    async def known(self) -> list[Attempt]:
        runs = [run for run in await runs_tagged(tag_of(self._run_id)) if _tagged(run, "vm")]
        return [
            Attempt(
                key=_tagged(run, "vm"),
                number=int(_tagged(run, "attempt")),
                ending=None if _still_at_work(run, self._folders()) else ENDINGS.get(_type(run)),
                message=_message(run),
                run_id=str(run.id),
            )
            for run in runs
        ]

    async def start(self, vm: Planned, number: int) -> str:
        parameters: dict[str, Any] = {
            "vcenter": reference(self._vcenter),
            "options": vm.job().model_dump(mode="json", exclude_unset=True),
        }
        mode = vm.member.mode
        for option, (parameter, _) in BLOCKS.items():
            if (name := vm.member.options.get(option)) and parameter in await self._taken_by(mode):
                parameters[parameter] = self._blocks[option, str(name)]
        key = f"wave-{self._run_id}-{vm.key}-{number}"
        tags = [TAG, tag_of(self._run_id), f"vm:{vm.key}", f"attempt:{number}", f"folder:{vm.checked.output}"]
        try:
            run = await arun_deployment(
                deployment_of(mode), parameters=parameters, timeout=0, as_subflow=True, idempotency_key=key, tags=tags
            )
        except ObjectNotFound as error:
            raise no_deployment(deployment_of(mode)) from error
        return str(run.id)

    async def _taken_by(self, mode: str) -> frozenset[str]:
        """Return the parameters of a mode's deployment."""
        if mode not in self._parameters:
            async with get_client() as client:
                try:
                    found = await client.read_deployment_by_name(deployment_of(mode))
                except ObjectNotFound as error:
                    raise no_deployment(deployment_of(mode)) from error
            self._parameters[mode] = frozenset((found.parameter_openapi_schema or {}).get("properties", {}))
        return self._parameters[mode]

    async def watch(self, run_ids: Iterable[str]) -> list[Watched]:
        folders = self._folders()
        return [_watched(run, folders) for run in await runs_of(run_ids)]

    async def held_back(self) -> str:
        async with get_client() as client:
            for mode in sorted({vm.member.mode for vm in self._plan.go}):
                deployment = await client.read_deployment_by_name(deployment_of(mode))
                if deployment.paused:
                    return f"the deployment {deployment.name} is paused"
                if not deployment.work_queue_id:
                    continue
                queue = await client.read_work_queue(deployment.work_queue_id)
                if queue.is_paused:
                    return f"the work queue {queue.name} is paused"
        return ""

    async def close(self) -> None:
        return

    def _folders(self) -> dict[str, Path]:
        return {vm.key: Path(vm.checked.output) for vm in self._plan.vms}


class InThisProcess:
    """Runs in the wave's own process, side by side: for a wave from a command line. They end with it."""

    def __init__(self, flow_of: Callable[[Planned], Callable[[], Awaitable[Any]]]) -> None:
        self._flow_of = flow_of
        self._runs: dict[str, asyncio.Task[Any]] = {}
        self._seconds: dict[str, float] = {}  # of runs that ended

    async def known(self) -> list[Attempt]:
        return []

    async def start(self, vm: Planned, number: int) -> str:
        name = f"{vm.key}-{number}"
        self._runs[name] = asyncio.ensure_future(self._timed(name, self._flow_of(vm)))
        return name

    async def _timed(self, name: str, run: Callable[[], Awaitable[Any]]) -> None:
        began = time.monotonic()
        await run()
        self._seconds[name] = time.monotonic() - began

    async def watch(self, run_ids: Iterable[str]) -> list[Watched]:
        return [
            Watched(run_id=each, seconds=self._seconds.get(each, 0.0), **_ended(self._runs[each])) for each in run_ids
        ]

    async def held_back(self) -> str:
        return ""

    async def close(self) -> None:
        for run in self._runs.values():
            run.cancel()
        await asyncio.gather(*self._runs.values(), return_exceptions=True)


def _ended(run: asyncio.Task[Any]) -> dict[str, Any]:
    if not run.done():
        return {}
    if run.cancelled():
        return {"ending": "skipped"}
    error = run.exception()
    if error is None:
        return {"ending": "done"}
    words = f"{type(error).__name__}: {error}"
    return {"ending": "failed", "message": words.splitlines()[0]}


# ── asking Prefect ───────────────────────────────────────────────────────────────────────────────────


async def runs_of(run_ids: Iterable[str]) -> list[FlowRun]:
    """Return flow runs by id: one query a page of 200."""
    ids = [UUID(each) for each in run_ids]
    async with get_client() as client:
        found: list[FlowRun] = []
        for start in range(0, len(ids), PAGE):
            some = FlowRunFilter(id=FlowRunFilterId(any_=ids[start : start + PAGE]))
            found += await client.read_flow_runs(flow_run_filter=some, limit=PAGE)
        return found


async def runs_tagged(tag: str) -> list[FlowRun]:
    """Return every flow run that has a tag: one query a page of 200."""
    wanted = FlowRunFilter(tags=FlowRunFilterTags(all_=[tag]))
    async with get_client() as client:
        found: list[FlowRun] = []
        while True:
            page = await client.read_flow_runs(
                flow_run_filter=wanted, limit=PAGE, offset=len(found), sort=FlowRunSort.ID_DESC
            )
            found += page
            if len(page) < PAGE:
                return found


def _watched(run: FlowRun, folders: Mapping[str, Path]) -> Watched:
    working = _still_at_work(run, folders)
    return Watched(
        run_id=str(run.id),
        ending=None if working else ENDINGS.get(_type(run)),
        crashed=_type(run) is StateType.CRASHED,
        message=_message(run),
        seconds=run.estimated_run_time.total_seconds(),
    )


def _still_at_work(run: FlowRun, folders: Mapping[str, Path]) -> bool:
    """Whether a run that Prefect calls crashed is at work all the same: it holds its job's lock, of this very run.

    Prefect calls a run crashed that it has not heard of for a while; the lock ends with the process.
    """
    folder = folders.get(_tagged(run, "vm"))
    if _type(run) is not StateType.CRASHED or folder is None:
        return False
    return (lock_holder(folder) or {}).get("flow_run_id") == str(run.id)


def _type(run: FlowRun) -> StateType:
    return run.state.type if run.state else StateType.SCHEDULED


def _message(run: FlowRun) -> str:
    text = (run.state.message if run.state else "") or ""
    return text.removeprefix("Flow run encountered an exception: ").partition("\n")[0]


def _tagged(run: FlowRun, kind: str) -> str:
    return next((tag.removeprefix(f"{kind}:") for tag in run.tags if tag.startswith(f"{kind}:")), "")


async def references(vms: Iterable[Planned]) -> dict[tuple[str, str], dict[str, Any]]:
    """Return references to the saved blocks that VMs' options name, by option and name. Raises InvalidInput."""
    named = {
        (option, str(vm.member.options[option])) for vm in vms for option in BLOCKS if vm.member.options.get(option)
    }
    return {(option, name): reference(await saved_block(option, name)) for option, name in sorted(named)}


def refuse_unheard(vms: Iterable[Planned], *, known: Container[str]) -> None:
    """Raise InvalidInput for an option that says what a road needs and that runs here would not hear of."""
    for vm in vms:
        own = JOBS[vm.member.mode].model_fields
        for option in vm.member.options.keys() & set(BESIDE) - own.keys():
            if option not in known:
                why = "the runs of this wave do not take it"
                heard = ", ".join(each for each in BESIDE if each in known)
                raise InvalidInput(what=f"option {option} of {vm.checked.path}", why=why, remedy=f"Use {heard}")


def refusal(error: Exception) -> str:
    """Return in which words Prefect refused what was asked, as it will again; "" where it may be asked again."""
    if not isinstance(error, httpx.HTTPStatusError):
        return ""
    status = error.response.status_code
    if status >= 500 or status in (408, 429):
        return ""
    return one_line(f"Prefect refused its run ({status}): {error.response.text[:500]}")


def reference(block: Block) -> dict[str, Any]:
    """Return a saved block as a parameter of a run: by reference, so that its secrets stay where they are.

    Raises InvalidInput for one that is not saved.
    """
    document = block._block_document_id
    if document is None:
        raise InvalidInput(
            what="vCenter",
            why="a wave's runs on workers log in by a saved block, and this one is not saved",
            remedy="Save it as a block of type vCenter, and choose that",
        )
    return {"$ref": {"block_document_id": str(document)}}


def no_deployment(name: str) -> Hyper2KvmError:
    """Return what it means that there is no deployment of that name."""
    return InvalidInput(what=f"deployment {name}", why="there is none", remedy="Deploy it (make up, or make deploy)")


async def cancel_all(flow: Flow[Any, Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Hook of a wave that was cancelled: cancel its runs, those under way and those that have not begun.

    May run in another process than the wave did.
    """
    log = flow_run_logger(flow_run, flow)
    for run in await runs_tagged(tag_of(str(flow_run.id))):
        kind = _type(run)
        if run.state is None or kind in ENDINGS or kind is StateType.CANCELLING:
            continue
        begun = kind in (StateType.RUNNING, StateType.PENDING)
        message = f"Its wave {flow_run.name} was cancelled."
        new: State[Any] = Cancelling(message=message) if begun else Cancelled(message=message)
        async with get_client() as client:
            await client.set_flow_run_state(run.id, new, force=not begun)
        log.info("cancelled with its wave flow_run=%s name=%r", run.id, run.name)
    async with get_client() as client:
        name = (await client.read_flow_run(flow_run.id)).name  # as it is now: a wave of a file has taken its name since
    await quietly(limits.remove(limits.wave_limit_name(name.removeprefix("wave "))))


async def ended_before(flow_run_id: str) -> int:
    """Return how often a run has ended as failed before: each Retry of that gives what failed another attempt."""
    async with get_client() as client:
        states = await client.read_flow_run_states(UUID(flow_run_id))
    return sum(each.type is StateType.FAILED for each in states)


async def say_state(run_id: str) -> Watched | None:
    """Return one run as it is now; None while Prefect does not answer."""
    found = await quietly(runs_of([run_id]))
    return _watched(found[0], {}) if found else None


def log_started(vm: Planned, run_id: str, number: int) -> None:
    get_run_logger().info("started vm=%r flow_run=%s attempt=%d", vm.checked.path, run_id, number)
