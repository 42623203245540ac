"""What the residency machine does at the operator's and the planner's word."""

from __future__ import annotations

from calm.errors import BadInput, CalmError, ShuttingDown, Unavailable
from calm.execute.asks import enqueue, unknown
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
from calm.execute.upkeep import forgive, misfit_error, recheck, refuse_waiters, settle, wish_pinned
from calm.records import PlacementPlan


def admin_load(state: State, e: AdminLoad) -> None:
    entry = state.entry_of(e.model)
    if state.closing:
        state.refuse(e.ticket, ShuttingDown(f"{e.model}: the server is shutting down"))
    elif entry is None or entry.removed:
        state.refuse(e.ticket, unknown(e.model))
    elif entry.serving and e.model in entry.misfits:
        state.refuse(e.ticket, misfit_error(entry, e.model))
    elif entry.serving:
        state.finish(e.ticket)
    elif (never := state.never_fits(entry)) is not None:
        state.refuse(e.ticket, never)
    else:
        entry.asked |= entry.residency == "loading"
        entry.retry_at_s = None
        entry.misfits.pop(e.model, None)
        if entry.residency == "failed":
            forgive(state, entry, e.at_s)
        enqueue(state, entry, e)
        run_round(state, e.at_s)


def admin_unload(state: State, e: AdminUnload) -> None:
    """An adapter is not unloaded by itself: its base and its siblings would go with it, unasked."""
    entry = state.entry_of(e.model)
    error = _unload_objection(state, e, entry)
    if error is not None or entry is None:
        state.refuse(e.ticket, error or unknown(e.model))
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
        return unknown(e.model)
    if e.model != entry.name:
        return BadInput(
            f"{e.model} is an adapter on the engine of {entry.name}, which {_carries(state, entry)}: "
            f"unload {entry.name}",
            field="model",
        )
    if entry.card.remote:
        return BadInput(f"{e.model} is remote: there is nothing to unload", field="model")
    if entry.pinned and not e.force:
        return BadInput(f"{e.model} is pinned: unpin it first", field="model")
    if entry.residency == "loading" and state.queue.count(e.model) and not e.force:
        return Unavailable(f"{e.model}: requests wait for it to load; try again when they are served")
    return None


def _carries(state: State, entry: Entry) -> str:
    crew = state.crews.get(entry.name, ())
    others = sum(adapter.name not in entry.misfits for adapter in crew) - 1
    return f"carries {others} more" if others > 0 else "would stay"


def pin(state: State, e: Pin | Unpin) -> None:
    """A pin is its host's: an adapter stays by its base staying, and so do its siblings."""
    entry = state.entry_of(e.model)
    if entry is None or entry.removed:
        return
    entry.pinned = isinstance(e, Pin)
    state.dirty.add(entry.name)
    if not entry.pinned:
        state.unwish(entry.name)
        state.abandon(entry, e.at_s)
    wish_pinned(state, entry)
    recheck(state, e.at_s)
    if entry.pinned and state.wishes:
        run_round(state, e.at_s, evict_for_wishes=True)


def prefer(state: State, plan: PlacementPlan, at_s: float) -> None:
    if plan.revision < state.revision or state.closing:
        return
    state.plan = plan = _of_hosts(state, plan)
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


def _of_hosts(state: State, plan: PlacementPlan) -> PlacementPlan:
    """What a plan says of adapters is meant for their hosts; what several are worth adds up."""
    if state.hosts.keys().isdisjoint(plan.value) and state.hosts.keys().isdisjoint(plan.preload):
        return plan
    value: dict[str, float] = {}
    for model, worth in plan.value.items():
        host = state.hosts.get(model, model)
        value[host] = value.get(host, 0.0) + worth
    preload = dict.fromkeys(state.hosts.get(model, model) for model in plan.preload)
    return PlacementPlan(revision=plan.revision, preload=tuple(preload), value=value)


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
