"""The paper's formulas, number by number, and its cold start."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from calm.errors import BadInput, SourceError
from calm.plan.paper import DEFAULT_LAMBDA, Mode, PaperPolicy, corrected_lambdas, parse_paper
from calm.records import (
    Ask,
    Candidate,
    Features,
    History,
    ModelCard,
    ModelState,
    Residency,
    Snapshot,
    Vector,
    Weights,
)

SIMS = {"medical": 0.9, "legal": 0.5, "finance": 0.1}
CARDS = {name: ModelCard(name=name, description=name) for name in SIMS}


class ScriptedEmbedder:
    """The query is the first axis; a description's cosine with it is SIMS."""

    name = "scripted"
    dimensions = 2

    def __init__(self) -> None:
        self.calls: list[str] = []

    def embed(self, text: str) -> Vector:
        self.calls.append(text)
        if not text:
            return np.zeros(2, dtype=np.float32)
        sim = SIMS.get(text, 1.0)
        return np.array([sim, (1.0 - sim * sim) ** 0.5], dtype=np.float32)


def ask(query: str = "what is a fever?") -> Ask:
    return Ask(request_id="r1", kind="chat", query=query, prompt_chars=16, body={}, requires=frozenset())


def features(embedding: Vector | None = None, embedder: str | None = None) -> Features:
    return Features(
        prompt_chars=16,
        prompt_tokens=4,
        language="en",
        embedding=embedding,
        embedder=embedder,
        turns=1,
        max_tokens=None,
        samples=1,
        conversation=None,
        wants_json=False,
        wants_tools=False,
    )


def snapshot(**residency: Residency) -> Snapshot:
    states = {
        name: ModelState(
            model=name,
            residency=where,
            pinned=False,
            in_flight=0,
            waiting=0,
            slots=4,
            threads=1,
            footprint_bytes=1,
            footprint_measured=True,
            load_s=None,
            last_used_s=None,
            failures=0,
        )
        for name, where in residency.items()
    }
    return Snapshot(
        revision=1,
        at_s=0.0,
        models=states,
        budget_bytes=10,
        used_bytes=0,
        cores=2,
        threads_in_use=0,
        queue_length=0,
        in_flight=0,
    )


def rank(spec: str, histories: dict[str, History] | None = None, **more: Any) -> dict[str, Candidate]:
    policy = PaperPolicy(parse_paper(spec), more.pop("embedder", None) or ScriptedEmbedder())
    ranked = policy.rank(
        more.pop("ask", ask()),
        more.pop("features", features()),
        more.pop("snapshot", snapshot()),
        more.pop("cards", CARDS),
        {},
        histories or {},
        Weights(),
    )
    return {candidate.model: candidate for candidate in ranked}


def paper_value(candidate: Candidate) -> float:
    value = next(term.value for term in candidate.terms if term.name == "paper")
    assert value is not None
    return value


def test_lambda_zero_is_the_similarity_alone() -> None:
    ranked = rank("")
    assert list(ranked) == ["medical", "legal", "finance"]
    for name, sim in SIMS.items():
        assert paper_value(ranked[name]) == pytest.approx(sim, abs=1e-6)
        assert ranked[name].score == pytest.approx(1 - sim, abs=1e-6)


def test_pro_latency_is_one_minus_sim_plus_lambda_times_the_normalised_mean() -> None:
    seen = {
        "medical": History(service_s=10.0),
        "legal": History(service_s=2.0),
        "finance": History(service_s=6.0),
    }
    ranked = rank("latency:0.3", seen)
    assert paper_value(ranked["medical"]) == pytest.approx(0.1 + 0.3 * 1.0, abs=1e-6)
    assert paper_value(ranked["legal"]) == pytest.approx(0.5, abs=1e-6)
    assert paper_value(ranked["finance"]) == pytest.approx(0.9 + 0.3 * 0.5, abs=1e-6)
    assert ranked["medical"].score == pytest.approx(paper_value(ranked["medical"]))
    assert [t.value for t in ranked["medical"].terms if t.name == "latency"] == [10.0]


def test_pro_energy_starts_cold_at_zero() -> None:
    ranked = rank("energy:0.9", {"medical": History(energy_j=50.0), "legal": History(energy_j=25.0)})
    assert paper_value(ranked["medical"]) == pytest.approx(0.1 + 0.9, abs=1e-6)
    assert paper_value(ranked["legal"]) == pytest.approx(0.5 + 0.45, abs=1e-6)
    assert paper_value(ranked["finance"]) == pytest.approx(0.9, abs=1e-6)
    assert next(iter(ranked)) == "finance"


def test_pro_confidence_is_highest_first_and_starts_at_five_of_five() -> None:
    ranked = rank("confidence:0.6", {"medical": History(rating=1.0), "legal": History(rating=3.0)})
    assert paper_value(ranked["medical"]) == pytest.approx(0.9, abs=1e-6)
    assert paper_value(ranked["legal"]) == pytest.approx(0.5 + 0.6 * 0.5, abs=1e-6)
    assert paper_value(ranked["finance"]) == pytest.approx(0.1 + 0.6, abs=1e-6)
    assert list(ranked) == ["medical", "legal", "finance"]
    assert ranked["medical"].score == pytest.approx(1.6 - 0.9, abs=1e-6)


