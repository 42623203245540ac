"""The calm score: what each regret is, how the unknown and the uncertain count, and what a choice costs others."""

from __future__ import annotations

from collections import Counter
from math import isfinite, log2
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calm.plan.score import CAP, REUSE_S, Tuning, displaced_s, score_all
from calm.records import Ask, Belief, Candidate, Estimate, ModelCard, ModelState, Snapshot, Weights, Wishes

MIB = 2**20
EVEN = Weights(latency=1.0, energy=1.0, quality=1.0, cost=1.0)


def ask(request_id: str = "r1", **wishes: Any) -> Ask:
    return Ask(
        request_id=request_id,
        kind="chat",
        query="hello",
        prompt_chars=40,
        body={},
        requires=frozenset(),
        wishes=Wishes(**wishes),
    )


def estimate(
    model: str,
    total_s: float = 1.0,
    quality: float = 0.5,
    joules: float | None = None,
    usd: float | None = None,
    sd: float = 0.0,
    total_sd: float = 0.0,
) -> Estimate:
    zero = Belief(mean=0.0, sd=0.0)
    return Estimate(
        model=model,
        prompt_tokens=10,
        cached_tokens=0,
        output_tokens=zero,
        queue_s=zero,
        load_s=zero,
        prefill_s=zero,
        decode_s=zero,
        ttft_s=zero,
        total_s=Belief(mean=total_s, sd=total_sd),
        energy_j=None if joules is None else Belief(mean=joules, sd=0.0),
        quality=Belief(mean=quality, sd=sd),
        cost_usd=usd,
    )


def state(model: str, **changes: Any) -> ModelState:
    base: dict[str, Any] = {
        "model": model,
        "residency": "ready",
        "pinned": False,
        "in_flight": 0,
        "waiting": 0,
        "slots": 4,
        "threads": 1,
        "footprint_bytes": 100 * MIB,
        "footprint_measured": True,
        "load_s": 2.0,
        "last_used_s": 100.0,
        "failures": 0,
    }
    return ModelState(**(base | changes))


def snapshot(*states: ModelState, budget: int = 1000 * MIB, used: int = 0) -> Snapshot:
    return Snapshot(
        revision=1,
        at_s=100.0,
        models={s.model: s for s in states},
        budget_bytes=budget,
        used_bytes=used,
        cores=2,
        threads_in_use=0,
        queue_length=0,
        in_flight=0,
    )


def rank(
    *estimates: Estimate,
    weights: Weights = EVEN,
    system: Snapshot | None = None,
    request: Ask | None = None,
    tuning: Tuning | None = None,
    remote: tuple[str, ...] = (),
    adapters: tuple[str, ...] = (),
) -> dict[str, Candidate]:
    cards = {
        e.model: ModelCard(
            name=e.model,
            description="",
            placement="remote" if e.model in remote else "local",
            adapter_of="base" if e.model in adapters else None,
        )
        for e in estimates
    }
    found = {e.model: e for e in estimates}
    ranked = score_all(
        request or ask(), system or snapshot(), cards, found, weights, tuning or Tuning(exploration=0.0)
    )
    return {candidate.model: candidate for candidate in ranked}


def regret(candidate: Candidate, name: str) -> float:
    return next(term.regret for term in candidate.terms if term.name == name)


def term_names(candidate: Candidate) -> list[str]:
    return [term.name for term in candidate.terms]


def test_a_specialist_out_of_its_field_promises_no_answer() -> None:
    """It is always quick: its two words would else outrun a whole answer of a weak generalist."""
    general, quick = (
        estimate("general", total_s=0.9, quality=0.32),
        estimate("quick", total_s=0.15, quality=0.14),
    )
    balanced = Weights(latency=0.3, energy=0.2, quality=0.5)
    ranked = rank(general, quick, weights=balanced, adapters=("quick",))
    assert regret(ranked["quick"], "quality") == 1.0
    assert next(iter(ranked)) == "general"
    assert next(iter(rank(general, quick, weights=balanced))) == "quick"  # any other model is weighed as ever
    near = rank(general, estimate("quick", total_s=0.15, quality=0.16), weights=balanced, adapters=("quick",))
    assert regret(near["quick"], "quality") == pytest.approx(0.16)


