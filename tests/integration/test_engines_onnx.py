"""Needle's own weights behind the ONNX backend: answers, isolation, cancellation, death."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from msgspec.structs import replace

from calm.backends.onnx import OnnxBackend
from calm.backends.upstream import HttpUpstream
from calm.errors import EngineLost, LoadFailed
from calm.ports import RunningEngine
from calm.records import ModelCard, SandboxSpec
from calm.registry import load_fleet

pytestmark = pytest.mark.models

CHAT = "/v1/chat/completions"
SECRET = "sk-must-not-be-seen"
FLEET = Path(__file__).parents[2] / "fleet"
TIMER = {
    "type": "function",
    "function": {
        "name": "setTimer",
        "description": "Start a countdown timer.",
        "parameters": {
            "type": "object",
            "properties": {
                "minutes": {"type": "integer", "description": "Length in minutes."},
                "label": {"type": "string", "description": "What the timer is for."},
            },
            "required": ["minutes"],
        },
    },
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the current weather for a city.",
        "parameters": {
            "type": "object",
            "properties": {"location": {"type": "string", "description": "City name."}},
            "required": ["location"],
        },
    },
}


@pytest.fixture
def card() -> ModelCard:
    return load_fleet(FLEET).fleet["needle-26m"]


@pytest.fixture
def needle(card: ModelCard) -> Path:
    assert card.source is not None
    given = os.environ.get("CALM_TEST_NEEDLE")
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "calm"
    found = Path(given) if given else next(iter(sorted(cache.rglob(str(card.source.filename)))), None)
    if found is None or not found.exists():
        pytest.skip("no Needle weights: run `calm models pull`, or set CALM_TEST_NEEDLE to the file")
    return found


@asynccontextmanager
async def running(
    of: ModelCard, weights: Path, run_dir: Path
) -> AsyncIterator[tuple[RunningEngine, HttpUpstream]]:
    inherited = {"PATH": os.environ["PATH"], "OPENAI_API_KEY": SECRET}
    engine = await OnnxBackend(run_dir, inherited=inherited).start(of, weights, 1)
    try:
        async with HttpUpstream() as upstream:
            yield engine, upstream
    finally:
        await engine.stop()


def asking(text: str, **more: object) -> bytes:
    messages = [{"role": "user", "content": text}]
    return msgspec.json.encode({"messages": messages, "tools": [TIMER, WEATHER], **more})


async def ask(upstream: HttpUpstream, engine: RunningEngine, text: str, **more: object) -> tuple[int, Any]:
    async with upstream.post(engine.endpoint, CHAT, asking(text, **more)) as reply:
        return reply.status, msgspec.json.decode(await reply.read())


async def busy(upstream: HttpUpstream, engine: RunningEngine) -> int:
    async with upstream.get(engine.endpoint, "/health") as reply:
        return int(msgspec.json.decode(await reply.read())["busy"])


def calls(answer: Any) -> list[tuple[str, Any]]:
    made = answer["choices"][0]["message"].get("tool_calls", [])
    return [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in made]


async def test_calls_in_the_callers_names_and_the_schemas_types(
    tmp_path: Path, card: ModelCard, needle: Path
) -> None:
    async with running(card, needle, tmp_path) as (engine, upstream):
        status, answer = await ask(upstream, engine, "Set a timer for 12 minutes for the pasta")
        assert (status, answer["model"]) == (200, "needle-26m")
        assert answer["choices"][0]["finish_reason"] == "tool_calls"
        assert calls(answer) == [("setTimer", {"minutes": 12, "label": "pasta"})]
        assert answer["usage"]["prompt_tokens"] == answer["timings"]["prompt_n"] > 50
        _, answer = await ask(upstream, engine, "What is the weather in Zürich and in Rome?")
        wanted = [("get_weather", {"location": city}) for city in ("Zürich", "Rome")]
        assert calls(answer) == wanted
        _, answer = await ask(upstream, engine, "What is the weather in Rome?", tool_choice="required")
        assert calls(answer) == [("get_weather", {"location": "Rome"})]
        named = {"type": "function", "function": {"name": "setTimer"}}
        _, answer = await ask(upstream, engine, "What is the weather in Rome?", tool_choice=named)
        assert [name for name, _ in calls(answer)] == ["setTimer"]
        _, answer = await ask(upstream, engine, "Tell me a joke")
        assert calls(answer) == []
        status, error = await ask(upstream, engine, "word " * 2000)
        assert (status, error["error"]["type"]) == (400, "invalid_request_error")


async def test_no_port_is_open_no_secret_is_seen_and_no_copy_of_the_weights_stays(
    tmp_path: Path, card: ModelCard, needle: Path
) -> None:
    async with running(card, needle, tmp_path) as (engine, _):
        assert engine.endpoint.socket is not None
        home = Path(engine.endpoint.socket).parent
        assert sorted(file.name for file in home.iterdir()) == ["e.sock", "plan.json"]
        for process in map(psutil.Process, engine.pids()):
            assert process.net_connections(kind="inet") == []
            assert SECRET not in process.environ().values()


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_stops_the_work(
    tmp_path: Path, card: ModelCard, needle: Path, stream: bool
) -> None:
    async with running(card, needle, tmp_path) as (engine, upstream):
        long = " and ".join(f"in {city}" for city in ("Rome", "Oslo", "Bern", "Kyiv", "Riga", "Lima") * 8)
        leaving = asyncio.create_task(ask(upstream, engine, f"What is the weather {long}?", stream=stream))
        async with asyncio.timeout(60):
            while not await busy(upstream, engine):
                await asyncio.sleep(0.005)
        leaving.cancel()
        await asyncio.wait({leaving})
        async with asyncio.timeout(60):
            while await busy(upstream, engine):
                await asyncio.sleep(0.005)
        assert leaving.cancelled()


async def test_a_death_is_told(tmp_path: Path, card: ModelCard, needle: Path) -> None:
    async with running(card, needle, tmp_path) as (engine, upstream):
        death = asyncio.create_task(engine.died())
        os.kill(engine.pids()[-1], signal.SIGKILL)
        assert "SIGKILL" in await asyncio.wait_for(death, 30)
        with pytest.raises(EngineLost):
            await ask(upstream, engine, "What is the weather in Rome?")


async def test_another_file_is_refused_with_the_childs_words(tmp_path: Path, card: ModelCard) -> None:
    assert card.source is not None
    other = tmp_path / "other.bin"
    options = {"encoder_bytes": 100, "decoder_bytes": 100}
    other.write_bytes(os.urandom(300))
    wrong = replace(card, engine=replace(card.engine, options=options))
    with pytest.raises(LoadFailed, match="cannot load") as failed:
        await OnnxBackend(tmp_path / "run").start(wrong, other, 1)
    assert str(tmp_path) not in failed.value.message
    assert list((tmp_path / "run").iterdir()) == []


async def test_a_start_that_is_cancelled_leaves_nothing(
    tmp_path: Path, card: ModelCard, needle: Path
) -> None:
    before = set(psutil.Process().children(recursive=True))
    starting = asyncio.create_task(OnnxBackend(tmp_path / "run").start(card, needle, 1))
    async with asyncio.timeout(60):
        while not set(psutil.Process().children(recursive=True)) - before:
            await asyncio.sleep(0.005)
    starting.cancel()
    await asyncio.wait({starting})
    assert set(psutil.Process().children(recursive=True)) <= before
    assert list((tmp_path / "run").iterdir()) == []


def bubblewrap_works() -> bool:
    probe = [
        shutil.which("bwrap") or "false",
        "--unshare-net",
        "--unshare-pid",
        "--ro-bind",
        "/",
        "/",
        "true",
    ]
    return subprocess.run(probe, capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not bubblewrap_works(), reason="bwrap is not installed or may not make namespaces here")
async def test_in_bubblewrap(tmp_path: Path, card: ModelCard, needle: Path) -> None:
    caged = replace(card, sandbox=SandboxSpec(kind="bubblewrap"))
    async with running(caged, needle, tmp_path) as (engine, upstream):
        status, answer = await ask(upstream, engine, "What is the weather in Rome?")
        assert (status, calls(answer)) == (200, [("get_weather", {"location": "Rome"})])
