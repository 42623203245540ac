"""How long a request would wait for its turn, read off the snapshot: slots, core tokens, work ahead.

    1. a slot and the threads are free           no wait
    2. the engine's slots are all taken           its next release, then the work that waits before us
    3. the core tokens are held by other engines  until enough of them have drained
Both 2 and 3 can hold; then the longer counts, since both drain at the same time. The residual of a service
in progress is taken as uniform over its mean s: of k in flight the first ends after s/(k+1), the last after
s*k/(k+1). A mean-value argument (Reiser and Lavenberg 1980), not a simulation: it costs a microsecond.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Generic, NamedTuple

from calm.analyze.maths import N
from calm.records import ModelCard, ModelState, Snapshot

DEFAULT_SERVICE_S = 2.0
RELATIVE_SD = 0.6
"""Standard deviation of a predicted wait, as a share of it."""

_COLD = {"ready": 0.0, "remote": 0.0, "loading": 0.5}


def drain_s(state: ModelState, service_s: float) -> float:
    """Until the engine is idle: the last of its running requests, and what waits for it."""
    slots = max(1, state.slots)
    running = service_s * state.in_flight / (state.in_flight + 1)
    return running + state.waiting_work_s / slots


def thread_waits(snapshot: Snapshot, service_s: Mapping[str, float]) -> list[tuple[float, int]]:
    """(seconds from now, core tokens free by then), ascending: the active engines drain one by one."""
    active = [s for s in snapshot.models.values() if s.in_flight > 0 and s.residency != "remote"]
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
        for s in snapshot.models.values()
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
        cold = _COLD.get(state.residency, 1.0)
        if cold == 1.0 and state.footprint_bytes > self._reachable_bytes:
            wait = max(wait, self._steps[-1][0])  # a busy model has to drain before it can make room
        return Wait(wait, cold, crowd, threads)
