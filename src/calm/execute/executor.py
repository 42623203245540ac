"""The sole owner of the residency machine: feeds it events, carries out its commands.

A grant for a model that is resident is made inside `acquire` without a task switch, so a warm request pays
microseconds. Everything that takes time (loads, stops) runs in the engine room and comes back as an event.
All methods are to be called on the event loop's thread.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import deque
from collections.abc import Callable, Mapping

from calm.errors import CalmError, UnknownModel
from calm.execute.alarm import Alarm
from calm.execute.engine_room import EngineRoom, Weights
from calm.execute.events import (
    AdminLoad,
    AdminUnload,
    Cancel,
    CancelLoad,
    Close,
    Command,
    Discipline,
    Done,
    Event,
    FleetChanged,
    Grant,
    Limits,
    Measured,
    Moved,
    Pin,
    Prefer,
    Refuse,
    Release,
    SetBudget,
    SetPolicy,
    StartLoad,
    StartUnload,
    Tick,
    Unpin,
    Want,
)
from calm.execute.eviction import EvictionPolicy, parse_eviction
from calm.execute.hosting import Crew, crews, same_crew
from calm.execute.remotes import Remotes
from calm.execute.residency import Machine
from calm.execute.sizing import size_fleet
from calm.ports import Clock, EngineBackend, RunningEngine
from calm.records import Endpoint, Lease, LeaseRequest, ModelCard, ModelState, PlacementPlan, Residency

log = logging.getLogger("calm.execute")
OnTransition = Callable[[str, Residency, Residency, float, str | None], None]
Logged = tuple[float, Event, tuple[Command, ...]]


class _Ask:
    """Someone waiting for an answer; `future` only exists when it did not come at once."""

    __slots__ = ("answered_s", "asked_s", "endpoint", "error", "future", "load_s", "model")

    def __init__(self, model: str, asked_s: float) -> None:
        self.model = model
        self.asked_s = asked_s
        self.answered_s: float | None = None
        self.endpoint: Endpoint | None = None
        self.load_s = 0.0
        self.error: CalmError | None = None
        self.future: asyncio.Future[None] | None = None


class Executor:
    """Leases engines, keeps them within memory and cores, loads and unloads them."""

    def __init__(
        self,
        cards: Mapping[str, ModelCard],
        backends: Mapping[str, EngineBackend],
        weights: Weights,
        clock: Clock,
        limits: Limits,
        *,
        queue: Discipline = "fifo",
        eviction: str | EvictionPolicy = "calm",
        log_size: int = 1000,
    ) -> None:
        """`backends` by engine kind. Raises BadInput when `eviction` names no policy."""
        self._clock = clock
        self._limits = limits
        keep = parse_eviction(eviction) if isinstance(eviction, str) else eviction
        self._machine = Machine(limits, keep, queue)
        self._room = EngineRoom(backends, weights, clock, self._feed)
        self._cards: dict[str, ModelCard] = {}
        self._crews: dict[str, Crew] = {}
        self._tickets = itertools.count(1)
        self._asks: dict[int, _Ask] = {}
        self._remotes = Remotes(self._room, clock, self._feed)
        self._alarm = Alarm(self._machine.wake_at_s, self._wake, limits.bypass_s)
        self._listeners: list[OnTransition] = []
        self._log: deque[Logged] = deque(maxlen=log_size)
        self._measuring = False
        self._idle: asyncio.Event | None = None
        self.update_fleet(cards)

    # --- leases ---------------------------------------------------------------------------------

    async def acquire(self, request: LeaseRequest) -> Lease:
        """The right to send one request to `request.model`; give it back with `release`.

        Returns without a task switch when the model is resident and free. Raises UnknownModel, NeverFits,
        LoadFailed, QueueFull, DeadlineExceeded, ShuttingDown, Unavailable (the operator unloaded it), and
        EngineLost when a remote model went in the moment it was granted. A cancelled caller leaves
        nothing behind.
        """
        now_s = self._clock.now()
        ticket = next(self._tickets)
        ask = self._asks[ticket] = _Ask(request.model, now_s)
        self._feed(
            Want(now_s, ticket, request.request_id, request.model, request.expected_s, request.deadline_at_s)
        )
        if ask.answered_s is None:
            await self._answer(ticket, ask)
        if ask.error is not None:
            raise ask.error
        if ask.endpoint is None:
            ask.endpoint = await self._reach(ticket, request.model)
        waited_s = (ask.answered_s or now_s) - now_s
        return Lease(
            ticket=ticket,
            request_id=request.request_id,
            model=request.model,
            endpoint=ask.endpoint,
            queued_s=max(0.0, waited_s - ask.load_s),
            load_s=ask.load_s,
        )

    def release(self, lease: Lease) -> None:
        """Give a lease back; safe to repeat, and after its engine died."""
        self._feed(Release(self._clock.now(), lease.ticket))

    async def _reach(self, ticket: int, model: str) -> Endpoint:
        try:
            host = self._host(model)
            return await self._remotes.endpoint(model, host, self._cards.get(host), self._crews.get(host, ()))
        except BaseException:
            self._feed(Release(self._clock.now(), ticket))
            raise

    async def _answer(self, ticket: int, ask: _Ask) -> None:
        ask.future = asyncio.get_running_loop().create_future()
        try:
            await ask.future
        except BaseException:  # cancelled, or the caller's coroutine was closed
            self._withdraw(ticket)
            raise

    def _withdraw(self, ticket: int) -> None:
        """The caller is gone: out of the queue, or, if the grant raced in, the lease back."""
        if self._asks.pop(ticket, None) is not None:
            self._feed(Cancel(self._clock.now(), ticket))
        else:
            self._feed(Release(self._clock.now(), ticket))

    # --- orders ---------------------------------------------------------------------------------

    async def load(self, model: str) -> None:
        """Make a model resident, evicting idle ones if need be; returns when it is. Errors as `acquire`."""
        await self._order(model, lambda at_s, ticket: AdminLoad(at_s, ticket, model))

    async def unload(self, model: str, force: bool = False) -> None:
        """Returns when the model is out of memory. Leases are waited for unless `force`, which ends them

        and also overrides a pin. Raises BadInput for a pinned or remote model, and for an adapter.
        """
        await self._order(model, lambda at_s, ticket: AdminUnload(at_s, ticket, model, force))

    async def _order(self, model: str, event: Callable[[float, int], Event]) -> None:
        now_s = self._clock.now()
        ticket = next(self._tickets)
        ask = self._asks[ticket] = _Ask(model, now_s)
        self._feed(event(now_s, ticket))
        if ask.answered_s is None:
            await self._answer(ticket, ask)
        if ask.error is not None:
            raise ask.error

    def pin(self, model: str) -> None:
        """Never evict this model, and load it as soon as there is room. Raises UnknownModel."""
        self._feed(Pin(self._clock.now(), self._known(model)))

    def unpin(self, model: str) -> None:
        self._feed(Unpin(self._clock.now(), self._known(model)))

    def _host(self, model: str) -> str:
        """Whose engine serves a model."""
        card = self._cards.get(model)
        return model if card is None else card.host

    def _known(self, model: str) -> str:
        if model not in self._cards:
            raise UnknownModel(f"{model}: no such model in the fleet")
        return model

    def prefer(self, plan: PlacementPlan) -> None:
        """Propose what to have in memory; ignored when residency changed since the plan's revision."""
        self._feed(Prefer(self._clock.now(), plan))

    def update_fleet(self, cards: Mapping[str, ModelCard]) -> None:
        """New cards in force. Leases on changed or removed models run to their end."""
        before, self._cards = self._cards, dict(cards)
        had, self._crews = self._crews, crews(self._cards)
        for host, crew in had.items():
            kept = same_crew(crew, self._crews.get(host, ()))
            if before[host].remote and not (kept and self._cards.get(host) == before[host]):
                self._remotes.leave(host)
        self._feed(FleetChanged(self._clock.now(), size_fleet(self._cards, self._limits.cores)))

    def set_budget(self, budget_bytes: int) -> None:
        self._feed(SetBudget(self._clock.now(), budget_bytes))

    def set_queue(self, queue: Discipline) -> None:
        self._feed(SetPolicy(self._clock.now(), queue=queue))

    def set_eviction(self, spec: str) -> None:
        """Raises BadInput when `spec` is no policy."""
        self._feed(SetPolicy(self._clock.now(), eviction=parse_eviction(spec)))

    async def tick(self) -> None:
        """Once a second: deadlines, idle models, retries, and the footprints of what is resident."""
        self._feed(Tick(self._clock.now()))
        if self._measuring:
            return
        self._measuring = True
        try:
            for model, footprint_bytes in await self._room.measure():
                self._feed(Measured(self._clock.now(), model, footprint_bytes))
        finally:
            self._measuring = False

    async def close(self, grace_s: float = 10.0) -> None:
        """Refuse who waits, give leases `grace_s` to end, stop every engine. Returns when all are gone."""
        self._idle = asyncio.Event()
        self._feed(Close(self._clock.now()))
        try:
            await asyncio.wait_for(self._idle.wait(), grace_s)
        except TimeoutError:
            if self.in_flight:
                log.warning("%d requests did not end within %.1f s of grace", self.in_flight, grace_s)
        self._feed(Close(self._clock.now(), force=True))
        await self._remotes.leave_all()
        await self._room.settled()
        self._alarm.stop()

    # --- what can be read -----------------------------------------------------------------------

    def engine(self, model: str) -> RunningEngine | None:
        """The engine that answers for a model now, its base's for an adapter; None while it has none."""
        host = self._host(model)
        up = self._room.up.get(host)
        return up.engine if up is not None else self._remotes.engine(host)

    async def gone(self, model: str, engine: RunningEngine, within_s: float = 1.0) -> bool:
        """True once `engine` no longer serves the model. The death of a process is learned when it is reaped:

        milliseconds after its socket went silent. False when it still serves after `within_s`.
        """
        until_s = self._clock.now() + (within_s if engine.pids() else 0.0)
        while self.engine(model) is engine and self._clock.now() < until_s:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        return self.engine(model) is not engine

    def pids(self) -> Mapping[str, tuple[int, ...]]:
        """Processes of each resident local engine, by host."""
        return {model: up.engine.pids() for model, up in self._room.up.items()}

    def snapshot_models(self) -> Mapping[str, ModelState]:
        """Every model's state, an adapter's being its host's; the mapping never changes afterwards."""
        return self._machine.models()

    def load_of(self, model: str) -> int:
        """Leases held now on the engine that serves a model."""
        return self._machine.leases_of(model)

    @property
    def revision(self) -> int:
        return self._machine.revision

    @property
    def budget_bytes(self) -> int:
        return self._machine.budget_bytes

    @property
    def used_bytes(self) -> int:
        return self._machine.used_bytes

    @property
    def queue_length(self) -> int:
        return self._machine.queue_length

    @property
    def in_flight(self) -> int:
        return self._machine.in_flight

    @property
    def cores(self) -> int:
        return self._limits.cores

    @property
    def threads_in_use(self) -> int:
        return self._machine.cores_in_use

    @property
    def policies(self) -> tuple[str, str]:
        """Queue discipline and eviction policy in force."""
        return self._machine.policies

    @property
    def events(self) -> tuple[Logged, ...]:
        """The latest events with the commands they led to, oldest first."""
        return tuple(self._log)

    def subscribe(self, listener: OnTransition) -> None:
        """Call `listener(model, old, new, at_s, detail)` on every residency change."""
        self._listeners.append(listener)

    # --- the machine ----------------------------------------------------------------------------

    def _feed(self, event: Event) -> None:
        commands = self._machine.step(event)
        self._log.append((event.at_s, event, tuple(commands)))
        for command in commands:
            self._perform(command, event.at_s)
        self._alarm.after(event, bool(self._machine.queue_length))
        if self._idle is not None and not self._machine.in_flight:
            self._idle.set()

    def _perform(self, command: Command, at_s: float) -> None:
        match command:
            case Grant(ticket):
                self._granted(self._asks.pop(ticket), at_s)
            case Refuse(ticket, error):
                ask = self._asks.pop(ticket)
                ask.error = error
                _answered(ask, at_s)
            case Done(ticket):
                _answered(self._asks.pop(ticket), at_s)
            case StartLoad(model, threads):
                self._room.load(self._cards[model], threads, self._crews[model])
            case CancelLoad(model):
                self._room.cancel_load(model)
            case StartUnload(model):
                self._room.unload(model)
            case Moved():
                self._tell(command)

    def _granted(self, ask: _Ask, at_s: float) -> None:
        up = self._room.up.get(self._host(ask.model))
        if up is not None:
            ask.endpoint = up.endpoints.get(ask.model)
            ask.load_s = max(0.0, min(at_s, up.ready_s) - max(ask.asked_s, up.started_s))
        _answered(ask, at_s)

    def _tell(self, moved: Moved) -> None:
        log.info("%s: %s -> %s (%s)", moved.model, moved.old, moved.new, moved.detail or "")
        for listener in self._listeners:
            try:
                listener(moved.model, moved.old, moved.new, moved.at_s, moved.detail)
            except Exception:
                log.exception("a listener failed on %s", moved)

    def _wake(self) -> None:
        self._feed(Tick(self._clock.now()))


def _answered(ask: _Ask, at_s: float) -> None:
    ask.answered_s = at_s
    if ask.future is not None and not ask.future.done():
        ask.future.set_result(None)
