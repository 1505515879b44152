"""How long a VM would be down if its cutover began now: an interval, from what its rounds took.

Nothing is measured here. Between the last round's snapshot and the source's being off the guest writes on; that is
fetched while it is off:

    downtime = shutdown + snapshot + overhead + transfer(bytes written since the last snapshot) + sample + preparing

Each part is an estimate with how far it may be off (`Estimate`), and independent ones add up as the root of the sum of
their squares.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import reduce
from math import hypot, sqrt

from tasks.models import Estimate, Forecast, Round, Value

ROUNDS_SEEN = 12  # the last ones, of which a guest's habits are learned
ROUNDS_NEEDED = 4  # before a forecast is believed
WIDEST = (
    2.0  # an interval whose upper end is more than so many times its lower is narrowed by more rounds, if it can be
)
ALIKE = 4.0  # rounds whose window is longer or shorter than the one forecast by more than this tell little of it
ONCE = 0.3  # of what was measured once only: how far the next may be off, as a share of it
LEAST = 0.08  # no estimate is nearer than this share of it, nor than
LEAST_S = 0.1
# Student's t, two-sided 90 %, by degrees of freedom from 1; for 1, where it is 6.3, three times what is seen, no more.
# Of the sum of parts it holds more often, since what they differ by evens out: 98 % of simulated cutovers.
_T = (3.0, 2.92, 2.35, 2.13, 2.02, 1.94, 1.90, 1.86, 1.83, 1.81, 1.80)

GUESSED_SHUTDOWN = Estimate(expected=45.0, off=40.0)
HARD_POWER_OFF = Estimate(expected=3.0, off=2.0)
ASIDE_S = Estimate(expected=0.5, off=0.4)  # a task of vSphere's that changes a name or a device
DEFINE_S = Estimate(expected=0.3, off=0.3)

NOTHING = Estimate(expected=0.0)


class Known(Value):
    """What a forecast knows beside the rounds. `shutdowns_s`: of the past, of the same guest."""

    shutdown_s: Estimate
    preparing_s: Estimate
    aside_s: Estimate = NOTHING
    guessed: tuple[str, ...] = ()


def plus(*estimates: Estimate) -> Estimate:
    """Return the sum of independent estimates."""
    total = sum(each.expected for each in estimates)
    return Estimate(expected=total, off=reduce(hypot, (each.off for each in estimates), 0.0))


def measured(samples: Sequence[float]) -> Estimate:
    """Return what the next of a few measurements of seconds will be."""
    mean = statistics.fmean(samples)
    if len(samples) == 1:
        return Estimate(expected=mean, off=max(ONCE * mean, LEAST_S))
    off = _t(len(samples) - 1) * statistics.stdev(samples) * sqrt(1 + 1 / len(samples))
    return Estimate(expected=mean, off=max(off, LEAST * mean, LEAST_S))


def shutdown_of(seen_s: Sequence[float], *, expected_s: float, hard: bool) -> tuple[Estimate, bool]:
    """Return how long the source takes to go off, and whether that is but a guess. seen_s: how long it took before."""
    if hard:
        return HARD_POWER_OFF, True
    if expected_s:
        return Estimate(expected=expected_s, off=max(ONCE * expected_s, LEAST_S)), False
    return (measured(seen_s), False) if seen_s else (GUESSED_SHUTDOWN, True)


def forecast(
    rounds: Sequence[Round], *, since_snapshot_s: float, known: Known, budget_s: float, pause_s: float
) -> Forecast:
    """Return the downtime of a cutover that begins now, `since_snapshot_s` after the last round's snapshot was taken.

    rounds: at least one. pause_s: between rounds, for whether more of them would help.
    """
    last = rounds[-ROUNDS_SEEN:]
    window_s = since_snapshot_s + known.shutdown_s.expected
    pending = written(last, window_s=window_s, off_s=known.shutdown_s.off)
    transfer = transfer_of(last)
    parts = {
        "shutdown": known.shutdown_s,
        "snapshot": measured([each.snapshot_s for each in last]),
        "sync": measured([each.overhead_s for each in last]),
        "transfer": transfer(pending),
        "sample": measured([each.sample_s for each in last]),
        "preparing": known.preparing_s,
        "aside": known.aside_s,
    }
    downtime = plus(*parts.values())
    said = {"downtime_s": downtime, "pending_bytes": pending, "parts": parts, "guessed": known.guessed}
    seen = _whole(rounds)
    if len(seen) >= 2 and (why := never_within(_whole(last), known=known, budget_s=budget_s, pause_s=pause_s)):
        return Forecast(verdict="will not converge", why=why, **said)
    if len(seen) < ROUNDS_NEEDED:
        return Forecast(verdict="too early", why=f"of {ROUNDS_NEEDED} rounds {len(seen)} were seen", **said)
    narrower = len(seen) < ROUNDS_SEEN and not known.guessed
    if narrower and downtime.high > WIDEST * downtime.low:
        why = f"{downtime.low:.1f} to {downtime.high:.1f} s is too wide to rest on, and more rounds tell more"
        return Forecast(verdict="too early", why=why, **said)
    if downtime.high <= budget_s:
        return Forecast(verdict="fits", why=f"at most {downtime.high:.1f} s of {budget_s:.0f}", **said)
    return Forecast(verdict="does not fit", why=f"up to {downtime.high:.1f} s, and {budget_s:.0f} allowed", **said)


def written(rounds: Sequence[Round], *, window_s: float, off_s: float = 0.0) -> Estimate:
    """Return how many bytes the guest will have changed in `window_s`, which may be off by `off_s`.

    What it changed a second is a distribution: the more the rounds differ from one another, the less is known, and the
    shorter the window, the less its bursts even out.
    """
    whole = _whole(rounds) or rounds
    alike = [each for each in whole if window_s / ALIKE <= each.window_s <= window_s * ALIKE]
    seen = alike if len(alike) >= ROUNDS_NEEDED else whole
    rate, noise = _rate(seen)
    total_s = sum(each.window_s for each in seen)
    off = _t(len(seen) - 1) * noise * sqrt(window_s * (1 + window_s / total_s))
    expected = rate * window_s
    return Estimate(expected=expected, off=hypot(max(off, LEAST * expected), rate * off_s))


def _whole(rounds: Sequence[Round]) -> Sequence[Round]:
    return [each for each in rounds if each.whole]


def _rate(rounds: Sequence[Round]) -> tuple[float, float]:
    """Return the bytes a second, and by how many bytes a window of one second strays from that (standard deviation).

    Of rounds of unlike length: what strays in a window of W seconds is √W times that.
    """
    total_s = sum(each.window_s for each in rounds) or 1.0
    rate = sum(each.changed_bytes for each in rounds) / total_s
    if len(rounds) < 2:
        return rate, ONCE * rate * sqrt(total_s)
    strays = sum((each.changed_bytes - rate * each.window_s) ** 2 / max(each.window_s, 0.001) for each in rounds)
    return rate, sqrt(strays / (len(rounds) - 1))


def transfer_of(rounds: Sequence[Round]) -> Callable[[Estimate], Estimate]:
    """Return how long fetching takes, by how much is to be fetched: a line through what the rounds took."""
    sizes, took = [each.changed_bytes for each in rounds], [each.transfer_s for each in rounds]
    slope, start = _line(sizes, took)
    strays = [seconds - start - slope * size for size, seconds in zip(sizes, took, strict=True)]
    freedom = max(1, len(rounds) - 2)
    noise = _t(freedom) * sqrt(sum(each**2 for each in strays) / freedom * (1 + 1 / len(rounds)))

    def transfer(pending: Estimate) -> Estimate:
        expected = start + slope * pending.expected
        return Estimate(expected=expected, off=hypot(slope * pending.off, max(noise, LEAST * expected)))

    return transfer


def _line(sizes: Sequence[int], took: Sequence[float]) -> tuple[float, float]:
    """Return seconds a byte, and seconds for none: both at least 0."""
    if len(sizes) > 2 and max(sizes) > 2 * min(sizes):
        slope, start = statistics.linear_regression(sizes, took)
        if slope > 0 and start >= 0:
            return slope, start
    return sum(took) / max(1, sum(sizes)), 0.0


def never_within(rounds: Sequence[Round], *, known: Known, budget_s: float, pause_s: float) -> str:
    """Return why no number of rounds brings the downtime within its budget; "" where that cannot be said.

    Of all that is not certain the best is taken. A round's length is T = F + w·u·T: what is fixed, and the fetching (u
    seconds a byte) of what was written (w bytes a second) in as long.
    """
    rate, noise = _rate(rounds)
    total_s = sum(each.window_s for each in rounds)
    rate = max(0.0, rate - _t(len(rounds) - 1) * noise / sqrt(total_s or 1.0))
    per_byte, _ = _line([each.changed_bytes for each in rounds], [each.transfer_s for each in rounds])
    if (load := rate * per_byte) >= 1:
        return f"the guest changes at least {rate / 1e6:.1f} MB/s, and {1e-6 / per_byte:.1f} MB/s are read"
    after_snapshot = plus(
        *(measured([getattr(each, part) for each in rounds]) for part in ("overhead_s", "sample_s", "consolidation_s"))
    ).low
    snapshot_s = measured([each.snapshot_s for each in rounds]).low
    round_s = (pause_s + snapshot_s + after_snapshot) / (1 - load)
    window_s = after_snapshot + load * round_s + known.shutdown_s.low
    fixed = plus(known.shutdown_s, known.preparing_s, known.aside_s).low + snapshot_s
    best_s = fixed + rate * window_s * per_byte
    if best_s <= budget_s:
        return ""
    if fixed > budget_s:
        return f"{fixed:.1f} s at least go by without a byte fetched"
    return f"at {rate / 1e6:.1f} MB/s at least it stays above {best_s:.1f} s, however many rounds there are"


def _t(freedom: int) -> float:
    return _T[min(max(freedom, 1), len(_T)) - 1]
