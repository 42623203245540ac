"""Adapters at servers asked over HTTP: vLLM's protocol and llama-server's, and every way they say no."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp import web
from tests.unit import fake_vllm
from tests.unit.fake_vllm import FakeVllm, serving

from calm.backends.command import CommandBackend
from calm.backends.fake import FakeEngineServer
from calm.backends.remote import RemoteBackend, RemoteEngine
from calm.backends.served_adapters import find_adapters
from calm.backends.upstream import HttpUpstream
from calm.errors import LoadFailed
from calm.records import AdapterFile, Endpoint, EngineSpec, ModelCard

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


def base_card(url: str) -> ModelCard:
    return ModelCard(name="base", description="d", engine=EngineSpec(kind="openai", url=url))


def adapter(name: str, weights: Path | None = None, upstream: str | None = None) -> AdapterFile:
    engine = EngineSpec(kind="openai", upstream_model=upstream)
    card = ModelCard(name=name, description="d", adapter_of="base", engine=engine)
    return AdapterFile(card=card, weights=weights)


def peft(directory: Path, rank: int = 8) -> Path:
    """A PEFT adapter's directory; the path of its weights."""
    directory.mkdir(parents=True)
    (directory / "adapter_config.json").write_text(json.dumps({"r": rank}))
    weights = directory / "adapter_model.safetensors"
    weights.write_bytes(b"tensors")
    return weights


async def start(url: str, *adapters: AdapterFile) -> RemoteEngine:
    return await RemoteBackend().start(base_card(url), None, 1, adapters)


async def ask(endpoint: Endpoint) -> tuple[int, dict[str, Any]]:
    body = msgspec.json.encode({"model": endpoint.model, "messages": []})
    async with HttpUpstream() as upstream, upstream.post(endpoint, "/v1/chat/completions", body) as reply:
        return reply.status, msgspec.json.decode(await reply.read(), type=dict[str, Any])


# --- vLLM ------------------------------------------------------------------------------------------


async def test_listed_adapters_are_asked_by_their_name() -> None:
    server = FakeVllm(modules={"finance": "/somewhere", "sql-v2": "/else"})
    async with serving(server.app) as url:
        engine = await start(url + "/v1", adapter("finance"), adapter("sql", upstream="sql-v2"))
        assert engine.refused() == {}
        assert {name: (at.model, at.adapter) for name, at in engine.adapters().items()} == {
            "finance": ("finance", None),
            "sql": ("sql-v2", None),
        }
        status, answer = await ask(engine.adapters()["sql"])
        assert (status, answer["choices"][0]["message"]["content"]) == (200, "I am sql-v2")
        await engine.stop()
    assert [path for path, _ in server.asked] == ["/v1/chat/completions"]  # nothing loaded, nothing unloaded


@pytest.mark.parametrize("flat_errors", [False, True])
async def test_others_are_loaded_from_their_directory_and_unloaded_at_the_end(
    tmp_path: Path, flat_errors: bool
) -> None:
    weights = peft(tmp_path / "finance")
    server = FakeVllm(modules={"sql": "/else"}, flat_errors=flat_errors)
    async with serving(server.app) as url:
        engine = await start(url, adapter("finance", weights), adapter("sql", weights))
        assert set(engine.adapters()) == {"finance", "sql"}
        assert server.asked == [(LOAD, {"lora_name": "finance", "lora_path": str(tmp_path / "finance")})]
        assert (await ask(engine.adapters()["finance"]))[0] == 200
        await engine.stop()
        await engine.stop()
        assert server.asked[2:] == [(UNLOAD, {"lora_name": "finance"})]
        status, error = await ask(engine.adapters()["finance"])
        assert status == 404
        assert "does not exist" in str(error)


async def test_one_that_another_client_loaded_meanwhile_is_used(tmp_path: Path) -> None:
    server = FakeVllm(modules={"finance": "/x"})
    server.hides = {"finance"}
    async with serving(server.app) as url:
        engine = await start(url, adapter("finance", peft(tmp_path / "a")))
        assert set(engine.adapters()) == {"finance"}
        await engine.stop()
    assert "finance" in server.loras  # not ours to unload


async def test_a_server_that_loads_nothing_at_run_time_says_how_it_could(tmp_path: Path) -> None:
    async with serving(FakeVllm(runtime=False).app) as url:
        engine = await start(url, adapter("finance", peft(tmp_path / "a")))
    assert engine.adapters() == {}
    reason = engine.refused()["finance"]
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1" in reason
    assert "--lora-modules finance=DIRECTORY" in reason


async def test_a_refusal_is_told_in_the_servers_words(tmp_path: Path) -> None:
    server = FakeVllm()
    async with serving(server.app) as url:
        engine = await start(
            url, adapter("big", peft(tmp_path / "b", rank=64)), adapter("good", peft(tmp_path / "g"))
        )
        assert set(engine.adapters()) == {"good"}
        assert "rank 64 is greater than max_lora_rank 16" in engine.refused()["big"]
        server.enable_lora = False
        engine = await start(url, adapter("late", peft(tmp_path / "l")))
        assert "--enable-lora" in engine.refused()["late"]


