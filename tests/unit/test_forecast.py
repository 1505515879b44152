"""`tasks.forecast`: intervals that hold, and are not so wide that they say nothing."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.forecast import (
    GUESSED_SHUTDOWN,
    HARD_POWER_OFF,
    ROUNDS_NEEDED,
    ROUNDS_SEEN,
    Known,
    forecast,
    measured,
    plus,
    shutdown_of,
    transfer_of,
    written,
)
from tasks.models import Estimate, Round

MB = 1e6
READ_BYTES_PER_S = 50 * MB
BURST_S = 1.0
MOST_BYTES_PER_S = 20 * MB


class Guest:
    """A guest that writes in bursts, and what rounds of it take: fixed parts that vary by a tenth, and the fetching."""

    def __init__(self, seed: int, most: float = MOST_BYTES_PER_S) -> None:
        self.chance, self.most = random.Random(seed), most

    def writes(self, seconds: float) -> int:
        total = 0.0
        while seconds > 0:
            total += self.chance.uniform(0, self.most) * min(seconds, BURST_S)
            seconds -= BURST_S
        return int(total)

    def about(self, seconds: float) -> float:
        return seconds * self.chance.uniform(0.9, 1.1)

    def fetch(self, count: int) -> float:
        return self.about(count / READ_BYTES_PER_S) + self.about(0.1)

    def rounds(self, number: int, *, first_window_s: float = 30.0) -> list[Round]:
        window_s, found = first_window_s, []
        for n in range(1, number + 1):
            changed = self.writes(window_s)
            transfer_s, sample_s, overhead_s, gone_s = self.fetch(changed), *map(self.about, (0.4, 0.2, 3.0))
            found.append(
                Round(
                    number=n,
                    taken="2026-01-01T00:00:00+00:00",
                    window_s=window_s,
                    changed_bytes=changed,
                    snapshot_s=self.about(0.3),
                    transfer_s=transfer_s,
                    overhead_s=overhead_s,
                    sample_s=sample_s,
                    consolidation_s=gone_s,
                )
            )
            window_s = transfer_s + sample_s + overhead_s + gone_s + 1.0
        return found

    def cutover(self, since_snapshot_s: float, shutdown_s: float) -> float:
        shutdown_s = self.about(shutdown_s)
        pending = self.writes(since_snapshot_s + shutdown_s)
        return shutdown_s + self.about(0.3) + self.about(0.2) + self.fetch(pending) + self.about(0.4) + self.about(0.2)


def known(shutdown_s: float = 4.0) -> Known:
    return Known(shutdown_s=measured([shutdown_s * 0.93, shutdown_s * 1.05, shutdown_s]), preparing_s=measured([0.2]))


def of(rounds: list[Round], *, budget_s: float = 60.0, knows: Known | None = None):
    since_s = rounds[-1].transfer_s + rounds[-1].overhead_s + rounds[-1].sample_s + rounds[-1].consolidation_s
    return forecast(rounds, since_snapshot_s=since_s, known=knows or known(), budget_s=budget_s, pause_s=1.0), since_s


def test_the_real_downtime_is_in_the_interval_and_that_is_no_wider_than_twice():
    inside = narrow = 0
    runs = 400
    for seed in range(runs):
        guest = Guest(seed)
        said, since_s = of(guest.rounds(6))
        inside += said.downtime_s.low <= guest.cutover(since_s, 4.0) <= said.downtime_s.high
        narrow += said.downtime_s.high <= 2 * said.downtime_s.low
    assert inside >= 0.9 * runs, inside
    assert narrow >= 0.9 * runs, narrow


def test_a_guest_that_writes_evenly_is_told_more_closely_than_one_that_writes_in_bursts():
    bursts = Guest(1).rounds(6)
    even = [each.model_copy(update={"changed_bytes": int(10 * MB * each.window_s)}) for each in bursts]
    assert written(even, window_s=8.0).off < written(bursts, window_s=8.0).off
    assert written(even, window_s=8.0).expected == pytest.approx(80 * MB, rel=0.01)


def test_it_is_too_early_until_enough_rounds_were_seen_then_it_fits_or_does_not():
    rounds = Guest(2).rounds(ROUNDS_NEEDED)
    for number in range(1, ROUNDS_NEEDED):
        assert of(rounds[:number])[0].verdict == "too early"
    said, _ = of(rounds)
    assert (said.verdict, said.downtime_s.high <= 60) == ("fits", True)
    assert of(rounds, budget_s=said.downtime_s.high - 0.1)[0].verdict == "does not fit"


@pytest.mark.parametrize(
    ("most", "budget_s", "why"),
    [(200 * MB, 60.0, "are read"), (0.0, 2.0, "without a byte fetched"), (80 * MB, 9.0, "it stays above")],
)
def test_what_will_not_converge_is_said_as_soon_as_the_numbers_say_so(most, budget_s, why):
    rounds = Guest(3, most).rounds(6, first_window_s=10.0)
    verdicts = [of(rounds[:number], budget_s=budget_s)[0].verdict for number in range(1, 7)]
    at = 1 + verdicts.index("will not converge")
    assert 2 <= at <= ROUNDS_NEEDED
    assert why in of(rounds[:at], budget_s=budget_s)[0].why


def test_a_guest_that_would_fit_is_never_said_not_to_converge():
    for seed in range(100):
        rounds = Guest(seed).rounds(6)
        for number in range(2, 7):
            assert of(rounds[:number], budget_s=20.0)[0].verdict != "will not converge"


def test_how_long_a_shutdown_takes_is_what_was_said_else_what_was_seen_else_a_guess():
    assert shutdown_of([4.0, 5.0], expected_s=10, hard=False) == (Estimate(expected=10, off=3.0), False)
    seen, guessed = shutdown_of([4.0, 5.0, 4.5], expected_s=0, hard=False)
    assert (seen.expected, guessed) == (4.5, False)
    assert shutdown_of([], expected_s=0, hard=False) == (GUESSED_SHUTDOWN, True)
    assert shutdown_of([40.0], expected_s=0, hard=True) == (HARD_POWER_OFF, True)


def test_an_interval_too_wide_to_rest_on_is_narrowed_by_more_rounds_but_not_for_ever():
    wild = [
        each.model_copy(update={"changed_bytes": int(each.changed_bytes * (0.1 if each.number % 2 else 2))})
        for each in Guest(6).rounds(ROUNDS_SEEN)
    ]
    verdicts = [of(wild[:number])[0].verdict for number in range(ROUNDS_NEEDED, ROUNDS_SEEN + 1)]
    assert set(verdicts[:-1]) == {"too early"} and verdicts[-1] == "fits"


def test_what_is_only_guessed_is_said_and_not_waited_for():
    knows = Known(shutdown_s=GUESSED_SHUTDOWN, preparing_s=measured([0.2]), guessed=("shutdown",))
    said, _ = of(Guest(4).rounds(6), knows=knows)
    assert (said.guessed, said.verdict) == (("shutdown",), "does not fit")
    assert said.downtime_s.high > 2 * said.downtime_s.low


def test_fetching_has_a_part_that_does_not_depend_on_how_much():
    guest = Guest(5)
    rounds = guest.rounds(4)
    few = [each.model_copy(update={"changed_bytes": each.changed_bytes // (1 << n)}) for n, each in enumerate(rounds)]
    timed = [each.model_copy(update={"transfer_s": 2.0 + each.changed_bytes / READ_BYTES_PER_S}) for each in few]
    transfer = transfer_of(timed)
    assert transfer(Estimate(expected=0)).expected == pytest.approx(2.0, rel=0.01)
    assert transfer(Estimate(expected=100 * MB)).expected == pytest.approx(4.0, rel=0.01)


estimates = st.builds(Estimate, expected=st.floats(0, 1e6), off=st.floats(0, 1e6))


@given(st.lists(estimates, max_size=6))
def test_a_sum_is_between_its_surest_part_and_all_of_them_at_their_worst(parts):
    total = plus(*parts)
    assert total.off <= sum(each.off for each in parts) + 1e-6
    assert total.off >= max((each.off for each in parts), default=0) - 1e-6
    assert total.low >= 0


@given(st.lists(st.floats(0.01, 1e5), min_size=1, max_size=12))
def test_the_next_measurement_is_expected_among_the_last_ones(samples):
    said = measured(samples)
    assert min(samples) - 1e-6 <= said.expected <= max(samples) + 1e-6
    assert said.off > 0


@given(st.integers(0, 1 << 40), st.floats(0.001, 1e5), st.integers(1, 12))
def test_no_round_whatever_it_took_makes_a_forecast_fail(changed, seconds, number):
    each = Round(
        number=1, taken="", window_s=seconds, changed_bytes=changed, snapshot_s=seconds, transfer_s=seconds,
        overhead_s=0.0, sample_s=0.0, consolidation_s=seconds,
    )  # fmt: skip
    said, _ = of([each] * number)
    assert 0 <= said.downtime_s.low <= said.downtime_s.high
