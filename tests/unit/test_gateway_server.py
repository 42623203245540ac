"""Where the door may listen, and how it closes."""

from __future__ import annotations

import asyncio
from pathlib import Path

import aiohttp
import pytest

from calm.errors import BadInput
from calm.gateway.app import build_app
from calm.gateway.auth import Guard, Keys
from calm.gateway.fake import CHAT_CHUNKS, Script, ScriptedService
from calm.gateway.limits import Limits
from calm.gateway.metrics import Metrics
from calm.gateway.server import Server, check_bind, start

BODY = {"messages": [{"role": "user", "content": "What is the capital of France?"}]}


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path / "keys.toml")


async def opened(service: ScriptedService, keys: Keys, port: int = 0) -> Server:
    app = build_app(service, Guard(keys), Limits(), Metrics(service.fleet.__contains__))
    return await start(app, "127.0.0.1", port)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "10.0.0.1", "example.org"])
def test_an_open_address_needs_keys_or_a_word(keys: Keys, host: str) -> None:
    with pytest.raises(BadInput, match="calm keys create") as caught:
        check_bind(host, keys, insecure=False)
    assert caught.value.field == "server.host"
    assert check_bind(host, keys, insecure=True) is False
    keys.create("ann")
    assert check_bind(host, keys, insecure=False) is False


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_loopback_needs_nothing(keys: Keys, host: str) -> None:
    assert check_bind(host, keys, insecure=False) is True


async def test_a_taken_port_is_said_plainly(keys: Keys) -> None:
    first = await opened(ScriptedService(), keys)
    with pytest.raises(BadInput, match=str(first.port)) as caught:
        await opened(ScriptedService(), keys, first.port)
    assert caught.value.field == "server.port"
    assert await first.stop()
    assert await first.stop()


async def test_stopping_lets_a_running_answer_finish(keys: Keys) -> None:
    service, gate = ScriptedService(), asyncio.Event()
    service.script = lambda ask: Script(steps=(*CHAT_CHUNKS[:2], gate, *CHAT_CHUNKS[2:]))
    server = await opened(service, keys)
    async with aiohttp.ClientSession() as session:
        async with session.post(
            f"{server.url}/v1/chat/completions", json={**BODY, "stream": True}
        ) as response:
            await response.content.readuntil(b"\n\n")
            stopping = asyncio.create_task(server.stop(grace_s=30))
            await asyncio.sleep(0)
            gate.set()
            assert (await response.text()).endswith("data: [DONE]\n\n")
        assert await stopping
        with pytest.raises(aiohttp.ClientConnectionError):
            await session.get(f"{server.url}/healthz")
    assert service.outcomes[0].status == "ok"


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("begun", [True, False])
async def test_what_outlasts_the_grace_is_ended_with_an_error(keys: Keys, stream: bool, begun: bool) -> None:
    service, never = ScriptedService(), asyncio.Event()
    steps = (CHAT_CHUNKS[0], never)
    service.script = lambda ask: Script(steps=steps) if begun else Script(before=(never,))
    server = await opened(service, keys)
    async with aiohttp.ClientSession() as session:
        asking = asyncio.create_task(
            session.post(f"{server.url}/v1/chat/completions", json={**BODY, "stream": stream})
        )
        await service.entered.wait()
        if stream and begun:
            await asking
        assert await server.stop(grace_s=0) is False
        response = await asking
        text = await response.text()
    assert '"code":"shutting_down"' in text
    assert response.status == (200 if stream and begun else 503)
    assert "[DONE]" not in text
    assert service.outcomes[0].status == "cancelled"


async def test_a_closing_server_admits_nobody(keys: Keys) -> None:
    service, gate = ScriptedService(), asyncio.Event()
    service.script = lambda ask: Script(before=(gate,), steps=(b"{}",))
    server = await opened(service, keys)
    async with aiohttp.ClientSession() as session:
        async with session.get(f"{server.url}/healthz") as idle:  # a connection that stays open
            assert idle.status == 200
        asking = asyncio.create_task(session.post(f"{server.url}/v1/chat/completions", json=BODY))
        await service.entered.wait()
        stopping = asyncio.create_task(server.stop(grace_s=30))
        await asyncio.sleep(0)
        gate.set()
        assert (await asking).status == 200
        await stopping


async def test_an_ipv6_url_has_brackets(keys: Keys) -> None:
    service = ScriptedService()
    app = build_app(service, Guard(keys), Limits(), Metrics(service.fleet.__contains__))
    try:
        server = await start(app, "::1", 0)
    except BadInput:
        pytest.skip("no IPv6 here")
    assert server.url == f"http://[::1]:{server.port}"
    async with aiohttp.ClientSession() as session, session.get(f"{server.url}/v1/models") as response:
        assert response.status == 200
    await server.stop()
