"""What the residency machine does when cards are added, changed or removed while it runs."""

from __future__ import annotations

from calm.errors import UnknownModel
from calm.execute.entry import Entry
from calm.execute.events import (
    Fleet,
)
from calm.execute.sizing import needs_measuring_anew, needs_restart
from calm.execute.state import State
from calm.execute.upkeep import recheck, refuse_waiters
from calm.records import ModelCard, Residency


def fleet_changed(state: State, fleet: Fleet, at_s: float) -> None:
    for gone in [e for e in state.entries.values() if e.name not in fleet.cards]:
        _remove(state, gone, at_s)
    for name, card in fleet.cards.items():
        entry = state.entries.get(name)
        if entry is not None and entry.card.remote and not card.remote:
            _remove(state, entry, at_s)
            entry = None
        if entry is None:
            state.entries[name] = Entry(card, fleet.bytes[name], fleet.threads[name])
            state.dirty.add(name)
            state.revision += 1
        else:
            _update(state, entry, card, fleet.bytes[name], fleet.threads[name], at_s)
    recheck(state, at_s)


def _remove(state: State, entry: Entry, at_s: float) -> None:
    refuse_waiters(state, entry.name, UnknownModel(f"{entry.name}: was removed from the fleet"))
    entry.removed, entry.pinned, entry.successor = True, False, None
    state.unwish(entry.name)
    if entry.residency in ("cold", "failed", "remote"):
        forget(state, entry)
    elif entry.residency != "unloading":
        state.leave(entry, at_s, "removed from the fleet")


def forget(state: State, entry: Entry) -> None:
    """Requests still at a remote engine run on; their tickets keep the entry alive."""
    del state.entries[entry.name]
    state.dirty.add(entry.name)
    state.revision += 1


def _update(state: State, entry: Entry, card: ModelCard, estimate: int, threads: int, at_s: float) -> None:
    """A description takes effect at once; what the engine was started with, after it has left."""
    entry.next_threads = threads
    entry.successor = None
    state.dirty.add(entry.name)
    running = entry.residency not in ("cold", "failed", "remote")
    if entry.removed or (running and needs_restart(entry.card, card)):
        entry.removed, entry.successor = False, (card, estimate)
        if entry.residency != "unloading":
            state.leave(entry, at_s, "its card changed")
    elif running or not needs_restart(entry.card, card):
        entry.card, entry.estimate_bytes = card, estimate
    else:
        succeed(state, entry, card, estimate, at_s)


def succeed(state: State, entry: Entry, card: ModelCard, estimate: int, at_s: float) -> None:
    """A new card on an entry without an engine: old failures and measurements say nothing about it."""
    old, entry.card, entry.successor = entry.card, card, None
    entry.estimate_bytes = estimate
    entry.threads = entry.next_threads
    if needs_measuring_anew(old, card):
        entry.measured_bytes = entry.load_s = None
    entry.failures, entry.retry_at_s, entry.reason = 0, None, None
    residency: Residency = "remote" if card.remote else "cold"
    if entry.residency != residency:
        state.move(entry, residency, at_s, "its card changed")
