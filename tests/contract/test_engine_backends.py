"""What every EngineBackend must do, whichever engine is behind it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import psutil
import pytest
from tests.contract.conftest import Kit

from calm.backends.upstream import HttpUpstream
from calm.errors import EngineLost, LoadFailed
from calm.ports import RunningEngine

PATH = "/v1/chat/completions"


def body(**more: object) -> bytes:
    messages = [{"role": "user", "content": "Tell a long story."}]
    return msgspec.json.encode({"messages": messages, "max_tokens": 4, "x_unknown": 1, **more})


@asynccontextmanager
async def running(kit: Kit) -> AsyncIterator[tuple[RunningEngine, HttpUpstream]]:
    engine = await kit.backend.start(kit.card, kit.weights, 1)
    try:
        async with HttpUpstream() as upstream:
            yield engine, upstream
    finally:
        await engine.stop()


def children() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


async def until_idle(kit: Kit, engine: RunningEngine) -> None:
    async with asyncio.timeout(60):
        while await kit.busy(engine):
            await asyncio.sleep(0.01)


async def test_answers_once_started(kit: Kit) -> None:
    async with running(kit) as (engine, upstream), upstream.post(engine.endpoint, PATH, body()) as reply:
        answer = msgspec.json.decode(await reply.read(), type=dict[str, object])
        assert reply.status == 200
        assert answer["choices"]


async def test_streams_to_the_end(kit: Kit) -> None:
    async with (
        running(kit) as (engine, upstream),
        upstream.post(engine.endpoint, PATH, body(stream=True)) as reply,
    ):
        text = b"".join([chunk async for chunk in reply.chunks()])
        assert reply.content_type.startswith("text/event-stream")
        assert text.rstrip().endswith(b"data: [DONE]")


async def test_leaving_a_stream_stops_the_work(kit: Kit) -> None:
    async with running(kit) as (engine, upstream):
        long = body(stream=True, max_tokens=3000, ignore_eos=True)
        async with upstream.post(engine.endpoint, PATH, long) as reply:
            await anext(aiter(reply.chunks()))
            assert await kit.busy(engine) == 1
        await until_idle(kit, engine)


async def test_two_engines_at_once_are_apart(kit: Kit) -> None:
    first, second = await asyncio.gather(
        kit.backend.start(kit.card, kit.weights, 1), kit.backend.start(kit.card, kit.weights, 1)
    )
    try:
        if kit.local:
            assert first.endpoint != second.endpoint
        assert not set(first.pids()) & set(second.pids())
    finally:
        await asyncio.gather(first.stop(), second.stop())


async def test_a_death_is_told_with_its_reason(kit: Kit) -> None:
    if kit.crash is None:
        pytest.skip("a remote engine cannot be seen to die")
    async with running(kit) as (engine, upstream):
        death = asyncio.create_task(engine.died())
        long = body(stream=True, max_tokens=3000, ignore_eos=True)
        async with upstream.post(engine.endpoint, PATH, long) as reply:
            chunks = aiter(reply.chunks())
            await anext(chunks)
            await kit.crash(engine)
            with pytest.raises(EngineLost):
                _ = [chunk async for chunk in chunks]
        reason = await asyncio.wait_for(death, 30)
        assert "SIGKILL" in reason or "scripted" in reason
        with pytest.raises(EngineLost):
            async with upstream.post(engine.endpoint, PATH, body()):
                pass


async def test_stop_returns_memory_and_may_be_repeated(kit: Kit) -> None:
    engine = await kit.backend.start(kit.card, kit.weights, 1)
    pids = engine.pids()
    held = engine.footprint_bytes()
    if kit.local:
        assert held is not None
        assert held > 1 << 20
    else:
        assert held is None
    await engine.stop()
    await engine.stop()
    assert engine.pids() == ()
    assert not engine.footprint_bytes()
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert list(kit.run_dir.iterdir()) == []


async def test_an_orderly_stop_is_not_a_death(kit: Kit) -> None:
    engine = await kit.backend.start(kit.card, kit.weights, 1)
    death = asyncio.create_task(engine.died())
    await engine.stop()
    await asyncio.sleep(0)
    assert not death.done()
    death.cancel()
    await asyncio.gather(death, return_exceptions=True)


async def test_a_start_that_fails_says_why_and_leaves_nothing(kit: Kit) -> None:
    before = children()
    with pytest.raises(LoadFailed, match="broken"):
        await kit.backend.start(kit.broken, kit.weights, 1)
    assert children() <= before
    assert list(kit.run_dir.iterdir()) == []


async def test_a_cancelled_start_leaves_nothing(kit: Kit) -> None:
    if kit.name == "remote":
        pytest.skip("a remote engine is not started")
    before = children()
    starting = asyncio.create_task(kit.backend.start(kit.slow, kit.slow_weights, 1))
    async with asyncio.timeout(30):
        while kit.name != "fake" and children() <= before:
            await asyncio.sleep(0.001)
    await asyncio.sleep(0)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert children() <= before
    assert list(kit.run_dir.iterdir()) == []
