"""Time comes in through an argument, so that a test or a replay can own it."""

from __future__ import annotations

import time


class SystemClock:
    """Seconds of the running machine: `now` never goes back, `wall` is Unix time."""

    def now(self) -> float:
        return time.monotonic()

    def wall(self) -> float:
        return time.time()


class ManualClock:
    """A clock that stands still until told to move."""

    def __init__(self, start_s: float = 0.0, wall_s: float = 1_700_000_000.0) -> None:
        self._now = start_s
        self._offset = wall_s - start_s

    def now(self) -> float:
        return self._now

    def wall(self) -> float:
        return self._now + self._offset

    def advance(self, seconds: float) -> None:
        if seconds < 0:
            raise ValueError("time does not go back")
        self._now += seconds
