"""What the residency machine does as time passes: deadlines, retries, idle models."""

from __future__ import annotations

from calm.execute.entry import Entry
from calm.execute.schedule import deadline_passed, run_round
from calm.execute.state import State
from calm.execute.upkeep import forgive, settle


def tick(state: State, at_s: float) -> None:
    for waiter in [w for w in state.queue if w.expired(at_s)]:
        state.refuse(waiter.ticket, deadline_passed(waiter.wanted, at_s - waiter.arrived_s))
        state.abandon(state.entries[waiter.model], at_s)
    for entry in [e for e in state.entries.values() if e.residency == "failed" and not e.resting(at_s)]:
        forgive(state, entry, at_s)
    for entry in [e for e in state.resident.values() if e.up and not e.leaving]:
        _age(state, entry, at_s)
    if state.wishes:
        run_round(state, at_s)
    settle(state, at_s)


def _age(state: State, entry: Entry, at_s: float) -> None:
    limits = state.limits
    if entry.failures and at_s - entry.ready_at_s >= limits.stable_s:
        entry.failures = 0
        state.dirty.add(entry.name)
    if limits.idle_unload_s is None or entry.leases or entry.pinned or state.queue.count(entry.name):
        return
    last_s = max(entry.ready_at_s, entry.last_used_s or entry.ready_at_s)
    if at_s - last_s >= limits.idle_unload_s:
        entry.dormant = True
        state.start_unload(entry, at_s, f"unused for {at_s - last_s:.0f} s")
