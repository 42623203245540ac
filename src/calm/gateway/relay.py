"""What goes to the engine and what comes back: the body in the engine's terms, the answer in CALM's.

Payloads are taken apart at their top level only (`msgspec.Raw`): a chunk costs microseconds however long its
log-probabilities are, and every field an engine adds survives.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from calm.errors import EngineLost
from calm.execute.dispatch import streams_upstream
from calm.gateway.opening import Opening
from calm.gateway.service import Reply
from calm.gateway.wire import wants_usage
from calm.records import Ask, Endpoint, ModelCard, Outcome, Reading, Record

Fields = dict[str, msgspec.Raw]

PREFIX = {"chat": "chatcmpl-", "completion": "cmpl-", "embeddings": "embd-"}
"""What stands before the request id in an answer's `id`, by kind, as with OpenAI."""

LENGTHS = ("max_tokens", "max_completion_tokens", "n_predict")
"""What the most tokens of an answer are called: by OpenAI, by OpenAI since, and by llama.cpp itself."""


class _Ending(msgspec.Struct):
    finish_reason: str | None = None


_top = msgspec.json.Decoder(Fields).decode
_endings = msgspec.json.Decoder(list[_Ending]).decode
_encode = msgspec.json.encode


# --- to the engine --------------------------------------------------------------------------------


def encode_for(ask: Ask, card: ModelCard, endpoint: Endpoint) -> bytes:
    """The body for one engine: its name for the model, the card's stop strings and longest answer, usage always asked.

    Which adapter is applied, and how strongly, is the fleet's to say: a caller's own `lora` is dropped, or it
    would answer as a model that nobody chose. The base of an engine that carries adapters has a number as well,
    which no adapter has.
    """
    body = dict(ask.body)
    body["model"] = endpoint.model
    body.pop("lora", None)
    if endpoint.adapter is not None:
        body["lora"] = [{"id": endpoint.adapter, "scale": 1.0}]
    if card.chat.stop and ask.kind != "embeddings":
        body["stop"] = merge_stops(body.get("stop"), card.chat.stop)
    if card.chat.answer_tokens is not None and ask.kind != "embeddings":
        body.update(shortened(body, card.chat.answer_tokens, alone=card.remote and ask.kind == "chat"))
    if streams_upstream(ask, card):
        body["stream"] = True
        options = body.get("stream_options")
        body["stream_options"] = {**(options if isinstance(options, Mapping) else {}), "include_usage": True}
    return _encode(body)


def merge_stops(given: object, added: tuple[str, ...]) -> list[str]:
    """The caller's stop strings (a string, a list or nothing) followed by the card's, each once."""
    mine = [given] if isinstance(given, str) else given if isinstance(given, list) else []
    return list(dict.fromkeys([*mine, *added]))


def shortened(body: Mapping[str, object], most: int, *, alone: bool) -> dict[str, int]:
    """The fields that keep an answer to `most` tokens, or to fewer where the caller wants fewer.

    Every field that the caller wrote says the same, for engines differ in which of them they believe; and
    `max_tokens`, which all of them read, is always there. Unless `alone`: OpenAI's own servers refuse it beside
    `max_completion_tokens`. A negative number is llama.cpp's for no limit.
    """
    given = [name for name in LENGTHS if body.get(name) is not None]
    wanted = [int(value) for name in given if isinstance(value := body[name], int | float) and value >= 0]
    told = given if alone and "max_completion_tokens" in given else [*given, "max_tokens"]
    return dict.fromkeys(told, min([most, *wanted]))


# --- back to the caller -----------------------------------------------------------------------------


class Receipt(Record, frozen=True, kw_only=True):
    """The `calm` object of an answer: who served it, why in a word, what it took. Unknown is null."""

    request_id: str
    model: str | None
    policy: str
    goal: str | None
    energy_j: float | None
    energy_meter: str | None
    energy_kind: str | None
    queue_s: float
    load_s: float | None
    ttft_s: float | None
    total_s: float | None
    decision_ms: float
    attempts: int | None


def receipt(reply: Reply) -> Receipt:
    """What is known of a reply by now."""
    outcome: Outcome | None = reply.outcome
    energy: Reading | None = outcome.energy if outcome else None
    return Receipt(
        request_id=reply.request_id,
        model=reply.model,
        policy=reply.decision.policy,
        goal=reply.decision.goal,
        energy_j=energy.joules if energy else None,
        energy_meter=energy.meter if energy else None,
        energy_kind=energy.kind if energy else None,
        queue_s=reply.queued_s,
        load_s=outcome.load_s if outcome else None,
        ttft_s=outcome.ttft_s if outcome else None,
        total_s=outcome.total_s if outcome else None,
        decision_ms=round(reply.decision.decision_s * 1000, 4),
        attempts=outcome.attempts if outcome else None,
    )


class Relay:
    """Gives one answer CALM's id and model name, and the receipt at its end.

    Holds a stream's last chunk back until the outcome is known: the chunk with the finish reason, or the
    usage chunk where the client asked for one. No token waits for it.
    """

    def __init__(self, ask: Ask, model: str | None, *, trim: bool = False) -> None:
        self._opening = Opening() if trim and ask.kind == "chat" else None
        self._id = msgspec.Raw(_encode(PREFIX[ask.kind] + ask.request_id))
        self._model = msgspec.Raw(_encode(model))
        self._has_id = ask.kind != "embeddings"
        self._usage = wants_usage(ask)
        self._held: Fields | None = None

    def whole(self, payload: bytes, receipt: Receipt) -> bytes:
        """A whole JSON answer. Raises EngineLost when the engine sent something else."""
        fields = self._named(payload)
        fields["calm"] = msgspec.Raw(_encode(receipt))
        return _encode(fields)

    def chunk(self, payload: bytes) -> list[bytes]:
        """The payloads that may go out now that this one has come."""
        fields = self._named(payload)
        bare = bytes(fields.get("choices", b"[]")).strip() == b"[]"
        usage = fields.get("usage") if self._usage else fields.pop("usage", None)
        if bare and usage is not None and not self._usage:
            self._absorb(fields)
            return []
        if not (bare and usage is not None) and not _ends(fields):
            return [*self._release(), _encode(fields)]
        ready = self._release()
        self._held = fields
        return ready

    def last(self, receipt: Receipt) -> list[bytes]:
        """What was held back, with the receipt."""
        if self._held is not None:
            self._held["calm"] = msgspec.Raw(_encode(receipt))
        return self._release()

    def _named(self, payload: bytes) -> Fields:
        try:
            fields = _top(payload)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            raise EngineLost("the engine answered with something that is not a JSON object") from None
        if self._has_id:
            fields["id"] = self._id
        fields["model"] = self._model
        if self._opening is not None and "choices" in fields:
            fields["choices"] = msgspec.Raw(self._opening.trim(bytes(fields["choices"])))
        return fields

    def _absorb(self, fields: Fields) -> None:
        """A usage chunk nobody asked for goes; what else the engine put there (timings) does not."""
        if self._held is not None:
            for name, value in fields.items():
                self._held.setdefault(name, value)

    def _release(self) -> list[bytes]:
        held, self._held = self._held, None
        return [] if held is None else [_encode(held)]


def _ends(fields: Fields) -> bool:
    """True for a chunk in which a choice finishes."""
    choices = bytes(fields.get("choices", b"[]"))
    if b"finish_reason" not in choices:
        return False
    try:
        return any(ending.finish_reason for ending in _endings(choices))
    except msgspec.MsgspecError:
        return False
