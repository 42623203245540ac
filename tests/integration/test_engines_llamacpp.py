"""llama.cpp on real weights: what it opens, sees, stops and answers. Needs the cached SmolLM2."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from calm.backends.llamacpp import LlamaCppBackend
from calm.backends.upstream import HttpUpstream
from calm.ports import RunningEngine
from calm.records import ModelCard

pytestmark = pytest.mark.models

CHAT = "/v1/chat/completions"
SECRET = "sk-must-not-be-seen"


@pytest.fixture
def smollm2() -> Path:
    given = os.environ.get("CALM_TEST_WEIGHTS")
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "calm"
    found = Path(given) if given else next(iter(sorted(cache.rglob("SmolLM2-135M*.gguf"))), None)
    if found is None or not found.exists():
        pytest.skip("no SmolLM2 weights: run `calm models pull`, or set CALM_TEST_WEIGHTS to a GGUF file")
    return found


def card(**fields: object) -> ModelCard:
    engine = {"slots": 2}
    return msgspec.convert(
        {"name": "smol", "description": "d", "context": 1024, "engine": engine, **fields}, ModelCard
    )


@asynccontextmanager
async def running(
    of: ModelCard, weights: Path, run_dir: Path
) -> AsyncIterator[tuple[RunningEngine, HttpUpstream]]:
    inherited = {"PATH": os.environ["PATH"], "OPENAI_API_KEY": SECRET}
    engine = await LlamaCppBackend(run_dir, inherited=inherited).start(of, weights, 1)
    try:
        async with HttpUpstream() as upstream:
            yield engine, upstream
    finally:
        await engine.stop()


async def ask(upstream: HttpUpstream, engine: RunningEngine, path: str, **body: object) -> tuple[int, Any]:
    async with upstream.post(engine.endpoint, path, msgspec.json.encode(body)) as reply:
        return reply.status, msgspec.json.decode(await reply.read())


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


async def decoded_calls(upstream: HttpUpstream, engine: RunningEngine) -> float:
    async with upstream.get(engine.endpoint, "/metrics") as reply:
        lines = (await reply.read()).decode().splitlines()
    return float(next(line for line in lines if line.startswith("llamacpp:n_decode_total")).split()[1])


async def test_no_port_is_open_and_no_secret_is_seen(tmp_path: Path, smollm2: Path) -> None:
    async with running(card(), smollm2, tmp_path) as (engine, _):
        assert engine.endpoint.socket is not None
        for process in map(psutil.Process, engine.pids()):
            assert process.net_connections(kind="inet") == []
            assert SECRET not in process.environ().values()
            assert SECRET not in " ".join(process.cmdline())


async def test_answers_carry_the_cards_name_and_its_context_is_per_request(
    tmp_path: Path, smollm2: Path
) -> None:
    async with running(card(), smollm2, tmp_path) as (engine, upstream):
        status, answer = await ask(upstream, engine, CHAT, messages=said("Hello"), max_tokens=3)
        assert (status, answer["model"]) == (200, "smol")
        assert answer["timings"]["predicted_n"] == answer["usage"]["completion_tokens"]
        status, error = await ask(upstream, engine, CHAT, messages=said("word " * 2000))
        assert status == 400
        assert error["error"]["type"] == "exceed_context_size_error"
        assert error["error"]["n_ctx"] == 1024


async def test_a_chat_template_of_the_card_is_used(tmp_path: Path, smollm2: Path) -> None:
    plain = card(chat={"template": "{% for m in messages %}{{ m['content'] }}{% endfor %}"})
    async with running(plain, smollm2, tmp_path) as (engine, upstream):
        _, answer = await ask(upstream, engine, CHAT, messages=said("Once"), max_tokens=1)
        assert answer["usage"]["prompt_tokens"] <= 2


async def test_embeddings_beside_chat(tmp_path: Path, smollm2: Path) -> None:
    both = card(capabilities=["chat", "embeddings"])
    async with running(both, smollm2, tmp_path) as (engine, upstream):
        status, answer = await ask(upstream, engine, "/v1/embeddings", input=["one", "two " * 700])
        assert status == 200
        assert [len(item["embedding"]) for item in answer["data"]] == [576, 576]
        status, _ = await ask(upstream, engine, CHAT, messages=said("Hello"), max_tokens=3)
        assert status == 200


async def test_json_schema_and_logprobs(tmp_path: Path, smollm2: Path) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    async with running(card(), smollm2, tmp_path) as (engine, upstream):
        _, answer = await ask(
            upstream, engine, CHAT, messages=said("A number"), max_tokens=60, response_format=wanted, seed=1
        )
        assert set(msgspec.json.decode(answer["choices"][0]["message"]["content"])) == {"n"}
        _, answer = await ask(
            upstream, engine, CHAT, messages=said("Hi"), max_tokens=2, logprobs=True, top_logprobs=2
        )
        assert len(answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]) == 2


async def test_a_closed_stream_stops_within_a_token_of_decoding(tmp_path: Path, smollm2: Path) -> None:
    body = msgspec.json.encode(
        {"messages": said("Tell a story"), "stream": True, "max_tokens": 900, "ignore_eos": True}
    )
    async with running(card(), smollm2, tmp_path) as (engine, upstream):
        events = 0
        async with upstream.post(engine.endpoint, CHAT, body) as reply:
            async for chunk in reply.chunks():
                events += chunk.count(b"data:")
                if events >= 10:
                    break
        await asyncio.sleep(0.5)
        calls = await decoded_calls(upstream, engine)
        await asyncio.sleep(0.5)
        assert await decoded_calls(upstream, engine) == calls
        assert calls < 100


def bubblewrap_works() -> bool:
    program = shutil.which("bwrap")
    probe = [
        program or "false",
        "--unshare-net",
        "--unshare-pid",
        "--ro-bind",
        "/",
        "/",
        "--proc",
        "/proc",
        "true",
    ]
    return subprocess.run(probe, capture_output=True, check=False).returncode == 0


def lines_of(pid: int, name: str) -> list[str]:
    return Path(f"/proc/{pid}/{name}").read_text().splitlines()


@pytest.mark.skipif(not bubblewrap_works(), reason="bwrap is not installed or may not make namespaces here")
async def test_bubblewrap_leaves_no_network_and_nothing_to_write(tmp_path: Path, smollm2: Path) -> None:
    async with running(card(sandbox={"kind": "bubblewrap"}), smollm2, tmp_path) as (engine, upstream):
        status, _ = await ask(upstream, engine, CHAT, messages=said("Hello"), max_tokens=2)
        assert status == 200
        caged = psutil.Process(engine.pids()[-1])
        interfaces = lines_of(caged.pid, "net/dev")[2:]
        assert [line.split(":")[0].strip() for line in interfaces] == ["lo"]
        root = next(line.split() for line in lines_of(caged.pid, "mounts") if line.split()[1] == "/")
        assert root[3].split(",")[0] == "ro"
        pids = engine.pids()
    assert not any(psutil.pid_exists(pid) for pid in pids)
