"""Engines that generate at once never use more threads than there are cores."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor

import pytest
from tests.system.conftest import GEMMA, SMOL, TINY, Background, Server, eventually

pytestmark = pytest.mark.models

STORY = "Tell me a long story about a dog."


def test_threads_of_all_active_engines_fit_the_cores(server: Server) -> None:
    for model in (SMOL, GEMMA, TINY):
        server.load(model)
    server.idle()
    threads = {model: engine.threads for model, engine in server.engines().items()}

    with Background(server.snapshot) as samples, contextlib.ExitStack() as streams:
        running = [streams.enter_context(server.stream(STORY, model)) for model in (SMOL, GEMMA)]
        lines = [response.iter_lines() for response in running]
        for _ in range(12):
            for line in lines:
                next(line)
        samples.grows(2)

    assert not samples.errors
    active = [
        {name for name, state in sample["models"].items() if state["in_flight"] and state["model"] == name}
        for sample in samples.results
    ]
    assert {SMOL, GEMMA} in active, "the two never generated at once"
    for sample, models in zip(samples.results, active, strict=True):
        assert sample["threads_in_use"] <= sample["cores"]
        assert sum(threads[model] for model in models) <= sample["cores"]
        assert sample["threads_in_use"] == sum(threads[model] for model in models)
    eventually("the cores given back", lambda: server.snapshot()["threads_in_use"] == 0)


def test_more_models_than_cores_take_turns(server: Server) -> None:
    """Three at once on however many cores: whoever has to wait waits, and all are answered."""
    with Background(server.snapshot) as samples, ThreadPoolExecutor(6) as callers:
        answers = list(
            callers.map(lambda model: server.chat(STORY, model, max_tokens=4), [SMOL, GEMMA, TINY] * 2)
        )
    assert [answer.status_code for answer in answers] == [200] * 6
    assert all(sample["threads_in_use"] <= sample["cores"] for sample in samples.results)
