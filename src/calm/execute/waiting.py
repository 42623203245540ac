"""The one queue of all asks that wait, in the order they are to be served.

FIFO orders by arrival. STCF (shortest expected time first) orders by `aging * arrived_s + expected_s`:
an ask of 10 s is overtaken by asks of 1 s only while those came within 9 s / aging after it, so none starves;
and the order of two asks never changes while they wait, so lists stay sorted.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

import msgspec

from calm.execute.events import Discipline

Key = tuple[float, int]
HOPELESS_SHARE = 0.6
"""Expected times are means with a wide spread: at 1 half of those that would just make it were refused."""


class Waiter(msgspec.Struct, frozen=True):
    """One ask that waits. `key` orders: the smaller is served first."""

    key: Key
    ticket: int
    model: str
    request_id: str | None
    expected_s: float
    deadline_at_s: float | None
    arrived_s: float
    sends: bool
    """False for the operator's order to load: it waits for the engine but sends nothing."""
    wanted: str
    """The model asked for: `model`, whose engine it waits for, or an adapter of it."""

    def expired(self, at_s: float) -> bool:
        return self.deadline_at_s is not None and self.deadline_at_s <= at_s

    def hopeless(self, at_s: float) -> bool:
        """It has waited so long that less than a good half of its expected service would be done in time.

        Serving it would be waste that makes the next one late in its turn: under overload a queue that does
        so finishes almost nothing. One that has not waited is not judged: its caller chose the deadline.
        """
        if self.deadline_at_s is None or at_s <= self.arrived_s:
            return self.expired(at_s)
        return self.deadline_at_s - at_s <= HOPELESS_SHARE * self.expected_s


class Queue:
    """All waiters: by ticket, and sorted per model."""

    def __init__(self, discipline: Discipline, aging: float) -> None:
        self.discipline = discipline
        self.aging = aging
        self._waiters: dict[int, Waiter] = {}
        self._lines: dict[str, list[tuple[Key, int]]] = {}
        self._work_s: dict[str, float] = {}
        self.work_s = 0.0
        """Expected seconds of everything that waits."""

    def __len__(self) -> int:
        return len(self._waiters)

    def __iter__(self) -> Iterator[Waiter]:
        return iter(self._waiters.values())

    def __contains__(self, ticket: int) -> bool:
        return ticket in self._waiters

    def key(self, ticket: int, arrived_s: float, expected_s: float) -> Key:
        if self.discipline == "fifo":
            return arrived_s, ticket
        return self.aging * arrived_s + expected_s, ticket

    def add(self, waiter: Waiter) -> None:
        self._waiters[waiter.ticket] = waiter
        insort(self._lines.setdefault(waiter.model, []), (waiter.key, waiter.ticket))
        self._work_s[waiter.model] = self.model_work_s(waiter.model) + waiter.expected_s
        self.work_s += waiter.expected_s

    def remove(self, ticket: int) -> Waiter | None:
        waiter = self._waiters.pop(ticket, None)
        if waiter is None:
            return None
        line = self._lines[waiter.model]
        del line[bisect_left(line, (waiter.key, ticket))]
        self._work_s[waiter.model] = max(0.0, self._work_s[waiter.model] - waiter.expected_s)
        self.work_s = max(0.0, self.work_s - waiter.expected_s) if self._waiters else 0.0
        if not line:
            del self._lines[waiter.model], self._work_s[waiter.model]
        return waiter

    def count(self, model: str) -> int:
        line = self._lines.get(model)
        return 0 if line is None else len(line)

    def model_work_s(self, model: str) -> float:
        return self._work_s.get(model, 0.0)

    def head(self, model: str) -> Waiter | None:
        """The waiter of this model that is served first."""
        line = self._lines.get(model)
        return None if line is None else self._waiters[line[0][1]]

    def heads(self) -> list[tuple[Key, str]]:
        """Key and model of every model's first waiter, sorted."""
        return sorted((line[0][0], model) for model, line in self._lines.items())

    def of(self, model: str) -> list[Waiter]:
        return [self._waiters[ticket] for _, ticket in self._lines.get(model, ())]

    def models(self) -> list[str]:
        return list(self._lines)

    def reorder(self, discipline: Discipline) -> None:
        """Sort everything that waits by another discipline."""
        waiters = list(self._waiters.values())
        self.discipline = discipline
        self._waiters, self._lines, self._work_s, self.work_s = {}, {}, {}, 0.0
        for w in waiters:
            self.add(msgspec.structs.replace(w, key=self.key(w.ticket, w.arrived_s, w.expected_s)))
