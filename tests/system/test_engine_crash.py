"""An engine killed with SIGKILL hurts the requests it was answering, visibly, and nobody else."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable

import httpx
import openai
import psutil
import pytest
from tests.system.conftest import GEMMA, SMOL, TINY, Json, Launch, Server, alive, eventually

pytestmark = pytest.mark.models

STORY = "Tell me a long story about a dog."
IN_HAND_S = 0.6
"""An engine that had a request for this long is no stale connection: it may have died of the request."""


def recovers(server: Server, model: str) -> str:
    """What the model answers once it serves again: after repeated crashes it rests for a while first."""

    def answer() -> str | None:
        response = server.chat("What is the capital of Japan?", model, max_tokens=12)
        if response.status_code == 503:
            return None
        assert response.status_code == 200, response.text
        return str(response.json()["choices"][0]["message"]["content"])

    return eventually(f"{model} serves again", answer)


def test_the_very_next_request_after_a_crash_is_served(launch: Launch) -> None:
    """The first death is forgiven, and a request that never reached the dead engine can wait for the new one."""
    server = launch(SMOL)
    server.load(SMOL)
    engine = server.engine(SMOL)
    os.kill(engine.pid, signal.SIGKILL)
    answer = server.chat("What is the capital of Japan?", SMOL, max_tokens=12)
    assert answer.status_code == 200, answer.text
    assert server.engine(SMOL).pid != engine.pid


def test_a_crash_mid_stream_is_an_error_event_and_never_done(server: Server) -> None:
    engine = server.engine(SMOL)
    with server.stream(STORY, SMOL) as response:
        request_id = response.headers["x-calm-request-id"]
        lines = response.iter_lines()
        for _ in range(3):
            next(lines)
        os.kill(engine.pid, signal.SIGKILL)
        rest = [line for line in lines if line]
    assert rest[-1].startswith('data: {"error"')
    assert "engine_lost" in rest[-1]
    assert not any("[DONE]" in line for line in rest)
    assert server.chat("Who painted the Mona Lisa?", TINY, max_tokens=2).status_code == 200, "others serve on"
    record = server.finished(request_id)
    assert record["outcome"]["status"] == "error"
    assert record["outcome"]["model"] == SMOL
    back = server.chat("What is the capital of Japan?", SMOL, max_tokens=12)
    assert back.status_code == 200, back.text
    assert "Tokyo" in back.json()["choices"][0]["message"]["content"]
    assert server.engine(SMOL).pid != engine.pid


def test_the_openai_client_raises_on_a_crash_mid_stream(server: Server, client: openai.OpenAI) -> None:
    engine = server.engine(SMOL)
    stream = client.chat.completions.create(
        model=SMOL,
        messages=[{"role": "user", "content": STORY}],
        max_tokens=1500,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    chunks = iter(stream)
    next(chunks)
    os.kill(engine.pid, signal.SIGKILL)
    with pytest.raises(openai.APIError, match=SMOL):
        for _ in chunks:
            pass
    assert "Tokyo" in recovers(server, SMOL)


def test_a_crash_before_the_first_byte_fails_over(server: Server, policy: Callable[..., Json]) -> None:
    """The first choice is frozen with the request in hand, then killed: the next one answers."""
    assert recovers(server, TINY)
    policy(policy=f"fixed:{TINY}")
    server.idle()
    engine = server.engine(TINY)
    os.kill(engine.pid, signal.SIGSTOP)
    answers: list[httpx.Response] = []
    asking = threading.Thread(target=lambda: answers.append(server.chat("Who painted the Mona Lisa?")))
    asking.start()
    try:
        eventually("the request at the first choice", lambda: server.model(TINY)["in_flight"] == 1)
        time.sleep(IN_HAND_S)
    finally:
        os.kill(engine.pid, signal.SIGKILL)
    asking.join(60)
    assert answers, "the request hangs"
    answer = answers[0]
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-calm-model"] in (SMOL, GEMMA)
    assert answer.json()["calm"]["attempts"] == 2
    record = server.answered(answer)
    assert record["decision"]["ranked"][0]["model"] == TINY
    assert record["outcome"]["status"] == "ok"
    assert record["outcome"]["attempts"] == 2


def test_a_pinned_request_has_nobody_to_fail_over_to(server: Server) -> None:
    assert recovers(server, GEMMA)
    engine = server.engine(GEMMA)
    os.kill(engine.pid, signal.SIGSTOP)
    answers: list[httpx.Response] = []
    asking = threading.Thread(target=lambda: answers.append(server.chat("Hi", GEMMA)))
    asking.start()
    try:
        eventually("the request in flight", lambda: server.model(GEMMA)["in_flight"] == 1)
        time.sleep(IN_HAND_S)
    finally:
        os.kill(engine.pid, signal.SIGKILL)
    asking.join(60)
    assert answers, "the request hangs"
    assert answers[0].status_code == 503
    assert answers[0].json()["error"]["code"] == "engine_lost"
    assert recovers(server, GEMMA)


def test_a_crash_of_an_idle_engine_is_noticed(server: Server) -> None:
    assert recovers(server, GEMMA)
    engine = server.engine(GEMMA)
    failures = server.model(GEMMA)["failures"]
    os.kill(engine.pid, signal.SIGKILL)
    eventually("the crash on record", lambda: server.model(GEMMA)["failures"] > failures)
    assert recovers(server, GEMMA)
    assert server.engine(GEMMA).pid != engine.pid


def test_a_killed_guard_takes_its_engine_along(server: Server) -> None:
    """The process that watches over an engine is not a way to lose track of it."""
    assert recovers(server, SMOL)
    engine = psutil.Process(server.engine(SMOL).pid)
    pid, started_s = engine.pid, engine.create_time()
    guard = engine.parent()
    assert guard is not None
    assert guard.pid != server.process.pid
    guard.kill()
    eventually("the engine gone with its guard", lambda: not alive(pid, started_s))
    assert "Tokyo" in recovers(server, SMOL)
    assert server.engine(SMOL).pid != pid
