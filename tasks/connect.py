"""Step: log in, once a run, and log out at its end."""

from __future__ import annotations

from collections.abc import AsyncIterator, Hashable
from contextlib import asynccontextmanager

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from blocks import VCenter
from tasks.models import VCenterInfo
from tasks.steps import connection_of, in_thread, to_the_end
from tasks.vsphere import session


@asynccontextmanager
async def connected(vcenter: VCenter) -> AsyncIterator[VCenterInfo]:
    """Hold one session with a vCenter for the block; every step in it borrows that one.

    Raises AuthenticationFailed (after one attempt), CertificateUntrusted, ThumbprintMismatch, ConnectionFailed.
    """
    borrower = object()
    try:
        yield await connect(vcenter, borrower)
    finally:
        await to_the_end(in_thread(session.release, None, connection_of(vcenter), borrower))


@task(name="connect", task_run_name="connect {vcenter.host}", cache_policy=NO_CACHE)
async def connect(vcenter: VCenter, borrower: Hashable) -> VCenterInfo:
    """Log in (or borrow the process's session) for `borrower`; say which server answered."""
    log = get_run_logger()
    if not vcenter.verify and not vcenter.thumbprint:
        log.warning("certificate not verified host=%s: the operator turned it off", vcenter.host)
    info = (await in_thread(session.hold, None, connection_of(vcenter), borrower)).info
    log.info("connected host=%s server=%r uuid=%s", vcenter.host, info.name, info.uuid)
    return info
