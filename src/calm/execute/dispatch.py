"""Execute one decision: lease the best model's engine, send, stream, and account for what happened.

    async with dispatcher.serve(ask, decision, cards, deadline_at_s) as reply:
        async for payload in reply.events(): ...        # or: await reply.body()
    reply.outcome                                       # always set afterwards, whatever happened

Failover to the next candidate happens only before the first byte; after it a failure is raised to the
caller, never passed off as a success. Leaving the block early closes the engine's connection, which is what
stops the work there. Lease, energy account and outcome are settled in one place, `_settle`, exactly once.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Protocol

from calm.errors import (
    CalmError,
    EngineLost,
    NotReached,
    ShuttingDown,
    Unavailable,
    UnknownModel,
    UpstreamRejected,
)
from calm.execute.assemble import Assembly
from calm.execute.endings import Deadline, describe, status_of
from calm.execute.observe import Observation, error_message
from calm.execute.sse import SseParser
from calm.ports import Clock, RunningEngine, Upstream, UpstreamReply
from calm.records import (
    Ask,
    Decision,
    Endpoint,
    Lease,
    LeaseRequest,
    ModelCard,
    Outcome,
    Reading,
)

PATHS = {"chat": "/v1/chat/completions", "completion": "/v1/completions", "embeddings": "/v1/embeddings"}
RETRYABLE = frozenset({408, 425, 429})
Encode = Callable[[Ask, ModelCard, Endpoint], bytes]


class Leases(Protocol):
    """The part of the Executor that dispatch needs."""

    async def acquire(self, request: LeaseRequest) -> Lease: ...

    def release(self, lease: Lease) -> None: ...

    def engine(self, model: str) -> RunningEngine | None: ...

    def load_of(self, model: str) -> int:
        """Leases held now on the engine that serves a model."""
        ...

    async def gone(self, model: str, engine: RunningEngine) -> bool:
        """True once that engine no longer serves the model; False when it still does after a moment."""
        ...


class Ledger(Protocol):
    """The part of the energy ledger that dispatch needs."""

    def begin(self, request_id: str, engine: str, pids: tuple[int, ...]) -> None: ...

    def end(self, request_id: str) -> Reading | None: ...


class Dispatcher:
    """Builds a `Serving` per request over the shared executor, upstream and ledger."""

    def __init__(
        self,
        *,
        executor: Leases,
        upstream: Upstream,
        ledger: Ledger,
        clock: Clock,
        encode: Encode,
        attempts: int,
    ) -> None:
        self.executor = executor
        self.upstream = upstream
        self.ledger = ledger
        self.clock = clock
        self.encode = encode
        self.attempts = attempts

    def serve(
        self, ask: Ask, decision: Decision, cards: Mapping[str, ModelCard], deadline_at_s: float
    ) -> Serving:
        return Serving(self, ask, decision, cards, deadline_at_s)


class Serving:
    """One request under way. Async context manager; raises CalmError on entry when nobody could serve."""

    def __init__(
        self,
        shared: Dispatcher,
        ask: Ask,
        decision: Decision,
        cards: Mapping[str, ModelCard],
        deadline_at_s: float,
    ) -> None:
        self.ask = ask
        self.decision = decision
        self.model: str | None = None
        self.outcome: Outcome | None = None
        self.seen = Observation()
        self._shared = shared
        self._cards = cards
        self._deadline_at_s = deadline_at_s
        self._attempts = 0
        self._lease: Lease | None = None
        self._context: AbstractAsyncContextManager[UpstreamReply] | None = None
        self._reply: UpstreamReply | None = None
        self._events: AsyncIterator[bytes] | None = None
        self._first: bytes | None = None
        self._sent_at_s: float | None = None
        self._queued_s = 0.0
        self._load_s = 0.0
        self._concurrency = 1
        self._energy: Reading | None = None

    @property
    def request_id(self) -> str:
        return self.ask.request_id

    @property
    def queued_s(self) -> float:
        return self._queued_s

    # --- entering: lease, send, first byte; failover lives here -----------------------------------

    async def __aenter__(self) -> Serving:
        try:
            async with self._deadline():
                await self._first_that_serves()
        except BaseException as error:
            await self._settle(error)
            raise
        return self

    async def _first_that_serves(self) -> None:
        failure: CalmError | None = None
        for candidate in self.decision.ranked[: self._shared.attempts]:
            try:
                return await self._serve_on(candidate.model)
            except ShuttingDown:
                raise
            except (Unavailable, UnknownModel) as error:
                failure = error
                await self._let_go()
        raise failure or Unavailable("no model could take the request")

    async def _serve_on(self, model: str) -> None:
        """One model; twice when its engine was dead before it took anything, which its owner learns a moment later."""
        try:
            return await self._attempt(model)
        except NotReached:
            dead = self._shared.executor.engine(model)
            await self._let_go()
            if dead is not None and not await self._shared.executor.gone(model, dead):
                raise
        return await self._attempt(model)

    async def _attempt(self, model: str) -> None:
        self._attempts += 1
        self.model = model
        await self._take_lease(model)
        assert self._lease is not None
        card = self._cards[model]
        body = self._shared.encode(self.ask, card, self._lease.endpoint)
        self._sent_at_s = self._shared.clock.now()
        self._context = self._shared.upstream.post(self._lease.endpoint, PATHS[self.ask.kind], body)
        self._reply = await self._context.__aenter__()
        await self._refuse_bad_status(self._reply, model)
        if streams_upstream(self.ask, card):
            await self._await_first_event(self._reply, model)

    async def _take_lease(self, model: str) -> None:
        """Joules are the engine's: what it serves at the same time, base and adapters, shares them."""
        executor, estimate = self._shared.executor, self.decision.estimates.get(model)
        expected_s = estimate.prefill_s.mean + estimate.decode_s.mean if estimate else 1.0
        lease = await executor.acquire(
            LeaseRequest(
                request_id=self.request_id,
                model=model,
                expected_s=expected_s,
                deadline_at_s=self._deadline_at_s,
            )
        )
        self._lease = lease
        self._queued_s += lease.queued_s
        self._load_s += lease.load_s
        self._concurrency = max(1, executor.load_of(model))
        engine = executor.engine(model)
        host = self._cards[model].host
        self._shared.ledger.begin(self.request_id, host, engine.pids() if engine else ())

    async def _refuse_bad_status(self, reply: UpstreamReply, model: str) -> None:
        if reply.status < 400:
            return
        body = await reply.read()
        said = error_message(body)
        if reply.status >= 500 or reply.status in RETRYABLE:
            raise EngineLost(f"{model} answered {reply.status}: {said}")
        raise UpstreamRejected(said, status=reply.status, body=body)

    async def _await_first_event(self, reply: UpstreamReply, model: str) -> None:
        if "event-stream" not in reply.content_type:
            raise EngineLost(f"{model} did not stream: it answered {reply.content_type or 'no content type'}")
        self._events = self._payloads(reply, model)
        try:
            self._first = await anext(self._events)
        except StopAsyncIteration:
            raise EngineLost(f"{model} ended its stream before the first token") from None

    # --- the answer -------------------------------------------------------------------------------

    async def body(self) -> bytes:
        """The whole JSON answer. Afterwards `outcome` is set."""
        if self._events is not None:
            return await self._assembled()
        assert self._reply is not None
        try:
            async with self._deadline():
                payload = await self._reply.read()
        except BaseException as error:
            await self._settle(error)
            raise
        self.seen.read(payload, self._shared.clock.now())
        await self._settle(None)
        return payload

    async def _assembled(self) -> bytes:
        assembly = Assembly(chat=self.ask.kind == "chat")
        async for payload in self.events():
            assembly.add(payload)
        return assembly.body()

    async def events(self) -> AsyncIterator[bytes]:
        """Stream payloads (JSON, unframed) as they arrive, without [DONE]. Afterwards `outcome` is set.

        Raises EngineLost when the stream breaks off or carries an error, DeadlineExceeded when time is up.
        """
        assert self._events is not None
        assert self._first is not None
        try:
            yield self._first
            while (payload := await self._next_event(self._events)) is not None:
                yield payload
        except BaseException as error:
            await self._settle(error)
            raise
        await self._settle(None)

    async def _next_event(self, events: AsyncIterator[bytes]) -> bytes | None:
        async with self._deadline():
            return await anext(events, None)

    async def _payloads(self, reply: UpstreamReply, model: str) -> AsyncIterator[bytes]:
        parser, now = SseParser(), self._shared.clock.now
        async for chunk in reply.chunks():
            for payload in parser.feed(chunk):
                if payload == b"[DONE]":
                    return
                self.seen.read(payload, now())
                if self.seen.error:
                    raise EngineLost(f"{model} broke off: {self.seen.error}")
                yield payload
        if self.seen.finish_reason is None:
            raise EngineLost(f"{model} ended its stream without finishing")

    # --- leaving: everything is settled once --------------------------------------------------------

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._settle(error or (None if self.outcome else asyncio.CancelledError()))

    async def _settle(self, error: BaseException | None) -> None:
        if self.outcome is not None:
            return
        self.outcome = self._conclude(error)  # first: a second cancellation must not lose the record
        try:
            await self._let_go()
        finally:
            self.outcome = self._conclude(error)

    async def _let_go(self) -> None:
        """Close the connection, close the energy account, give the lease back; safe to repeat."""
        context, self._context = self._context, None
        lease, self._lease = self._lease, None
        try:
            if lease is not None:
                self._note_energy(self._shared.ledger.end(self.request_id))
            if context is not None and self._reply is not None:
                await context.__aexit__(None, None, None)
        finally:
            self._reply = None
            if lease is not None:
                self._shared.executor.release(lease)

    def _note_energy(self, reading: Reading | None) -> None:
        before, self._energy = self._energy, reading
        if reading and before:  # an earlier attempt's joules were spent on this request too
            self._energy = Reading(
                joules=before.joules + reading.joules, meter=reading.meter, kind=reading.kind
            )

    def _conclude(self, error: BaseException | None) -> Outcome:
        seen, now = self.seen, self._shared.clock.now()
        first_at_s = seen.first_token_at_s or self._inferred_first_token_at_s(now)
        return Outcome(
            request_id=self.request_id,
            model=self.model,
            status=status_of(error),
            wall_s=self._shared.clock.wall(),
            queue_s=self._queued_s,
            load_s=self._load_s,
            prefill_s=seen.prefill_s,
            ttft_s=None if first_at_s is None else first_at_s - self.ask.arrived_s,
            total_s=now - self.ask.arrived_s,
            prompt_tokens=seen.prompt_tokens,
            cached_tokens=seen.cached_tokens,
            completion_tokens=seen.tokens_out(self.ask.samples),
            concurrency=self._concurrency,
            energy=self._energy,
            finish_reason=seen.finish_reason,
            error=describe(error),
            attempts=max(1, self._attempts),
        )

    def _inferred_first_token_at_s(self, now: float) -> float | None:
        """Without a stream the first token is not seen; llama.cpp's prefill time tells when it was."""
        if self._events is not None or self._sent_at_s is None or self.seen.prefill_s is None:
            return None
        return min(now, self._sent_at_s + self.seen.prefill_s)

    def _deadline(self) -> Deadline:
        return Deadline(
            self._deadline_at_s - self._shared.clock.now(), self._deadline_at_s - self.ask.arrived_s
        )


def streams_upstream(ask: Ask, card: ModelCard) -> bool:
    """Whether the engine is asked for a stream, also where the caller wanted one body (see assemble.py)."""
    return ask.stream or (card.engine.kind == "llamacpp" and ask.kind != "embeddings")
