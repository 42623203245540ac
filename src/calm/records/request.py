"""One request as it comes: what is asked, what its caller wishes, and what the Monitor reads off it."""

from __future__ import annotations

from collections.abc import Mapping

from calm.records.base import Capability, Kind, Privacy, Record, Strict, Vector


class Weights(Strict, frozen=True, kw_only=True):
    """How much each regret counts in the QoS score. Non-negative; only their ratios matter."""

    latency: float = 0.3
    energy: float = 0.2
    quality: float = 0.5
    cost: float = 0.0


class Wishes(Strict, frozen=True, kw_only=True):
    """What one caller asks for one request: the `calm` object of the body, or x-calm-* headers."""

    goal: str | None = None
    weights: Weights | None = None
    deadline_s: float | None = None
    max_energy_j: float | None = None
    max_cost_usd: float | None = None
    allowed_models: tuple[str, ...] | None = None
    privacy: Privacy | None = None
    conversation: str | None = None


class Ask(Record, frozen=True, kw_only=True):
    """A validated request. `body` is the OpenAI body as it came, less the `calm` object."""

    request_id: str
    kind: Kind
    query: str
    """The text the decision is about: the last user turn; a short follow-up carries the turn before it."""
    prompt_chars: int
    """Characters over all messages: what prefill has to read."""
    body: Mapping[str, object]
    requires: frozenset[Capability]
    stream: bool = False
    max_tokens: int | None = None
    samples: int = 1
    """OpenAI's `n`."""
    model: str | None = None
    """A pinned model; None when CALM is to choose."""
    wishes: Wishes = Wishes()
    tenant: str | None = None
    """Name of the API key used; never the key."""
    conversation: str | None = None
    """Stable id of the conversation (given, or a hash of its opening), for stickiness to a warm KV cache."""
    turns: int = 1
    arrived_s: float = 0.0


FORM = 16
"""Numbers in the form of a query."""


class Features(Record, frozen=True, kw_only=True):
    """What the Monitor reads off a query. `embedding` is L2-normalised, shape (d,), or None."""

    prompt_chars: int
    prompt_tokens: float
    """Model-independent estimate; analyze refines it per model."""
    language: str
    """ISO 639-1, `und` where the text is too short to tell."""
    embedding: Vector | None
    embedder: str | None
    turns: int
    max_tokens: int | None
    samples: int
    conversation: str | None
    wants_json: bool
    wants_tools: bool
    form: tuple[float, ...] | None = None
    """(FORM,): how the query is laid out (calm.monitor.form); None where nobody read it."""