def test_optimism_does_not_bring_a_specialist_back_into_a_field() -> None:
    """Where the best is right once in twenty times, the bonus of the uncertain is as large as all there is."""
    query, number = (
        estimate("query", 0.9, quality=0.04, sd=0.25),
        estimate("number", 0.1, quality=0.012, sd=0.25),
    )
    ranked = rank(
        query, number, weights=Weights(latency=0.3, energy=0.2, quality=0.5),
        adapters=("query", "number"), tuning=Tuning(exploration=0.1),
    )  # fmt: skip
    assert regret(ranked["number"], "quality") == 1.0
    assert next(iter(ranked)) == "query"


def test_four_octaves_of_latency_weigh_as_much_as_all_quality() -> None:
    weights = Weights(latency=1, energy=0, quality=1, cost=0)
    ranked = rank(estimate("slow", 16.0, 1.0), estimate("bad", 1.0, 0.0), weights=weights)
    assert ranked["slow"].score == pytest.approx(ranked["bad"].score) == pytest.approx(0.5)


def test_the_worked_example_of_the_decision_record() -> None:
    weights = Weights(latency=0.3, energy=0.2, quality=0.5, cost=0.0)
    ranked = rank(
        estimate("smollm2", 1.2, 0.45, 14.0),
        estimate("gemma", 2.0, 0.50, 25.0),
        estimate("tinyllama", 8.0, 0.70, 95.0),
        weights=weights,
    )
    scores = {name: round(candidate.score, 3) for name, candidate in ranked.items()}
    assert scores == {"smollm2": 0.125, "gemma": 0.197, "tinyllama": 0.343}
    assert next(iter(ranked)) == "smollm2"
    overloaded = rank(
        estimate("smollm2", 1.2 + 30, 0.45, 14.0),
        estimate("gemma", 2.0, 0.50, 25.0),
        estimate("tinyllama", 8.0 + 30, 0.70, 95.0),
        weights=weights,
    )
    assert next(iter(overloaded)) == "gemma"


def test_the_order_does_not_depend_on_units_or_on_the_scale_of_weights() -> None:
    made = [estimate("a", 1.0, 0.3, 10.0), estimate("b", 3.0, 0.6, 20.0), estimate("c", 9.0, 0.9, 40.0)]
    scaled = [
        estimate(e.model, e.total_s.mean * 7, e.quality.mean, e.energy_j.mean * 7) for e in made if e.energy_j
    ]
    tens = Weights(latency=10, energy=10, quality=10, cost=10)
    first, second = rank(*made), rank(*scaled, weights=tens)
    assert list(first) == list(second)
    for name in first:
        assert first[name].score == pytest.approx(second[name].score)


def test_a_ratio_is_capped() -> None:
    ranked = rank(estimate("best", 0.1), estimate("worst", 1e6))
    assert regret(ranked["worst"], "latency") == CAP


def test_differences_nobody_notices_are_no_regret() -> None:
    ranked = rank(estimate("a", 0.0001, joules=1e-6), estimate("b", 0.009, joules=1e-3))
    assert regret(ranked["b"], "latency") == regret(ranked["b"], "energy") == 0.0


def test_unknown_energy_counts_as_the_worst_known() -> None:
    ranked = rank(estimate("low", joules=10.0), estimate("high", joules=40.0), estimate("dark"))
    assert regret(ranked["dark"], "energy") == regret(ranked["high"], "energy") == pytest.approx(0.5)
    dark = next(term for term in ranked["dark"].terms if term.name == "energy")
    assert dark.value is None


def test_energy_known_for_none_leaves_the_term_out_and_the_weights_sum_to_one() -> None:
    ranked = rank(estimate("a"), estimate("b", 2.0))
    assert term_names(ranked["a"]) == ["latency", "quality", "cost"]
    assert sum(term.weight for term in ranked["a"].terms) == pytest.approx(1.0)


def test_a_term_of_weight_zero_is_left_out() -> None:
    ranked = rank(estimate("a", joules=1.0), weights=Weights(latency=0, energy=1, quality=0, cost=0))
    assert term_names(ranked["a"]) == ["energy"]


def test_no_known_term_ranks_by_fairness_alone() -> None:
    ranked = rank(estimate("a"), estimate("b"), weights=Weights(latency=0, energy=1, quality=0, cost=0))
    assert {c.score for c in ranked.values()} == {0.0}
    assert all(c.terms == () for c in ranked.values())


