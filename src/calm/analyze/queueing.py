"""How long a request would wait for its turn, read off the snapshot: slots, core tokens, work ahead.

    1. a slot and the threads are free           no wait
    2. the engine's slots are all taken           its next release, then the work that waits before us
    3. the core tokens are held by other engines  until enough of them have drained
Both 2 and 3 can hold; then the longer counts, since both drain at the same time; but at least what the backlog
of the whole house takes at the number of requests now served side by side, for turns go round all models. The
residual of a service in progress is taken as uniform over its mean s: of k in flight the first ends after
s/(k+1), the last after s*k/(k+1). A mean-value argument (Reiser and Lavenberg 1980), not a simulation: it costs
a microsecond.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Generic, NamedTuple

import numpy as np

from calm.analyze.maths import Array, N
from calm.records import ModelCard, ModelState, Snapshot

DEFAULT_SERVICE_S = 2.0
RELATIVE_SD = 0.6
"""Standard deviation of a predicted wait, as a share of it."""

_NOTHING = object()
_COLD = {"ready": 0.0, "remote": 0.0, "loading": 0.5}


def engines(snapshot: Snapshot) -> list[ModelState]:
    """Each engine's state once: adapters share their base's, which bears the base's name."""
    return [state for name, state in snapshot.models.items() if state.model == name]


def drain_s(state: ModelState, service_s: float) -> float:
    """Until the engine is idle: the last of its running requests, and what waits for it."""
    slots = max(1, state.slots)
    running = service_s * state.in_flight / (state.in_flight + 1)
    return running + state.waiting_work_s / slots


def thread_waits(snapshot: Snapshot, service_s: Mapping[str, float]) -> list[tuple[float, int]]:
    """(seconds from now, core tokens free by then), ascending: the active engines drain one by one."""
    active = [s for s in engines(snapshot) if s.in_flight > 0 and s.residency != "remote"]
    ends = sorted((drain_s(s, service_s.get(s.model, DEFAULT_SERVICE_S)), s.threads) for s in active)
    free = max(0, snapshot.cores - snapshot.threads_in_use)
    steps = [(0.0, free)]
    for end, threads in ends:
        free += threads
        steps.append((end, free))
    return steps


def thread_wait_s(steps: Sequence[tuple[float, int]], threads: int) -> float:
    """The first moment `threads` core tokens are free; the last drain when even that is not enough."""
    for at_s, free in steps:
        if free >= threads:
            return at_s
    return steps[-1][0]


def slot_wait_s(state: ModelState, concurrency: int, service_s: float) -> float:
    """Until one of the engine's slots is ours."""
    slots = max(1, concurrency)
    if state.in_flight < slots and state.waiting == 0:
        return 0.0
    work = state.waiting_work_s if state.waiting_work_s > 0 else state.waiting * service_s
    next_free = service_s / (slots + 1) if state.in_flight >= slots else 0.0
    return next_free + work / slots


def evictable_bytes(snapshot: Snapshot) -> int:
    """Bytes of the ready models that are idle and not pinned."""
    return sum(
        s.footprint_bytes
        for s in engines(snapshot)
        if s.residency == "ready" and not s.in_flight and not s.pinned
    )


class Wait(NamedTuple, Generic[N]):
    """What a model's engine would be like for one more request."""

    queue_s: N
    cold: N
    """Share of a load still ahead: 0 when it can serve, 1 when cold, half when one is under way."""
    concurrency: N
    threads: N


