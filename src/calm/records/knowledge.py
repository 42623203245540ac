"""What the knowledge base gives back: stored requests and their sums."""

from __future__ import annotations

from collections.abc import Mapping

from calm.records.base import Kind, MeterKind, Record
from calm.records.decision import Decision
from calm.records.execution import Feedback, Outcome
from calm.records.request import Features


class StoredRequest(Record, frozen=True, kw_only=True):
    """One request as it was stored: what `calm explain` prints. `features.embedding` is left out."""

    request_id: str
    wall_s: float
    kind: Kind
    tenant: str | None
    pinned: str | None
    stream: bool
    query: str | None
    """None unless the operator lets prompts be stored."""
    features: Features
    decision: Decision
    outcome: Outcome | None
    feedback: tuple[Feedback, ...]


class ModelSummary(Record, frozen=True, kw_only=True):
    """Means over a model's stored requests; predicted ones over those it was the first choice for."""

    model: str
    requests: int
    ok: int
    observed_ttft_s: float | None
    predicted_ttft_s: float | None
    observed_total_s: float | None
    predicted_total_s: float | None
    observed_output_tokens: float | None
    predicted_output_tokens: float | None
    observed_energy_j: float | None
    predicted_energy_j: float | None
    rating: float | None
    """1..5."""


class MeterSummary(Record, frozen=True, kw_only=True):
    meter: str
    kind: MeterKind
    requests: int
    joules: float


class KnowledgeSummary(Record, frozen=True, kw_only=True):
    requests: int
    feedback: int
    events: int
    since_wall_s: float | None
    statuses: Mapping[str, int]
    models: tuple[ModelSummary, ...]
    energy: tuple[MeterSummary, ...]
    dropped: int
    """Records lost to a full queue or refused by the database since this process started."""
