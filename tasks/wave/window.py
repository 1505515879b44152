"""The hours in which a wave may start VMs. The time is a parameter: nothing here asks a clock."""

from __future__ import annotations

from datetime import datetime, time, timedelta, tzinfo
from typing import TYPE_CHECKING
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from tasks.models import Value

if TYPE_CHECKING:
    from tasks.wave.models import Window


class Hours(Value):
    """A window that has become moments: `start` and `stop` with their time zone, None for no such bound."""

    start: datetime | None = None
    stop: datetime | None = None

    def opens_in(self, now: datetime) -> float:
        """Return the seconds until VMs may be started; 0 where they may be, as far as the start goes."""
        return max(0.0, (self.start - now).total_seconds()) if self.start else 0.0

    def closed(self, now: datetime) -> bool:
        """Whether the hard stop has come."""
        return self.stop is not None and now >= self.stop


def zone(name: str) -> tzinfo:
    """Return a time zone by its IANA name. Raises ValueError."""
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise ValueError(f"there is no time zone {name!r}: give one such as Europe/Berlin") from error


def parse_moment(text: str) -> time | datetime:
    """Read a time of day (`22:00`) or a moment (`2026-11-28T22:00`, with an offset or not). Raises ValueError."""
    for read in (time.fromisoformat, datetime.fromisoformat):
        try:
            return read(text)
        except ValueError:
            continue
    raise ValueError(f"{text!r} is neither a time of day (22:00) nor a moment (2026-11-28T22:00)")


def hours_of(window: Window, now: datetime) -> Hours:
    """Return the moments that a window means for a wave that begins at `now` (with its time zone).

    A time of day is the next such: 22:00 of today, or tomorrow's if that has passed; a stop is the first after the
    start. One that is between both already, as at 23:00 of 22:00 to 06:00, starts at once.
    Raises ValueError where the stop is not after the start.
    """
    here = now.astimezone(zone(window.timezone))
    stop = _next(window.stop, here)
    start = _next(window.start, here)
    if start and stop and isinstance(parse_moment(window.start), time):
        if isinstance(parse_moment(window.stop), time) and stop < start:
            start = here  # the window that opened yesterday, or earlier today, is still open
    elif start and stop and isinstance(parse_moment(window.stop), time):
        stop = _next(window.stop, start)
    if start and stop and stop <= start:
        raise ValueError(f"the hard stop {stop.isoformat()} is not after the start {start.isoformat()}")
    return Hours(start=start, stop=stop)


def _next(text: str, after: datetime) -> datetime | None:
    """Return the moment that `text` means, in the zone of `after`; of a time of day the first one from `after` on."""
    if not text:
        return None
    moment = parse_moment(text)
    if isinstance(moment, datetime):
        return moment if moment.tzinfo else moment.replace(tzinfo=after.tzinfo)
    found = datetime.combine(after.date(), moment, tzinfo=after.tzinfo)
    return found if found >= after else datetime.combine(after.date() + timedelta(days=1), moment, tzinfo=after.tzinfo)
