"""Records to rows and back: the only place that knows how a record lies in a table."""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Sequence
from typing import NamedTuple, cast

import msgspec
import numpy as np

from calm.records import (
    Ask,
    Decision,
    Estimate,
    Features,
    Feedback,
    MeterKind,
    Outcome,
    Reading,
    StoredRequest,
    Vector,
)

Value = str | bytes | int | float | None
Row = tuple[Value, ...]

REQUEST_COLUMNS = (
    "id", "wall_s", "kind", "tenant", "pinned", "stream", "query", "prompt_chars", "prompt_tokens",
    "language", "turns", "max_tokens", "samples", "conversation", "wants_json", "wants_tools", "embedder",
    "embedding", "form", "policy", "goal", "chosen", "score", "predicted_ttft_s", "predicted_total_s",
    "predicted_output_tokens", "predicted_energy_j", "predicted_quality", "decision_s", "decision",
)  # fmt: skip
OUTCOME_COLUMNS = (
    "request_id", "wall_s", "model", "status", "queue_s", "load_s", "prefill_s", "ttft_s", "total_s",
    "prompt_tokens", "cached_tokens", "completion_tokens", "concurrency", "memory_bytes", "energy_j",
    "energy_meter", "energy_kind", "finish_reason", "error", "attempts",
)  # fmt: skip
FEEDBACK_COLUMNS = ("request_id", "wall_s", "rating", "source", "comment")
EVENT_COLUMNS = ("wall_s", "kind", "model", "detail")


class AskSummary(NamedTuple):
    """What is kept of an Ask: never its body, and its query only where the operator said so."""

    kind: str
    tenant: str | None
    pinned: str | None
    stream: bool
    query: str | None


def summarise(ask: Ask, *, with_query: bool) -> AskSummary:
    return AskSummary(ask.kind, ask.tenant, ask.model, ask.stream, ask.query if with_query else None)


def plain(value: object) -> object:
    """numpy's scalars as Python's, for the JSON encoder."""
    if isinstance(value, np.generic):
        return value.item()
    raise NotImplementedError(f"cannot store a {type(value).__name__}")


ENCODER = msgspec.json.Encoder(enc_hook=plain)
DECISION = msgspec.json.Decoder(Decision)


def request_row(ask: AskSummary, features: Features, decision: Decision) -> Row:
    best = decision.ranked[0] if decision.ranked else None
    estimate = decision.estimates.get(best.model) if best else None
    return (
        decision.request_id, decision.wall_s, ask.kind, ask.tenant, ask.pinned, ask.stream, ask.query,
        features.prompt_chars, float(features.prompt_tokens), features.language, features.turns,
        features.max_tokens, features.samples, features.conversation, features.wants_json,
        features.wants_tools, features.embedder, pack_vector(features.embedding), pack_vector(features.form),
        decision.policy, decision.goal, best.model if best else None, float(best.score) if best else None,
        *predicted(estimate), float(decision.decision_s), ENCODER.encode(decision),
    )  # fmt: skip


def predicted(estimate: Estimate | None) -> tuple[float | None, ...]:
    """ttft_s, total_s, output_tokens, energy_j, quality."""
    if estimate is None:
        return (None,) * 5
    beliefs = (
        estimate.ttft_s, estimate.total_s, estimate.output_tokens, estimate.energy_j, estimate.quality
    )  # fmt: skip
    return tuple(None if belief is None else float(belief.mean) for belief in beliefs)


def outcome_row(outcome: Outcome) -> Row:
    energy = outcome.energy
    return (
        outcome.request_id, outcome.wall_s, outcome.model, outcome.status, outcome.queue_s, outcome.load_s,
        outcome.prefill_s, outcome.ttft_s, outcome.total_s, outcome.prompt_tokens, outcome.cached_tokens,
        outcome.completion_tokens, outcome.concurrency, outcome.memory_bytes,
        float(energy.joules) if energy else None, energy.meter if energy else None,
        energy.kind if energy else None, outcome.finish_reason, outcome.error, outcome.attempts,
    )  # fmt: skip


def feedback_row(feedback: Feedback) -> Row:
    return feedback.request_id, feedback.wall_s, float(feedback.rating), feedback.source, feedback.comment


def pack_vector(vector: Vector | Sequence[float] | None) -> bytes | None:
    """float16: a unit vector keeps three digits of each component in half the bytes of a float32."""
    return None if vector is None else np.asarray(vector, dtype=np.float16).tobytes()


def unpack_vector(blob: bytes | None) -> Vector | None:
    return None if blob is None else np.frombuffer(blob, dtype=np.float16).astype(np.float32)


def unpack_numbers(blob: bytes | None) -> tuple[float, ...] | None:
    return None if blob is None else tuple(np.frombuffer(blob, dtype=np.float16).tolist())


def to_features(row: sqlite3.Row, *, with_embedding: bool) -> Features:
    return Features(
        prompt_chars=row["prompt_chars"],
        prompt_tokens=row["prompt_tokens"],
        language=row["language"],
        embedding=unpack_vector(row["embedding"]) if with_embedding else None,
        embedder=row["embedder"],
        turns=row["turns"],
        max_tokens=row["max_tokens"],
        samples=row["samples"],
        conversation=row["conversation"],
        wants_json=bool(row["wants_json"]),
        wants_tools=bool(row["wants_tools"]),
        form=unpack_numbers(row["form"]) if with_embedding else None,
    )


def to_outcome(row: sqlite3.Row) -> Outcome:
    return Outcome(
        **{name: row[name] for name in OUTCOME_COLUMNS if not name.startswith("energy_")},
        energy=to_reading(row),
    )


def to_reading(row: sqlite3.Row) -> Reading | None:
    if row["energy_j"] is None:
        return None
    return Reading(
        joules=row["energy_j"], meter=row["energy_meter"], kind=cast(MeterKind, row["energy_kind"])
    )


def to_feedback(row: sqlite3.Row) -> Feedback:
    return Feedback(**{name: row[name] for name in FEEDBACK_COLUMNS})


def to_stored(row: sqlite3.Row, outcome: Outcome | None, feedback: tuple[Feedback, ...]) -> StoredRequest:
    return StoredRequest(
        request_id=row["id"],
        wall_s=row["wall_s"],
        kind=row["kind"],
        tenant=row["tenant"],
        pinned=row["pinned"],
        stream=bool(row["stream"]),
        query=row["query"],
        features=to_features(row, with_embedding=False),
        decision=decode_decision(row["decision"]),
        outcome=outcome,
        feedback=feedback,
    )


def decode_decision(data: bytes) -> Decision:
    """JSON has no infinity: the encoder writes null for one, and it is put back here."""
    try:
        return DECISION.decode(data)
    except msgspec.ValidationError:
        return msgspec.convert(with_infinities(msgspec.json.decode(data)), Decision)


# The numbers of a Decision that are never None: a null there was an infinity (or no number at all).
NEVER_NULL = frozenset({"score", "regret", "weight", "mean", "sd", "prompt_tokens", "cached_tokens"})


def with_infinities(value: object) -> object:
    if isinstance(value, dict):
        return {
            key: math.inf if item is None and key in NEVER_NULL else with_infinities(item)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [with_infinities(item) for item in value]
    return value
