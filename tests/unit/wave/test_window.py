"""Windows become moments by a clock that is given."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from pydantic import ValidationError

from tasks.wave.models import Window
from tasks.wave.window import hours_of


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


@pytest.mark.parametrize(
    ("now", "start", "stop"),
    [
        ("2026-11-28T12:00", "2026-11-28T22:00", "2026-11-29T06:00"),  # tonight
        ("2026-11-28T23:30", "2026-11-28T23:30", "2026-11-29T06:00"),  # it is open
        ("2026-11-29T05:59", "2026-11-29T05:59", "2026-11-29T06:00"),
        ("2026-11-29T06:01", "2026-11-29T22:00", "2026-11-30T06:00"),  # it has closed: the next night
    ],
)
def test_a_night_is_the_next_one_or_the_one_that_is(now: str, start: str, stop: str) -> None:
    hours = hours_of(Window(start="22:00", stop="06:00"), at(now))
    assert (hours.start, hours.stop) == (at(start), at(stop))


def test_times_are_of_the_zone_that_is_named() -> None:
    hours = hours_of(Window(stop="06:00", timezone="Europe/Berlin"), at("2026-07-01T00:00"))
    assert hours.stop == at("2026-07-01T04:00")
    assert not hours.closed(at("2026-07-01T03:59")) and hours.closed(at("2026-07-01T04:00"))


def test_no_window_is_always_open() -> None:
    hours = hours_of(Window(), at("2026-07-01T00:00"))
    assert hours.opens_in(at("2026-07-01T00:00")) == 0 and not hours.closed(at("2099-01-01T00:00"))


def test_what_cannot_be_read_or_be_is_refused() -> None:
    for field, text in (("start", "ten"), ("stop", "25:00"), ("timezone", "Mars/Olympus")):
        with pytest.raises(ValidationError, match=text):
            Window(**{field: text})
    with pytest.raises(ValueError, match="not after"):
        hours_of(Window(start="2026-07-02T00:00", stop="2026-07-01T00:00"), at("2026-06-01T00:00"))
