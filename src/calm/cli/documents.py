"""The server's answers as the command line reads them.

Lenient where the server's own records are strict: a field that is missing or null is unknown, a field that is
new is ignored, so a client and a server of neighbouring versions still understand each other. They also keep
numpy, which the records need, out of commands that only print.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec


class Lenient(msgspec.Struct, frozen=True, kw_only=True):
    """Base of all: immutable, unknown fields ignored."""


# --- a stored request ---------------------------------------------------------------------------


class TermView(Lenient, frozen=True, kw_only=True):
    name: str
    value: float | None = None
    regret: float | None = None
    weight: float | None = None

    @property
    def contribution(self) -> float | None:
        if self.regret is None or self.weight is None:
            return None
        return self.regret * self.weight


class CandidateView(Lenient, frozen=True, kw_only=True):
    model: str
    score: float | None = None
    terms: tuple[TermView, ...] = ()

    def term(self, name: str) -> TermView | None:
        return next((term for term in self.terms if term.name == name), None)


class RefusalView(Lenient, frozen=True, kw_only=True):
    model: str
    constraint: str
    reason: str


class BeliefView(Lenient, frozen=True, kw_only=True):
    mean: float | None = None
    sd: float | None = None


class EstimateView(Lenient, frozen=True, kw_only=True):
    prompt_tokens: float | None = None
    output_tokens: BeliefView | None = None
    queue_s: BeliefView | None = None
    load_s: BeliefView | None = None
    ttft_s: BeliefView | None = None
    total_s: BeliefView | None = None
    energy_j: BeliefView | None = None
    quality: BeliefView | None = None


class WeightsView(Lenient, frozen=True, kw_only=True):
    latency: float = 0.0
    energy: float = 0.0
    quality: float = 0.0
    cost: float = 0.0


class DecisionView(Lenient, frozen=True, kw_only=True):
    request_id: str
    policy: str
    goal: str | None = None
    weights: WeightsView = WeightsView()
    ranked: tuple[CandidateView, ...] = ()
    refused: tuple[RefusalView, ...] = ()
    estimates: Mapping[str, EstimateView] = {}
    decision_s: float | None = None
    wall_s: float | None = None


class ReadingView(Lenient, frozen=True, kw_only=True):
    joules: float
    meter: str
    kind: str


class OutcomeView(Lenient, frozen=True, kw_only=True):
    model: str | None = None
    status: str = "ok"
    queue_s: float | None = None
    load_s: float | None = None
    ttft_s: float | None = None
    total_s: float | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    energy: ReadingView | None = None
    finish_reason: str | None = None
    error: str | None = None
    attempts: int = 1


class FeedbackView(Lenient, frozen=True, kw_only=True):
    rating: float
    source: str | None = None
    comment: str | None = None


class RequestView(Lenient, frozen=True, kw_only=True):
    request_id: str | None = None
    kind: str | None = None
    tenant: str | None = None
    pinned: str | None = None
    query: str | None = None
    decision: DecisionView | None = None
    outcome: OutcomeView | None = None
    feedback: tuple[FeedbackView, ...] = ()


class Page(Lenient, frozen=True, kw_only=True):
    """GET /calm/v1/decisions: newest first, each as it came."""

    decisions: tuple[msgspec.Raw, ...] = ()


# --- the fleet ----------------------------------------------------------------------------------


class StateView(Lenient, frozen=True, kw_only=True):
    residency: str
    model: str | None = None
    """Whose engine this is the state of."""
    pinned: bool = False
    in_flight: int = 0
    waiting: int = 0
    slots: int = 0
    threads: int = 0
    footprint_bytes: int | None = None
    load_s: float | None = None
    reason: str | None = None


class ModelView(Lenient, frozen=True, kw_only=True):
    name: str
    adapter_of: str | None = None
    context: int | None = None
    capabilities: tuple[str, ...] = ()
    state: StateView | None = None


class RefusedCardView(Lenient, frozen=True, kw_only=True):
    file: str
    reason: str
    field: str | None = None


class FleetView(Lenient, frozen=True, kw_only=True):
    """GET /calm/v1/fleet."""

    models: tuple[ModelView, ...] = ()
    refused: tuple[RefusedCardView, ...] = ()
    budget_bytes: int | None = None
    used_bytes: int | None = None
    queue_length: int = 0
    in_flight: int = 0


class FilesView(Lenient, frozen=True, kw_only=True):
    """What a fleet directory says without a server: printed, never received."""

    fleet: str
    models: tuple[Mapping[str, object], ...]
    problems: tuple[str, ...]


# --- an answer ----------------------------------------------------------------------------------


class ReceiptView(Lenient, frozen=True, kw_only=True):
    """The `calm` object of an answer."""

    request_id: str
    model: str | None = None
    policy: str | None = None
    goal: str | None = None
    energy_j: float | None = None
    energy_meter: str | None = None
    energy_kind: str | None = None
    queue_s: float | None = None
    load_s: float | None = None
    ttft_s: float | None = None
    total_s: float | None = None


class MessageView(Lenient, frozen=True, kw_only=True):
    content: str | None = None


class ChoiceView(Lenient, frozen=True, kw_only=True):
    delta: MessageView = MessageView()
    message: MessageView = MessageView()
    finish_reason: str | None = None


class AnswerView(Lenient, frozen=True, kw_only=True):
    """A whole answer or one chunk of a stream."""

    choices: tuple[ChoiceView, ...] = ()
    calm: ReceiptView | None = None
