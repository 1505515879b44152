"""When a cutover begins: as soon as it fits, at a time, or when a person says so. Told of each round, and asked."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Protocol

from prefect.logging import get_run_logger

from tasks import approval
from tasks.approval import CutoverRequest
from tasks.errors import CutoverRefused, WillNotConverge
from tasks.images.cutover import Campaign
from tasks.models import Forecast
from tasks.steps import quietly

ASK_EVERY_S = 2.0
MARGIN = 1.3  # times the last round's length: a round that must be over at a time begins so long before


class Until(Protocol):
    """What ends the rounds."""

    @property
    def link(self) -> str:
        """Where a person says that it is time; "" where nobody is asked."""

    @property
    def note(self) -> str:
        """Who said so, for the report; "" where nobody was asked."""

    async def is_time(self, forecast: Forecast, words: str) -> bool:
        """Tell, after a round, whether the cutover begins now. Raises WillNotConverge, CutoverRefused."""

    async def rest(self, pause_s: float) -> None:
        """Return when the next round is to begin."""


class Fitting:
    """As soon as the forecast fits the budget."""

    link = note = ""

    def __init__(self, vm: str, budget_s: float) -> None:
        self._vm, self._budget_s = vm, budget_s

    async def is_time(self, forecast: Forecast, words: str) -> bool:
        if forecast.verdict == "will not converge":
            raise WillNotConverge(vm=self._vm, budget_s=self._budget_s, why=forecast.why)
        return forecast.verdict == "fits"

    async def rest(self, pause_s: float) -> None:
        await asyncio.sleep(pause_s)


class AtTime:
    """At a time, the last round being over just before it."""

    link = note = ""

    def __init__(self, at: datetime) -> None:
        self._at, self._round_began = at, time.monotonic()

    async def is_time(self, forecast: Forecast, words: str) -> bool:
        left_s = self._left_s()
        if left_s > MARGIN * (time.monotonic() - self._round_began):
            return False
        await asyncio.sleep(max(0.0, left_s))
        return True

    async def rest(self, pause_s: float) -> None:
        before_last_s = self._left_s() - MARGIN * (time.monotonic() - self._round_began)
        await asyncio.sleep(max(0.0, min(pause_s, before_last_s)))
        self._round_began = time.monotonic()

    def _left_s(self) -> float:
        return (self._at - datetime.now(UTC)).total_seconds()


class Approved:
    """Once a person has said so; then there is one more round, for as little as possible to be left to fetch.

    campaign: whose approval it is. asked: called with the run that waits for the word, to be remembered.
    """

    def __init__(self, request: CutoverRequest, campaign: Campaign, asked: Callable[[str], Awaitable[None]]) -> None:
        self._request, self._key, self._asked = request, f"cutover-{campaign.id}", asked
        self._run = campaign.approval
        self._approved = False
        self.note = ""

    @property
    def link(self) -> str:
        return approval.link_to(self._run) if self._run else ""

    async def is_time(self, forecast: Forecast, words: str) -> bool:
        if self._approved:
            return True
        if not self._run:
            self._run = str((await approval.ask(self._request.model_copy(update={"words": words}), key=self._key)).id)
            await self._asked(self._run)
            get_run_logger().info("approval asked for flow_run=%s link=%s", self._run, self.link)
        await quietly(approval.remind(self._run, words))
        await quietly(self._look())
        return False  # once approved: after one more round

    async def rest(self, pause_s: float) -> None:
        ends = time.monotonic() + pause_s
        while not self._approved and (left_s := ends - time.monotonic()) > 0:
            await asyncio.sleep(min(ASK_EVERY_S, left_s))
            await quietly(self._look())

    async def _look(self) -> None:
        found = await approval.answer(self._run)
        if found is None:
            return
        if isinstance(found, str):
            raise CutoverRefused(vm=self._request.vm, why=found)
        if found.decision != "cut over":
            raise CutoverRefused(vm=self._request.vm, why=f"stopped in the form ({found.note or 'without a note'})")
        self._approved, self.note = True, f"approved in {self.link}: {found.note or 'without a note'}"
        get_run_logger().info("approved flow_run=%s note=%r", self._run, found.note)
