"""Global concurrency limits, created by name: ceilings that operators see and change in the UI."""

from __future__ import annotations

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.exceptions import ObjectNotFound


def ensure(name: str, slots: int, *, client: SyncPrefectClient) -> None:
    """Create a limit of `slots` unless it is there: an operator may have changed it, and his value stays."""
    try:
        client.read_global_concurrency_limit_by_name(name)
    except ObjectNotFound:
        client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=slots, active=True))
