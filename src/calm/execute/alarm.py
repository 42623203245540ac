"""Wakes the machine when a waiter's deadline passes or when it has waited long enough to claim its turn."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from calm.execute.events import Cancel, Event, Release, Want

SHORTEST_S = 0.001


class Alarm:
    """One timer, set anew only by events that can bring its moment forward: finding it is O(waiters)."""

    def __init__(
        self, next_s: Callable[[float], float | None], ring: Callable[[], None], bypass_s: float
    ) -> None:
        self._next_s = next_s
        self._ring = ring
        self._bypass_s = bypass_s
        self._timer: asyncio.TimerHandle | None = None
        self._at_s: float | None = None
        """When it rings; infinity: only an event can change anything; None: not known."""

    def after(self, event: Event, anyone_waits: bool) -> None:
        """Set the timer for what may happen next now that `event` happened."""
        if not anyone_waits:
            self.stop()
        elif self._at_s is None or self._earlier(event):
            self._set(event.at_s)

    def stop(self) -> None:
        self._at_s = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _earlier(self, event: Event) -> bool:
        if isinstance(event, Release | Cancel):
            return False
        if not isinstance(event, Want) or self._at_s is None:
            return True
        own_s = event.at_s + self._bypass_s
        if event.deadline_at_s is not None:
            own_s = min(own_s, event.deadline_at_s)
        return own_s < self._at_s

    def _set(self, now_s: float) -> None:
        self.stop()
        next_s = self._next_s(now_s)
        self._at_s = float("inf") if next_s is None else next_s
        if next_s is not None:
            delay_s = max(next_s - now_s, SHORTEST_S)
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._rung)

    def _rung(self) -> None:
        self.stop()
        self._ring()
