"""When a wave stops for its failures, and what is tried again."""

from __future__ import annotations

from tasks.wave.models import FailurePolicy

ENOUGH = 10  # VMs that must have ended before a share of them says anything


def stops(policy: FailurePolicy, *, failed: int, ended: int, canary_failed: bool = False) -> str:
    """Return why nothing more is to be started, or "". `ended` counts those that failed too."""
    if canary_failed:
        return "a canary failed"
    if policy.stop_after and failed >= policy.stop_after:
        return f"{failed} VMs failed, and {policy.stop_after} are the limit"
    if policy.stop_share and ended >= ENOUGH and failed / ended >= policy.stop_share:
        return f"{failed} of {ended} VMs failed, and a share of {policy.stop_share:g} is the limit"
    return ""
