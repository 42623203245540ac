"""Every seam of CALM as a Protocol. Adapters implement one; the pure rooms know only these."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Protocol

from calm.records import (
    AdapterFile,
    Ask,
    Candidate,
    Decision,
    Endpoint,
    Estimate,
    Features,
    Feedback,
    History,
    KnowledgeSummary,
    MeterKind,
    ModelCard,
    Outcome,
    Snapshot,
    StoredRequest,
    Vector,
    Weights,
)


class Clock(Protocol):
    def now(self) -> float:
        """Monotonic seconds."""
        ...

    def wall(self) -> float:
        """Unix seconds."""
        ...


class Embedder(Protocol):
    """Text to a unit vector. Synchronous: the ones worth having take well under a millisecond."""

    @property
    def name(self) -> str: ...

    @property
    def dimensions(self) -> int: ...

    def embed(self, text: str) -> Vector:
        """Shape (dimensions,), float32, L2 norm 1 (all zeros for a text without content)."""
        ...


class Policy(Protocol):
    """Ranks the models that may serve one request; pure apart from a small state such as a counter."""

    @property
    def name(self) -> str: ...

    def rank(
        self,
        ask: Ask,
        features: Features,
        snapshot: Snapshot,
        cards: Mapping[str, ModelCard],
        estimates: Mapping[str, Estimate],
        histories: Mapping[str, History],
        weights: Weights,
    ) -> tuple[Candidate, ...]:
        """Every card of `cards` exactly once, best first, scores ascending."""
        ...


class RunningEngine(Protocol):
    """An engine that answers. Ours to stop if we started it."""

    @property
    def endpoint(self) -> Endpoint: ...

    def adapters(self) -> Mapping[str, Endpoint]:
        """Where each adapter it carries is asked, by the adapter's name in the fleet."""
        ...

    def refused(self) -> Mapping[str, str]:
        """Adapters it could not take, with the reason."""
        ...

    def pids(self) -> tuple[int, ...]:
        """Processes on this machine that do its work; empty for a remote one."""
        ...

    def footprint_bytes(self) -> int | None:
        """Memory the engine holds now (proportional set size where known); None for a remote one."""
        ...

    async def died(self) -> str:
        """Returns only when the engine is gone without being asked to, with the reason."""
        ...

    async def stop(self) -> None:
        """Idempotent. Returns when the process group is gone and its memory is back with the system."""
        ...


class EngineBackend(Protocol):
    """Starts engines of one kind."""

    async def start(
        self, card: ModelCard, weights: Path | None, threads: int, adapters: Sequence[AdapterFile] = ()
    ) -> RunningEngine:
        """Returns when the engine answers its health check, carrying the adapters that fit its base.

        An adapter that does not fit is left out and named in `refused()`; it never fails the base.

        Raises LoadFailed (with the engine's last words) or, when cancelled, leaves nothing behind.
        """
        ...


class UpstreamReply(Protocol):
    """An engine's HTTP answer, still being received."""

    @property
    def status(self) -> int: ...

    @property
    def content_type(self) -> str: ...

    async def read(self) -> bytes:
        """The whole rest of the body. Raises EngineLost when it breaks off."""
        ...

    def chunks(self) -> AsyncIterator[bytes]:
        """The body as it arrives. Raises EngineLost when it breaks off."""
        ...


class Upstream(Protocol):
    """Speaks HTTP to an endpoint."""

    def post(self, endpoint: Endpoint, path: str, body: bytes) -> AbstractAsyncContextManager[UpstreamReply]:
        """`path` such as /v1/chat/completions. Entering raises EngineLost when nobody answers;

        leaving the block early closes the connection, which is what cancels work in the engine.
        """
        ...


class Meter(Protocol):
    """Joules of process groups since the meter was made. One meter per machine is chosen at start."""

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> MeterKind: ...

    def read(self, groups: Mapping[str, Sequence[int]]) -> Mapping[str, float]:
        """Cumulative joules of each group (name -> pids), monotone; a group it cannot see is left out."""
        ...


class KnowledgeStore(Protocol):
    """Remembers. Every `record_*` returns at once and is on disk within a second."""

    def record_decision(self, ask: Ask, features: Features, decision: Decision) -> None: ...

    def record_outcome(self, outcome: Outcome) -> None: ...

    def record_feedback(self, feedback: Feedback) -> None: ...

    def checkpoint(self, name: str, state: bytes) -> None:
        """Keep the state of an estimator under a name; the newest wins."""
        ...

    def restore(self, name: str) -> bytes | None: ...

    def flush(self) -> None:
        """Block until everything recorded so far is on disk."""
        ...

    def close(self) -> None: ...


class EventLog(Protocol):
    """Remembers what happened to the fleet: residency changes, loads, changes of policy or goal."""

    def record_event(
        self, kind: str, *, model: str | None = None, detail: Mapping[str, object] | None = None
    ) -> None:
        """Returns at once, like every `record_*`."""
        ...


class Recall(Protocol):
    """Reads back what was recorded. Blocking but thread-safe: call through asyncio.to_thread."""

    def decision(self, request_id: str) -> StoredRequest | None: ...

    def features_of(self, request_id: str) -> Features | None:
        """With the embedding, for learning from a rating that comes late."""
        ...

    def recent(
        self, limit: int = 50, *, model: str | None = None, status: str | None = None
    ) -> tuple[StoredRequest, ...]:
        """Newest first."""
        ...

    def summary(self) -> KnowledgeSummary: ...
