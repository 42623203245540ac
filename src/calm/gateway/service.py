"""The port the door is programmed against: everything HTTP callers can ask of CALM, without HTTP.

Kept apart from the loop that implements it so that the door is tested with a scripted service and the loop
without sockets. Every method speaks records or plain JSON-ready documents; every failure is a CalmError.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Annotated, Protocol

import msgspec

from calm.records import (
    Ask,
    Decision,
    Feedback,
    ModelCard,
    Outcome,
    Record,
    Snapshot,
    StoredRequest,
    Strict,
    Weights,
)
from calm.registry.problems import CardProblem

Document = Mapping[str, object]
"""A JSON object that msgspec can encode."""


class Reply(Protocol):
    """An answer under way. Entered when the engine has begun to answer (stream: with its first event)."""

    @property
    def request_id(self) -> str: ...

    @property
    def model(self) -> str | None:
        """Card name of the model that answers; set once entered."""
        ...

    @property
    def decision(self) -> Decision: ...

    @property
    def queued_s(self) -> float: ...

    @property
    def outcome(self) -> Outcome | None:
        """Energy, usage and times; set when `body` returned, `events` ended, or the block was left."""
        ...

    async def body(self) -> bytes:
        """The engine's whole JSON answer, as it came. For asks that do not stream."""
        ...

    def events(self) -> AsyncIterator[bytes]:
        """The engine's stream payloads (JSON, unframed) in order, without [DONE].

        Ends normally only when the engine finished; a stream that breaks raises CalmError.
        """
        ...


class Readiness(Record, frozen=True, kw_only=True):
    """Whether CALM can serve, and when not, why."""

    ready: bool
    reason: str | None = None


class Steering(Strict, frozen=True, kw_only=True):
    """A change of policy while running; a field left out stays as it is."""

    policy: str | None = None
    """calm, paper[:mode[:lambda]], fixed:NAME, random, round-robin, least-loaded, or a plug-in."""
    goal: str | None = None
    weights: Weights | None = None
    quality_floor: Annotated[float, msgspec.Meta(gt=0, lt=1)] | msgspec.UnsetType | None = msgspec.UNSET
    """Mean quality to hold; None (null) takes it away."""


class Service(Protocol):
    """What the loop offers the door."""

    def serve(self, ask: Ask) -> AbstractAsyncContextManager[Reply]:
        """Entering raises CalmError before the first byte; leaving the block early cancels the work."""
        ...

    def readiness(self) -> Readiness: ...

    def cards(self) -> Mapping[str, ModelCard]:
        """The fleet by name. Never loads a model."""
        ...

    def bad_cards(self) -> Sequence[CardProblem]:
        """Metadata files that were refused, with field and reason."""
        ...

    def snapshot(self) -> Snapshot:
        """The system now. Never loads a model; cheap enough for every scrape."""
        ...

    async def load(self, model: str) -> None:
        """Return when the model is resident. Raises UnknownModel, NeverFits, LoadFailed."""
        ...

    async def unload(self, model: str) -> None:
        """Return when its memory is back; running answers finish first. Raises UnknownModel."""
        ...

    async def pin(self, model: str, pinned: bool) -> None:
        """Keep a model resident (loading it if need be), or let it be evicted again."""
        ...

    async def explain(self, request_id: str) -> StoredRequest | None:
        """The request as stored: decision, outcome, feedback."""
        ...

    async def recent(self, limit: int, *, model: str | None, status: str | None) -> Sequence[StoredRequest]:
        """The newest requests, newest first, of one model or with one outcome where that is given."""
        ...

    async def feedback(self, feedback: Feedback, *, tenant: str | None = None) -> None:
        """Raises UnknownRequest when no decision is stored under the id, or it is not this tenant's."""
        ...

    async def knowledge(self) -> Document:
        """What is stored, how well it predicts, joules by engine, and the meter in use."""
        ...

    async def events(self, since: int, limit: int) -> Sequence[Record]:
        """Residency events with `seq` greater than `since`, oldest first."""
        ...

    def goals(self) -> Mapping[str, Weights]: ...

    async def set_goals(self, goals: Mapping[str, Weights]) -> None:
        """Add or replace named goals. Raises BadInput."""
        ...

    def policy(self) -> Document:
        """The policy in force: `policy`, `goal`, `weights`, the names of those `available`, and
        `quality_floor` with `quality_price`, which is None until it is found."""
        ...

    async def steer(self, change: Steering) -> None:
        """Raises BadInput for an unknown policy or goal, or a floor out of range."""
        ...
