"""What the residency machine does when a request wants a model, gives up waiting, or gives its lease back."""

from __future__ import annotations

from calm.errors import CalmError, QueueFull, ShuttingDown, UnknownModel
from calm.execute.entry import Entry
from calm.execute.events import (
    AdminLoad,
    Cancel,
    Release,
    Want,
)
from calm.execute.schedule import deadline_passed, run_round
from calm.execute.state import State
from calm.execute.upkeep import failed_error, forgive, misfit_error, settle
from calm.execute.waiting import Waiter

_UP = frozenset({"ready", "remote"})


def want(state: State, e: Want) -> None:
    entry = state.entry_of(e.model)
    if not state.queue and entry is not None and _open(state, entry, e):
        state.grant(entry, e.ticket, e.model, e.at_s)
        return
    error = _objection(state, entry, e)
    if error is not None or entry is None:
        state.refuse(e.ticket, error or unknown(e.model))
        return
    waiter = enqueue(state, entry, e)
    if state.queue.head(entry.name) is waiter:
        run_round(state, e.at_s)
    if len(state.queue) > state.limits.max_queue and e.ticket in state.queue:
        state.refuse(e.ticket, _queue_full(state))


def _open(state: State, entry: Entry, e: Want) -> bool:
    """Nothing stands between this ask and its engine, the queue of others apart."""
    return (
        entry.residency in _UP
        and not entry.leaving
        and len(entry.leases) < entry.cap
        and not entry.closed_to(e.model)
        and state.cores_for(entry) <= state.limits.cores - state.cores_in_use
        and not entry.resting(e.at_s)
        and (e.deadline_at_s is None or e.deadline_at_s > e.at_s)
        and e.model not in entry.misfits
    )


def _objection(state: State, entry: Entry | None, e: Want) -> CalmError | None:
    """Why this ask must not even wait; None when it may."""
    if state.closing:
        return ShuttingDown(f"{e.model}: the server is shutting down")
    if entry is None or entry.removed:
        return unknown(e.model)
    if e.model in entry.misfits:
        return misfit_error(entry, e.model)
    if e.deadline_at_s is not None and e.deadline_at_s <= e.at_s:
        return deadline_passed(e.model, 0.0)
    if entry.resting(e.at_s):
        return failed_error(entry, e.at_s)
    if entry.residency == "failed":
        forgive(state, entry, e.at_s)
    if not entry.serving and (never := state.never_fits(entry)) is not None:
        return never
    waiting = len(state.queue)
    if waiting >= state.limits.max_queue and not (
        _open(state, entry, e) and not state.queue.count(entry.name)
    ):
        return _queue_full(state)
    return None


def _queue_full(state: State) -> QueueFull:
    wait_s = max(1.0, state.queue.work_s / max(1, len(state.leases)))
    return QueueFull(
        f"{len(state.queue)} requests wait already; try again in {wait_s:.0f} s", retry_after_s=wait_s
    )


def unknown(model: str) -> UnknownModel:
    return UnknownModel(f"{model}: no such model in the fleet")


def enqueue(state: State, entry: Entry, e: Want | AdminLoad) -> Waiter:
    queue, want = state.queue, e if isinstance(e, Want) else None
    expected_s = want.expected_s if want else 0.0
    waiter = Waiter(
        key=queue.key(e.ticket, e.at_s, expected_s),
        ticket=e.ticket,
        model=entry.name,
        request_id=want.request_id if want else None,
        expected_s=expected_s,
        deadline_at_s=want.deadline_at_s if want else None,
        arrived_s=e.at_s,
        sends=want is not None,
        wanted=e.model,
    )
    queue.add(waiter)
    entry.dormant = False
    state.dirty.add(entry.name)
    return waiter


def release(state: State, e: Release) -> None:
    entry = state.leases.pop(e.ticket, None)
    if entry is None:
        return
    state.give_back(entry, e.ticket, e.at_s)
    if entry.leaving and entry.idle and entry.up:
        state.start_unload(entry, e.at_s, entry.reason or "no longer in use")
    settle(state, e.at_s)


def cancel(state: State, e: Cancel) -> None:
    state.unloads.pop(e.ticket, None)
    waiter = state.unqueue(e.ticket)
    if waiter is not None:
        state.abandon(state.entries[waiter.model], e.at_s)
        settle(state, e.at_s)
