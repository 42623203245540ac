"""The HTTP client of engines: pooling, broken connections, keys that stay secret."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from calm.backends.fake import FakeEngineServer, Script
from calm.backends.upstream import HttpUpstream, is_loopback, url_of
from calm.errors import EngineLost
from calm.records import Endpoint

PATH = "/v1/chat/completions"
BODY = b'{"messages":[],"max_tokens":2}'
STREAM = b'{"messages":[],"stream":true}'
KEY = "sk-very-secret"
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@pytest.mark.parametrize(
    ("base", "path", "url"),
    [
        ("http://h:1", PATH, "http://h:1/v1/chat/completions"),
        ("http://h:1/", PATH, "http://h:1/v1/chat/completions"),
        ("http://h:1/v1", PATH, "http://h:1/v1/chat/completions"),
        ("http://h:1/v1/", "/v1/models", "http://h:1/v1/models"),
        ("https://h/api/v4", PATH, "https://h/api/v4/chat/completions"),
        ("https://h/v1beta/openai", PATH, "https://h/v1beta/openai/chat/completions"),
        ("http://h/very/v", PATH, "http://h/very/v/v1/chat/completions"),
        ("http://h:1/v1", "/health", "http://h:1/v1/health"),
    ],
)
def test_base_urls_with_and_without_a_version(base: str, path: str, url: str) -> None:
    assert url_of(base, path) == url


@pytest.mark.parametrize(
    ("url", "loopback"),
    [
        ("http://127.0.0.1:8", True),
        ("http://127.9.9.9", True),
        ("http://[::1]:8", True),
        ("http://localhost:1", True),
        ("http://10.0.0.1", False),
        ("https://example.org", False),
        ("http://localhost.example.org", False),
    ],
)
def test_loopback_is_told_from_remote(url: str, loopback: bool) -> None:
    assert is_loopback(url) is loopback


@asynccontextmanager
async def raw_server(handler: Handler) -> AsyncIterator[Endpoint]:
    server = await asyncio.start_server(handler, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        yield Endpoint(base_url=f"http://127.0.0.1:{port}", model="m")
    finally:
        server.close()
        await server.wait_closed()


async def ask(upstream: HttpUpstream, endpoint: Endpoint, body: bytes = BODY) -> bytes:
    async with upstream.post(endpoint, PATH, body) as reply:
        return b"".join([chunk async for chunk in reply.chunks()])


async def read_request(reader: asyncio.StreamReader) -> None:
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length"))
    await reader.readexactly(int(length.split(b":")[1]))


async def test_reads_a_whole_answer() -> None:
    async with (
        FakeEngineServer() as server,
        HttpUpstream() as upstream,
        upstream.post(server.endpoint(), PATH, BODY) as reply,
    ):
        assert reply.status == 200
        assert reply.content_type.startswith("application/json")
        assert b"Hello from" in await reply.read()


async def test_one_connection_serves_many_requests() -> None:
    connections = 0

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        try:
            while True:
                await read_request(reader)
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async with raw_server(handler) as endpoint, HttpUpstream() as upstream:
        for _ in range(5):
            async with upstream.post(endpoint, PATH, BODY) as reply:
                assert await reply.read() == b"ok"
    assert connections == 1


async def test_unix_sockets(tmp_path: Path) -> None:
    async with FakeEngineServer(socket=tmp_path / "e.sock") as server, HttpUpstream() as upstream:
        async with upstream.post(server.endpoint(), PATH, STREAM) as reply:
            chunks = [chunk async for chunk in reply.chunks()]
        assert chunks[-1].endswith(b"data: [DONE]\n\n")


async def test_a_new_engine_forgets_the_pools_of_gone_ones(tmp_path: Path) -> None:
    async with HttpUpstream() as upstream:
        for name in ("a.sock", "b.sock", "c.sock"):
            async with FakeEngineServer(socket=tmp_path / name) as server:
                await ask(upstream, server.endpoint())
        assert list(upstream._sessions) == [(str(tmp_path / "c.sock"), False)]


async def test_connections_are_not_reused_after_a_stream_of_an_engine_of_ours(tmp_path: Path) -> None:
    """llama.cpp hangs up after each stream without saying so: the next request must not meet that."""
    connections: list[asyncio.Task[None] | None] = []
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(asyncio.current_task())
        await read_request(reader)
        writer.write(head + b"2\r\nok\r\n")
        await writer.drain()
        await asyncio.sleep(0.01)
        writer.write(b"0\r\n\r\n")
        await reader.read()
        writer.close()
        await writer.wait_closed()

    path = str(tmp_path / "e.sock")
    server = await asyncio.start_unix_server(handler, path)
    endpoint = Endpoint(base_url="http://localhost", model="m", socket=path)
    async with HttpUpstream() as upstream:
        for _ in range(3):
            assert await ask(upstream, endpoint) == b"ok"
    assert len(connections) == 3
    await asyncio.gather(*(task for task in connections if task))
    server.close()
    await server.wait_closed()


async def test_leaving_early_closes_the_connection() -> None:
    script = Script(hang_after=1)
    async with FakeEngineServer(script) as server, HttpUpstream() as upstream:
        async with upstream.post(server.endpoint(), PATH, STREAM) as reply:
            await anext(aiter(reply.chunks()))
            assert server.in_flight == 1
        await asyncio.wait_for(server.until(cancelled=1), 30)
        assert server.in_flight == 0


async def test_cancelling_before_the_first_byte_closes_the_connection() -> None:
    async with FakeEngineServer(Script(token_gate=asyncio.Event())) as server, HttpUpstream() as upstream:
        asking = asyncio.create_task(ask(upstream, server.endpoint()))
        await asyncio.wait_for(server.until(seen=1), 30)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await asyncio.wait_for(server.until(cancelled=1), 30)


@pytest.mark.parametrize("stream", [BODY, STREAM])
async def test_an_engine_that_dies_midway_is_lost(stream: bytes) -> None:
    async with FakeEngineServer(Script(die_after=1)) as server, HttpUpstream() as upstream:
        with pytest.raises(EngineLost):
            await ask(upstream, server.endpoint(), stream)


async def test_a_short_body_is_lost_and_not_taken_for_whole() -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")
        await writer.drain()
        writer.close()

    async with (
        raw_server(handler) as endpoint,
        HttpUpstream() as upstream,
        upstream.post(endpoint, PATH, BODY) as reply,
    ):
        with pytest.raises(EngineLost, match="broke off"):
            await reply.read()


async def test_nobody_there() -> None:
    async with HttpUpstream() as upstream:
        with pytest.raises(EngineLost, match="nobody answers"):
            await ask(upstream, Endpoint(base_url="http://127.0.0.1:1", model="m"))
        gone = Endpoint(base_url="http://localhost", model="m", socket="/nonexistent/e.sock")
        with pytest.raises(EngineLost, match="nobody answers"):
            await ask(upstream, gone)


async def test_a_stale_connection_is_replaced_once() -> None:
    """The server drops the kept connection at the moment the second request arrives on it."""
    requests = []

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        requests.append("answered")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        try:
            await read_request(reader)
            requests.append("dropped")
        except asyncio.IncompleteReadError:
            pass
        writer.close()

    async with raw_server(handler) as endpoint, HttpUpstream() as upstream:
        for _ in range(2):
            async with upstream.post(endpoint, PATH, BODY) as reply:
                assert await reply.read() == b"ok"
    assert requests == ["answered", "dropped", "answered"]


async def test_a_fresh_connection_that_dies_is_not_asked_again() -> None:
    requests = 0

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal requests
        await read_request(reader)
        requests += 1
        writer.close()

    async with raw_server(handler) as endpoint, HttpUpstream() as upstream:
        with pytest.raises(EngineLost):
            await ask(upstream, endpoint)
    assert requests == 1


async def test_the_key_is_sent_and_never_told() -> None:
    async with FakeEngineServer() as server, HttpUpstream({"MY_KEY": KEY}.get) as upstream:
        endpoint = Endpoint(base_url=server.base_url, model="m", api_key_env="MY_KEY")
        async with upstream.post(endpoint, PATH, BODY) as reply:
            await reply.read()
        assert server.seen[0].headers["Authorization"] == f"Bearer {KEY}"
        server.script.die_after = 0
        with pytest.raises(EngineLost) as lost:
            await ask(upstream, endpoint)
    assert KEY not in str(lost.value)
    assert lost.value.__cause__ is None
    assert lost.value.__suppress_context__


async def test_a_missing_key_names_its_variable() -> None:
    async with HttpUpstream() as upstream:
        endpoint = Endpoint(base_url="http://127.0.0.1:1", model="m", api_key_env="MY_KEY")
        with pytest.raises(EngineLost, match="environment variable MY_KEY"):
            await ask(upstream, endpoint)


async def test_a_childs_own_key_is_sent() -> None:
    async with FakeEngineServer() as server, HttpUpstream() as upstream:
        async with upstream.post(server.endpoint(api_key="child"), PATH, BODY) as reply:
            await reply.read()
        assert server.seen[0].headers["Authorization"] == "Bearer child"


async def test_large_bodies_pass() -> None:
    async with FakeEngineServer() as server, HttpUpstream() as upstream:
        body = b'{"messages":[],"padding":"' + b"x" * (3 << 20) + b'"}'
        async with upstream.post(server.endpoint(), PATH, body) as reply:
            await reply.read()
        assert len(str(server.seen[0].body["padding"])) == 3 << 20


async def test_redirects_are_not_followed_with_the_key() -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 307 Moved\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()
        writer.close()

    async with (
        raw_server(handler) as endpoint,
        HttpUpstream() as upstream,
        upstream.post(endpoint, PATH, BODY) as reply,
    ):
        assert reply.status == 307


async def test_proxies_of_the_environment_are_for_remote_servers_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with FakeEngineServer() as server, HttpUpstream() as upstream:
        monkeypatch.setenv("http_proxy", server.base_url)
        monkeypatch.delenv("no_proxy", raising=False)
        async with upstream.post(Endpoint(base_url="http://far.invalid", model="m"), PATH, BODY) as reply:
            await reply.read()
        assert server.seen[0].headers["Host"] == "far.invalid"
        async with FakeEngineServer() as near, upstream.post(near.endpoint(), PATH, BODY) as reply:
            await reply.read()
        assert len(server.seen) == 1
