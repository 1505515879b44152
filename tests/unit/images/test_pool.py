import threading

import pytest

from tasks.images.pool import Pool
from tasks.process import Stopped


def test_a_stop_that_comes_first_has_nothing_done() -> None:
    stop, done = threading.Event(), list[int]()
    stop.set()
    with pytest.raises(Stopped):
        Pool[int](stop=stop).run([1, 2, 3], [done.append])
    assert done == []


def test_a_stop_that_comes_with_the_last_item_is_no_success() -> None:
    """However fast the workers are: whoever set it relies on it."""
    for _ in range(50):
        stop = threading.Event()
        with pytest.raises(Stopped):
            Pool[int](stop=stop).run([1], [lambda _, stop=stop: stop.set()])


def test_meanwhile_runs_when_woken_and_its_error_ends_the_workers() -> None:
    pool, began = Pool[int](), threading.Event()

    def work(_: int) -> None:
        began.set()
        pool.wake()
        assert pool.ended.wait(10)

    def meanwhile() -> None:
        if began.is_set():
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        pool.run([1, 2], [work, work], meanwhile=meanwhile)
