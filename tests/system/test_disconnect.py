"""A caller that leaves stops the engine's work, wherever its request stands, and the record says so."""

from __future__ import annotations

import os
import signal
import time

import httpx
import pytest
from tests.system.conftest import SMOL, TINY, Server, eventually

pytestmark = pytest.mark.models

STORY = "Tell me a long story about a dog."
LATE_TOKENS = 16
"""Decoding steps that may still happen while the news of the departure travels on a busy machine."""


def rests(server: Server, model: str) -> float:
    """Decoding steps of the engine, once they have stopped growing; fails when they go on."""
    engine = server.engine(model)
    eventually(
        "the engine's last request gone", lambda: engine.counter("requests_processing") == 0, patience_s=10
    )
    steps = engine.counter("n_decode_total")
    time.sleep(1.0)
    assert engine.counter("n_decode_total") == steps, "the engine still generates"
    return steps


def test_leaving_a_stream_stops_the_engine(server: Server) -> None:
    server.idle()
    before = rests(server, TINY)
    with server.stream(STORY, TINY) as response:
        request_id = response.headers["x-calm-request-id"]
        tokens = 0
        for line in response.iter_lines():
            tokens += '"content":"' in line
            if tokens == 4:
                break
    eventually("nothing in flight", lambda: server.snapshot()["in_flight"] == 0, patience_s=10)
    assert rests(server, TINY) - before <= tokens + LATE_TOKENS
    record = server.finished(request_id)
    assert record["outcome"]["status"] == "cancelled"
    assert record["outcome"]["error"] == "the client left"
    assert tokens <= record["outcome"]["completion_tokens"] <= tokens + LATE_TOKENS
    assert record["outcome"]["energy"]["joules"] > 0, "what was spent on it is on record"


def test_leaving_a_whole_answer_stops_the_engine(server: Server) -> None:
    """The caller's patience ends in the middle of an answer of which it has not seen a byte."""
    server.idle()
    before = rests(server, TINY)
    body = {"model": TINY, "messages": [{"role": "user", "content": STORY}], "temperature": 0}
    with pytest.raises(httpx.TimeoutException):
        httpx.post(
            f"{server.url}/v1/chat/completions",
            json={**body, "max_tokens": 1500, "ignore_eos": True},
            timeout=1.0,
            trust_env=False,
        )
    eventually("nothing in flight", lambda: server.snapshot()["in_flight"] == 0, patience_s=10)
    assert rests(server, TINY) - before < 1000, "1,500 were asked for"
    newest = server.get("/calm/v1/decisions?limit=1")["decisions"][0]
    assert newest["outcome"]["status"] == "cancelled"


def test_leaving_before_the_first_token(server: Server) -> None:
    """The engine is frozen, so the request has a lease and no byte when its caller goes."""
    server.idle()
    engine = server.engine(SMOL)
    os.kill(engine.pid, signal.SIGSTOP)
    try:
        with pytest.raises(httpx.TimeoutException):
            httpx.post(
                f"{server.url}/v1/chat/completions",
                json={"model": SMOL, "stream": True, "messages": [{"role": "user", "content": STORY}]},
                timeout=1.0,
                trust_env=False,
            )
        eventually("nothing in flight", lambda: server.snapshot()["in_flight"] == 0, patience_s=10)
        newest = server.get("/calm/v1/decisions?limit=1")["decisions"][0]
        assert newest["outcome"]["status"] == "cancelled"
        assert newest["outcome"]["completion_tokens"] in (None, 0)
    finally:
        os.kill(engine.pid, signal.SIGCONT)
    assert server.chat("Hi", SMOL).status_code == 200


def test_leaving_the_queue(server: Server) -> None:
    """More callers than slots: one that leaves while it waits is out of the queue at once."""
    server.idle()
    slots = server.model(TINY)["slots"]
    streams = [server.stream(STORY, TINY) for _ in range(slots)]
    for stream in streams:
        stream.__enter__()
    try:
        with pytest.raises(httpx.TimeoutException):
            httpx.post(
                f"{server.url}/v1/chat/completions",
                json={"model": TINY, "messages": [{"role": "user", "content": STORY}]},
                timeout=1.0,
                trust_env=False,
            )
        eventually("an empty queue", lambda: server.snapshot()["queue_length"] == 0, patience_s=10)
        assert server.model(TINY)["in_flight"] == slots
    finally:
        for stream in streams:
            stream.__exit__(None, None, None)
    eventually("nothing in flight", lambda: server.snapshot()["in_flight"] == 0, patience_s=10)
    rests(server, TINY)


def test_half_a_stream_leaves_a_clean_slot_for_the_next(server: Server) -> None:
    for _ in range(3):
        with server.stream(STORY, SMOL) as response:
            next(response.iter_lines())
    server.idle()
    answer = server.chat("What is the capital of Japan?", SMOL, max_tokens=12)
    assert "Tokyo" in answer.json()["choices"][0]["message"]["content"]
