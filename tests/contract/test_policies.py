"""The contract of ports.Policy, run over every built-in policy and over a plug-in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from importlib.metadata import EntryPoint, EntryPoints
from math import isfinite
from typing import Any
from zlib import crc32

import msgspec
import numpy as np
import pytest

from calm.errors import BadInput, CalmError
from calm.plan import policies
from calm.plan.policies import PolicyContext, make_policy, policy_choices, verified
from calm.ports import Policy
from calm.records import (
    Ask,
    Belief,
    Candidate,
    Estimate,
    Features,
    History,
    ModelCard,
    ModelState,
    Snapshot,
    Vector,
    Weights,
    Wishes,
)

SPECS = [
    "calm",
    "paper",
    "paper:latency:0.2",
    "paper:energy",
    "paper:confidence:0.1",
    "paper:cache",
    "paper:latency+energy+confidence+cache:0.1,0.1,0.1,0.02",
    "fixed:m1",
    "fixed:gone",
    "random",
    "random:7",
    "round-robin",
    "least-loaded",
]


class HashEmbedder:
    """A unit vector that depends on the text alone."""

    name = "hash"
    dimensions = 16

    def embed(self, text: str) -> Vector:
        vector = np.random.default_rng(crc32(text.encode())).normal(size=16).astype(np.float32)
        unit: Vector = vector / np.linalg.norm(vector)
        return unit


def make(spec: str, seed: int = 3) -> Policy:
    return make_policy(spec, embedder=HashEmbedder, seed=seed)


def fleet(count: int) -> dict[str, ModelCard]:
    return {f"m{i}": ModelCard(name=f"m{i}", description=f"knows subject {i}") for i in range(count)}


def belief(mean: float) -> Belief:
    return Belief(mean=mean, sd=abs(mean) / 4)


def estimates(cards: Mapping[str, ModelCard], energy: bool = True) -> dict[str, Estimate]:
    return {
        name: Estimate(
            model=name,
            prompt_tokens=20,
            cached_tokens=0,
            output_tokens=belief(100),
            queue_s=belief(0),
            load_s=belief(0),
            prefill_s=belief(0.1),
            decode_s=belief(1),
            ttft_s=belief(0.1),
            total_s=belief(1.0 + i % 5),
            energy_j=belief(10.0 + i % 3) if energy else None,
            quality=belief(0.2 + 0.1 * (i % 4)),
        )
        for i, name in enumerate(cards)
    }


def snapshot(cards: Mapping[str, ModelCard]) -> Snapshot:
    states = {
        name: ModelState(
            model=name,
            residency="cold" if i % 2 else "ready",
            pinned=False,
            in_flight=i % 3,
            waiting=0,
            slots=4,
            threads=1,
            footprint_bytes=100,
            footprint_measured=True,
            load_s=1.0,
            last_used_s=9.0,
            failures=0,
        )
        for i, name in enumerate(cards)
    }
    return Snapshot(
        revision=1,
        at_s=10.0,
        models=states,
        budget_bytes=100 * len(cards),
        used_bytes=100 * len(cards),
        cores=2,
        threads_in_use=0,
        queue_length=0,
        in_flight=0,
    )


def ask(request_id: str) -> Ask:
    return Ask(
        request_id=request_id,
        kind="chat",
        query=f"question {request_id}",
        prompt_chars=40,
        body={},
        requires=frozenset(),
        wishes=Wishes(deadline_s=30.0),
    )


FEATURES = Features(
    prompt_chars=40,
    prompt_tokens=10,
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


def histories(cards: Mapping[str, ModelCard]) -> dict[str, History]:
    """Every second model was observed."""
    return {
        name: History(latency_s=1.0 + i, energy_j=5.0 * i, rating=1.0 + i % 5, observations=9)
        for i, name in enumerate(cards)
        if i % 2
    }


def rank(
    policy: Policy,
    cards: Mapping[str, ModelCard],
    request_id: str = "r1",
    energy: bool = True,
    system: Snapshot | None = None,
    past: Mapping[str, History] | None = None,
) -> tuple[Candidate, ...]:
    return policy.rank(
        ask(request_id),
        FEATURES,
        system or snapshot(cards),
        cards,
        estimates(cards, energy),
        histories(cards) if past is None else past,
        Weights(),
    )


def keeps_contract(ranked: tuple[Candidate, ...], cards: Mapping[str, ModelCard]) -> None:
    scores = [candidate.score for candidate in ranked]
    assert sorted(c.model for c in ranked) == sorted(cards)
    assert scores == sorted(scores)
    assert all(isfinite(score) for score in scores)
    for candidate in ranked:
        assert sum(t.contribution for t in candidate.terms) == pytest.approx(candidate.score)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("count", [1, 2, 3, 40])
def test_ranks_every_card_once_ascending_finite_explained(spec: str, count: int) -> None:
    cards = fleet(count)
    keeps_contract(rank(make(spec), cards), cards)


@pytest.mark.parametrize("spec", SPECS)
def test_works_without_energy_without_history_and_without_states(spec: str) -> None:
    cards = fleet(4)
    bare = snapshot({})
    keeps_contract(rank(make(spec), cards, energy=False, past={}, system=bare), cards)


@pytest.mark.parametrize("spec", SPECS)
def test_equal_seeds_give_equal_rankings(spec: str) -> None:
    cards = fleet(6)
    first, second = make(spec), make(spec)
    for i in range(20):
        assert rank(first, cards, f"r{i}") == rank(second, cards, f"r{i}")


@pytest.mark.parametrize("spec", SPECS)
def test_inputs_are_left_as_they_are(spec: str) -> None:
    cards = fleet(3)
    names = list(cards)
    rank(make(spec), cards)
    assert list(cards) == names


@pytest.mark.parametrize("spec", SPECS)
def test_the_fleet_may_change_between_requests(spec: str) -> None:
    policy = make(spec)
    for count in (5, 1, 3):
        keeps_contract(rank(policy, fleet(count)), fleet(count))


@pytest.mark.parametrize("spec", SPECS)
def test_a_policys_name_makes_it_again(spec: str) -> None:
    policy = make(spec)
    assert make(policy.name).name == policy.name


# --- what each is ---------------------------------------------------------------------------------


def test_fixed_puts_its_model_first() -> None:
    assert rank(make("fixed:m1"), fleet(3))[0].model == "m1"


@pytest.mark.parametrize("request_id", ["r1", "r2", "r3", "r4"])
def test_what_fixed_falls_back_on_are_specialists_last_of_all(request_id: str) -> None:
    cards = fleet(4)
    cards["m0"] = msgspec.structs.replace(cards["m0"], adapter_of="m2")
    assert rank(make("fixed:m1"), cards, request_id)[-1].model == "m0"
    assert rank(make("fixed:m0"), cards, request_id)[0].model == "m0"


def test_fixed_refuses_a_misspelt_name_when_the_fleet_is_known() -> None:
    with pytest.raises(BadInput, match="no such model; known: m0, m1"):
        make_policy("fixed:m7", models=fleet(2))
    assert make_policy("fixed:m1", models=fleet(2)).name == "fixed:m1"


def test_round_robin_serves_each_in_turn_and_survives_a_change() -> None:
    policy, cards = make("round-robin"), fleet(3)
    assert [rank(policy, cards)[0].model for _ in range(4)] == ["m0", "m1", "m2", "m0"]
    del cards["m1"]
    assert [rank(policy, cards)[0].model for _ in range(2)] == ["m2", "m0"]


def test_random_is_even_and_seeds_differ() -> None:
    policy, cards = make("random:1"), fleet(3)
    firsts = Counter(rank(policy, cards)[0].model for _ in range(600))
    assert min(firsts[name] for name in cards) > 150
    orders = [[c.model for c in rank(make(f"random:{seed}"), fleet(20))] for seed in (1, 2)]
    assert orders[0] != orders[1]


def test_least_loaded_counts_requests_per_slot_and_prefers_the_resident() -> None:
    cards = fleet(4)
    for i in range(10):
        ranked = rank(make("least-loaded"), cards, f"r{i}")
        assert [c.model for c in ranked] == ["m0", "m3", "m1", "m2"]


# --- the registry ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    ["", "best", "calm:x", "fixed", "fixed:", "random:x", "round-robin:2", "least-loaded:1", "paper:fast"],
)
def test_a_wrong_spec_is_bad_input_of_the_field_policy(spec: str) -> None:
    with pytest.raises(BadInput) as caught:
        make(spec)
    assert caught.value.field == "policy"


def test_an_unknown_spec_lists_the_choices() -> None:
    with pytest.raises(BadInput) as caught:
        make("best")
    for choice in policy_choices():
        assert choice in caught.value.message


class WorstFirst:
    """A plug-in: the model with the longest name first."""

    name = "worst-first"

    def __init__(self, break_it: str) -> None:
        self._break = break_it

    def rank(self, ask: Any, features: Any, snapshot: Any, cards: Any, *rest: Any) -> tuple[Candidate, ...]:
        ranked = [
            Candidate(model=name, score=float(i), terms=())
            for i, name in enumerate(sorted(cards, reverse=True))
        ]
        if self._break == "order":
            ranked.reverse()
        if self._break == "missing":
            ranked.pop()
        if self._break == "nan":
            ranked[0] = Candidate(model=ranked[0].model, score=float("nan"), terms=())
        return tuple(ranked)


def worst_first(argument: str, context: PolicyContext) -> Policy:
    if argument == "raise":
        raise RuntimeError("no luck")
    if argument == "nothing":
        return None  # type: ignore[return-value]
    assert context.seed == 3
    return WorstFirst(argument)


@pytest.fixture
def plugged(monkeypatch: pytest.MonkeyPatch) -> None:
    class Loaded(EntryPoint):
        def load(self) -> Any:
            return worst_first

    installed = EntryPoints([Loaded("worst-first", "somewhere:worst_first", policies.ENTRY_POINT_GROUP)])
    monkeypatch.setattr(policies, "entry_points", installed.select)


@pytest.mark.usefixtures("plugged")
def test_a_plug_in_is_listed_and_keeps_the_contract() -> None:
    assert policy_choices()[-1] == "worst-first"
    policy, cards = make("worst-first"), fleet(3)
    ranked = rank(policy, cards)
    assert [c.model for c in ranked] == ["m2", "m1", "m0"]
    assert policy.name == "worst-first"


@pytest.mark.usefixtures("plugged")
@pytest.mark.parametrize(
    ("fault", "words"), [("order", "ascending"), ("missing", "exactly once"), ("nan", "not finite")]
)
def test_a_plug_in_that_breaks_the_contract_is_named(fault: str, words: str) -> None:
    policy = make(f"worst-first:{fault}")
    with pytest.raises(CalmError, match=f"'worst-first'.*{words}"):
        rank(policy, fleet(3))


@pytest.mark.usefixtures("plugged")
@pytest.mark.parametrize(("fault", "words"), [("raise", "no luck"), ("nothing", "made no policy")])
def test_a_plug_in_that_cannot_be_built_is_named(fault: str, words: str) -> None:
    with pytest.raises(CalmError, match=f"worst-first.*{words}"):
        make(f"worst-first:{fault}")


def test_verified_passes_a_good_ranking_through() -> None:
    cards = fleet(3)
    ranked = rank(make("calm"), cards)
    assert verified(ranked, cards, "calm") == ranked