def test_local_is_free_and_a_remote_price_counts_in_octaves() -> None:
    weights = Weights(latency=0, energy=0, quality=0, cost=1)
    ranked = rank(
        estimate("home"),
        estimate("cloud", usd=0.00016),
        estimate("dark"),
        weights=weights,
        remote=("cloud", "dark"),
    )
    assert regret(ranked["home"], "cost") == 0.0
    assert regret(ranked["cloud"], "cost") == pytest.approx(1.0)
    assert regret(ranked["dark"], "cost") == regret(ranked["cloud"], "cost")


def test_exploration_is_optimism_about_the_uncertain() -> None:
    made = (estimate("known", quality=0.52, sd=0.0), estimate("new", quality=0.5, sd=0.3))
    only = Weights(latency=0, energy=0, quality=1, cost=0)
    assert next(iter(rank(*made, weights=only))) == "known"
    assert next(iter(rank(*made, weights=only, tuning=Tuning(exploration=0.1)))) == "new"


def test_optimism_never_exceeds_perfect() -> None:
    ranked = rank(estimate("a", quality=0.9, sd=5.0), tuning=Tuning(exploration=1.0))
    assert next(t.value for t in ranked["a"].terms if t.name == "quality") == 1.0


def test_a_deadline_makes_latency_risk_averse() -> None:
    made = (estimate("steady", 1.1, total_sd=0.05), estimate("wild", 1.0, total_sd=1.0))
    only = Weights(latency=1, energy=0, quality=0, cost=0)
    assert next(iter(rank(*made, weights=only))) == "wild"
    assert next(iter(rank(*made, weights=only, request=ask(deadline_s=3.0)))) == "steady"


def test_predictions_that_are_no_numbers_count_as_the_worst_known() -> None:
    nan = float("nan")
    ranked = rank(
        estimate("good", 1.0, 0.9, 5.0), estimate("bad", 4.0, 0.1, 9.0), estimate("broken", nan, nan, nan)
    )
    assert all(isfinite(c.score) for c in ranked.values())
    assert ranked["broken"].score == ranked["bad"].score


def test_a_card_without_an_estimate_is_ranked_and_worst() -> None:
    cards = {name: ModelCard(name=name, description="") for name in ("a", "b")}
    ranked = score_all(ask(), snapshot(), cards, {"a": estimate("a")}, EVEN)
    assert {c.model for c in ranked} == {"a", "b"}


# --- others ------------------------------------------------------------------------------------


def others_of(candidate: Candidate) -> float:
    return next((t.regret for t in candidate.terms if t.name == "others"), 0.0)


def test_loading_into_free_memory_displaces_nobody() -> None:
    system = snapshot(state("a"), state("b", residency="cold"), used=100 * MIB)
    assert displaced_s(system, {"a": ModelCard(name="a", description="")}) is None
    assert others_of(rank(estimate("a"), estimate("b"), system=system)["b"]) == 0.0


def test_displacing_a_hot_model_costs_its_reload() -> None:
    system = snapshot(state("a"), state("b", residency="cold"), budget=150 * MIB, used=100 * MIB)
    ranked = rank(estimate("a", 1.0), estimate("b", 1.0), system=system)
    assert next(iter(ranked)) == "a"
    assert others_of(ranked["b"]) == pytest.approx(log2(3.0) / 4)
    assert others_of(ranked["a"]) == 0.0


def test_latency_and_what_others_lose_add_up_to_one_ratio() -> None:
    system = snapshot(state("a"), state("b", residency="cold"), budget=150 * MIB, used=100 * MIB)
    b = rank(estimate("a", 1.0), estimate("b", 2.0), system=system)["b"]
    assert regret(b, "latency") + regret(b, "others") == pytest.approx(log2((2.0 + 2.0) / 1.0) / 4)
    only = Weights(latency=3, energy=0, quality=0, cost=0)
    assert rank(estimate("a", 1.0), estimate("b", 2.0), system=system, weights=only)["b"].score == 0.5


def test_the_idle_are_displaced_first_and_cost_less_the_longer_they_idle() -> None:
    old = state("old", last_used_s=100.0 - 3 * REUSE_S)
    system = snapshot(old, state("hot"), state("new", residency="cold"), budget=200 * MIB, used=200 * MIB)
    cost = displaced_s(system, {"new": ModelCard(name="new", description="")})
    assert cost == [pytest.approx(2.0 * 2.718281828**-3)]


