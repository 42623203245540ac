"""Adapters on real llama.cpp: switched, interleaved, refused. Needs the cached SmolLM2.

The adapters are random, of rank 32 in Q8_0: llama.cpp multiplies Q8_0 alike for one row and for many, so that
answers at temperature 0 can be compared letter by letter. With F16 and F32 halves the sums of a batch differ in
their last bits, and a random adapter's near ties turn over.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize

from calm.backends import llamacpp
from calm.backends.engine import ChildEngine
from calm.backends.llamacpp import LlamaCppBackend
from calm.backends.served_adapters import find_adapters
from calm.backends.upstream import HttpUpstream
from calm.gguf import read_header
from calm.records import AdapterFile, Endpoint, EngineSpec, ModelCard

pytestmark = [pytest.mark.models, pytest.mark.timeout(600)]

RANK = 32
BASE = ModelCard(name="smol", description="d", context=512, engine=EngineSpec(slots=3, start_timeout_s=300.0))
QUESTIONS = ("What is the capital of France?", "Write a line about rivers.", "Name three fruits.")


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """Converted to Q4_0 where that is in the cache, as it is served."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "calm"
    found = sorted(cache.rglob("SmolLM2-135M*.gguf"), key=lambda path: "as-Q4_0" not in path.name)
    if not found:
        pytest.skip("no SmolLM2 weights: run `calm models pull`")
    return found[0]