async def test_what_vllm_cannot_read_is_not_sent(tmp_path: Path) -> None:
    lonely = tmp_path / "adapter_model.safetensors"
    lonely.write_bytes(b"x")
    server = FakeVllm()
    async with serving(server.app) as url:
        engine = await start(
            url, adapter("a", tmp_path / "a.gguf"), adapter("b", lonely), adapter("c"), adapter("base")
        )
    assert server.asked == []
    assert "a.gguf, not the adapter_model.safetensors" in engine.refused()["a"]
    assert "no adapter_config.json" in engine.refused()["b"]
    assert "no source" in engine.refused()["c"]
    assert "is the base at the server" in engine.refused()["base"]


async def test_files_of_this_machine_are_not_named_to_another(tmp_path: Path) -> None:
    server = FakeVllm()
    async with serving(server.app) as url, HttpUpstream() as upstream:
        found = await find_adapters(
            upstream,
            Endpoint(base_url=url, model="base"),
            [adapter("a", peft(tmp_path / "a"))],
            same_machine=False,
            timeout_s=5.0,
        )
    assert server.asked == []
    assert "--lora-modules a=DIRECTORY" in found.refused["a"]


async def test_without_a_list_the_operators_word_counts() -> None:
    app = web.Application()

    async def here(request: web.Request) -> web.Response:
        return web.Response()

    app.router.add_get("/health", here)
    async with serving(app) as url:
        engine = await start(url, adapter("a", upstream="org/a"), adapter("b"))
    assert engine.adapters()["a"].model == "org/a"
    assert "engine.upstream_model" in engine.refused()["b"]


async def test_no_adapters_no_questions() -> None:
    server = FakeVllm()
    async with serving(server.app) as url:
        engine = await start(url)
        await engine.stop()
    assert (engine.adapters(), engine.refused(), server.asked) == ({}, {}, [])
    assert engine.endpoint.adapter is None


async def test_a_server_that_dies_meanwhile_fails_no_base(tmp_path: Path) -> None:
    async with HttpUpstream() as upstream:
        gone = Endpoint(base_url="http://127.0.0.1:1", model="base")
        found = await find_adapters(upstream, gone, [adapter("a")], same_machine=True, timeout_s=5.0)
    assert "nobody answers" in found.refused["a"]


async def test_a_command_engine_loads_into_its_own_server(tmp_path: Path) -> None:
    program = f"{sys.executable} {fake_vllm.__file__} {{port}}"
    spec = EngineSpec(kind="command", cmd=program, start_timeout_s=60.0)
    card = ModelCard(name="base", description="d", engine=spec)
    backend = CommandBackend(tmp_path / "run")
    engine = await backend.start(card, None, 1, [adapter("finance", peft(tmp_path / "f")), adapter("odd")])
    try:
        assert set(engine.adapters()) == {"finance"}
        assert set(engine.refused()) == {"odd"}
        status, answer = await ask(engine.adapters()["finance"])
        assert (status, answer["model"]) == (200, "finance")
    finally:
        await engine.stop()
    assert list((tmp_path / "run").iterdir()) == []


# --- llama-server ----------------------------------------------------------------------------------


def llama_server(listed: Sequence[str]) -> web.Application:
    async def models(request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "base.gguf"}]})

    async def adapters(request: web.Request) -> web.Response:
        entries = [{"id": number, "path": path, "scale": 1.0} for number, path in enumerate(listed)]
        return web.json_response(entries)

    app = web.Application()
    app.router.add_get("/v1/models", models)
    app.router.add_get("/lora-adapters", adapters)
    return app


@pytest.mark.parametrize("suffix", ["", "/v1"])
async def test_llama_servers_adapters_are_found_by_file_and_asked_by_number(
    tmp_path: Path, suffix: str
) -> None:
    async with serving(llama_server(["/x/sql.gguf", "/y/finance.gguf"])) as url:
        engine = await start(
            url + suffix,
            adapter("money", tmp_path / "finance.gguf"),
            adapter("tables", upstream="sql"),
            adapter("maths", tmp_path / "maths.gguf"),
        )
    assert {name: at.adapter for name, at in engine.adapters().items()} == {"money": 1, "tables": 0}
    assert engine.refused()["maths"] == (
        "the server has no adapter maths.gguf (it has: sql.gguf, finance.gguf): start it with --lora FILE"
    )
    assert engine.endpoint.adapter == 2  # a number of no adapter: the base, said aloud


async def test_a_llama_server_without_adapters(tmp_path: Path) -> None:
    async with serving(llama_server([])) as url:
        engine = await start(url, adapter("a", tmp_path / "a.gguf"))
    assert "it has: none" in engine.refused()["a"]
    assert engine.endpoint.adapter is None


# --- the rest --------------------------------------------------------------------------------------


async def test_a_page_in_place_of_the_lists_is_no_list() -> None:
    async def page(request: web.Request) -> web.Response:
        return web.Response(text="<html>welcome</html>", content_type="text/html")

    app = web.Application()
    app.router.add_get("/{tail:.*}", page)
    async with serving(app) as url:
        engine = await start(url, adapter("a", upstream="a-there"))
    assert engine.adapters()["a"].model == "a-there"


async def test_a_base_that_is_not_there_fails_as_ever() -> None:
    async with FakeEngineServer() as server:
        url = server.base_url
    with pytest.raises(LoadFailed, match="nobody answers"):
        await start(url, adapter("a"))