class Outlook:
    """What all models share at one moment; the dearer parts are worked out when a model's wait needs them."""

    def __init__(self, snapshot: Snapshot, service_s: Mapping[str, float]) -> None:
        self._snapshot = snapshot
        self._service_s = service_s
        self._free_cores = max(0, snapshot.cores - snapshot.threads_in_use)

    @cached_property
    def _steps(self) -> list[tuple[float, int]]:
        return thread_waits(self._snapshot, self._service_s)

    @cached_property
    def _backlog_s(self) -> float:
        """Of all local models."""
        snapshot = self._snapshot
        work = sum(s.waiting_work_s for s in engines(snapshot) if s.residency != "remote")
        return work / max(1, snapshot.in_flight)

    @cached_property
    def _reachable_bytes(self) -> int:
        """Free in the budget, or free as soon as idle models are evicted."""
        snapshot = self._snapshot
        return snapshot.budget_bytes - snapshot.used_bytes + evictable_bytes(snapshot)

    def of(self, state: ModelState | None, card: ModelCard, extra: int = 0) -> Wait[float]:
        """`extra`: sequences beyond one that the request itself would decode side by side."""
        engine = card.engine
        limit = card.max_in_flight or engine.slots or 1
        if state is None:
            remote = engine.kind == "openai"
            return Wait(0.0, 0.0 if remote else 1.0, 1.0 + extra, 1.0 if remote else engine.threads or 1)
        busy = state.in_flight
        crowd = min(busy + 1, limit) + extra
        free_slot = busy < limit and not state.waiting
        service = 0.0 if free_slot else self._service_s.get(state.model, DEFAULT_SERVICE_S)
        wait = 0.0 if free_slot else slot_wait_s(state, limit, service)
        if engine.kind == "openai" or state.residency == "remote":
            return Wait(wait, 0.0, crowd, 1.0)
        threads = state.threads or engine.threads or 1
        if not busy and threads > self._free_cores:
            wait = max(wait, thread_wait_s(self._steps, threads))
        if wait:
            wait = max(wait, self._backlog_s)
        cold = _COLD.get(state.residency, 1.0)
        if cold == 1.0 and state.footprint_bytes > self._reachable_bytes:
            wait = max(wait, self._steps[-1][0])  # a busy model has to drain before it can make room
        return Wait(wait, cold, crowd, threads)

    def over(self, stances: Stance[Array], cards: Mapping[str, ModelCard], extra: int = 0) -> Wait[Array]:
        """The same for many cards, whose stances are given: at once for those nobody is at, by `of` for others."""
        wait = self._thread_waits_s(stances.needs)
        if stances.bytes.max() > self._reachable_bytes:
            crowded = np.maximum(wait, self._steps[-1][0])
            wait = np.where(stances.bytes > self._reachable_bytes, crowded, wait)
        found = Wait(wait, stances.cold, np.full(len(wait), 1.0 + extra), stances.threads)
        busy, items = np.flatnonzero(stances.busy).tolist(), list(cards.items())
        for place in busy:
            name, card = items[place]
            one = self.of(self._snapshot.models.get(name), card, extra)
            for column, value in zip(found, one, strict=True):
                column[place] = value
        return found

    def _thread_waits_s(self, needs: Array) -> Array:
        if needs.max() <= self._free_cores:
            return np.zeros(len(needs))
        at_s, free = zip(*self._steps, strict=True)
        first = np.minimum(np.searchsorted(free, needs), len(free) - 1)
        waits: Array = np.asarray(at_s, np.float64).take(first)
        return np.where(waits > 0.0, np.maximum(waits, self._backlog_s), waits)


class Stance(NamedTuple, Generic[N]):
    """What a model's wait depends on beside the machine, while nobody is at it."""

    busy: N
    """1 when somebody is: then the rest does not tell its wait."""
    cold: N
    threads: N
    needs: N
    """Core tokens it takes from the machine's before it serves."""
    bytes: N
    """What must be free before it is loaded; 0 when nothing has to be loaded."""


def stance(state: ModelState | None, card: ModelCard) -> Stance[float]:
    engine = card.engine
    remote = engine.kind == "openai" or (state is not None and state.residency == "remote")
    if state is None:
        return Stance(0.0, 0.0 if remote else 1.0, 1.0 if remote else engine.threads or 1, 0.0, 0.0)
    busy = 1.0 if state.in_flight or state.waiting else 0.0
    if remote:
        return Stance(busy, 0.0, 1.0, 0.0, 0.0)
    threads = state.threads or engine.threads or 1
    cold = _COLD.get(state.residency, 1.0)
    return Stance(busy, cold, threads, threads, state.footprint_bytes if cold == 1.0 else 0.0)


class Stances:
    """The stances of a large fleet as columns, a row for each model.

    Between two requests few states change, and a state is a frozen record that is shared while it does not: one
    that was read for the row before is not read again.
    """

    def __init__(self) -> None:
        self._read: list[object] = []
        self._columns: Array = np.zeros((len(Stance._fields), 0))

    def forget(self, row: int) -> None:
        """The row's card is new or has changed."""
        missing = row + 1 - len(self._read)
        if missing > 0:
            missing += row // 2
            self._read += [_NOTHING] * missing
            blank = np.zeros((len(self._columns), missing))
            self._columns = np.concatenate([self._columns, blank], axis=1)
        self._read[row] = _NOTHING

    def over(
        self, rows: Sequence[int], cards: Mapping[str, ModelCard], states: Mapping[str, ModelState]
    ) -> Stance[Array]:
        """Of `cards`, whose rows are given."""
        read = self._read
        for row, card, state in zip(rows, cards.values(), map(states.get, cards), strict=True):
            if read[row] is not state:
                read[row], self._columns[:, row] = state, stance(state, card)
        return Stance(*self._columns.take(rows, axis=1))
