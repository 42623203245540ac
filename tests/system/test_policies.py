"""The paper's policy and the other embedders, each on a real server."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.system.conftest import CHATTERS, GEMMA, SMOL, Json, Launch, Server

from calm.sources.assets import cached_minilm

pytestmark = pytest.mark.models

PROMPT = "Who painted the Mona Lisa?"


@pytest.fixture
def minilm(weights: Path) -> None:
    if cached_minilm(weights) is None:
        pytest.fail(f"no MiniLM in {weights}: run `make weights`", pytrace=False)


@pytest.mark.usefixtures("minilm")
@pytest.mark.parametrize(
    "spec", ["paper", "paper:latency", "paper:energy:0.5", "paper:confidence", "paper:cache"]
)
def test_the_papers_policy_while_running(server: Server, policy: Callable[..., Json], spec: str) -> None:
    assert policy(policy=spec)["policy"].startswith("paper")
    for _ in range(2):
        record = server.answered(server.chat(PROMPT, max_tokens=2))
        decision = record["decision"]
        assert decision["policy"].startswith("paper")
        assert {candidate["model"] for candidate in decision["ranked"]} == CHATTERS
        assert all(candidate["terms"] for candidate in decision["ranked"])
        assert decision["ranked"][0]["model"] == record["outcome"]["model"]


@pytest.mark.usefixtures("minilm")
def test_minilm_as_the_embedder(launch: Launch) -> None:
    server = launch(SMOL, GEMMA, environment={"CALM_POLICY__EMBEDDER": "minilm"}, flags=("--policy", "paper"))
    record = server.answered(server.chat(PROMPT, max_tokens=2))
    assert record["features"]["embedder"] is not None
    assert "minilm" in record["features"]["embedder"].lower()
    assert record["decision"]["policy"].startswith("paper")


def test_without_an_embedder(launch: Launch) -> None:
    server = launch(SMOL, environment={"CALM_POLICY__EMBEDDER": "none"})
    record = server.answered(server.chat(PROMPT, max_tokens=2))
    assert record["features"]["embedder"] is None
    rating = {"request_id": record["request_id"], "rating": 5}
    assert server.request("POST", "/v1/feedback", json=rating).status_code == 200
    assert server.chat(PROMPT, max_tokens=2).status_code == 200
