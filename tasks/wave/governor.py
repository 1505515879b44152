"""How many disks an ESXi host is given: halved where it runs short, one more after a quiet while."""

from __future__ import annotations

from dataclasses import dataclass, field

QUIET_S = 60.0
RISEN = 2.0  # times the best seconds per byte seen of it
MEMORY = 8  # latencies whose best counts


@dataclass
class Governor:
    """Additive up, halved down, by what a host shows: NFC memory errors, or bytes that take longer and longer.

    ceiling: disks at once at most; an operator's change of it is taken over. Times are seconds of any one clock.
    """

    ceiling: int
    limit: int = 0
    _changed_at: float = 0.0
    _seen: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.limit = self.limit or self.ceiling

    def raised_to(self, ceiling: int) -> None:
        """Take over another ceiling; the limit goes with it, up or down."""
        self.ceiling = self.limit = ceiling

    def short_of_memory(self, now: float) -> int:
        """The host had no memory for one more NFC session: return the limit from now on."""
        return self._halved(now)

    def took(self, seconds_per_byte: float, now: float) -> int:
        """A transfer ended that took so long: return the limit from now on."""
        best = min(self._seen, default=seconds_per_byte)
        self._seen = [*self._seen, seconds_per_byte][-MEMORY:]
        if seconds_per_byte > RISEN * best:
            return self._halved(now)
        return self.quiet(now)

    def quiet(self, now: float) -> int:
        """Nothing bad was heard until `now`: return the limit from now on, one more after a while of that."""
        if self.limit < self.ceiling and now - self._changed_at >= QUIET_S:
            self.limit, self._changed_at = self.limit + 1, now
        return self.limit

    def _halved(self, now: float) -> int:
        self.limit, self._changed_at = max(1, self.limit // 2), now
        return self.limit
