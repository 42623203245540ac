"""Streams: order, honest ends, pings, and what happens to the work when a client leaves."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import msgspec
import pytest

from calm.errors import EngineLost, QueueFull
from calm.gateway.auth import Keys
from calm.gateway.fake import CHAT_CHUNKS, Script, ScriptedService, serving
from calm.gateway.limits import Limits
from calm.gateway.server import Server

BODY = {"messages": [{"role": "user", "content": "What is the capital of France?"}]}
STREAM = {**BODY, "stream": True}


@pytest.fixture
def service() -> ScriptedService:
    return ScriptedService()


@pytest.fixture
async def server(service: ScriptedService, tmp_path: Path) -> AsyncIterator[Server]:
    async with serving(service, Keys(tmp_path / "k.toml"), limits=Limits(ping_s=0.02)) as server:
        yield server


async def text_of(server: Server, body: dict[str, object] = STREAM) -> tuple[aiohttp.ClientResponse, str]:
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{server.url}/v1/chat/completions", json=body) as response,
    ):
        return response, await response.text()


def events(text: str) -> list[object]:
    lines = [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data: ")]
    return [line if line == "[DONE]" else msgspec.json.decode(line) for line in lines]


async def connect(
    server: Server, body: dict[str, object]
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A client that speaks HTTP by hand, so that it can leave when and how it likes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    raw = msgspec.json.encode(body)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(raw)}\r\n\r\n"
    writer.write(head.encode() + raw)
    await writer.drain()
    return reader, writer


async def leave(writer: asyncio.StreamWriter) -> None:
    writer.close()
    await writer.wait_closed()


# --- what comes ---------------------------------------------------------------------------------------


async def test_events_come_in_order_and_end_with_done(server: Server) -> None:
    response, text = await text_of(server)
    assert response.headers["Content-Type"].startswith("text/event-stream")
    assert response.headers["X-Accel-Buffering"] == "no"
    assert response.headers["x-calm-model"] == "small"
    *chunks, done = events(text)
    assert done == "[DONE]"
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == "hello"
    assert chunks[-1]["calm"]["energy_j"] == 1.5
    assert all("usage" not in chunk for chunk in chunks)


async def test_usage_where_it_was_asked_for(server: Server) -> None:
    _, text = await text_of(server, {**STREAM, "stream_options": {"include_usage": True}})
    last = events(text)[-2]
    assert (last["usage"]["total_tokens"], last["choices"]) == (7, [])


async def test_each_event_is_flushed_when_it_comes(server: Server, service: ScriptedService) -> None:
    gate = asyncio.Event()
    service.script = lambda ask: Script(steps=(*CHAT_CHUNKS[:2], gate, *CHAT_CHUNKS[2:]))
    reader, writer = await connect(server, STREAM)
    assert b'"hel"' in await reader.readuntil(b'"hel"')
    gate.set()
    assert b"[DONE]" in await reader.readuntil(b"[DONE]\n\n")
    await leave(writer)


async def test_white_space_of_an_engine_does_not_break_the_framing(
    server: Server, service: ScriptedService
) -> None:
    odd = b'{"choices": [\n\n{"delta": {"content": "x"},\r\n"index": 0}]}'
    service.script = lambda ask: Script(steps=(odd, *CHAT_CHUNKS[3:]))
    assert events((await text_of(server))[1])[0]["choices"][0]["delta"]["content"] == "x"


# --- what breaks --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("failure", "code"), [(EngineLost("it died"), "engine_lost"), (RuntimeError("secret"), "internal_error")]
)
async def test_a_stream_that_breaks_says_so(
    server: Server, service: ScriptedService, failure: Exception, code: str
) -> None:
    service.script = lambda ask: Script(steps=(*CHAT_CHUNKS[:2], failure))
    response, text = await text_of(server)
    assert response.status == 200
    assert events(text)[-1]["error"]["code"] == code
    assert "[DONE]" not in text
    assert "secret" not in text
    assert '"finish_reason":"stop"' not in text


async def test_an_engine_that_stops_talking_json_breaks_the_stream(
    server: Server, service: ScriptedService
) -> None:
    service.script = lambda ask: Script(steps=(CHAT_CHUNKS[0], b"oops"))
    _, text = await text_of(server)
    assert events(text)[-1]["error"]["code"] == "engine_lost"
    assert service.outcomes[0].status == "error"


async def test_a_finish_that_was_held_back_is_not_shown_when_the_end_breaks(
    server: Server, service: ScriptedService
) -> None:
    service.script = lambda ask: Script(steps=(*CHAT_CHUNKS[:4], EngineLost("at the very end")))
    _, text = await text_of(server)
    assert '"finish_reason":"stop"' not in text
    assert "[DONE]" not in text


# --- waiting ------------------------------------------------------------------------------------------


async def test_a_long_wait_is_pinged_and_then_answered(server: Server, service: ScriptedService) -> None:
    gate = asyncio.Event()
    service.script = lambda ask: Script(before=(gate,), steps=CHAT_CHUNKS)
    reader, writer = await connect(server, STREAM)
    head = await reader.readuntil(b"\r\n\r\n")
    assert b"200 OK" in head
    assert service.asks[0].request_id.encode() in head
    for _ in range(2):
        await reader.readuntil(b": waiting\n\n")
    gate.set()
    rest = await reader.readuntil(b"[DONE]\n\n")
    assert b'"hel"' in rest
    await leave(writer)


async def test_a_long_wait_that_fails_ends_with_an_error_event(
    server: Server, service: ScriptedService
) -> None:
    gate = asyncio.Event()
    service.script = lambda ask: Script(before=(gate, QueueFull("full", retry_after_s=1)))
    reader, writer = await connect(server, STREAM)
    await reader.readuntil(b": waiting\n\n")
    gate.set()
    rest = await reader.read()
    assert b'"queue_full"' in rest
    assert b"[DONE]" not in rest
    await leave(writer)


async def test_a_pause_between_tokens_is_pinged(server: Server, service: ScriptedService) -> None:
    gate = asyncio.Event()
    service.script = lambda ask: Script(steps=(*CHAT_CHUNKS[:2], gate, *CHAT_CHUNKS[2:]))
    reader, writer = await connect(server, STREAM)
    await reader.readuntil(b'"hel"')
    await reader.readuntil(b": waiting\n\n")
    gate.set()
    await reader.readuntil(b"[DONE]\n\n")
    await leave(writer)


# --- clients that leave -------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("where", ["before", "between"])
async def test_a_client_that_leaves_cancels_the_work(
    service: ScriptedService, tmp_path: Path, stream: bool, where: str
) -> None:
    """Blocked before the first byte or in the middle, streaming or not, with nothing being written."""
    never = asyncio.Event()
    waiting = Script(before=(never,)) if where == "before" else Script(steps=(CHAT_CHUNKS[0], never))
    service.script = lambda ask: waiting
    async with serving(service, Keys(tmp_path / "k.toml")) as server:
        reader, writer = await connect(server, {**BODY, "stream": stream})
        await service.entered.wait()
        if stream and where == "between":
            await reader.readuntil(b"data: ")
        await leave(writer)
        await service.ended.wait()
    assert [outcome.status for outcome in service.outcomes] == ["cancelled"]


async def test_a_client_that_resets_while_tokens_flow_cancels_the_work(
    server: Server, service: ScriptedService
) -> None:
    service.script = lambda ask: Script(steps=CHAT_CHUNKS[:1] * 200_000)
    reader, writer = await connect(server, STREAM)
    await reader.readuntil(b"data: ")
    raw = writer.get_extra_info("socket")
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    writer.transport.abort()
    await service.ended.wait()
    assert [outcome.status for outcome in service.outcomes] == ["cancelled"]


async def test_a_client_that_stops_reading_is_cut_off(service: ScriptedService, tmp_path: Path) -> None:
    service.script = lambda ask: Script(steps=(CHAT_CHUNKS[0] + b" " * 60_000,) * 100_000)
    async with serving(service, Keys(tmp_path / "k.toml"), limits=Limits(stall_s=0.05)) as server:
        _, writer = await connect(server, STREAM)
        await service.ended.wait()
        await leave(writer)
    assert service.outcomes[0].status == "cancelled"


async def test_a_connection_serves_one_request_after_the_other(server: Server) -> None:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=1)) as session:
        for body in (STREAM, BODY, STREAM, {"messages": []}, BODY):
            async with session.post(f"{server.url}/v1/chat/completions", json=body) as response:
                await response.read()
                assert response.status == (400 if body == {"messages": []} else 200)


async def test_many_at_once_each_get_their_own(server: Server, service: ScriptedService) -> None:
    async with aiohttp.ClientSession() as session:

        async def one(number: int) -> bool:
            body = {**STREAM, "model": ("small", "large")[number % 2]}
            async with session.post(f"{server.url}/v1/chat/completions", json=body) as response:
                chunks = events(await response.text())
                wanted = f"chatcmpl-{response.headers['x-calm-request-id']}"
                return {chunk["id"] for chunk in chunks[:-1]} == {wanted} and chunks[-1] == "[DONE]"

        assert all(await asyncio.gather(*(one(number) for number in range(40))))
    assert len({outcome.request_id for outcome in service.outcomes}) == 40
