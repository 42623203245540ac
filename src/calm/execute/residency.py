"""Which models are in memory and who may use them: pure, because this is where a bug costs most.

`Machine.step(event)` returns the commands to carry out, in order. No I/O, no clock (events carry `at_s`), no
event loop: a history of events replays to the same commands. The invariants I1 to I8 are in
docs/decisions/0001-architecture.md, the choices behind them in 0003-residency.md.

    cold -> loading -> ready <-> draining -> unloading -> cold
               |          `-- died ----------^   `------> failed   (it failed; cold again at retry_at_s)
               `-> failed        remote: always ready, costs no bytes and no cores, only its cap counts

There is one entry for each engine. An adapter has none: what is asked of it is asked of its base, its host.
"""

from __future__ import annotations

from collections.abc import Mapping

from calm.execute.asks import cancel, release, want
from calm.execute.engines import engine_event
from calm.execute.events import (
    AdminLoad,
    AdminUnload,
    Cancel,
    Close,
    Command,
    Died,
    Discipline,
    Event,
    FleetChanged,
    Limits,
    Loaded,
    LoadFailed,
    Measured,
    Pin,
    Prefer,
    Release,
    SetBudget,
    SetPolicy,
    Sized,
    Tick,
    Unloaded,
    Unpin,
    Want,
)
from calm.execute.eviction import EvictionPolicy
from calm.execute.fleet_change import fleet_changed
from calm.execute.orders import admin_load, admin_unload, close, pin, prefer, set_budget, set_policy
from calm.execute.passage import tick
from calm.execute.state import State
from calm.execute.waiting import Queue
from calm.records import ModelState


class Machine:
    """The residency state machine. One owner feeds it; it never calls out."""

    def __init__(self, limits: Limits, eviction: EvictionPolicy, queue: Discipline = "fifo") -> None:
        self._state = State(limits, Queue(queue, limits.aging), eviction)
        self._models: Mapping[str, ModelState] = {}

    # --- what can be read -----------------------------------------------------------------------

    @property
    def revision(self) -> int:
        """Grows with every residency change."""
        return self._state.revision

    @property
    def budget_bytes(self) -> int:
        return self._state.budget_bytes

    @property
    def used_bytes(self) -> int:
        """Footprints of everything in memory, on its way in or on its way out."""
        return self._state.used_bytes

    @property
    def cores_in_use(self) -> int:
        return self._state.cores_in_use

    @property
    def queue_length(self) -> int:
        return len(self._state.queue)

    @property
    def in_flight(self) -> int:
        return len(self._state.leases)

    @property
    def policies(self) -> tuple[str, str]:
        """Names of the queue discipline and of the eviction policy in force."""
        return self._state.queue.discipline, self._state.eviction.name

    def models(self) -> Mapping[str, ModelState]:
        """Every model's state now. The mapping is never changed afterwards; unchanged states are shared.

        An adapter's state is its host's, with the host's name in it: sums are over those that bear their own.
        """
        dirty = self._state.dirty
        if dirty:
            fresh: dict[str, ModelState] = {}
            for name in dirty:
                fresh.update(self._state.states_of(name))
            kept = self._models if dirty <= fresh.keys() else self._without(dirty)
            self._models = {**kept, **fresh}
            dirty.clear()
        return self._models

    def _without(self, names: set[str]) -> Mapping[str, ModelState]:
        return {name: state for name, state in self._models.items() if name not in names}

    def leases_of(self, model: str) -> int:
        """On its engine, whichever of the models it carries they are for."""
        entry = self._state.entry_of(model)
        return 0 if entry is None else len(entry.leases)

    def wake_at_s(self, at_s: float) -> float | None:
        """When a Tick would next change what happens to a waiter; None when only events can."""
        state = self._state
        if not state.queue:
            return None
        times = [w.deadline_at_s for w in state.queue if w.deadline_at_s is not None]
        times += [w.arrived_s + state.limits.bypass_s for w in state.queue]
        times += [e.stays_until_s(state.limits) for e in state.resident.values() if e.up]
        return min((time for time in times if time > at_s), default=None)

    # --- events ---------------------------------------------------------------------------------

    def step(self, event: Event) -> list[Command]:
        """Take one event; returns what is to be done about it, in order."""
        state = self._state
        if isinstance(event, Want):
            want(state, event)
        elif isinstance(event, Release):
            release(state, event)
        else:
            self._step_rare(event)
        out, state.out = state.out, []
        return out

    def _step_rare(self, event: Event) -> None:
        state = self._state
        match event:
            case Cancel():
                cancel(state, event)
            case Tick():
                tick(state, event.at_s)
            case Loaded() | LoadFailed() | Unloaded() | Died() | Measured() | Sized():
                engine_event(state, event)
            case AdminLoad():
                admin_load(state, event)
            case AdminUnload():
                admin_unload(state, event)
            case Pin() | Unpin():
                pin(state, event)
            case Prefer():
                prefer(state, event.plan, event.at_s)
            case FleetChanged():
                fleet_changed(state, event.fleet, event.at_s)
            case SetBudget():
                set_budget(state, event)
            case SetPolicy():
                set_policy(state, event)
            case Close():
                close(state, event)
            case _:
                raise TypeError(f"the residency machine knows no event {type(event).__name__}")
