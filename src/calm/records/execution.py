"""What a chosen model's answer takes: endpoint, lease, reading of a meter, outcome, and what people thought of it."""

from __future__ import annotations

from pathlib import Path

from calm.records.base import MeterKind, OutcomeStatus, Record
from calm.records.card import ModelCard


class AdapterFile(Record, frozen=True, kw_only=True):
    """A LoRA adapter that an engine is to carry beside its base."""

    card: ModelCard
    weights: Path | None
    """None where the engine has it already: a server that knows the adapter by name."""


class Endpoint(Record, frozen=True, kw_only=True):
    """Where an engine listens. With `socket` the request goes over that unix socket."""

    base_url: str
    model: str
    socket: str | None = None
    api_key_env: str | None = None
    api_key: str | None = None
    """Per-child key of an engine we started ourselves; never a user's."""
    adapter: int | None = None
    """llama.cpp's number of the LoRA adapter to apply; one beyond the last adapter's is the base, said aloud (a
    request without a number would be answered from the adapter's prompt cache). None: an engine without adapters, or
    a server that knows them by name."""


class LeaseRequest(Record, frozen=True, kw_only=True):
    """What the Executor needs to know to queue a request for a model."""

    request_id: str
    model: str
    expected_s: float
    """Predicted service time once granted: orders the STCF queue."""
    deadline_at_s: float | None = None


class Lease(Record, frozen=True, kw_only=True):
    """The right to send one request to a resident engine; whoever holds it must release it."""

    ticket: int
    request_id: str
    model: str
    endpoint: Endpoint
    queued_s: float
    load_s: float
    """Time this request waited for a load; 0 when the model was resident."""


class Reading(Record, frozen=True, kw_only=True):
    """Energy of one request, with the meter's name and how it was obtained."""

    joules: float
    meter: str
    kind: MeterKind


class Outcome(Record, frozen=True, kw_only=True):
    """What was observed. Token counts are the engine's; None where it did not say."""

    request_id: str
    model: str | None
    status: OutcomeStatus
    wall_s: float
    queue_s: float = 0.0
    load_s: float = 0.0
    prefill_s: float | None = None
    ttft_s: float | None = None
    total_s: float = 0.0
    """From arrival to the last byte."""
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    concurrency: int = 1
    """Requests in flight on the same engine when this one was sent, itself included."""
    memory_bytes: int | None = None
    energy: Reading | None = None
    finish_reason: str | None = None
    error: str | None = None
    attempts: int = 1


class Feedback(Record, frozen=True, kw_only=True):
    """A rating of one answer, 1 (useless) to 5 (perfect), by a user or a judge."""

    request_id: str
    rating: float
    source: str
    wall_s: float
    comment: str | None = None
