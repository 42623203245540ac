"""The door over real sockets: routes, statuses, headers, roles, limits."""

from __future__ import annotations

import asyncio
import gzip
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from calm.errors import (
    DeadlineExceeded,
    EngineLost,
    LoadFailed,
    NoCandidate,
    QueueFull,
    UnknownModel,
    UpstreamRejected,
)
from calm.gateway.auth import Guard, Keys
from calm.gateway.fake import Script, ScriptedService, decision_for, serving
from calm.gateway.limits import Limits
from calm.gateway.service import Readiness
from calm.records import Features, StoredRequest, Weights

CHAT = {"model": "calm", "messages": [{"role": "user", "content": "What is the capital of France?"}]}


class Client:
    """A session at one door."""

    def __init__(self, session: aiohttp.ClientSession, service: ScriptedService, url: str) -> None:
        self.session, self.service, self.url = session, service, url

    async def ask(self, method: str, path: str, **options: object) -> tuple[aiohttp.ClientResponse, dict]:
        async with self.session.request(method, self.url + path, **options) as response:
            body = await response.read()
            return response, msgspec.json.decode(body) if "json" in response.content_type else {}


@asynccontextmanager
async def door(path: Path, **options: object) -> AsyncIterator[Client]:
    service = options.pop("service", None) or ScriptedService()
    keys = Keys(path / "keys.toml")
    async with serving(service, keys, **options) as server, aiohttp.ClientSession() as session:
        yield Client(session, service, server.url)


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[Client]:
    async with door(tmp_path, limits=Limits(max_body_bytes=2000)) as client:
        yield client


# --- answers ------------------------------------------------------------------------------------------


async def test_a_chat(client: Client) -> None:
    response, answer = await client.ask("POST", "/v1/chat/completions", json=CHAT)
    assert response.status == 200
    assert answer["choices"][0]["message"]["content"] == "hello"
    assert response.headers["x-calm-request-id"] == client.service.asks[0].request_id
    assert answer["id"] == f"chatcmpl-{client.service.asks[0].request_id}"
    assert (response.headers["x-calm-model"], answer["model"]) == ("small", "small")
    assert response.headers["x-calm-energy-j"] == "1.5"
    assert response.headers["x-calm-energy-meter"] == "scripted; modelled"
    assert response.headers["x-calm-decision-ms"] == "0.123"
    assert response.headers["Server"] == "calm"
    assert answer["calm"]["energy_meter"] == "scripted"


async def test_completions_and_embeddings(client: Client) -> None:
    _, answer = await client.ask("POST", "/v1/completions", json={"prompt": "x", "model": "large"})
    assert (answer["choices"][0]["text"], answer["model"]) == ("hello", "large")
    _, answer = await client.ask("POST", "/v1/embeddings", json={"input": "x"})
    assert answer["data"][0]["embedding"] == [0.6, 0.8]


async def test_no_meter_no_energy_header(client: Client) -> None:
    client.service.script = lambda ask: Script(steps=(b"{}",), energy=None)
    response, answer = await client.ask("POST", "/v1/chat/completions", json=CHAT)
    assert "x-calm-energy-j" not in response.headers
    assert answer["calm"]["energy_j"] is None


async def test_request_ids_differ(client: Client) -> None:
    for _ in range(3):
        await client.ask("POST", "/v1/chat/completions", json=CHAT)
    assert len({ask.request_id for ask in client.service.asks}) == 3


async def test_wishes_by_header(client: Client) -> None:
    await client.ask("POST", "/v1/chat/completions", json=CHAT, headers={"X-Calm-Goal": "energy"})
    assert client.service.asks[0].wishes.goal == "energy"


async def test_models(client: Client) -> None:
    _, answer = await client.ask("GET", "/v1/models")
    assert [entry["id"] for entry in answer["data"]] == ["calm", "calm/balanced", "small", "large"]
    _, entry = await client.ask("GET", "/v1/models/calm/balanced")
    assert entry["id"] == "calm/balanced"
    response, answer = await client.ask("GET", "/v1/models/nope")
    assert (response.status, answer["error"]["code"]) == (404, "model_not_found")


