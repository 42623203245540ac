"""The scripted engine does what its script says, since everybody's tests rest on it."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from calm.backends.fake import FakeBackend, FakeEngineServer, Script
from calm.backends.upstream import HttpUpstream
from calm.errors import LoadFailed
from calm.records import AdapterFile, Endpoint, ModelCard

PATH = "/v1/chat/completions"
CARD = ModelCard(name="smol", description="d")


async def ask(server: FakeEngineServer, path: str = PATH, **body: object) -> tuple[int, Any]:
    request = msgspec.json.encode(body)
    async with HttpUpstream() as upstream, upstream.post(server.endpoint(), path, request) as reply:
        return reply.status, msgspec.json.decode(await reply.read())


async def test_answers_count_their_tokens() -> None:
    async with FakeEngineServer(Script(answer=("a", "b", "c"), cached_tokens=3)) as server:
        status, answer = await ask(server, messages=[], max_tokens=2, n=2, seed=5)
        assert status == 200
        assert [choice["message"]["content"] for choice in answer["choices"]] == ["ab", "ab"]
        assert answer["usage"]["completion_tokens"] == 4
        assert answer["timings"]["cache_n"] == 3
        assert answer["choices"][0]["finish_reason"] == "length"
        assert server.seen[0].body["seed"] == 5
        assert (server.completed, server.peak_in_flight, server.in_flight) == (1, 1, 0)


async def test_streams_close_with_usage_when_asked() -> None:
    async with FakeEngineServer(Script(answer=("a",))) as server, HttpUpstream() as upstream:
        body = b'{"messages":[],"stream":true,"stream_options":{"include_usage":true}}'
        async with upstream.post(server.endpoint(), PATH, body) as reply:
            events = (await reply.read()).split(b"\n\n")
    assert b'"content":"a"' in events[0]
    assert b'"finish_reason":"stop"' in events[1]
    assert b'"usage"' in events[2]
    assert events[3] == b"data: [DONE]"


async def test_completions_and_embeddings() -> None:
    async with FakeEngineServer() as server:
        _, answer = await ask(server, "/v1/completions", prompt="x", max_tokens=1)
        assert answer["choices"][0]["text"] == "Hello"
        _, answer = await ask(server, "/v1/embeddings", input=["a", "b"])
        assert len(answer["data"]) == 2


async def test_errors_as_often_as_scripted() -> None:
    async with FakeEngineServer(Script(error_status=500, error_times=1)) as server:
        assert (await ask(server, messages=[]))[0] == 500
        assert (await ask(server, messages=[]))[0] == 200


async def test_the_backend_notes_what_was_asked_of_it() -> None:
    gate = asyncio.Event()
    backend = FakeBackend({"smol": Script(load_gate=gate, footprint_bytes=7)}, listen=False)
    starting = asyncio.create_task(backend.start(CARD, None, 2))
    await asyncio.sleep(0)
    assert backend.started == [("smol", 2)]
    gate.set()
    engine = await starting
    assert engine.footprint_bytes() == 7
    assert backend.running == {"smol": engine}
    await engine.stop()
    await engine.stop()
    assert (backend.stopped, backend.running, engine.footprint_bytes()) == (["smol"], {}, 0)


async def test_refusals_and_cancelled_loads() -> None:
    backend = FakeBackend({"smol": Script(refuse="no memory", refuse_times=1)}, listen=False)
    with pytest.raises(LoadFailed, match="smol: no memory"):
        await backend.start(CARD, None, 1)
    backend.script("smol").load_gate = asyncio.Event()
    starting = asyncio.create_task(backend.start(CARD, None, 1))
    await asyncio.sleep(0)
    starting.cancel()
    await asyncio.gather(starting, return_exceptions=True)
    assert backend.cancelled == ["smol"]
    assert backend.running == {}


def adapter(name: str) -> AdapterFile:
    return AdapterFile(card=ModelCard(name=name, description="d", adapter_of="smol"), weights=None)


async def text_of(upstream: HttpUpstream, endpoint: Endpoint, **body: object) -> str:
    async with upstream.post(endpoint, PATH, msgspec.json.encode({"messages": [], **body})) as reply:
        answer = msgspec.json.decode(await reply.read(), type=dict[str, Any])
    return str(answer["choices"][0]["message"]["content"])


@pytest.mark.parametrize("by_name", [False, True])
async def test_adapters_follow_scripts_of_their_own(by_name: bool) -> None:
    scripts = {"smol": Script(answer=("base",)), "odd": Script(refuse="another shape")}
    for name in ("finance", "sql"):
        scripts[name] = Script(answer=(name,))
    backend = FakeBackend(scripts, by_name=by_name)
    engine = await backend.start(CARD, None, 1, [adapter(name) for name in ("finance", "odd", "sql")])
    assert backend.given == [("finance", "odd", "sql")]
    assert engine.refused() == {"odd": "another shape"}
    assert [of.adapter for of in engine.adapters().values()] == ([None, None] if by_name else [0, 1])
    async with HttpUpstream() as upstream:
        assert await text_of(upstream, engine.endpoint, model="smol") == "base"
        for name, endpoint in engine.adapters().items():
            number = [{"id": endpoint.adapter, "scale": 1.0}]
            body: dict[str, object] = {"model": name} if by_name else {"lora": number}
            assert await text_of(upstream, endpoint, **body) == name
    await engine.stop()


async def test_adapters_without_a_socket() -> None:
    backend = FakeBackend(listen=False)
    engine = await backend.start(CARD, None, 1, [adapter("finance")])
    assert engine.adapters()["finance"].adapter == 0
    assert (engine.endpoint.adapter, engine.refused()) == (None, {})