def test_pro_cache_adds_lambda_to_the_resident() -> None:
    ranked = rank("cache:0.5", snapshot=snapshot(medical="cold", legal="ready", finance="loading"))
    assert paper_value(ranked["medical"]) == pytest.approx(0.9, abs=1e-6)
    assert paper_value(ranked["legal"]) == pytest.approx(1.0, abs=1e-6)
    assert paper_value(ranked["finance"]) == pytest.approx(0.1, abs=1e-6)
    assert next(iter(ranked)) == "legal"


def test_equal_observations_make_no_difference() -> None:
    same = {name: History(service_s=3.0) for name in SIMS}
    assert paper_value(rank("latency:0.3", same)["medical"]) == pytest.approx(0.1, abs=1e-6)


def test_correlated_metrics_share_their_lambda() -> None:
    columns = [[0.0, 0.5, 1.0], [1.0, 0.4, 0.0]]
    assert corrected_lambdas((0.2, 0.4), columns) == pytest.approx((0.1, 0.2))
    assert corrected_lambdas((0.2, 0.4), [[0.0, 0.5, 1.0], [0.0, 0.0, 0.0]]) == pytest.approx((0.2, 0.4))
    assert corrected_lambdas((0.2,), [[0.0, 1.0]]) == (0.2,)


def test_spearman_gives_equal_values_their_mean_rank() -> None:
    # Ranks 0.5 0.5 2 3 and 0 1 2 3: covariance 4.5, variances 4.5 and 5.
    rho = 4.5 / (4.5 * 5.0) ** 0.5
    (first, _) = corrected_lambdas((1.0, 1.0), [[1.0, 1.0, 2.0, 9.0], [1.0, 2.0, 3.0, 4.0]])
    assert first == pytest.approx(1 / (1 + rho))


def test_several_metrics_may_pull_in_both_directions() -> None:
    seen = {
        "medical": History(service_s=10.0, rating=1.0),
        "legal": History(service_s=2.0, rating=5.0),
        "finance": History(service_s=6.0, rating=5.0),
    }
    ranked = rank("latency+confidence:0.2,0.3", seen)
    assert list(ranked) == sorted(ranked, key=lambda name: ranked[name].score)
    for candidate in ranked.values():
        assert sum(t.contribution for t in candidate.terms) == pytest.approx(candidate.score)
        assert paper_value(candidate) == pytest.approx(candidate.score)


def test_descriptions_are_embedded_once_and_the_query_each_time() -> None:
    embedder = ScriptedEmbedder()
    policy = PaperPolicy(Mode(), embedder)
    for query in ("one", "two"):
        policy.rank(ask(query), features(), snapshot(), CARDS, {}, {}, Weights())
    assert sorted(embedder.calls) == sorted([*SIMS, "one", "two"])
    changed = {"medical": ModelCard(name="medical", description="legal")}
    policy.rank(ask("three"), features(), snapshot(), changed, {}, {}, Weights())
    assert embedder.calls[-1] == "three"


def test_the_monitors_embedding_is_used_when_it_is_the_same_embedders() -> None:
    embedder = ScriptedEmbedder()
    vector = np.array([1.0, 0.0], dtype=np.float32)
    rank("", embedder=embedder, features=features(vector, "scripted"))
    assert ask().query not in embedder.calls
    rank("", embedder=embedder, features=features(vector, "another"))
    assert ask().query in embedder.calls


def test_a_query_without_content_is_similar_to_nothing() -> None:
    ranked = rank("", ask=ask(""))
    assert all(paper_value(c) == 0.0 for c in ranked.values())


def test_specs_are_read_and_written_back() -> None:
    assert parse_paper("") == Mode()
    assert parse_paper("latency") == Mode(("latency",), (DEFAULT_LAMBDA["latency"],))
    assert parse_paper("latency+energy:0.1,0.15").spec == "paper:latency+energy:0.1,0.15"
    for spec in ("paper", "paper:cache:0.05", "paper:confidence:0.3"):
        assert parse_paper(spec.partition(":")[2]).spec == spec


@pytest.mark.parametrize(
    "argument",
    ["speed", "latency:x", "latency:-1", "latency:nan", "latency:0.1,0.2", "latency+latency", "+"],
)
def test_malformed_specs_are_refused(argument: str) -> None:
    with pytest.raises(BadInput) as e:
        parse_paper(argument)
    assert e.value.field == "policy"


def test_a_missing_embedder_is_told_with_its_remedy() -> None:
    def absent() -> Any:
        raise FileNotFoundError("model_quantized.onnx")

    for factory in (None, absent):
        with pytest.raises(SourceError, match="calm models pull --assets"):
            PaperPolicy.build(Mode(), factory)