async def test_models_tell_whose_adapters_they_are(client: Client) -> None:
    service = client.service
    service.fleet["finance"] = msgspec.structs.replace(
        service.fleet["small"], name="finance", adapter_of="small"
    )
    _, answer = await client.ask("GET", "/v1/models")
    told = {entry["id"]: entry.get("calm") for entry in answer["data"]}
    assert told["finance"] == {"adapter_of": "small"}
    assert told["small"] == {"adapter_of": None}
    assert told["calm"] is None
    _, fleet = await client.ask("GET", "/calm/v1/fleet")
    assert {entry["name"]: entry["adapter_of"] for entry in fleet["models"]}["finance"] == "small"
    _, base = await client.ask("GET", "/calm/v1/models/small")
    assert base["adapters"] == ["finance"]
    assert (await client.ask("GET", "/calm/v1/models/finance"))[1]["card"]["adapter_of"] == "small"


async def test_index_health_readiness(client: Client) -> None:
    _, index = await client.ask("GET", "/")
    assert "POST /v1/chat/completions" in index["endpoints"]
    assert "GET /v1/models/{id}" in index["endpoints"]
    assert (await client.ask("GET", "/healthz"))[0].status == 200
    assert (await client.ask("GET", "/readyz"))[0].status == 200
    client.service.ready = Readiness(ready=False, reason="no model has weights")
    response, answer = await client.ask("GET", "/readyz")
    assert (response.status, answer["reason"]) == (503, "no model has weights")


async def test_metrics_count_by_route_and_never_by_path(client: Client) -> None:
    await client.ask("POST", "/v1/chat/completions", json=CHAT)
    await client.ask("GET", "/v1/models/secret-name")
    await client.ask("GET", "/nowhere/secret-path")
    async with client.session.get(client.url + "/metrics") as response:
        text = await response.text()
    assert 'calm_http_responses_total{code="200",route="/v1/chat/completions"} 1.0' in text
    assert 'calm_http_responses_total{code="404",route="(none)"} 1.0' in text
    assert 'calm_model_state{model="small",state="ready"} 1.0' in text
    assert "secret" not in text


async def test_feedback(client: Client) -> None:
    _, answer = await client.ask("POST", "/v1/chat/completions", json=CHAT)
    body = {"request_id": answer["id"], "rating": 4, "comment": "good"}
    response, _ = await client.ask("POST", "/v1/feedback", json=body)
    assert response.status == 200
    rating = client.service.ratings[0]
    assert (rating.request_id, rating.rating, rating.source) == (answer["calm"]["request_id"], 4, "user")
    for bad, status in (
        ({**body, "rating": 6}, 400),
        ({"rating": 3}, 400),
        ({**body, "request_id": "x"}, 404),
    ):
        assert (await client.ask("POST", "/v1/feedback", json=bad))[0].status == status


# --- failures -----------------------------------------------------------------------------------------

