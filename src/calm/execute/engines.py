"""What the residency machine does when an engine came up, failed, died, left or was measured."""

from __future__ import annotations

from calm.execute.entry import Entry
from calm.execute.events import (
    Died,
    Event,
    Loaded,
    LoadFailed,
    Measured,
    Sized,
    Unloaded,
)
from calm.execute.fleet_change import forget, succeed
from calm.execute.schedule import run_round
from calm.execute.state import State
from calm.execute.upkeep import (
    failed_error,
    recheck,
    refuse_waiters,
    settle,
    take_misfits,
    wish_pinned,
)


def engine_event(state: State, e: Loaded | LoadFailed | Unloaded | Died | Measured | Sized) -> None:
    """What engines report. A report that fits no more (say, of an engine cancelled since) is void."""
    entry = state.entries.get(e.model)
    if entry is None:
        return
    if entry.residency == "remote":
        _reached(state, entry, e)
        return
    match e:
        case Loaded() if entry.residency == "loading":
            _loaded(state, entry, e)
        case LoadFailed() if entry.residency == "loading":
            _load_failed(state, entry, e)
        case LoadFailed() | Unloaded() if entry.residency == "unloading":
            _unloaded(state, entry, e.reason, e.at_s)
        case Died() if entry.up:
            _died(state, entry, e)
        case Measured() if entry.up:
            _resize(state, entry, e.footprint_bytes, e.at_s)
        case Sized() if entry.measured_bytes is None:
            entry.estimate_bytes = e.footprint_bytes
            if entry.residency == "loading":
                state.charge(entry, e.footprint_bytes)
            recheck(state, e.at_s)
        case _:
            return


def _reached(state: State, entry: Entry, e: Event) -> None:
    """A remote engine was reached, or not: then it rests for a while like one that failed to load."""
    state.dirty.add(entry.name)
    if isinstance(e, Loaded):
        entry.failures, entry.retry_at_s, entry.reason = 0, None, None
        take_misfits(state, entry, e.refused)
    elif isinstance(e, LoadFailed | Died):
        _count_failure(state, entry, e.reason, e.at_s, entry.failures)
        refuse_waiters(state, entry.name, failed_error(entry, e.at_s))
        settle(state, e.at_s)


def _loaded(state: State, entry: Entry, e: Loaded) -> None:
    entry.load_s, entry.ready_at_s, entry.uses = e.load_s, e.at_s, 0
    entry.asked = entry.preloading = False
    entry.reason = None
    state.move(entry, "ready", e.at_s, f"loaded in {e.load_s:.2f} s")
    if e.footprint_bytes is not None:
        entry.measured_bytes = e.footprint_bytes
        state.charge(entry, e.footprint_bytes)
    take_misfits(state, entry, e.refused)
    recheck(state, e.at_s)


def _load_failed(state: State, entry: Entry, e: LoadFailed) -> None:
    _count_failure(state, entry, e.reason, e.at_s, entry.failures)
    state.move(entry, "failed", e.at_s, e.reason)
    refuse_waiters(state, entry.name, failed_error(entry, e.at_s))
    run_round(state, e.at_s)


def _died(state: State, entry: Entry, e: Died) -> None:
    """The first death is forgiven: the next ask loads it again. Repeated ones open the circuit."""
    reason = f"the engine died: {e.reason}"
    if e.at_s - entry.ready_at_s >= state.limits.stable_s:
        entry.failures = 0
    _count_failure(state, entry, reason, e.at_s, entry.failures - 1)
    state.start_unload(entry, e.at_s, reason)
    if entry.resting(e.at_s):
        refuse_waiters(state, entry.name, failed_error(entry, e.at_s))
    settle(state, e.at_s)


def _count_failure(state: State, entry: Entry, reason: str, at_s: float, doublings: int) -> None:
    """Rest `backoff_s` doubled so many times; below zero: not at all."""
    limits = state.limits
    entry.failures += 1
    entry.reason = reason
    entry.retry_at_s = None
    if doublings >= 0:
        entry.retry_at_s = at_s + min(limits.backoff_s * 2.0 ** min(doublings, 30), limits.backoff_max_s)


def _unloaded(state: State, entry: Entry, reason: str | None, at_s: float) -> None:
    entry.leaving = False
    entry.reason = reason or entry.reason
    state.move(entry, "failed" if entry.resting(at_s) else "cold", at_s, reason)
    if entry.removed:
        forget(state, entry)
    elif entry.successor is not None:
        succeed(state, entry, *entry.successor, at_s)
    wish_pinned(state, entry)
    for ticket in [t for t, model in state.unloads.items() if model == entry.name]:
        del state.unloads[ticket]
        state.finish(ticket)
    recheck(state, at_s)


def _resize(state: State, entry: Entry, footprint_bytes: int, at_s: float) -> None:
    entry.measured_bytes = footprint_bytes
    state.charge(entry, footprint_bytes)
    recheck(state, at_s)
