"""Where there is no room: a full queue, more answers than slots, a silent engine, nobody left to load for."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from tests.system.conftest import CHATTERS, SMOL, TINY, Engine, Json, Launch, Server, eventually

pytestmark = pytest.mark.models


@contextlib.contextmanager
def frozen(engine: Engine) -> Iterator[None]:
    """The engine takes connections and says nothing."""
    os.kill(engine.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(engine.pid, signal.SIGCONT)


def test_a_full_queue_is_429_with_a_time_to_come_back(launch: Launch) -> None:
    server = launch(SMOL, environment={"CALM_SERVER__MAX_QUEUE": "2"})
    server.load(SMOL)
    slots = server.model(SMOL)["slots"]
    with frozen(server.engine(SMOL)), ThreadPoolExecutor(slots + 2) as callers, server.openai() as client:
        waiting = [callers.submit(server.chat, "Hi", SMOL) for _ in range(slots + 2)]
        eventually(
            "slots and queue full",
            lambda: (server.model(SMOL)["in_flight"], server.snapshot()["queue_length"]) == (slots, 2),
        )
        with pytest.raises(openai.RateLimitError) as caught:
            client.chat.completions.create(model=SMOL, messages=[{"role": "user", "content": "Hi"}])
        assert caught.value.code == "queue_full"
        assert int(caught.value.response.headers["Retry-After"]) >= 1
        os.kill(server.engine(SMOL).pid, signal.SIGCONT)
        assert [call.result().status_code for call in waiting] == [200] * (slots + 2), "who waited is served"


def test_more_answers_than_an_engine_has_slots(server: Server, policy: Callable[..., Json]) -> None:
    """llama.cpp gives as many answers at once as it has slots; a model with more of them serves instead."""
    slots = {name: state["slots"] for name, state in server.snapshot()["models"].items()}
    assert slots[TINY] < 3 <= slots[SMOL]
    policy(policy=f"fixed:{TINY}")
    answer = server.chat("Hi", n=3, temperature=1, max_tokens=3)
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-calm-model"] in CHATTERS - {TINY}
    assert len(answer.json()["choices"]) == 3
    pinned = server.chat("Hi", TINY, n=3)
    assert pinned.status_code in (400, 422)
    assert "slots" in pinned.json()["error"]["message"]


def test_a_silent_engine_is_bridged_with_comments(launch: Launch) -> None:
    """Proxies give up on silence, so a stream that waits says so; its failure then comes as an event."""
    server = launch(SMOL, environment={"CALM_SERVER__PING_S": "0.2"})
    server.load(SMOL)
    with frozen(server.engine(SMOL)), server.stream("Hi", SMOL, calm={"deadline_s": 1.5}) as response:
        assert response.status_code == 200
        lines = [line for line in response.iter_lines() if line]
    assert lines[:2] == [": waiting"] * 2
    assert "deadline_exceeded" in lines[-1]
    assert not any("[DONE]" in line for line in lines)
    eventually("nothing in flight", lambda: server.snapshot()["in_flight"] == 0)
    with server.stream("Hi", SMOL, max_tokens=3) as response:
        assert response.read().decode().rstrip().endswith("data: [DONE]")


def test_a_load_nobody_waits_for_is_cancelled(launch: Launch) -> None:
    server = launch(TINY, environment={"CALM_MEMORY__PRELOAD": "false"})
    with ThreadPoolExecutor(1) as caller:
        asking = caller.submit(ask_and_lose_patience, server)
        eventually("the load begun", lambda: server.model(TINY)["residency"] == "loading" or asking.done())
        asking.result()
    eventually("no engine and no load", lambda: not server.engines() and settled(server))
    assert server.snapshot()["used_bytes"] == 0
    assert server.chat("Hi", TINY, max_tokens=1).status_code == 200, "and it loads when someone asks again"


def ask_and_lose_patience(server: Server) -> None:
    body = {"model": TINY, "messages": [{"role": "user", "content": "Hi"}]}
    with pytest.raises(httpx.TimeoutException):
        httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=0.2, trust_env=False)


def settled(server: Server) -> bool:
    return server.model(TINY)["residency"] == "cold"


def test_an_idle_model_leaves_and_comes_back(launch: Launch) -> None:
    server = launch(SMOL, environment={"CALM_MEMORY__IDLE_UNLOAD_S": "1"})
    assert server.chat("Hi", SMOL, max_tokens=1).status_code == 200
    eventually("unloaded", lambda: server.model(SMOL)["residency"] == "cold" and not server.engines())
    assert server.chat("Hi", SMOL, max_tokens=1).status_code == 200


def test_a_remote_engine_that_is_not_there(server: Server) -> None:
    """It fails at once and by name when pinned, and a routed request does without it."""
    card = server.fleet / "gone.toml"
    card.write_text(
        'name = "gone"\ndescription = "Nobody."\n[engine]\nkind = "openai"\nurl = "http://127.0.0.1:9"\n',
        encoding="utf-8",
    )
    try:
        eventually("the card in the fleet", lambda: server.model("gone"))
        answer = server.chat("Hi", "gone")
        assert answer.status_code == 503
        assert "gone" in answer.json()["error"]["message"]
        for _ in range(3):
            assert server.chat("Hi", max_tokens=1).status_code == 200
    finally:
        card.unlink()
        eventually("the card gone", lambda: not server.model("gone"))


def test_a_body_too_large_and_one_that_is_no_json(server: Server) -> None:
    large = server.request("POST", "/v1/chat/completions", content=b" " * (9 * 2**20))
    assert large.status_code == 413
    assert large.json()["error"]["code"] == "request_too_large"
    broken = server.request("POST", "/v1/chat/completions", content=b'{"model": ')
    assert broken.status_code == 400
    assert broken.json()["error"]["type"] == "invalid_request_error"