FAILURES = [
    (QueueFull("full", retry_after_s=2.2), 429, "queue_full"),
    (DeadlineExceeded("late"), 504, "deadline_exceeded"),
    (NoCandidate("none fits"), 422, "no_eligible_model"),
    (UnknownModel("which?", field="model"), 404, "model_not_found"),
    (LoadFailed("no"), 503, "model_load_failed"),
    (EngineLost("gone"), 503, "engine_lost"),
    (UpstreamRejected("no", status=400), 400, "upstream_rejected"),
    (UpstreamRejected("no", status=401), 502, "upstream_rejected"),
    (UpstreamRejected("no", status=302), 502, "upstream_rejected"),
    (RuntimeError("secret"), 500, "internal_error"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("failure", "status", "code"), FAILURES)
async def test_a_failure_before_the_first_byte_has_its_status(
    client: Client, failure: Exception, status: int, code: str, stream: bool
) -> None:
    client.service.script = lambda ask: Script(before=(failure,))
    response, answer = await client.ask("POST", "/v1/chat/completions", json={**CHAT, "stream": stream})
    assert (response.status, answer["error"]["code"]) == (status, code)
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert response.headers["x-calm-request-id"] == client.service.asks[0].request_id
    assert response.headers.get("Retry-After") == ("3" if status == 429 else None)
    assert "secret" not in answer["error"]["message"]


async def test_an_unforeseen_failure_is_in_the_log_under_its_id(
    client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    client.service.script = lambda ask: Script(before=(RuntimeError("secret"),))
    response, answer = await client.ask("POST", "/v1/chat/completions", json=CHAT)
    request_id = response.headers["x-calm-request-id"]
    assert request_id in answer["error"]["message"]
    assert request_id in caplog.text
    assert "RuntimeError: secret" in caplog.text


async def test_an_engines_own_words_are_passed_on(client: Client) -> None:
    said = {"error": {"message": "context is 2048", "type": "exceed_context_size_error", "code": 400}}
    body = msgspec.json.encode(said)
    client.service.script = lambda ask: Script(before=(UpstreamRejected("x", status=400, body=body),))
    response, answer = await client.ask("POST", "/v1/chat/completions", json=CHAT)
    assert response.status == 400
    assert answer["error"] == {**said["error"], "param": None}


async def test_a_failure_after_the_engine_began_a_whole_answer(client: Client) -> None:
    client.service.script = lambda ask: Script(steps=(b'{"a":', EngineLost("gone")))
    assert (await client.ask("POST", "/v1/chat/completions", json=CHAT))[0].status == 503
    client.service.script = lambda ask: Script(steps=(b"not json",))
    assert (await client.ask("POST", "/v1/chat/completions", json=CHAT))[0].status == 503


async def test_unknown_urls_and_methods(client: Client) -> None:
    response, answer = await client.ask("GET", "/v1/nothing")
    assert (response.status, answer["error"]["code"]) == (404, "unknown_url")
    response, answer = await client.ask("DELETE", "/v1/chat/completions")
    assert (response.status, answer["error"]["code"]) == (405, "method_not_allowed")
    assert "POST" in answer["error"]["message"]
    assert (await client.ask("OPTIONS", "/v1/chat/completions"))[0].status == 405


async def test_bodies_that_are_too_large(client: Client) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(5):
            yield b"x" * 1000

    big = b"x" * 2001
    bomb = gzip.compress(b"x" * 1_000_000)
    for data, headers in (
        (big, {}),
        (pieces(), {}),
        (big, {"Expect": "100-continue"}),
        (bomb, {"Content-Encoding": "gzip"}),
    ):
        response, answer = await client.ask("POST", "/v1/chat/completions", data=data, headers=headers)
        assert (response.status, answer["error"]["code"]) == (413, "request_too_large")


async def test_chunked_and_compressed_bodies_are_read(client: Client) -> None:
    raw = msgspec.json.encode(CHAT)

    async def pieces() -> AsyncIterator[bytes]:
        yield raw[:10]
        yield raw[10:]

    assert (await client.ask("POST", "/v1/chat/completions", data=pieces()))[0].status == 200
    zipped = {"data": gzip.compress(raw), "headers": {"Content-Encoding": "gzip"}}
    assert (await client.ask("POST", "/v1/chat/completions", **zipped))[0].status == 200
    expecting = {"data": raw, "headers": {"Expect": "100-continue"}}
    assert (await client.ask("POST", "/v1/chat/completions", **expecting))[0].status == 200


async def test_a_body_that_is_not_what_it_says(client: Client) -> None:
    broken = {"data": b"not gzip", "headers": {"Content-Encoding": "gzip"}}
    response, _ = await client.ask("POST", "/v1/chat/completions", **broken)
    assert response.status == 400


async def test_a_body_that_trickles_is_given_up(tmp_path: Path) -> None:
    async with door(tmp_path, limits=Limits(body_timeout_s=0.05)) as client:
        never = asyncio.Event()

        async def pieces() -> AsyncIterator[bytes]:
            yield b'{"messages"'
            await never.wait()

        response, answer = await client.ask("POST", "/v1/chat/completions", data=pieces())
        assert (response.status, answer["error"]["code"]) == (408, "body_timeout")


async def test_headers_that_never_end_are_given_up(tmp_path: Path) -> None:
    async with door(tmp_path, limits=Limits(keepalive_s=0.05)) as client:
        port = int(client.url.rpartition(":")[2])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127")
        assert await reader.read() == b""
        writer.close()
        await writer.wait_closed()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELD = st.sampled_from(
    ["messages", "model", "stream", "n", "calm", "prompt", "input", "rating", "goals", "weights"]
)
PATHS = st.sampled_from(
    [
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/completions"),
        ("POST", "/v1/embeddings"),
        ("POST", "/v1/feedback"),
        ("PUT", "/calm/v1/goals"),
        ("PUT", "/calm/v1/policy"),
    ]
)
BODY = st.dictionaries(FIELD, JSON, max_size=5).map(msgspec.json.encode) | st.binary(max_size=60)


def test_no_body_is_a_server_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    with asyncio.Runner() as runner:
        context = door(tmp_path)
        client = runner.run(context.__aenter__())

        @settings(
            max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
        )
        @given(PATHS, BODY)
        def holds(target: tuple[str, str], body: bytes) -> None:
            async def ask() -> int:
                async with client.session.request(*_at(client, target), data=body) as response:
                    await response.read()
                    return response.status

            assert runner.run(ask()) < 500

        try:
            holds()
        finally:
            runner.run(context.__aexit__(None, None, None))
    assert not caplog.records


def _at(client: Client, target: tuple[str, str]) -> tuple[str, str]:
    return target[0], client.url + target[1]


# --- CALM's own endpoints -----------------------------------------------------------------------------


async def test_the_fleet_and_its_states(client: Client) -> None:
    response, entry = await client.ask("POST", "/calm/v1/models/large/unload")
    assert (response.status, entry["state"]["residency"]) == (200, "cold")
    _, fleet = await client.ask("GET", "/calm/v1/fleet")
    assert [model["state"]["residency"] for model in fleet["models"]] == ["ready", "cold"]
    assert fleet["refused"][0]["file"] == "broken.toml"
    assert (fleet["budget_bytes"], fleet["used_bytes"]) == (1000, 100)
    assert (await client.ask("POST", "/calm/v1/models/large/load"))[1]["state"]["residency"] == "ready"
    assert (await client.ask("POST", "/calm/v1/models/large/pin"))[1]["state"]["pinned"] is True
    assert (await client.ask("POST", "/calm/v1/models/large/unpin"))[1]["state"]["pinned"] is False
    assert (await client.ask("POST", "/calm/v1/models/none/load"))[0].status == 404
    assert (await client.ask("POST", "/calm/v1/models/large/explode"))[0].status == 404


async def test_a_card_shows_no_secret(tmp_path: Path) -> None:
    service = ScriptedService()
    card = service.fleet["small"]
    engine = msgspec.structs.replace(card.engine, env={"HF_TOKEN": "hush"})
    service.fleet["small"] = msgspec.structs.replace(card, engine=engine)
    async with door(tmp_path, service=service) as client:
        for path in ("/calm/v1/models/small", "/calm/v1/fleet"):
            _, answer = await client.ask("GET", path)
            assert "hush" not in str(answer)
        _, answer = await client.ask("GET", "/calm/v1/models/small")
        assert answer["card"]["engine"]["env"] == {"HF_TOKEN": "(set)"}


async def test_goals_and_policy(client: Client) -> None:
    goals = {"goals": {"green": {"energy": 3, "quality": 1}}}
    _, answer = await client.ask("PUT", "/calm/v1/goals", json=goals)
    assert answer["goals"]["green"] == {"latency": 0, "energy": 3, "quality": 1, "cost": 0}
    response, answer = await client.ask("PUT", "/calm/v1/goals", json={"goals": {"x": {"energy": -1}}})
    assert (response.status, answer["error"]["param"]) == (400, "goals.x")
    _, answer = await client.ask("PUT", "/calm/v1/policy", json={"policy": "paper", "weights": {"energy": 1}})
    assert answer["policy"] == "paper"
    assert client.service.steered.weights == Weights(latency=0, energy=1, quality=0, cost=0)
    assert answer["quality_floor"] is None
    _, answer = await client.ask("PUT", "/calm/v1/policy", json={"quality_floor": 0.7})
    assert answer["quality_floor"] == 0.7
    await client.ask("PUT", "/calm/v1/policy", json={"quality_floor": None})
    assert client.service.steered.quality_floor is None
    await client.ask("PUT", "/calm/v1/policy", json={"goal": "energy"})
    assert client.service.steered.quality_floor is msgspec.UNSET
    bad_floors = [{"quality_floor": floor} for floor in (0, 1, -0.1, "0.7", True)]
    for bad in ({"policy": "x"}, {"speed": 1}, {"weights": []}, *bad_floors):
        assert (await client.ask("PUT", "/calm/v1/policy", json=bad))[0].status == 400


async def test_lists_are_paged(client: Client) -> None:
    _, answer = await client.ask("GET", "/calm/v1/events?since=1&limit=5")
    assert [event["seq"] for event in answer["events"]] == [2, 3]
    for query in ("limit=0", "limit=x", "limit=1001", "since=-1", "since=" + "9" * 30):
        response, answer = await client.ask("GET", f"/calm/v1/events?{query}")
        assert (response.status, answer["error"]["param"]) == (400, query.partition("=")[0])
    assert (await client.ask("GET", "/calm/v1/decisions"))[1] == {"decisions": []}
    assert (await client.ask("GET", "/calm/v1/knowledge"))[1]["requests"] == 0
    assert (await client.ask("GET", "/calm/v1/snapshot"))[1]["revision"] == 1


def stored(client: Client, tenant: str | None) -> StoredRequest:
    ask = client.service.asks[-1]
    features = Features(
        prompt_chars=1,
        prompt_tokens=1,
        language="en",
        embedding=None,
        embedder=None,
        turns=1,
        max_tokens=None,
        samples=1,
        conversation=None,
        wants_json=False,
        wants_tools=False,
    )
    return StoredRequest(
        request_id=ask.request_id,
        wall_s=0.0,
        kind="chat",
        tenant=tenant,
        pinned=None,
        stream=False,
        query=None,
        features=features,
        decision=decision_for(ask),
        outcome=None,
        feedback=(),
    )


async def test_roles(tmp_path: Path) -> None:
    keys = Keys(tmp_path / "keys.toml")
    ann, bob, root = keys.create("ann"), keys.create("bob"), keys.create("root", "admin")
    async with door(tmp_path, guard=Guard(keys)) as client:

        async def status(method: str, path: str, key: str | None, **options: object) -> int:
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            return (await client.ask(method, path, headers=headers, **options))[0].status

        assert await status("POST", "/v1/chat/completions", None, json=CHAT) == 401
        assert await status("POST", "/v1/chat/completions", ann, json=CHAT) == 200
        assert client.service.asks[0].tenant == "ann"
        decision = f"/calm/v1/decisions/chatcmpl-{client.service.asks[0].request_id}"
        client.service.stored[client.service.asks[0].request_id] = stored(client, "ann")
        assert [await status("GET", decision, key) for key in (ann, bob, root)] == [200, 404, 200]
        for path in ("/healthz", "/readyz", "/"):
            assert await status("GET", path, None) == 200
        for path in ("/metrics", "/calm/v1/fleet", "/calm/v1/goals", "/calm/v1/policy", "/v1/models/small"):
            assert [await status("GET", path, key) for key in (None, ann)] == [401, 200]
        for path in ("decisions", "knowledge", "events", "snapshot", "models/small"):
            assert [await status("GET", f"/calm/v1/{path}", key) for key in (None, ann, root)] == [
                401,
                403,
                200,
            ]
        for action in ("load", "unload", "pin", "unpin"):
            path = f"/calm/v1/models/small/{action}"
            assert [await status("POST", path, key) for key in (None, ann, root)] == [401, 403, 200]
        for path in ("goals", "policy"):
            assert [await status("PUT", f"/calm/v1/{path}", key, json={}) for key in (None, ann)] == [
                401,
                403,
            ]


async def test_every_route_but_three_is_guarded(tmp_path: Path) -> None:
    keys = Keys(tmp_path / "keys.toml")
    keys.create("ann")
    async with door(tmp_path, guard=Guard(keys)) as client:
        _, index = await client.ask("GET", "/")
        for line in index["endpoints"]:
            method, _, path = line.partition(" ")
            if path not in ("/healthz", "/readyz"):
                response, answer = await client.ask(method, path.replace("{", "").replace("}", ""))
                assert (response.status, answer["error"]["code"]) == (401, "invalid_api_key"), line
                assert "Bearer" in response.headers["WWW-Authenticate"]


async def test_browser_guards(client: Client) -> None:
    foreign = {"Origin": "https://evil.example"}
    assert (await client.ask("POST", "/v1/chat/completions", json=CHAT, headers=foreign))[0].status == 403
    rebound = {"Host": "evil.example"}
    assert (await client.ask("GET", "/v1/models", headers=rebound))[0].status == 403
    assert not client.service.asks
    response, _ = await client.ask("GET", "/v1/models", headers=foreign)
    assert "Access-Control-Allow-Origin" not in response.headers


async def test_cors_for_configured_origins(tmp_path: Path) -> None:
    guard = Guard(Keys(tmp_path / "keys.toml"), allowed_origins=("https://app.example",))
    origin = {"Origin": "https://app.example"}
    async with door(tmp_path, guard=guard) as client:
        preflight = {**origin, "Access-Control-Request-Method": "POST"}
        response, _ = await client.ask("OPTIONS", "/v1/chat/completions", headers=preflight)
        assert response.status == 204
        assert "POST" in response.headers["Access-Control-Allow-Methods"]
        for stream in (False, True):
            async with client.session.post(
                client.url + "/v1/chat/completions", json={**CHAT, "stream": stream}, headers=origin
            ) as response:
                assert response.headers["Access-Control-Allow-Origin"] == "https://app.example"
                assert "x-calm-model" in response.headers["Access-Control-Expose-Headers"]
        response, _ = await client.ask(
            "OPTIONS", "/v1/chat/completions", headers={**preflight, "Origin": "https://evil.example"}
        )
        assert response.status == 405
