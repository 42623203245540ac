"""What the residency machine does when cards are added, changed or removed while it runs."""

from __future__ import annotations

from calm.errors import Unavailable, UnknownModel
from calm.execute.entry import Entry
from calm.execute.events import Fleet
from calm.execute.hosting import Crew, crews, hosts, same_crew
from calm.execute.sizing import needs_measuring_anew, needs_restart
from calm.execute.state import State
from calm.execute.upkeep import recheck, refuse_waiters
from calm.records import ModelCard, Residency


def fleet_changed(state: State, fleet: Fleet, at_s: float) -> None:
    _rehost(state, crews(fleet.cards))
    for gone in [e for e in state.entries.values() if e.name not in state.crews]:
        _remove(state, gone, at_s)
    for name, crew in state.crews.items():
        card, entry = fleet.cards[name], state.entries.get(name)
        if entry is not None and entry.card.remote and not card.remote:
            _remove(state, entry, at_s)
            entry = None
        if entry is None:
            state.entries[name] = Entry(card, fleet.bytes[name], fleet.threads[name], crew)
            state.dirty.add(name)
            state.revision += 1
        else:
            entry.next_threads = fleet.threads[name]
            _update(state, entry, card, crew, fleet.bytes[name], at_s)
    _turn_away(state)
    recheck(state, at_s)


def _rehost(state: State, found: dict[str, Crew]) -> None:
    """Which adapter runs where from now on."""
    before, state.crews, state.hosts = state.hosts, found, hosts(found)
    if before != state.hosts:
        state.dirty |= before.keys() | state.hosts.keys()
        state.revision += 1


def _turn_away(state: State) -> None:
    """Whoever waits for an adapter at an engine that is no longer its own."""
    for waiter in list(state.queue):
        host = state.hosts.get(waiter.wanted, waiter.wanted)
        if host == waiter.model:
            continue
        known = host in state.crews
        gone = UnknownModel(f"{waiter.wanted}: was removed from the fleet")
        moved = Unavailable(f"{waiter.wanted}: its card changed, it runs on {host} now; ask again")
        state.refuse(waiter.ticket, moved if known else gone)


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


def _update(state: State, entry: Entry, card: ModelCard, crew: Crew, estimate: int, at_s: float) -> None:
    """A description takes effect at once; what the engine was started with, after it has left."""
    entry.successor = None
    state.dirty.add(entry.name)
    running = entry.residency not in ("cold", "failed", "remote")
    other = needs_restart(entry.card, card) or not same_crew(_carried(entry, crew), crew)
    if entry.removed or (running and other):
        entry.removed, entry.successor = False, (card, crew, estimate)
        if entry.residency != "unloading":
            state.leave(entry, at_s, _changed(entry.card, card))
    elif running or not other:
        entry.card, entry.adapters, entry.estimate_bytes = card, crew, estimate
    else:
        succeed(state, entry, card, crew, estimate, at_s)


def _carried(entry: Entry, crew: Crew) -> Crew:
    """What the engine was given, less what it could not take and nobody asks of it any more."""
    names = {adapter.name for adapter in crew}
    return tuple(a for a in entry.adapters if a.name in names or a.name not in entry.misfits)


def _changed(old: ModelCard, new: ModelCard) -> str:
    return "its card changed" if needs_restart(old, new) else "its adapters changed"


def succeed(state: State, entry: Entry, card: ModelCard, crew: Crew, estimate: int, at_s: float) -> None:
    """New cards on an entry without an engine: old failures and measurements say nothing about them."""
    measured_anew = needs_measuring_anew(entry.card, card) or not same_crew(entry.adapters, crew)
    entry.card, entry.adapters, entry.successor = card, crew, None
    entry.estimate_bytes = estimate
    entry.threads = entry.next_threads
    if measured_anew:
        entry.measured_bytes = entry.load_s = None
    entry.failures, entry.retry_at_s, entry.reason = 0, None, None
    entry.misfits = {}
    residency: Residency = "remote" if card.remote else "cold"
    if entry.residency != residency:
        state.move(entry, residency, at_s, "its card changed")
