"""Servers that already run: probed once, told apart from wrong URLs and wrong keys."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from calm.backends.fake import FakeEngineServer
from calm.backends.remote import RemoteBackend
from calm.errors import LoadFailed
from calm.records import EngineSpec, ModelCard


def card(url: str | None, **engine: object) -> ModelCard:
    spec = EngineSpec(kind="openai", url=url, upstream_model="up", **engine)  # type: ignore[arg-type]
    return ModelCard(name="cloud", description="d", placement="remote", engine=spec)


@asynccontextmanager
async def answering(status: int) -> AsyncIterator[str]:
    async def handler(request: web.Request) -> web.Response:
        return web.Response(status=status)

    runner = web.AppRunner(web.Application(), access_log=None)
    runner.app.router.add_get("/{tail:.*}", handler)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
async def test_with_and_without_v1(suffix: str) -> None:
    async with FakeEngineServer() as server:
        engine = await RemoteBackend().start(card(server.base_url + suffix), None, 1)
        assert engine.endpoint.model == "up"
        assert engine.footprint_bytes() is None
        assert engine.pids() == ()
        await engine.stop()
        await engine.stop()


@pytest.mark.parametrize("url", [None, "", "localhost:11434", "ftp://x"])
async def test_urls_that_are_none(url: str | None) -> None:
    with pytest.raises(LoadFailed, match="must begin with http"):
        await RemoteBackend().start(card(url), None, 1)


async def test_nobody_there() -> None:
    with pytest.raises(LoadFailed, match=r"cloud: .*nobody answers"):
        await RemoteBackend().start(card("http://127.0.0.1:1"), None, 1)


@pytest.mark.parametrize("status", [200, 404, 405, 429])
async def test_a_server_without_a_list_of_models_will_do(status: int) -> None:
    async with answering(status) as url:
        assert (await RemoteBackend().start(card(url), None, 1)).endpoint.base_url == url


@pytest.mark.parametrize(
    ("status", "advice"), [(401, "is the key in MY_KEY right"), (403, "MY_KEY"), (500, "500")]
)
async def test_refusals_say_what_to_do(status: int, advice: str) -> None:
    backend = RemoteBackend({"MY_KEY": "sk-secret"}.get)
    async with answering(status) as url:
        with pytest.raises(LoadFailed, match=advice) as failed:
            await backend.start(card(url, api_key_env="MY_KEY"), None, 1)
    assert "sk-secret" not in str(failed.value)


async def test_a_key_that_is_not_configured() -> None:
    async with answering(401) as url:
        with pytest.raises(LoadFailed, match=r"set engine\.api_key_env"):
            await RemoteBackend().start(card(url), None, 1)


async def test_a_key_that_is_not_set() -> None:
    with pytest.raises(LoadFailed, match="environment variable MY_KEY"):
        await RemoteBackend().start(card("http://127.0.0.1:1", api_key_env="MY_KEY"), None, 1)


async def test_it_is_never_seen_to_die() -> None:
    async with FakeEngineServer() as server:
        engine = await RemoteBackend().start(card(server.base_url), None, 1)
    death = asyncio.create_task(engine.died())
    done, _ = await asyncio.wait([death], timeout=0.05)
    assert not done
    death.cancel()
    await asyncio.gather(death, return_exceptions=True)
