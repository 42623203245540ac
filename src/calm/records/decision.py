"""What Analyze predicts for each model and what Plan makes of it: estimates, prices, the ranking, its reasons."""

from __future__ import annotations

from collections.abc import Mapping

from calm.records.base import Record
from calm.records.request import Weights


class Belief(Record, frozen=True, kw_only=True, gc=False):
    """A prediction: mean and standard deviation of what will be observed."""

    mean: float
    sd: float


class Estimate(Record, frozen=True, kw_only=True, gc=False):
    """What one model is predicted to do with one request. `ttft_s = queue_s + load_s + prefill_s`."""

    model: str
    prompt_tokens: float
    cached_tokens: float
    """Prompt tokens expected to be in the engine's KV cache already."""
    output_tokens: Belief
    queue_s: Belief
    load_s: Belief
    prefill_s: Belief
    decode_s: Belief
    ttft_s: Belief
    total_s: Belief
    energy_j: Belief | None
    quality: Belief
    cost_usd: float | None = None


class History(Record, frozen=True, kw_only=True, gc=False):
    """Means over a model's last k = 100 observations, None before the first: the paper's dyn_l."""

    latency_s: float | None = None
    """Arrival to last byte."""
    service_s: float | None = None
    """Inference alone: latency without waiting for a turn or a load."""
    energy_j: float | None = None
    memory_bytes: float | None = None
    rating: float | None = None
    """1..5."""
    observations: int = 0


class Term(Record, frozen=True, kw_only=True, gc=False):
    """One summand of a score: `value` as measured or predicted, `regret` normalised, times `weight`."""

    name: str
    value: float | None
    regret: float
    weight: float

    @property
    def contribution(self) -> float:
        return self.weight * self.regret


class Candidate(Record, frozen=True, kw_only=True, gc=False):
    """A model with its score (lower is better) and every term of it."""

    model: str
    score: float
    terms: tuple[Term, ...]


class Refusal(Record, frozen=True, kw_only=True, gc=False):
    """A model that a hard constraint excluded, and why, in words a user understands."""

    model: str
    constraint: str
    reason: str


class Decision(Record, frozen=True, kw_only=True):
    """Who serves a request and why: what `calm explain` prints."""

    request_id: str
    policy: str
    goal: str | None
    weights: Weights
    ranked: tuple[Candidate, ...]
    refused: tuple[Refusal, ...]
    estimates: Mapping[str, Estimate]
    snapshot_revision: int
    decision_s: float
    wall_s: float
