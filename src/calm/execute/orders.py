"""What the residency machine does at the operator's and the planner's word."""

from __future__ import annotations

from calm.errors import BadInput, CalmError, ShuttingDown, Unavailable, UnknownModel
from calm.execute.asks import enqueue
from calm.execute.entry import Entry
from calm.execute.events import (
    AdminLoad,
    AdminUnload,
    Close,
    Pin,
    SetBudget,
    SetPolicy,
    Unpin,
)
from calm.execute.schedule import run_round
from calm.execute.state import State
from calm.execute.upkeep import forgive, recheck, refuse_waiters, settle, wish_pinned
from calm.records import PlacementPlan


def admin_load(state: State, e: AdminLoad) -> None:
    entry = state.entries.get(e.model)
    if state.closing:
        state.refuse(e.ticket, ShuttingDown(f"{e.model}: the server is shutting down"))
    elif entry is None or entry.removed:
        state.refuse(e.ticket, UnknownModel(f"{e.model}: no such model in the fleet"))
    elif entry.serving:
        state.finish(e.ticket)
    elif (never := state.never_fits(entry)) is not None:
        state.refuse(e.ticket, never)
    else:
        entry.asked |= entry.residency == "loading"
        entry.retry_at_s = None
        if entry.residency == "failed":
            forgive(state, entry, e.at_s)
        enqueue(state, e.ticket, e.model, e)
        run_round(state, e.at_s)


def admin_unload(state: State, e: AdminUnload) -> None:
    entry = state.entries.get(e.model)
    error = _unload_objection(state, e, entry)
    if error is not None or entry is None:
        state.refuse(e.ticket, error or UnknownModel(f"{e.model}: no such model in the fleet"))
        return
    entry.dormant = True
    if e.force:
        entry.pinned = False
        state.unwish(e.model)
        refuse_waiters(state, e.model, Unavailable(f"{e.model}: unloaded by the operator"))
    if entry.residency in ("cold", "failed"):
        state.finish(e.ticket)
        return
    state.unloads[e.ticket] = e.model
    if e.force and entry.up:
        state.start_unload(entry, e.at_s, "unloaded by force")
    elif entry.residency != "unloading":
        state.leave(entry, e.at_s, "unloaded by the operator")
    settle(state, e.at_s)


def _unload_objection(state: State, e: AdminUnload, entry: Entry | None) -> CalmError | None:
    if entry is None or entry.removed:
        return UnknownModel(f"{e.model}: no such model in the fleet")
    if entry.card.remote:
        return BadInput(f"{e.model} is remote: there is nothing to unload", field="model")
    if entry.pinned and not e.force:
        return BadInput(f"{e.model} is pinned: unpin it first", field="model")
    if entry.residency == "loading" and state.queue.count(e.model) and not e.force:
        return Unavailable(f"{e.model}: requests wait for it to load; try again when they are served")
    return None


def pin(state: State, e: Pin | Unpin) -> None:
    entry = state.entries.get(e.model)
    if entry is None or entry.removed:
        return
    entry.pinned = isinstance(e, Pin)
    state.dirty.add(e.model)
    if not entry.pinned:
        state.unwish(e.model)
        state.abandon(entry, e.at_s)
    wish_pinned(state, entry)
    recheck(state, e.at_s)
    if entry.pinned and state.wishes:
        run_round(state, e.at_s, evict_for_wishes=True)


def prefer(state: State, plan: PlacementPlan, at_s: float) -> None:
    if plan.revision < state.revision or state.closing:
        return
    state.plan = plan
    for entry in [e for e in state.resident.values() if e.residency == "loading"]:
        entry.preloading &= state.preferred(entry.name) or bool(state.value(entry.name))
        state.abandon(entry, at_s)
    pinned = [name for name in state.wishes if state.entries[name].pinned]
    cold = [
        n for n in plan.preload if (e := state.entries.get(n)) and e.residency == "cold" and not e.dormant
    ]
    state.wishes = [*pinned, *(name for name in cold if name not in pinned)]
    if state.wishes:
        run_round(state, at_s, evict_for_wishes=True)


def set_budget(state: State, e: SetBudget) -> None:
    state.budget_bytes = e.budget_bytes
    recheck(state, e.at_s)


def set_policy(state: State, e: SetPolicy) -> None:
    if e.eviction is not None:
        state.eviction = e.eviction
    if e.queue is not None and e.queue != state.queue.discipline:
        state.queue.reorder(e.queue)
    recheck(state, e.at_s)


def close(state: State, e: Close) -> None:
    state.closing = True
    state.wishes = []
    for waiter in list(state.queue):
        state.refuse(waiter.ticket, ShuttingDown(f"{waiter.model}: the server is shutting down"))
    for entry in list(state.resident.values()):
        if e.force and entry.up:
            state.start_unload(entry, e.at_s, "the server is shutting down")
        elif entry.residency != "unloading":
            state.leave(entry, e.at_s, "the server is shutting down")
