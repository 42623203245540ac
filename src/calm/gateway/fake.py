"""A scripted `Service`: the door's tests and benchmarks run against it, over real sockets, without models.

Public, as every port ships its fake. It answers what its `Script` says, in the script's order, and keeps
what it was asked and how each answer ended.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from types import TracebackType

import msgspec

from calm.errors import BadInput, CalmError, UnknownModel, UnknownRequest
from calm.gateway.app import build_app
from calm.gateway.auth import Guard, Keys
from calm.gateway.limits import Limits
from calm.gateway.metrics import Metrics
from calm.gateway.server import Server, start
from calm.gateway.service import Document, Readiness, Service, Steering
from calm.records import (
    Ask,
    Decision,
    Feedback,
    KnowledgeSummary,
    ModelCard,
    ModelState,
    Outcome,
    OutcomeStatus,
    Reading,
    Residency,
    Snapshot,
    StoredRequest,
    Weights,
)
from calm.registry.problems import CardProblem

Step = bytes | BaseException | asyncio.Event
"""A payload to send, a failure to raise, or an event to wait for."""


class Script(msgspec.Struct, frozen=True, kw_only=True):
    """How one request goes: `before` the first byte, then `steps` (joined where nothing is streamed)."""

    before: tuple[BaseException | asyncio.Event, ...] = ()
    steps: tuple[Step, ...] = ()
    energy: Reading | None = Reading(joules=1.5, meter="scripted", kind="modelled")


class ScriptedReply:
    """One scripted answer under way."""

    def __init__(self, service: ScriptedService, ask: Ask, script: Script) -> None:
        self.request_id = ask.request_id
        self.model: str | None = None
        self.decision = decision_for(ask)
        self.queued_s = 0.25
        self.outcome: Outcome | None = None
        self._service = service
        self._ask = ask
        self._script = script

    async def __aenter__(self) -> ScriptedReply:
        self._service.entered.set()
        try:
            for step in self._script.before:
                await _take(step)
        except BaseException as error:
            self._conclude("cancelled" if isinstance(error, asyncio.CancelledError) else "error")
            raise
        self.model = self._ask.model or self._service.default
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.outcome is None:
            self._conclude("cancelled" if not isinstance(error, CalmError) else "error")

    async def body(self) -> bytes:
        parts = [payload async for payload in self._play()]
        self._conclude("ok")
        return b"".join(parts)

    async def events(self) -> AsyncIterator[bytes]:
        async for payload in self._play():
            yield payload
        self._conclude("ok")

    async def _play(self) -> AsyncIterator[bytes]:
        for step in self._script.steps:
            if isinstance(step, bytes):
                yield step
            else:
                await _take(step)

    def _conclude(self, status: OutcomeStatus) -> None:
        self.outcome = Outcome(
            request_id=self.request_id,
            model=self.model,
            status=status,
            wall_s=0.0,
            queue_s=self.queued_s,
            ttft_s=0.5,
            total_s=1.0,
            prompt_tokens=5,
            completion_tokens=2,
            energy=self._script.energy if status == "ok" else None,
        )
        self._service.concluded(self.outcome)


class ScriptedService:
    """Implements `Service` in memory. `script` decides per ask; the default answers "hello" in two tokens."""

    def __init__(self, *cards: ModelCard, script: Callable[[Ask], Script] | None = None) -> None:
        self.fleet = {card.name: card for card in cards or (card_named("small"), card_named("large"))}
        self.default = next(iter(self.fleet))
        self.script = script or hello
        self.state: dict[str, Residency] = dict.fromkeys(self.fleet, "ready")
        self.pinned: set[str] = set()
        self.asks: list[Ask] = []
        self.outcomes: list[Outcome] = []
        self.ratings: list[Feedback] = []
        self.stored: dict[str, StoredRequest] = {}
        self.named_goals: dict[str, Weights] = {"balanced": Weights()}
        self.steered = Steering(policy="calm", goal="balanced")
        self.ready = Readiness(ready=True)
        self.entered = asyncio.Event()
        self.ended = asyncio.Event()

    def serve(self, ask: Ask) -> ScriptedReply:
        self.asks.append(ask)
        return ScriptedReply(self, ask, self.script(ask))

    def concluded(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        self.ended.set()

    def readiness(self) -> Readiness:
        return self.ready

    def cards(self) -> Mapping[str, ModelCard]:
        return self.fleet

    def bad_cards(self) -> Sequence[CardProblem]:
        return (CardProblem(file="broken.toml", field="context", reason="expected int"),)

    def snapshot(self) -> Snapshot:
        return Snapshot(
            revision=1,
            at_s=0.0,
            models={name: self._state(card.host) for name, card in self.fleet.items()},
            budget_bytes=1000,
            used_bytes=sum(100 for state in self.state.values() if state == "ready"),
            cores=2,
            threads_in_use=0,
            queue_length=0,
            in_flight=0,
        )

    async def load(self, model: str) -> None:
        self._set(model, "ready")

    async def unload(self, model: str) -> None:
        self._set(model, "cold")

    async def pin(self, model: str, pinned: bool) -> None:
        self._set(model, "ready")
        (self.pinned.add if pinned else self.pinned.discard)(model)

    async def explain(self, request_id: str) -> StoredRequest | None:
        return self.stored.get(request_id)

    async def recent(self, limit: int, *, model: str | None, status: str | None) -> Sequence[StoredRequest]:
        return tuple(self.stored.values())[:limit]

    async def feedback(self, feedback: Feedback, *, tenant: str | None = None) -> None:
        if not any(ask.request_id == feedback.request_id for ask in self.asks):
            raise UnknownRequest(f"no request {feedback.request_id}", field="request_id")
        self.ratings.append(feedback)

    async def knowledge(self) -> KnowledgeSummary:
        count = len(self.outcomes)
        return KnowledgeSummary(
            requests=count,
            feedback=0,
            events=0,
            since_wall_s=None,
            statuses={},
            models=(),
            energy=(),
            dropped=0,
        )

    async def events(self, since: int, limit: int) -> Sequence[Document]:
        return [{"seq": seq, "kind": "loaded"} for seq in range(since + 1, min(since + limit, 3) + 1)]

    def goals(self) -> Mapping[str, Weights]:
        return self.named_goals

    async def set_goals(self, goals: Mapping[str, Weights]) -> None:
        self.named_goals.update(goals)

    def policy(self) -> Document:
        floor = self.steered.quality_floor
        return {
            "policy": self.steered.policy,
            "goal": self.steered.goal,
            "quality_floor": None if floor is msgspec.UNSET else floor,
            "available": ["calm", "paper"],
        }

    async def steer(self, change: Steering) -> None:
        if change.policy not in (None, "calm", "paper"):
            raise BadInput(f"policy: unknown {change.policy}", field="policy")
        self.steered = change

    def _set(self, model: str, state: Residency) -> None:
        if model not in self.fleet:
            raise UnknownModel(f"no model {model}")
        self.state[model] = state

    def _state(self, model: str) -> ModelState:
        return ModelState(
            model=model,
            residency=self.state[model],
            pinned=model in self.pinned,
            in_flight=0,
            waiting=0,
            slots=4,
            threads=1,
            footprint_bytes=100,
            footprint_measured=True,
            load_s=0.1,
            last_used_s=None,
            failures=0,
        )


async def _take(step: BaseException | asyncio.Event) -> None:
    if isinstance(step, asyncio.Event):
        await step.wait()
    else:
        raise step


def card_named(name: str) -> ModelCard:
    """The smallest valid card."""
    return ModelCard(name=name, description=f"the {name} model")


def decision_for(ask: Ask) -> Decision:
    """A decision without candidates, for answers that were scripted and not chosen."""
    return Decision(
        request_id=ask.request_id,
        policy="scripted",
        goal=ask.wishes.goal,
        weights=ask.wishes.weights or Weights(),
        ranked=(),
        refused=(),
        estimates={},
        snapshot_revision=1,
        decision_s=0.000123,
        wall_s=0.0,
    )


def hello(ask: Ask) -> Script:
    """What a well-behaved engine answers to each kind of ask."""
    if ask.kind == "embeddings":
        return Script(steps=(EMBEDDINGS,))
    if ask.stream:
        return Script(steps=CHAT_CHUNKS if ask.kind == "chat" else TEXT_CHUNKS)
    return Script(steps=(CHAT if ask.kind == "chat" else TEXT,))


def _json(value: object) -> bytes:
    return msgspec.json.encode(value)


def _event(kind: str, choices: Sequence[object], **more: object) -> bytes:
    head = {"id": "engine-1", "object": kind, "created": 1_700_000_000, "model": "/weights/m.gguf"}
    return _json({**head, "choices": choices, **more})


def _delta(delta: Mapping[str, object], finish: str | None = None) -> list[object]:
    return [{"index": 0, "delta": delta, "finish_reason": finish}]


def _piece(text: str, finish: str | None = None) -> list[object]:
    return [{"index": 0, "text": text, "finish_reason": finish, "logprobs": None}]


USAGE = {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}
CHAT = _event(
    "chat.completion",
    [{"index": 0, "message": {"role": "assistant", "content": "hello"}, "finish_reason": "stop"}],
    usage=USAGE,
    timings={"prompt_ms": 3.5},
)
TEXT = _event("text_completion", _piece("hello", "stop"), usage=USAGE)
EMBEDDINGS = _json(
    {
        "object": "list",
        "model": "m",
        "data": [{"object": "embedding", "index": 0, "embedding": [0.6, 0.8]}],
        "usage": {"prompt_tokens": 2, "total_tokens": 2},
    }
)
CHAT_CHUNKS = (
    _event("chat.completion.chunk", _delta({"role": "assistant", "content": ""})),
    _event("chat.completion.chunk", _delta({"content": "hel"})),
    _event("chat.completion.chunk", _delta({"content": "lo"})),
    _event("chat.completion.chunk", _delta({}, "stop")),
    _event("chat.completion.chunk", [], usage=USAGE, timings={"prompt_ms": 3.5}),
)
TEXT_CHUNKS = (
    _event("text_completion", _piece("hel")),
    _event("text_completion", _piece("lo", "stop")),
    _event("text_completion", [], usage=USAGE),
)


@asynccontextmanager
async def serving(
    service: Service,
    keys: Keys,
    *,
    limits: Limits | None = None,
    guard: Guard | None = None,
    metrics: Metrics | None = None,
) -> AsyncIterator[Server]:
    """The real door before `service`, on a free port of the loopback address."""
    metrics = metrics or Metrics(lambda name: name in service.cards())
    app = build_app(service, guard or Guard(keys), limits or Limits(), metrics)
    server = await start(app, "127.0.0.1", 0)
    try:
        yield server
    finally:
        await server.stop(grace_s=0.0)
