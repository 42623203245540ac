"""Small duties several events of the residency machine share."""

from __future__ import annotations

from collections.abc import Mapping

from calm.errors import CalmError
from calm.errors import LoadFailed as LoadFailedError
from calm.execute.entry import Entry
from calm.execute.schedule import over_limit, run_round
from calm.execute.state import State


def settle(state: State, at_s: float) -> None:
    """A round, unless nobody could gain from one."""
    if state.queue or state.drains or over_limit(state):
        run_round(state, at_s)


def refuse_waiters(state: State, model: str, error: CalmError) -> None:
    """The same refusal for all, one error object each: exceptions carry their own traceback."""
    for waiter in state.queue.of(model):
        state.refuse(waiter.ticket, type(error)(error.message))


def recheck(state: State, at_s: float) -> None:
    """Sizes, pins or limits changed: what can never fit goes and is refused; then a round."""
    names = {*state.resident, *state.queue.models()}
    for entry in [state.entries[name] for name in sorted(names)]:
        never = None if entry.card.remote else state.never_fits(entry)
        if never is None:
            continue
        refuse_waiters(state, entry.name, never)
        entry.reason = never.message
        if entry.residency == "loading" or (entry.up and not entry.leaving):
            state.leave(entry, at_s, never.message)
    run_round(state, at_s)


def wish_pinned(state: State, entry: Entry) -> None:
    """A pinned model that is cold is loaded as soon as there is room."""
    if entry.pinned and entry.residency == "cold" and not state.closing:
        entry.dormant = False
        others = [name for name in state.wishes if name != entry.name]
        state.wishes = [entry.name, *others]


def forgive(state: State, entry: Entry, at_s: float) -> None:
    entry.retry_at_s = None
    state.move(entry, "cold", at_s, "may be tried again")
    wish_pinned(state, entry)


def misfit_error(entry: Entry, adapter: str) -> LoadFailedError:
    return LoadFailedError(f"{adapter} cannot run on {entry.name}: {entry.misfits[adapter]}")


def take_misfits(state: State, entry: Entry, refused: Mapping[str, str]) -> None:
    """What an engine that came up says of its adapters: nobody waits on for one it could not take."""
    entry.misfits = dict(refused)
    state.dirty.add(entry.name)
    for waiter in state.queue.of(entry.name) if refused else ():
        if waiter.wanted in refused:
            state.refuse(waiter.ticket, misfit_error(entry, waiter.wanted))


def failed_error(entry: Entry, at_s: float) -> LoadFailedError:
    wait_s = max(0.0, (entry.retry_at_s or at_s) - at_s)
    again = f"; tried again in {wait_s:.1f} s" if wait_s else ""
    times = f" ({entry.failures} times in a row)" if entry.failures > 1 else ""
    error = LoadFailedError(f"{entry.name} is not available{times}: {entry.reason}{again}")
    error.retry_after_s = wait_s or None
    return error
