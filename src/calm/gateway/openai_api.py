"""OpenAI's endpoints: bytes to an `Ask`, the service's reply to bytes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AbstractAsyncContextManager, aclosing, nullcontext
from typing import Annotated

import msgspec
from aiohttp import web

from calm.errors import CalmError, ShuttingDown, UnknownModel
from calm.gateway.faults import REQUEST_ID, internal
from calm.gateway.limits import Limits
from calm.gateway.relay import PREFIX, Relay, receipt
from calm.gateway.routes import IDENTITY_KEY, REQUEST_ID_KEY, Handler, Route, json_response, read_body
from calm.gateway.service import Reply, Service
from calm.gateway.shapes import convert
from calm.gateway.stream import EventStream
from calm.gateway.wire import PARSERS, ROUTED, read_object
from calm.ports import Clock
from calm.records import Ask, Feedback, Kind, Strict

log = logging.getLogger("calm.gateway")


class FeedbackBody(Strict, frozen=True, kw_only=True):
    """POST /v1/feedback."""

    request_id: Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
    rating: Annotated[float, msgspec.Meta(ge=1, le=5)]
    comment: Annotated[str, msgspec.Meta(max_length=10_000)] | None = None
    source: Annotated[str, msgspec.Meta(max_length=128)] | None = None


class OpenAiApi:
    """Handlers of /v1. Stateless but for what it was given."""

    def __init__(self, service: Service, limits: Limits, clock: Clock) -> None:
        self._service = service
        self._limits = limits
        self._clock = clock
        self._created = int(clock.wall())

    def routes(self) -> tuple[Route, ...]:
        return (
            Route("POST", "/v1/chat/completions", self._handler("chat")),
            Route("POST", "/v1/completions", self._handler("completion")),
            Route("POST", "/v1/embeddings", self._handler("embeddings")),
            Route("GET", "/v1/models", self.models),
            Route("GET", "/v1/models/{id:.+}", self.model),
            Route("POST", "/v1/feedback", self.feedback),
        )

    def _handler(self, kind: Kind) -> Handler:
        parse = PARSERS[kind]

        async def answer(request: web.Request) -> web.StreamResponse:
            arrived_s = self._clock.now()
            raw = await read_body(request, self._limits)
            ask = parse(
                raw,
                request.headers,
                limits=self._limits,
                request_id=request[REQUEST_ID_KEY],
                now_s=arrived_s,
                tenant=request[IDENTITY_KEY].name,
            )
            return await (self._stream(request, ask) if ask.stream else self._whole(ask))

        return answer

    # --- answers ------------------------------------------------------------------------------------

    async def _whole(self, ask: Ask) -> web.Response:
        async with self._service.serve(ask) as reply:
            payload = await reply.body()
            body = self._relay(ask, reply).whole(payload, receipt(reply))
        headers = {REQUEST_ID: ask.request_id, **reply_headers(reply), **energy_headers(reply)}
        return web.Response(body=body, content_type="application/json", headers=headers)

    async def _stream(self, request: web.Request, ask: Ask) -> web.StreamResponse:
        out = EventStream(request, {REQUEST_ID: ask.request_id}, self._limits)
        try:
            await self._pump(ask, out)
        except asyncio.CancelledError:  # the client left (then nobody reads this) or the server closes
            if out.opened:
                await out.broken(ShuttingDown("the server is closing"))
            raise
        except Exception as error:
            if not out.opened:
                raise
            await out.broken(self._mid_stream(error, ask))
        finally:
            await out.close()
        return out.response

    async def _pump(self, ask: Ask, out: EventStream) -> None:
        """Events as they come; returns early, which cancels the work, when the client has left."""
        async with self._service.serve(ask) as reply:
            relay = self._relay(ask, reply)
            await out.open(reply_headers(reply))
            async with _closing(reply.events()) as events:
                async for payload in events:
                    for ready in relay.chunk(payload):
                        if not await out.send(ready):
                            return
            for ready in relay.last(receipt(reply)):
                await out.send(ready)
            await out.finish()

    def _relay(self, ask: Ask, reply: Reply) -> Relay:
        card = self._service.cards().get(reply.model or "")
        return Relay(ask, reply.model, trim=card is not None and card.chat.trim)

    def _mid_stream(self, error: Exception, ask: Ask) -> CalmError:
        """What the error event says, and the log with it."""
        if isinstance(error, CalmError):
            log.warning("request %s: stream broke: %s", ask.request_id, error.message)
            return error
        log.error("request %s failed mid-stream", ask.request_id, exc_info=error)
        return internal(ask.request_id)

    # --- the rest -----------------------------------------------------------------------------------

    async def models(self, request: web.Request) -> web.Response:
        """GET /v1/models: `calm`, one `calm/GOAL` per goal, and the fleet."""
        return json_response({"object": "list", "data": [self._entry(name) for name in self._names()]})

    async def model(self, request: web.Request) -> web.Response:
        """GET /v1/models/{id}."""
        name = request.match_info["id"]
        if name not in self._names():
            raise UnknownModel(f'no model "{name[:200]}" here; GET /v1/models lists them', field="model")
        return json_response(self._entry(name))

    async def feedback(self, request: web.Request) -> web.Response:
        """POST /v1/feedback: a rating of an answer, by its request id or by the `id` of the completion."""
        fields = read_object(await read_body(request, self._limits), self._limits.max_depth)
        body = convert(fields, FeedbackBody)
        request_id = body.request_id
        for prefix in PREFIX.values():
            request_id = request_id.removeprefix(prefix)
        feedback = Feedback(
            request_id=request_id,
            rating=body.rating,
            source=body.source or request[IDENTITY_KEY].name or "user",
            wall_s=self._clock.wall(),
            comment=body.comment,
        )
        identity = request[IDENTITY_KEY]
        await self._service.feedback(feedback, tenant=None if identity.role == "admin" else identity.name)
        return json_response({"request_id": request_id, "rating": body.rating, "recorded": True})

    def _names(self) -> list[str]:
        return [ROUTED, *(f"{ROUTED}/{goal}" for goal in self._service.goals()), *self._service.cards()]

    def _entry(self, name: str) -> dict[str, object]:
        """As OpenAI has it; a model of the fleet also tells whose adapter it is, null for none."""
        entry = {"id": name, "object": "model", "created": self._created, "owned_by": "calm"}
        card = self._service.cards().get(name)
        return entry if card is None else {**entry, "calm": {"adapter_of": card.adapter_of}}


def reply_headers(reply: Reply) -> dict[str, str]:
    """What is known when the answer begins."""
    decision_ms = f"{reply.decision.decision_s * 1000:.3f}"
    return {"x-calm-model": reply.model or "", "x-calm-decision-ms": decision_ms}


def energy_headers(reply: Reply) -> dict[str, str]:
    """What is known when it has ended. Absent when no meter could tell."""
    energy = reply.outcome.energy if reply.outcome else None
    if energy is None:
        return {}
    return {
        "x-calm-energy-j": f"{energy.joules:.6g}",
        "x-calm-energy-meter": f"{energy.meter}; {energy.kind}",
    }


def _closing(events: AsyncIterator[bytes]) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
    """An async generator left early is closed now, not when the garbage collector finds it."""
    return aclosing(events) if isinstance(events, AsyncGenerator) else nullcontext(events)
