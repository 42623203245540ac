"""What stays of a request: headers and receipt, the stored decision beside its outcome, feedback, steering."""

from __future__ import annotations

from collections.abc import Callable

import openai
import pytest
from tests.system.conftest import CHATTERS, GEMMA, SMOL, Json, Server

pytestmark = pytest.mark.models

PROMPT = "Who painted the Mona Lisa?"


def test_headers_and_receipt_agree(server: Server) -> None:
    response = server.chat(PROMPT, SMOL)
    receipt = response.json()["calm"]
    assert response.headers["x-calm-model"] == receipt["model"] == SMOL
    assert response.headers["x-calm-request-id"] == receipt["request_id"]
    assert response.json()["id"] == f"chatcmpl-{receipt['request_id']}"
    assert float(response.headers["x-calm-energy-j"]) == pytest.approx(receipt["energy_j"], rel=1e-4)
    assert receipt["energy_j"] > 0
    meter, kind = response.headers["x-calm-energy-meter"].split("; ")
    assert (meter, kind) == (receipt["energy_meter"], receipt["energy_kind"])
    assert kind in ("measured", "attributed", "modelled")
    assert receipt["total_s"] >= receipt["ttft_s"] > 0
    assert receipt["attempts"] == 1


def test_a_stream_carries_its_receipt_in_the_last_chunk(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model=SMOL, messages=[{"role": "user", "content": PROMPT}], max_tokens=4, stream=True
        )
    )
    extra = chunks[-1].model_extra or {}
    assert extra["calm"]["model"] == SMOL
    assert extra["calm"]["energy_j"] > 0
    assert all("calm" not in (chunk.model_extra or {}) for chunk in chunks[:-1])


def test_explain_has_estimates_beside_the_outcome(server: Server) -> None:
    response = server.chat(PROMPT, calm={"goal": "balanced"}, max_tokens=6)
    record = server.finished(response.headers["x-calm-request-id"])
    chosen = response.headers["x-calm-model"]
    decision, outcome = record["decision"], record["outcome"]
    assert decision["ranked"][0]["model"] == chosen == outcome["model"]
    assert set(decision["estimates"]) == CHATTERS
    for estimate in decision["estimates"].values():
        for quantity in ("ttft_s", "total_s", "output_tokens", "energy_j", "quality"):
            assert estimate[quantity]["mean"] > 0
            assert estimate[quantity]["sd"] >= 0
    assert outcome["status"] == "ok"
    assert outcome["completion_tokens"] == response.json()["usage"]["completion_tokens"]
    assert outcome["prompt_tokens"] == response.json()["usage"]["prompt_tokens"]
    assert outcome["energy"]["joules"] == pytest.approx(response.json()["calm"]["energy_j"])
    assert outcome["total_s"] >= outcome["ttft_s"] > 0
    assert outcome["memory_bytes"] > 10_000_000
    scores = [candidate["score"] for candidate in decision["ranked"]]
    assert scores == sorted(scores)
    for candidate in decision["ranked"]:
        total = sum(term["weight"] * term["regret"] for term in candidate["terms"])
        assert candidate["score"] == pytest.approx(total, abs=1e-6)


def test_prompts_are_not_stored(server: Server) -> None:
    response = server.chat("My secret word is xylophone.", SMOL)
    record = server.finished(response.headers["x-calm-request-id"])
    assert record["query"] is None
    for file in server.state.rglob("*"):
        if file.is_file():
            assert b"xylophone" not in file.read_bytes(), f"the prompt stands in {file.name}"
    assert "xylophone" not in server.log


def test_a_refused_request_is_on_record_too(server: Server) -> None:
    response = server.chat(PROMPT, calm={"max_energy_j": 1e-6})
    assert response.status_code == 422
    record = server.finished(response.headers["x-calm-request-id"])
    assert record["outcome"]["status"] == "rejected"
    assert record["outcome"]["model"] is None


# --- feedback ---------------------------------------------------------------------------------------

BREAD = "How do I bake bread at home?"
"""Ratings of this do not decide about the questions other tests ask."""


def quality(server: Server, model: str) -> float:
    response = server.chat(BREAD, max_tokens=1)
    record = server.finished(response.headers["x-calm-request-id"])
    return float(record["decision"]["estimates"][model]["quality"]["mean"])


