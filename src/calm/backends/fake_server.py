"""The HTTP half of the scripted engine; `calm.backends.fake` says how to use it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Self

import msgspec
from aiohttp import web

from calm.backends.fake_wire import (
    JsonObject,
    adapter_number,
    chunk,
    embedding_answer,
    event,
    finish_reason,
    json_reply,
    limit,
    samples,
    usage_event,
    whole_answer,
)
from calm.records import Endpoint


@dataclass
class Script:
    """How one fake engine behaves. Every field may be changed while it runs."""

    answer: tuple[str, ...] = ("Hello", " from", " a", " fake", " engine", ".")
    """The tokens of every answer; `max_tokens` cuts them short with finish_reason `length`."""
    ttft_s: float = 0.0
    tpot_s: float = 0.0
    prompt_tokens: int = 7
    cached_tokens: int = 0
    token_gate: asyncio.Event | None = None
    """Answers wait for it before their first token."""
    die_after: int | None = None
    """Cut the connection after this many tokens (0: before any response byte)."""
    hang_after: int | None = None
    """Send this many tokens, then nothing more until the client leaves."""
    error_status: int | None = None
    """Answer this HTTP status with an OpenAI error object."""
    error_times: int | None = None
    """How many more requests get `error_status`; None: all of them."""
    load_s: float = 0.0
    load_gate: asyncio.Event | None = None
    """`FakeBackend.start` waits for it."""
    refuse: str | None = None
    """`FakeBackend.start` raises LoadFailed with this text; an adapter is refused with it."""
    refuse_times: int | None = None
    """How many more starts are refused; None: all of them."""
    footprint_bytes: int | None = 100 << 20
    pids: tuple[int, ...] = ()

    def refusal(self) -> str | None:
        """Why this start is refused, counted off `refuse_times`; None when it is not."""
        if self.refuse is None or self.refuse_times == 0:
            return None
        if self.refuse_times is not None:
            self.refuse_times -= 1
        return self.refuse


@dataclass(frozen=True)
class Seen:
    """One request as the fake received it."""

    path: str
    body: JsonObject
    headers: Mapping[str, str]


class _ConnectionCut(Exception):
    """The script told the engine to die here."""


@dataclass
class _Tally:
    in_flight: int = 0
    peak_in_flight: int = 0
    cancelled: int = 0
    completed: int = 0
    tokens: int = 0
    seen: list[Seen] = field(default_factory=list)


class FakeEngineServer:
    """An OpenAI-compatible server inside this process, on `socket` if given, else on a free loopback port.

    Serves /health, /v1/models, /v1/chat/completions, /v1/completions and /v1/embeddings. `cancelled` counts
    the requests whose client left before the answer was complete. A request is answered by the script of the
    adapter it asks for, by its number in `lora` as llama.cpp does or by its name in `model` as vLLM does.
    """

    def __init__(
        self,
        script: Script | None = None,
        *,
        socket: Path | None = None,
        model: str = "fake",
        adapters: Mapping[str, Script] = MappingProxyType({}),
    ) -> None:
        self.script = script or Script()
        self.adapters = dict(adapters)
        self._socket = socket
        self._model = model
        self._tally = _Tally()
        self._runner: web.AppRunner | None = None
        self._port: int | None = None
        self._open: dict[int, web.Request] = {}
        self._changed = asyncio.Event()

    @property
    def in_flight(self) -> int:
        return self._tally.in_flight

    @property
    def peak_in_flight(self) -> int:
        return self._tally.peak_in_flight

    @property
    def cancelled(self) -> int:
        return self._tally.cancelled

    @property
    def completed(self) -> int:
        return self._tally.completed

    @property
    def tokens_sent(self) -> int:
        return self._tally.tokens

    @property
    def seen(self) -> list[Seen]:
        return self._tally.seen

    @property
    def base_url(self) -> str:
        return "http://localhost" if self._socket else f"http://127.0.0.1:{self._port}"

    def endpoint(self, model: str | None = None, *, api_key: str | None = None) -> Endpoint:
        socket = str(self._socket) if self._socket else None
        return Endpoint(base_url=self.base_url, model=model or self._model, socket=socket, api_key=api_key)

    async def start(self) -> None:
        app = web.Application(client_max_size=64 << 20)
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/chat/completions", self._generate)
        app.router.add_post("/v1/completions", self._generate)
        app.router.add_post("/v1/embeddings", self._embeddings)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.0, access_log=None)
        await self._runner.setup()
        site: web.BaseSite
        if self._socket:
            site = web.UnixSite(self._runner, self._socket)
        else:
            site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        if not self._socket:
            self._port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """Idempotent. Cuts the connections that are still open."""
        runner, self._runner = self._runner, None
        for request in self._open.values():
            if request.transport:
                request.transport.abort()
        if runner:
            await runner.cleanup()
        if self._socket:
            self._socket.unlink(missing_ok=True)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def until(self, *, seen: int = 0, cancelled: int = 0, completed: int = 0, tokens: int = 0) -> None:
        """Wait until at least so many requests were seen, cancelled, completed, or tokens sent."""
        wanted = (seen, cancelled, completed, tokens)
        while any(have < want for have, want in zip(self._counts(), wanted, strict=True)):
            await self._changed.wait()

    def _counts(self) -> tuple[int, int, int, int]:
        tally = self._tally
        return len(tally.seen), tally.cancelled, tally.completed, tally.tokens

    # --- handlers ---

    async def _health(self, request: web.Request) -> web.Response:
        return json_reply({"status": "ok"})

    async def _models(self, request: web.Request) -> web.Response:
        names = (self._model, *self.adapters)
        return json_reply({"object": "list", "data": [{"id": name, "object": "model"} for name in names]})

    async def _embeddings(self, request: web.Request) -> web.StreamResponse:
        body = await self._note(request)
        failure = self._failure(self._script(body))
        if failure:
            return failure
        return json_reply(embedding_answer(body, self._model))

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = await self._note(request)
        with self._in_flight(request):
            return self._failure(self._script(body)) or await self._respond(request, body)

    async def _respond(self, request: web.Request, body: JsonObject) -> web.StreamResponse:
        respond = self._stream if body.get("stream") else self._whole
        try:
            reply = await respond(request, body)
        except _ConnectionCut:
            return web.Response()
        except (asyncio.CancelledError, ConnectionResetError):
            self._tally.cancelled += 1
            raise
        self._tally.completed += 1
        return reply

    async def _note(self, request: web.Request) -> JsonObject:
        body = msgspec.json.decode(await request.read(), type=JsonObject)
        self._tally.seen.append(Seen(path=request.path, body=body, headers=dict(request.headers)))
        self._notify()
        return body

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    @contextmanager
    def _in_flight(self, request: web.Request) -> Iterator[None]:
        tally = self._tally
        tally.in_flight += 1
        self._open[id(request)] = request
        tally.peak_in_flight = max(tally.peak_in_flight, tally.in_flight)
        try:
            yield
        finally:
            tally.in_flight -= 1
            self._open.pop(id(request), None)
            self._notify()

    def _script(self, body: JsonObject) -> Script:
        """The base's script, or that of the adapter the request asks for."""
        number = adapter_number(body)
        if number is not None and number < len(self.adapters):
            return list(self.adapters.values())[number]
        return self.adapters.get(str(body.get("model")), self.script)

    def _failure(self, script: Script) -> web.Response | None:
        status, times = script.error_status, script.error_times
        if status is None or times == 0:
            return None
        if times is not None:
            script.error_times = times - 1
        error = {"message": "scripted failure", "type": "server_error", "code": status}
        return json_reply({"error": error}, status)

    async def _tokens(self, request: web.Request, body: JsonObject) -> AsyncIterator[str]:
        script = self._script(body)
        if script.token_gate:
            await script.token_gate.wait()
        await pause(script.ttft_s)
        for index, token in enumerate(script.answer[: limit(body)]):
            if script.die_after == index:
                _cut(request)
            if script.hang_after == index:
                await asyncio.Event().wait()
            if index:
                await pause(script.tpot_s)
            self._tally.tokens += 1
            yield token

    async def _whole(self, request: web.Request, body: JsonObject) -> web.Response:
        started = time.monotonic()
        tokens = [token async for token in self._tokens(request, body)]
        return json_reply(
            whole_answer(body, self._model, "".join(tokens), self._closing(body, len(tokens), started))
        )

    async def _stream(self, request: web.Request, body: JsonObject) -> web.StreamResponse:
        started = time.monotonic()
        reply = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        script = self._script(body)
        if script.die_after == 0:
            _cut(request)
        await reply.prepare(request)
        count = 0
        async for token in self._tokens(request, body):
            count += 1
            for index in range(samples(body)):
                await reply.write(event(chunk(body, self._model, index, token, None)))
            self._notify()
        closing = self._closing(body, count, started)
        for index in range(samples(body)):
            await reply.write(
                event(chunk(body, self._model, index, None, finish_reason(body, len(script.answer))))
            )
        await reply.write(usage_event(body, self._model, closing) + b"data: [DONE]\n\n")
        await reply.write_eof()
        return reply

    def _closing(self, body: JsonObject, count: int, started: float) -> JsonObject:
        script, produced = self._script(body), count * samples(body)
        elapsed_ms = (time.monotonic() - started) * 1e3
        return {
            "finish_reason": finish_reason(body, len(script.answer)),
            "usage": {
                "prompt_tokens": script.prompt_tokens,
                "completion_tokens": produced,
                "total_tokens": script.prompt_tokens + produced,
                "prompt_tokens_details": {"cached_tokens": script.cached_tokens},
            },
            "timings": {
                "cache_n": script.cached_tokens,
                "prompt_n": script.prompt_tokens - script.cached_tokens,
                "prompt_ms": script.ttft_s * 1e3,
                "predicted_n": produced,
                "predicted_ms": max(elapsed_ms - script.ttft_s * 1e3, 0.0),
            },
        }


async def pause(seconds: float) -> None:
    if seconds > 0:
        await asyncio.sleep(seconds)


def _cut(request: web.Request) -> None:
    if request.transport:
        request.transport.abort()
    raise _ConnectionCut
