"""What the residency machine holds, and the few primitives that change it.

Every counter (bytes, core tokens, leases) is changed in one place here, together with the command that tells
the executor; the decisions when to do so are in `schedule` and `residency`.
"""

from __future__ import annotations

from calm.errors import CalmError, NeverFits
from calm.execute.entry import HOLDS_MEMORY, Entry
from calm.execute.events import (
    CancelLoad,
    Command,
    Done,
    Grant,
    Limits,
    Moved,
    Refuse,
    StartLoad,
    StartUnload,
)
from calm.execute.eviction import EvictionPolicy
from calm.execute.hosting import Crew
from calm.execute.waiting import Key, Queue, Waiter
from calm.records import ModelState, PlacementPlan, Residency


class State:
    """Entries, queue and counters of the machine."""

    def __init__(self, limits: Limits, queue: Queue, eviction: EvictionPolicy) -> None:
        self.limits = limits
        self.queue = queue
        self.eviction = eviction
        self.budget_bytes = limits.budget_bytes
        self.entries: dict[str, Entry] = {}
        """By host: what has an engine of its own."""
        self.hosts: dict[str, str] = {}
        """The host of every adapter."""
        self.crews: dict[str, Crew] = {}
        """The adapters of every host, by the cards in force."""
        self.resident: dict[str, Entry] = {}
        """Local models that hold memory now."""
        self.leases: dict[int, Entry] = {}
        self.used_bytes = 0
        self.cores_in_use = 0
        self.revision = 0
        self.plan: PlacementPlan | None = None
        self.wishes: list[str] = []
        """Models to load when nobody waits for memory, best first."""
        self.drains: dict[str, Key] = {}
        """Models that take no ask behind the key, so that they become idle and can be evicted."""
        self.yields: dict[str, Key] = {}
        """Models that take no ask behind the key, so that their cores come free."""
        self.dirty: set[str] = set()
        """Models whose ModelState changed since it was last read."""
        self.unloads: dict[int, str] = {}
        """Tickets of operators who wait for a model to be gone."""
        self.closing = False
        self.out: list[Command] = []

    # --- what can be asked ---

    @property
    def free_bytes(self) -> int:
        return self.budget_bytes - self.used_bytes

    def value(self, name: str) -> float | None:
        return None if self.plan is None else self.plan.value.get(name, 0.0)

    def preferred(self, name: str) -> bool:
        return self.plan is not None and name in self.plan.preload

    def never_fits(self, entry: Entry) -> NeverFits | None:
        """Why this model cannot be loaded whatever else is evicted; None when it can."""
        if entry.card.remote:
            return None
        pins = [e for e in self.resident.values() if e.pinned and e is not entry]
        if entry.pinned and entry.name in self.resident:
            pins = []
        pinned_bytes = sum(e.charge for e in pins)
        if entry.size_bytes > self.budget_bytes - pinned_bytes:
            return NeverFits(_too_large(entry, self.budget_bytes, pinned_bytes))
        most = self.eviction.max_resident
        if most is not None and len(pins) >= most:
            names = ", ".join(sorted(e.name for e in pins))
            return NeverFits(
                f"{entry.name}: eviction {self.eviction.name} keeps {most} models and {names} "
                f"are pinned; unpin one or allow more"
            )
        return None

    def entry_of(self, model: str) -> Entry | None:
        """Whose engine serves a model."""
        return self.entries.get(self.hosts.get(model, model))

    def states_of(self, model: str) -> dict[str, ModelState]:
        """The state of a model's host, shared by all that its engine carries; none for what is gone."""
        host = self.hosts.get(model, model)
        entry = self.entries.get(host)
        if entry is None:
            return {}
        shown = entry.state(self.queue.count(host), self.queue.model_work_s(host))
        crew = (adapter.name for adapter in self.crews.get(host, ()))
        return {host: shown, **{a: entry.misfit(a) if a in entry.misfits else shown for a in crew}}

    # --- residency ---

    def move(self, entry: Entry, new: Residency, at_s: float, detail: str | None = None) -> None:
        old = entry.residency
        entry.residency = new
        if new in HOLDS_MEMORY:
            self.resident[entry.name] = entry
        elif self.resident.pop(entry.name, None) is not None:
            self.charge(entry, 0)
        self.revision += 1
        self.dirty.add(entry.name)
        self.out.append(Moved(entry.name, old, new, at_s, detail))

    def charge(self, entry: Entry, footprint_bytes: int) -> None:
        self.used_bytes += footprint_bytes - entry.charge
        entry.charge = footprint_bytes
        self.dirty.add(entry.name)

    def start_load(self, entry: Entry, at_s: float, detail: str) -> None:
        entry.threads = entry.next_threads
        entry.asked = entry.preloading = entry.leaving = False
        entry.retry_at_s = None
        self.move(entry, "loading", at_s, detail)
        self.charge(entry, entry.size_bytes)
        self.out.append(StartLoad(entry.name, entry.threads))

    def cancel_load(self, entry: Entry, at_s: float, detail: str) -> None:
        self.move(entry, "unloading", at_s, detail)
        self.out.append(CancelLoad(entry.name))

    def start_unload(self, entry: Entry, at_s: float, detail: str) -> None:
        """Also with leases, when the operator forces it or the engine died: they end here."""
        self.drop_leases(entry)
        self.drains.pop(entry.name, None)
        self.yields.pop(entry.name, None)
        self.move(entry, "unloading", at_s, detail)
        self.out.append(StartUnload(entry.name))

    def drain(self, entry: Entry, at_s: float, detail: str) -> None:
        if entry.residency == "ready":
            self.move(entry, "draining", at_s, detail)

    def leave(self, entry: Entry, at_s: float, detail: str) -> None:
        """Out of memory for good reason: at once when idle, else after the last lease."""
        entry.leaving = True
        if entry.residency == "loading":
            self.cancel_load(entry, at_s, detail)
        elif entry.up and entry.idle:
            self.start_unload(entry, at_s, detail)
        elif entry.up:
            self.drain(entry, at_s, detail)

    def abandon(self, entry: Entry, at_s: float) -> None:
        """Cancel a load nobody waits for and nobody prefers."""
        wanted = entry.asked or entry.pinned or entry.preloading or self.preferred(entry.name)
        if entry.residency == "loading" and not wanted and not self.queue.count(entry.name):
            self.cancel_load(entry, at_s, "nobody waits for it any more")

    def unwish(self, name: str) -> None:
        self.wishes = [wish for wish in self.wishes if wish != name]

    # --- leases and answers ---

    def cores_for(self, entry: Entry) -> int:
        """Tokens that one more lease takes: the first one takes the engine's threads."""
        return 0 if entry.leases else entry.threads

    def grant(self, entry: Entry, ticket: int, model: str, at_s: float) -> None:
        if not entry.leases:
            self.cores_in_use += entry.threads
        entry.leases.add(ticket)
        entry.applied = model
        entry.uses += 1
        entry.last_used_s = at_s
        self.leases[ticket] = entry
        self.dirty.add(entry.name)
        self.out.append(Grant(ticket))

    def give_back(self, entry: Entry, ticket: int, at_s: float) -> None:
        entry.leases.discard(ticket)
        entry.last_used_s = at_s
        if not entry.leases:
            self.cores_in_use -= entry.threads
            entry.applied = None
        self.dirty.add(entry.name)

    def drop_leases(self, entry: Entry) -> None:
        if entry.leases:
            self.cores_in_use -= entry.threads
        for ticket in entry.leases:
            self.leases.pop(ticket, None)
        entry.leases.clear()
        entry.applied = None
        self.dirty.add(entry.name)

    def unqueue(self, ticket: int) -> Waiter | None:
        waiter = self.queue.remove(ticket)
        if waiter is not None:
            self.dirty.add(waiter.model)
        return waiter

    def refuse(self, ticket: int, error: CalmError) -> None:
        self.unqueue(ticket)
        self.out.append(Refuse(ticket, error))

    def finish(self, ticket: int) -> None:
        self.unqueue(ticket)
        self.out.append(Done(ticket))


def _too_large(entry: Entry, budget_bytes: int, pinned_bytes: int) -> str:
    kind = "takes" if entry.measured_bytes is not None else "is expected to take"
    pinned = f", of which {_mib(pinned_bytes)} are pinned" if pinned_bytes else ""
    return (
        f"{entry.name} {kind} {_mib(entry.size_bytes)}, the memory budget is {_mib(budget_bytes)}{pinned}: "
        f"raise the budget, unpin a model or use a smaller one"
    )


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:,.0f} MiB"
