"""Per-request wishes, in the `calm` object and in headers, steer the decision or are refused by name."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest
from tests.system.conftest import FLEET, GEMMA, SMOL, TINY, Json, Server, eventually

from calm.registry import load_fleet

pytestmark = pytest.mark.models

PROMPT = "Who painted the Mona Lisa?"
_numbers = itertools.count(1000)


def fresh() -> str:
    """A question no engine has cached, so that predictions are about the models and not about their caches."""
    return f"{next(_numbers)} people ask: who painted the Mona Lisa?"


def decided(server: Server, response: httpx.Response) -> Json:
    assert response.status_code == 200, response.text
    return server.finished(response.headers["x-calm-request-id"])["decision"]


def order(decision: Json) -> list[str]:
    return [candidate["model"] for candidate in decision["ranked"]]


def by_mean(decision: Json, quantity: str) -> list[str]:
    return sorted(decision["estimates"], key=lambda model: decision["estimates"][model][quantity]["mean"])


# --- weights and goals ------------------------------------------------------------------------------


@pytest.fixture
def known(server: Server) -> None:
    """Every model has been seen at work, so that its joules are known."""
    for model in (SMOL, GEMMA, TINY):
        server.answered(server.chat(fresh(), model, max_tokens=2))


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize(("weight", "quantity"), [("latency", "total_s"), ("energy", "energy_j")])
def test_one_weight_alone_ranks_by_that_quantity(server: Server, weight: str, quantity: str) -> None:
    decision = decided(server, server.chat(fresh(), calm={"weights": {weight: 1}}, max_tokens=4))
    assert decision["weights"] == {"latency": 0, "energy": 0, "quality": 0, "cost": 0, weight: 1}
    assert order(decision)[0] == by_mean(decision, quantity)[0]
    assert order(decision)[-1] == by_mean(decision, quantity)[-1]


@pytest.mark.usefixtures("known")
def test_weights_turn_the_ranking_around(server: Server) -> None:
    """Rated best, the slow model wins when quality is all that counts, and loses when time is."""
    for model, rating in ((TINY, 5), (SMOL, 1), (GEMMA, 1)) * 3:
        answer = server.chat(fresh(), model, max_tokens=1)
        rated = server.request(
            "POST", "/v1/feedback", json={"request_id": answer.json()["id"], "rating": rating}
        )
        assert rated.status_code == 200, rated.text
    best = decided(server, server.chat(fresh(), max_tokens=1, calm={"weights": {"quality": 1}}))
    fast = decided(server, server.chat(fresh(), max_tokens=1, headers={"x-calm-weights": "latency=1"}))
    assert order(best)[0] == TINY
    assert order(fast)[-1] == TINY
    for candidate in best["ranked"]:
        counted = [term for term in candidate["terms"] if term["weight"] > 0]
        assert [term["name"] for term in counted] == ["quality"]


def test_goals_bring_their_weights(server: Server) -> None:
    in_body = decided(server, server.chat(PROMPT, calm={"goal": "energy"}, max_tokens=1))
    in_header = decided(server, server.chat(PROMPT, headers={"x-calm-goal": "quality"}, max_tokens=1))
    in_model = decided(server, server.chat(PROMPT, "calm/latency", max_tokens=1))
    assert [d["goal"] for d in (in_body, in_header, in_model)] == ["energy", "quality", "latency"]
    goals = server.get("/calm/v1/goals")["goals"]
    for decision in (in_body, in_header, in_model):
        assert decision["weights"] == goals[decision["goal"]]


def test_the_body_wins_over_headers(server: Server) -> None:
    response = server.chat(PROMPT, calm={"goal": "energy"}, headers={"x-calm-goal": "quality"}, max_tokens=1)
    assert decided(server, response)["goal"] == "energy"


# --- hard wishes ------------------------------------------------------------------------------------


def test_allowed_models(server: Server) -> None:
    for response in (
        server.chat(PROMPT, calm={"allowed_models": [GEMMA]}, max_tokens=1),
        server.chat(PROMPT, headers={"x-calm-models": f"{GEMMA}"}, max_tokens=1),
    ):
        decision = decided(server, response)
        assert order(decision) == [GEMMA]
        others = set(load_fleet(FLEET).fleet) - {GEMMA}
        assert {(r["model"], r["constraint"]) for r in decision["refused"]} == {
            (n, "allowed") for n in others
        }
        assert response.headers["x-calm-model"] == GEMMA


def test_pinned_model_outside_the_allowed_ones(server: Server) -> None:
    response = server.chat(PROMPT, SMOL, calm={"allowed_models": [GEMMA]})
    assert response.status_code == 422
    assert response.json()["error"]["code"] == "no_eligible_model"


@pytest.mark.usefixtures("known")
def test_energy_limit_leaves_out_the_hungry(server: Server) -> None:
    predicted = decided(server, server.chat(fresh(), max_tokens=2))["estimates"]
    joules = {model: estimate["energy_j"]["mean"] for model, estimate in predicted.items()}
    lean, hungry = min(joules, key=joules.__getitem__), max(joules, key=joules.__getitem__)
    limit = (joules[lean] * joules[hungry]) ** 0.5
    decision = decided(server, server.chat(fresh(), max_tokens=2, calm={"max_energy_j": limit}))
    assert lean in order(decision)
    assert hungry not in order(decision)
    assert hungry in {refusal["model"] for refusal in decision["refused"]}
    assert all(decision["estimates"][model]["energy_j"]["mean"] <= limit for model in order(decision))
    none = server.chat(fresh(), headers={"x-calm-max-energy-j": "0.000001"})
    assert none.status_code == 422
    assert "allowed 1e-06 J" in none.json()["error"]["message"]


@pytest.mark.parametrize("model", ["calm", SMOL])
def test_a_deadline_too_short_is_504(server: Server, client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": "Tell me a long story"}],
            extra_body={"calm": {"deadline_s": 0.02}, "ignore_eos": True},
        )
    assert caught.value.status_code == 504
    assert caught.value.code == "deadline_exceeded"
    assert caught.value.type == "timeout_error"
    server.idle()


def test_a_deadline_that_passes_mid_stream_ends_it_with_an_error(server: Server) -> None:
    """The engine is frozen after its first tokens, so the deadline passes for certain."""
    engine = server.engine(SMOL)
    try:
        with server.stream("Tell me a story", SMOL, calm={"deadline_s": 4}) as response:
            assert response.status_code == 200
            lines = response.iter_lines()
            next(lines)
            os.kill(engine.pid, signal.SIGSTOP)
            rest = [line for line in lines if line]
    finally:
        os.kill(engine.pid, signal.SIGCONT)
    assert "deadline_exceeded" in rest[-1]
    assert not any("[DONE]" in line for line in rest)
    record = server.finished(response.headers["x-calm-request-id"])
    assert record["outcome"]["status"] == "timeout"
    server.idle()
    assert server.chat(PROMPT, SMOL).status_code == 200


FAR = """
name = "far"
description = "A model on another machine."
placement = "remote"
[engine]
kind = "openai"
url = "{url}"
upstream_model = "{model}"
"""


def test_privacy_keeps_queries_off_remote_models(server: Server) -> None:
    """The remote model is this very server once more, so that it would answer if it were asked."""
    card = server.fleet / "far.toml"
    card.write_text(FAR.format(url=server.url, model=SMOL), encoding="utf-8")
    try:
        eventually("far in the fleet", lambda: server.model("far"))
        anywhere = server.chat(PROMPT, "far")
        assert anywhere.status_code == 200, anywhere.text
        assert anywhere.headers["x-calm-model"] == "far"
        assert anywhere.json()["model"] == "far"
        pinned = server.chat(PROMPT, "far", calm={"privacy": "local"})
        assert pinned.status_code == 422
        assert "remote" in pinned.json()["error"]["message"]
        routed = decided(server, server.chat(PROMPT, headers={"x-calm-privacy": "local"}, max_tokens=1))
        assert ("far", "privacy") in {(r["model"], r["constraint"]) for r in routed["refused"]}
        assert "far" not in order(routed)
    finally:
        card.unlink()
        eventually("far gone", lambda: not server.model("far"))


# --- wrong wishes -----------------------------------------------------------------------------------

WRONG_BODIES: list[tuple[str, Any]] = [
    ("deadline_s", -1),
    ("deadline_s", "soon"),
    ("max_energy_j", 0),
    ("max_cost_usd", -0.1),
    ("privacy", "secret"),
    ("allowed_models", []),
    ("allowed_models", SMOL),
    ("weights", {"latency": -1}),
    ("weights", {"latency": 0}),
    ("goal", "world peace"),
    ("wish", "typo"),
]
WRONG_HEADERS = [
    ("x-calm-deadline-s", "soon"),
    ("x-calm-deadline-s", "nan"),
    ("x-calm-max-energy-j", "-1"),
    ("x-calm-privacy", "secret"),
    ("x-calm-models", ","),
    ("x-calm-weights", "latency"),
]


def refused_field(response: httpx.Response) -> str:
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert response.headers["x-calm-request-id"]
    return error["param"]


@pytest.mark.parametrize(("field", "value"), WRONG_BODIES)
def test_a_wrong_wish_in_the_body_is_named(server: Server, field: str, value: object) -> None:
    named = refused_field(server.chat(PROMPT, calm={field: value}))
    assert named.startswith("calm")
    if field != "wish":
        assert named.split("[")[0].startswith(f"calm.{field}")


@pytest.mark.parametrize(("header", "value"), WRONG_HEADERS)
def test_a_wrong_wish_in_a_header_is_named(server: Server, header: str, value: str) -> None:
    assert refused_field(server.chat(PROMPT, headers={header: value})).startswith(header)


def test_an_unknown_allowed_model_leaves_nobody(server: Server) -> None:
    response = server.chat(PROMPT, calm={"allowed_models": ["nobody"]})
    assert response.status_code in (404, 422)
    assert (
        "nobody" in response.json()["error"]["message"]
        or "allowed_models" in response.json()["error"]["message"]
    )


def test_policy_fixture_restores(server: Server, policy: Callable[..., Json]) -> None:
    """`fixed:` still obeys hard wishes: it only ranks who may serve."""
    policy(policy=f"fixed:{GEMMA}")
    assert server.chat(PROMPT, max_tokens=1).headers["x-calm-model"] == GEMMA
    other = server.chat(PROMPT, max_tokens=1, calm={"allowed_models": [SMOL]})
    assert other.headers["x-calm-model"] == SMOL
