"""One rate for many threads, told by a clock that the test moves."""

from concurrent.futures import ThreadPoolExecutor

from hypothesis import given
from hypothesis import strategies as st

from tasks.rate import RATE, Rate, limited_to

MIB = 1024 * 1024


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@given(st.lists(st.tuples(st.integers(1, 8 * MIB), st.floats(0, 3)), min_size=1, max_size=50))
def test_who_waits_as_told_never_gets_more_than_the_rate(steps: list[tuple[int, float]]) -> None:
    clock = Clock()
    rate, started, taken = Rate(MIB, clock=clock), clock.now, 0
    for count, idle_s in steps:
        delay = rate.delay(count)
        taken += count
        assert delay >= 0
        clock.now += delay
        assert taken <= (clock.now - started) * MIB * 1.000001
        clock.now += idle_s


def test_an_idle_time_is_not_saved_up() -> None:
    clock = Clock()
    rate = Rate(MIB, clock=clock)
    clock.now += 1000
    assert rate.delay(2 * MIB) == 2.0


def test_threads_share_it() -> None:
    rate = Rate(MIB, clock=Clock())
    with ThreadPoolExecutor(8) as pool:
        delays = sorted(pool.map(lambda _: rate.delay(MIB), range(40)))
    assert delays == [float(number) for number in range(1, 41)]


def test_a_block_has_its_own_and_gives_it_back() -> None:
    with limited_to(MIB):
        outer = RATE.get()
        with limited_to(None):
            assert RATE.get() is None
        assert RATE.get() is outer
    assert RATE.get() is None