def write_adapter(
    path: Path, base: Path, seed: int, architecture: str | None = None, strength: float = 1.0
) -> Path:
    """A random change of some projections; 1 changes many answers, 3 nearly all."""
    header, random = read_header(base), np.random.default_rng(seed)
    writer = GGUFWriter(path, architecture or header.architecture or "")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", strength * RANK)
    for name, tensor in header.tensors.items():
        if name.endswith(("attn_q.weight", "attn_output.weight", "ffn_up.weight")):
            width, rows = tensor.shape
            a = 0.5 * random.standard_normal((RANK, width)).astype(np.float32) / width**0.5
            b = random.standard_normal((rows, RANK)).astype(np.float32) / RANK**0.5
            for half, data in (("lora_a", a), ("lora_b", b)):
                q8 = quantize(data, GGMLQuantizationType.Q8_0)
                writer.add_tensor(f"{name}.{half}", q8, raw_dtype=GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def adapters(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> list[AdapterFile]:
    directory = tmp_path_factory.mktemp("adapters")
    return [named(f"s{n}", write_adapter(directory / f"s{n}.gguf", smollm2, n)) for n in range(2)]


def named(name: str, weights: Path) -> AdapterFile:
    return AdapterFile(card=ModelCard(name=name, description="d", adapter_of="smol"), weights=weights)


@asynccontextmanager
async def running(
    tmp_path: Path, weights: Path, adapters: Sequence[AdapterFile] = ()
) -> AsyncIterator[tuple[ChildEngine, HttpUpstream]]:
    engine = await LlamaCppBackend(tmp_path).start(BASE, weights, 1, adapters)
    try:
        async with HttpUpstream() as upstream:
            yield engine, upstream
    finally:
        await engine.stop()


async def say(
    upstream: HttpUpstream, at: Endpoint, question: str, path: str = "/v1/chat/completions", **more: object
) -> tuple[str, int]:
    """(answer, prompt tokens found in the cache), asked for as the gateway asks."""
    body: dict[str, object] = {"model": at.model, "max_tokens": 12, "temperature": 0, **more}
    if path == "/completion":
        body |= {"prompt": question, "n_predict": 12, "ignore_eos": True}
    else:
        body["messages"] = [{"role": "user", "content": question}]
    if at.adapter is not None:
        body["lora"] = [{"id": at.adapter, "scale": 1.0}]
    async with upstream.post(at, path, msgspec.json.encode(body)) as reply:
        said = msgspec.json.decode(await reply.read(), type=dict[str, object])
        assert reply.status == 200, said
    text = said["content"] if path == "/completion" else said["choices"][0]["message"]["content"]  # type: ignore[index]
    return str(text), int(said["timings"]["cache_n"])  # type: ignore[index]


async def test_switching_leaves_nothing_of_the_other_adapter_behind(
    tmp_path: Path, smollm2: Path, adapters: list[AdapterFile]
) -> None:
    question = QUESTIONS[0]
    async with running(tmp_path, smollm2) as (engine, upstream):
        alone, _ = await say(upstream, engine.endpoint, question)
        alone_raw, _ = await say(upstream, engine.endpoint, question, "/completion")
    async with running(tmp_path, smollm2, adapters) as (engine, upstream):
        assert engine.refused() == {}
        first, second = engine.adapters().values()
        base, _ = await say(upstream, engine.endpoint, question)
        one, cached = await say(upstream, first, question)
        assert (base, cached) == (alone, 0)
        assert one != base
        two, cached = await say(upstream, second, question)
        assert two not in (base, one)
        assert cached == 0
        assert await say(upstream, engine.endpoint, question) == (base, 0)  # not from an adapter's cache
        assert (await say(upstream, engine.endpoint, question))[1] > 0  # but from its own
        assert await say(upstream, first, question) == (one, 0)
        assert (await say(upstream, engine.endpoint, question, "/completion"))[0] == alone_raw
        assert (await say(upstream, first, question, "/completion"))[0] != alone_raw


async def test_interleaved_requests_answer_as_they_do_alone(
    tmp_path: Path, smollm2: Path, adapters: list[AdapterFile]
) -> None:
    async with running(tmp_path, smollm2, adapters) as (engine, upstream):
        endpoints = (engine.endpoint, *engine.adapters().values())
        jobs = [(at, question) for question in QUESTIONS for at in endpoints]
        alone = [(await say(upstream, at, question))[0] for at, question in jobs]
        assert len(set(alone[:3])) == 3
        for order in (jobs, jobs[::-1]):
            together = await asyncio.gather(*(say(upstream, at, question) for at, question in order))
            expected = alone if order is jobs else alone[::-1]
            assert [text for text, _ in together] == expected


async def test_a_misfit_is_refused_and_the_rest_served(
    tmp_path: Path, smollm2: Path, adapters: list[AdapterFile]
) -> None:
    odd = named("odd", write_adapter(tmp_path / "odd.gguf", smollm2, 5, architecture="gemma3"))
    async with running(tmp_path / "run", smollm2, [odd, adapters[0]]) as (engine, upstream):
        assert engine.refused() == {"odd": "it was made for gemma3, the base is llama"}
        assert {name: at.adapter for name, at in engine.adapters().items()} == {"s0": 0}
        assert (await say(upstream, engine.adapters()["s0"], QUESTIONS[0]))[0]


async def test_one_that_only_llama_cpp_can_refuse_does_not_fail_the_base(
    tmp_path: Path, smollm2: Path, adapters: list[AdapterFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llamacpp, "fits", lambda base, adapter: None)
    odd = named("odd", write_adapter(tmp_path / "odd.gguf", smollm2, 5, architecture="gemma3"))
    async with running(tmp_path / "run", smollm2, [odd, adapters[0]]) as (engine, _):
        assert engine.refused() == {"odd": "llama.cpp refused it: model arch and LoRA arch mismatch"}
        assert set(engine.adapters()) == {"s0"}
    assert list((tmp_path / "run").iterdir()) == []


async def test_an_adapter_costs_about_its_file(
    tmp_path: Path, smollm2: Path, adapters: list[AdapterFile]
) -> None:
    async with running(tmp_path, smollm2) as (engine, _):
        without = engine.footprint_bytes()
    async with running(tmp_path, smollm2, adapters) as (engine, _):
        held = engine.footprint_bytes()
    assert without is not None
    assert held is not None
    files = sum(adapter.weights.stat().st_size for adapter in adapters if adapter.weights)
    assert held - without < 3 * files
    assert held < 1.3 * without


async def test_a_running_llama_server_is_asked_for_its_adapters(
    tmp_path: Path, smollm2: Path, adapters: list[AdapterFile]
) -> None:
    async with running(tmp_path, smollm2, adapters) as (engine, upstream):
        socket = Endpoint(base_url="http://localhost/v1", model="smol", socket=engine.endpoint.socket)
        asked = [*adapters, named("other", tmp_path / "other.gguf")]
        found = await find_adapters(upstream, socket, asked, same_machine=True, timeout_s=60.0)
    assert {name: at.adapter for name, at in found.adapters.items()} == {"s0": 0, "s1": 1}
    assert "it has: s0.gguf, s1.gguf" in found.refused["other"]
    assert found.base.adapter == engine.endpoint.adapter == 2
