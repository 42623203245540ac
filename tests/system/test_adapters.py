"""Specialists through a whole CALM: one engine, several models, each answering as itself."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.integration.test_adapters_llamacpp import write_adapter
from tests.system.conftest import SMOL, Launch, Server, eventually

from calm.registry import load_fleet
from calm.settings import cache_dir
from calm.sources.fetch import cached_path

pytestmark = pytest.mark.models

QUESTIONS = ("What is the capital of France?", "Name three fruits.")


def add_adapter(server: Server, name: str, weights: Path) -> None:
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    card = f"""
        name = "{name}"
        description = "A random change of its base."
        adapter_of = "{SMOL}"
        [source]
        parts = ["file:{weights}"]
        sha256 = "{digest}"
    """
    (server.fleet / f"{name}.toml").write_text(card, encoding="utf-8")


def base_weights(server: Server) -> Path:
    card = load_fleet(server.fleet).fleet[SMOL]
    assert card.source is not None
    path = cached_path(card.source, cache_dir(), server.fleet)
    assert path is not None
    return path


def model(server: Server, name: str) -> dict[str, object]:
    return next((m for m in server.get("/calm/v1/fleet")["models"] if m["name"] == name), {})


def answer(server: Server, name: str, question: str) -> str:
    reply = server.chat(question, name, max_tokens=12, temperature=0)
    assert reply.status_code == 200, reply.text
    assert reply.json()["model"] == reply.headers["x-calm-model"] == name
    return str(reply.json()["choices"][0]["message"]["content"])


def test_specialists_share_one_engine_and_answer_as_themselves(launch: Launch, tmp_path: Path) -> None:
    server = launch(SMOL)
    weights = base_weights(server)
    before = [answer(server, SMOL, question) for question in QUESTIONS]
    for seed, name in enumerate(("finance", "sql")):
        add_adapter(server, name, write_adapter(tmp_path / f"{name}.gguf", weights, seed, strength=3.0))
    add_adapter(server, "odd", write_adapter(tmp_path / "odd.gguf", weights, 3, architecture="gemma3"))
    eventually("the specialists in the fleet", lambda: model(server, "sql") and model(server, "odd"))
    jobs = [(name, question) for question in QUESTIONS for name in (SMOL, "finance", "sql")]
    alone = [answer(server, *job) for job in jobs]
    assert [text for (name, _), text in zip(jobs, alone, strict=True) if name == SMOL] == before
    assert len(set(alone[:3])) == 3
    with ThreadPoolExecutor(len(jobs)) as pool:
        assert list(pool.map(lambda job: answer(server, *job), jobs)) == alone
    assert list(server.engines()) == [SMOL]
    refused = server.chat("Hi", "odd")
    assert refused.status_code == 503
    assert "it was made for gemma3, the base is llama" in refused.text