def test_two_victims_cost_both() -> None:
    new = state("new", residency="cold", footprint_bytes=150 * MIB)
    system = snapshot(state("a"), state("b", load_s=1.0), new, budget=200 * MIB, used=200 * MIB)
    assert displaced_s(system, {"new": ModelCard(name="new", description="")}) == [pytest.approx(3.0)]


def test_models_that_cannot_leave_are_no_victims() -> None:
    system = snapshot(
        state("pinned", pinned=True),
        state("busy", in_flight=1),
        state("idle", load_s=5.0),
        state("new", residency="cold"),
        budget=300 * MIB,
        used=300 * MIB,
    )
    assert displaced_s(system, {"new": ModelCard(name="new", description="")}) == [pytest.approx(5.0)]


# --- ties ----------------------------------------------------------------------------------------


def test_ties_go_to_the_model_with_fewest_requests() -> None:
    system = snapshot(state("a", in_flight=2), state("b", in_flight=1), state("c", waiting=2))
    assert next(iter(rank(estimate("a"), estimate("b"), estimate("c"), system=system))) == "b"


def test_ties_are_shared_fairly_and_repeatably() -> None:
    made = [estimate(name) for name in ("a", "b", "c")]
    firsts = Counter(next(iter(rank(*made, request=ask(f"r{i}")))) for i in range(600))
    assert min(firsts[name] for name in ("a", "b", "c")) > 150
    again = [list(rank(*made, request=ask("same"))) for _ in range(3)]
    backwards = list(rank(*reversed(made), request=ask("same")))
    assert again[0] == again[1] == again[2] == backwards


positive = st.floats(1e-4, 1e4)
some_estimates = st.lists(
    st.tuples(positive, st.floats(0, 1), st.one_of(st.none(), positive), st.floats(0, 2)),
    min_size=1,
    max_size=8,
)


@settings(deadline=None)
@given(some_estimates, st.tuples(*[st.floats(0, 1)] * 4))
def test_any_input_gives_a_complete_ascending_explained_ranking(rows: Any, weights: Any) -> None:
    made = [estimate(f"m{i}", s, q, j, sd=sd, total_sd=sd * s) for i, (s, q, j, sd) in enumerate(rows)]
    chosen = Weights(latency=weights[0], energy=weights[1], quality=weights[2], cost=weights[3])
    ranked = list(rank(*made, weights=chosen, request=ask(deadline_s=5.0)).values())
    scores = [c.score for c in ranked]
    assert len(ranked) == len(rows)
    assert scores == sorted(scores)
    for candidate in ranked:
        assert isfinite(candidate.score)
        assert candidate.score >= 0
        assert sum(t.contribution for t in candidate.terms) == pytest.approx(candidate.score)


@settings(deadline=None)
@given(some_estimates, st.data())
def test_making_a_model_better_never_ranks_it_lower(rows: Any, data: Any) -> None:
    made = [estimate(f"m{i}", s, q) for i, (s, q, _, _) in enumerate(rows)]
    i = data.draw(st.integers(0, len(made) - 1))
    better = list(made)
    better[i] = estimate(f"m{i}", rows[i][0] / 2, min(1.0, rows[i][1] + 0.1))
    weights = Weights(latency=1, energy=0, quality=1, cost=0)
    before = list(rank(*made, weights=weights)).index(f"m{i}")
    ranked = rank(*better, weights=weights)
    after = sum(c.score < ranked[f"m{i}"].score - 1e-12 for c in ranked.values())
    assert after <= before


def test_a_base_with_specialists_is_displaced_once() -> None:
    """Its reload is paid once, however many models it serves: else loading anything would look six times dearer."""
    base, new = state("base"), state("new", residency="cold", footprint_bytes=100 * MIB)
    alone = snapshot(base, new, budget=100 * MIB, used=100 * MIB)
    listed = {"base": base, "x": base, "y": base, "new": new}
    shared = msgspec.structs.replace(alone, models=listed)
    cards = {"new": ModelCard(name="new", description="new")}
    assert displaced_s(shared, cards) == displaced_s(alone, cards) == [2.0]