@pytest.mark.parametrize(("model", "rating"), [(GEMMA, 5), (SMOL, 1)])
def test_feedback_is_stored_and_learned(server: Server, model: str, rating: int) -> None:
    before = quality(server, model)
    for _ in range(4):
        answer = server.chat(BREAD, model, max_tokens=2)
        fields = {"request_id": answer.json()["id"], "rating": rating, "comment": "as asked"}
        rated = server.request("POST", "/v1/feedback", json=fields)
        assert rated.status_code == 200, rated.text
    record = server.decision(answer.headers["x-calm-request-id"])
    assert [(f["rating"], f["comment"]) for f in record["feedback"]] == [(rating, "as asked")]
    after = quality(server, model)
    assert (after > before) if rating == 5 else (after < before)
    rated_models = {m["model"]: m["rating"] for m in server.get("/calm/v1/knowledge")["stored"]["models"]}
    assert rated_models[model] is not None


@pytest.mark.parametrize("rating", [0, 6, "good", None])
def test_a_rating_outside_one_to_five_is_refused(server: Server, rating: object) -> None:
    answer = server.chat(PROMPT, SMOL, max_tokens=1)
    fields = {"request_id": answer.json()["id"], "rating": rating}
    refused = server.request("POST", "/v1/feedback", json=fields)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "rating"


def test_feedback_on_a_request_that_never_was(server: Server) -> None:
    refused = server.request("POST", "/v1/feedback", json={"request_id": "nothing", "rating": 3})
    assert refused.status_code == 404
    assert refused.json()["error"]["code"] == "request_not_found"
    assert server.request("GET", "/calm/v1/decisions/nothing").status_code == 404


# --- steering while running -------------------------------------------------------------------------


def test_policies_change_while_running(server: Server, policy: Callable[..., Json]) -> None:
    assert policy(policy=f"fixed:{GEMMA}")["policy"] == f"fixed:{GEMMA}"
    assert server.chat(PROMPT, max_tokens=1).headers["x-calm-model"] == GEMMA
    policy(policy="round-robin")
    served = {server.chat(PROMPT, max_tokens=1).headers["x-calm-model"] for _ in CHATTERS}
    assert served == CHATTERS
    policy(policy="random:3")
    assert server.chat(PROMPT, max_tokens=1).status_code == 200
    policy(policy="least-loaded")
    assert server.chat(PROMPT, max_tokens=1).status_code == 200


def test_a_wrong_policy_changes_nothing(server: Server) -> None:
    before = server.get("/calm/v1/policy")
    for change in (
        {"policy": "magic"},
        {"policy": "fixed:nobody"},
        {"goal": "peace"},
        {"weights": {"luck": 1}},
    ):
        refused = server.request("PUT", "/calm/v1/policy", json=change)
        assert refused.status_code in (400, 404), f"{change}: {refused.text}"
    assert server.get("/calm/v1/policy") == before


def test_goals_are_added_while_running(server: Server, policy: Callable[..., Json]) -> None:
    added = server.put("/calm/v1/goals", {"goals": {"green": {"energy": 3, "quality": 1}}})
    assert added["goals"]["green"] == {"latency": 0, "energy": 3, "quality": 1, "cost": 0}
    assert "calm/green" in [m["id"] for m in server.get("/v1/models")["data"]]
    response = server.chat(PROMPT, "calm/green", max_tokens=1)
    record = server.finished(response.headers["x-calm-request-id"])
    assert record["decision"]["goal"] == "green"
    assert record["decision"]["weights"]["energy"] == 3
    assert policy(goal="green")["goal"] == "green"
    routed = server.chat(PROMPT, max_tokens=1)
    assert server.answered(routed)["decision"]["goal"] == "green"


def test_metrics_count_the_requests(server: Server) -> None:
    def counted() -> float:
        text = server.request("GET", "/metrics").text
        lines = [line for line in text.split("\n") if line.startswith("calm_requests_total{")]
        mine = [line for line in lines if f'model="{SMOL}"' in line and 'status="ok"' in line]
        return float(mine[0].split()[-1]) if mine else 0.0

    before = counted()
    server.chat(PROMPT, SMOL, max_tokens=1)
    server.chat(PROMPT, SMOL, max_tokens=1)
    assert counted() == before + 2
