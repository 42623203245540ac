"""What happens to the residency machine and what it orders: typed events in, typed commands out.

Everything that reaches `Machine.step` is one of these events, so a history is a list that can be logged,
printed and replayed; everything it wants done is one of these commands, so it needs no I/O. Times are the
caller's monotonic seconds (`at_s`); tickets are numbers the caller never uses twice. What callers and operators
ask may name an adapter; engines, and all commands, go by the host's name.
(Events in, instructions out after the worker state machine of dask.distributed.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec

from calm.errors import CalmError
from calm.execute.eviction import EvictionPolicy
from calm.records import ModelCard, PlacementPlan, Residency

Discipline = Literal["fifo", "stcf"]


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """The operator's numbers the machine keeps to."""

    cores: int
    """Core tokens shared by the local engines that have leases."""
    budget_bytes: int
    max_queue: int = 256
    """Asks that may wait at once; 0: none, an ask is granted at once or refused."""
    bypass_s: float = 2.0
    """How long a later ask may overtake an earlier one in something the earlier one waits for."""
    aging: float = 0.1
    """STCF: seconds of expected time forgiven per second of waiting."""
    min_residence_s: float | None = None
    """A loaded model stays at least this long; None: twice its last load time, at most `max_residence_s`."""
    max_residence_s: float = 10.0
    idle_unload_s: float | None = None
    """Unload what nobody used for so long; None: never, memory is there to be used."""
    backoff_s: float = 1.0
    """Wait after the first failed load; doubles with each further one."""
    backoff_max_s: float = 60.0
    stable_s: float = 60.0
    """A model that ran so long without trouble has its failures forgotten."""


class Event(msgspec.Struct, frozen=True):
    """Something that happened at `at_s`."""

    at_s: float


class Want(Event, frozen=True):
    """A request wants to be sent to a model; answered once, by Grant or Refuse, unless cancelled first."""

    ticket: int
    request_id: str
    model: str
    expected_s: float
    deadline_at_s: float | None = None


class Cancel(Event, frozen=True):
    """Whoever held this ticket no longer waits. Nothing happens when it was answered already."""

    ticket: int


class Release(Event, frozen=True):
    """A granted ticket is given back. Nothing happens when it was, or its engine died."""

    ticket: int


class Sized(Event, frozen=True):
    """The weights are here and tell a better estimate than the card did."""

    model: str
    footprint_bytes: int


class Loaded(Event, frozen=True):
    """An engine answers (for a remote model: was reached). None: its footprint could not be read."""

    model: str
    footprint_bytes: int | None
    load_s: float
    refused: Mapping[str, str] = {}
    """Adapters it could not take, with the reason."""


class LoadFailed(Event, frozen=True):
    model: str
    reason: str


class Unloaded(Event, frozen=True):
    """The engine is gone and its memory is back; also the end of a cancelled load."""

    model: str
    reason: str | None = None


class Died(Event, frozen=True):
    """An engine ended without being asked to. Its leases end with it."""

    model: str
    reason: str


class Measured(Event, frozen=True):
    model: str
    footprint_bytes: int


class AdminLoad(Event, frozen=True):
    """The operator wants a model resident; answered by Done or Refuse."""

    ticket: int
    model: str


class AdminUnload(Event, frozen=True):
    """The operator wants a model gone; `force` ends its leases and overrides a pin. Done or Refuse."""

    ticket: int
    model: str
    force: bool = False


class Pin(Event, frozen=True):
    """Never evict this model; load it as soon as there is room."""

    model: str


class Unpin(Event, frozen=True):
    model: str


class Prefer(Event, frozen=True):
    """The planner proposes what to have in memory. Proposals made on an older revision are ignored."""

    plan: PlacementPlan


class Fleet(msgspec.Struct, frozen=True, kw_only=True):
    """The cards in force; by host, the bytes its engine is believed to need and the threads it would get."""

    cards: Mapping[str, ModelCard]
    bytes: Mapping[str, int]
    threads: Mapping[str, int]


class FleetChanged(Event, frozen=True):
    fleet: Fleet


class SetBudget(Event, frozen=True):
    budget_bytes: int


class SetPolicy(Event, frozen=True):
    """None: leave as it is."""

    queue: Discipline | None = None
    eviction: EvictionPolicy | None = None


class Tick(Event, frozen=True):
    """Time passed: deadlines, aging, idle models, failed models whose wait is over."""


class Close(Event, frozen=True):
    """No new work. Waiting asks are refused; leases run on until `force`."""

    force: bool = False


class Command(msgspec.Struct, frozen=True):
    """Something the executor must do, in the order given."""


class StartLoad(Command, frozen=True):
    """Answer with Loaded, LoadFailed, or (once cancelled) Unloaded."""

    model: str
    threads: int


class CancelLoad(Command, frozen=True):
    """Stop the load and leave nothing behind; answer with Unloaded."""

    model: str


class StartUnload(Command, frozen=True):
    """Stop the engine; answer with Unloaded when its memory is back."""

    model: str


class Grant(Command, frozen=True):
    """The ticket may send its request now, and must be released."""

    ticket: int


class Done(Command, frozen=True):
    """The operator's order behind this ticket is carried out; nothing to release."""

    ticket: int


class Refuse(Command, frozen=True):
    ticket: int
    error: CalmError


class Moved(Command, frozen=True):
    """For the record: a model's residency changed."""

    model: str
    old: Residency
    new: Residency
    at_s: float
    detail: str | None = None
