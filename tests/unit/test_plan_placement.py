"""Placement: within the budget whatever comes in, worth more per byte first, and no thrash."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calm.plan.placement import HYSTERESIS, MIN_RATE_RPS, forecast, one_at_a_time, propose
from calm.records import EngineSpec, ModelCard, ModelState, PriorSpec, Snapshot, SourceSpec

MIB = 2**20


def card(name: str, **changes: Any) -> ModelCard:
    return ModelCard(name=name, description=name, **changes)


def state(model: str, **changes: Any) -> ModelState:
    base: dict[str, Any] = {
        "model": model,
        "residency": "cold",
        "pinned": False,
        "in_flight": 0,
        "waiting": 0,
        "slots": 4,
        "threads": 1,
        "footprint_bytes": 100 * MIB,
        "footprint_measured": True,
        "load_s": 1.0,
        "last_used_s": None,
        "failures": 0,
    }
    return ModelState(**(base | changes))


def snapshot(*states: ModelState, budget: int = 250 * MIB) -> Snapshot:
    return Snapshot(
        revision=7,
        at_s=100.0,
        models={s.model: s for s in states},
        budget_bytes=budget,
        used_bytes=0,
        cores=2,
        threads_in_use=0,
        queue_length=0,
        in_flight=0,
    )


def fleet(*names: str) -> dict[str, ModelCard]:
    return {name: card(name) for name in names}


# --- forecast ------------------------------------------------------------------------------------


def test_a_first_observation_is_taken_as_it_is() -> None:
    made = forecast(None, {"a": 2.0}, 5.0, horizon_s=60.0)
    assert made.rate_rps == {"a": 2.0}
    assert made.horizon_s == 60.0


def test_what_was_seen_a_horizon_ago_counts_half() -> None:
    first = forecast(None, {"a": 2.0}, 5.0, horizon_s=60.0)
    assert forecast(first, {"a": 0.0}, 60.0, horizon_s=60.0).rate_rps["a"] == pytest.approx(1.0)
    assert forecast(first, {}, 60.0, horizon_s=60.0).rate_rps["a"] == pytest.approx(1.0)


def test_two_short_steps_forget_as_much_as_a_long_one() -> None:
    first = forecast(None, {"a": 2.0}, 5.0)
    twice = forecast(forecast(first, {"a": 1.0}, 10.0), {"a": 1.0}, 20.0)
    assert twice.rate_rps["a"] == pytest.approx(forecast(first, {"a": 1.0}, 30.0).rate_rps["a"])


def test_a_model_nobody_asks_for_fades_out() -> None:
    made = forecast(None, {"a": 1.0}, 1.0, horizon_s=10.0)
    made = forecast(made, {}, 1000.0, horizon_s=10.0)
    assert made.rate_rps == {}


def test_no_time_passed_changes_nothing() -> None:
    first = forecast(None, {"a": 2.0}, 5.0)
    assert forecast(first, {"a": 9.0}, 0.0).rate_rps == first.rate_rps


# --- propose -------------------------------------------------------------------------------------


def test_demand_times_reload_time_per_byte_decides() -> None:
    states = (state("hot"), state("slow", load_s=9.0), state("big", footprint_bytes=200 * MIB))
    plan = propose(fleet("hot", "slow", "big"), snapshot(*states), {"hot": 3.0, "slow": 1.0, "big": 3.0})
    assert plan.preload == ("slow", "hot")
    assert plan.value["slow"] > plan.value["hot"] > plan.value["big"]
    assert plan.value["hot"] == pytest.approx(3.0 * 1.0 / (100 * MIB), rel=1e-4)
    assert plan.revision == 7


def test_load_estimates_come_before_the_last_load() -> None:
    plan = propose(fleet("a"), snapshot(state("a", load_s=1.0)), {"a": 1.0}, {"a": 4.0})
    assert plan.value["a"] == pytest.approx(4.0 / (100 * MIB), rel=1e-4)


def test_an_idle_start_warms_small_models_first_and_better_ones_among_equals() -> None:
    source = SourceSpec(parts=("file:x",), sha256="0" * 64, bytes=50 * MIB)
    cards = {
        "big": card("big", memory_hint_bytes=200 * MIB),
        "small": card("small", source=source),
        "good": card("good", memory_hint_bytes=50 * MIB, priors=PriorSpec(quality={"default": 0.9})),
        "unknown": card("unknown"),
    }
    plan = propose(cards, snapshot(), {})
    assert plan.preload == ("good", "small")
    assert "unknown" not in plan.value


def test_newcomers_come_one_at_a_time() -> None:
    cards = fleet("a", "b", "c")
    cold = snapshot(state("a", residency="ready"), state("b"), state("c"), budget=1000 * MIB)
    plan = propose(cards, cold, {})
    assert set(plan.preload) == {"a", "b", "c"}
    first = one_at_a_time(plan, cold)
    assert len(first.preload) == 2
    assert "a" in first.preload
    assert first.value == plan.value
    busy = snapshot(
        state("a", residency="ready"), state("b", residency="loading"), state("c"), budget=1000 * MIB
    )
    assert set(one_at_a_time(propose(cards, busy, {}), busy).preload) == {"a", "b"}


def test_a_guess_never_displaces_a_resident() -> None:
    cards = {
        "resident": card("resident"),
        "better": card("better", priors=PriorSpec(quality={"default": 1.0})),
    }
    resident = state("resident", residency="ready", load_s=0.01)
    system = snapshot(resident, state("better", load_s=100.0), budget=150 * MIB)
    assert propose(cards, system, {}).preload == ("resident",)
    assert propose(cards, system, {"better": MIN_RATE_RPS}).preload == ("better",)


def test_a_newcomer_must_be_clearly_worth_more() -> None:
    system = snapshot(state("in", residency="ready"), state("new"), budget=150 * MIB)
    cards = fleet("in", "new")
    barely = {"in": 1.0, "new": HYSTERESIS * 0.99}
    assert propose(cards, system, barely).preload == ("in",)
    assert propose(cards, system, {"in": 1.0, "new": HYSTERESIS * 1.01}).preload == ("new",)


def test_pinned_and_serving_models_stay_whatever_others_are_worth() -> None:
    pinned = state("pinned", pinned=True)
    serving = state("serving", residency="ready", in_flight=1)
    plan = propose(fleet("pinned", "serving", "hot"), snapshot(pinned, serving, state("hot")), {"hot": 99.0})
    assert set(plan.preload) == {"pinned", "serving"}


def test_models_that_cannot_be_resident_are_in_no_plan() -> None:
    cards = fleet("huge", "failed", "paused") | {
        "cloud": card("cloud", engine=EngineSpec(kind="openai", url="http://x"), memory_hint_bytes=1)
    }
    states = (
        state("huge", footprint_bytes=999 * MIB),
        state("failed", residency="failed"),
        state("paused", retry_at_s=101.0),
    )
    rates = dict.fromkeys(cards, 5.0)
    plan = propose(cards, snapshot(*states), rates)
    assert plan.preload == ()
    assert plan.value == {}
    healed = msgspec.structs.replace(states[2], retry_at_s=100.0)
    assert propose(cards, snapshot(healed), rates).preload == ("paused",)


residencies = st.sampled_from(["cold", "loading", "ready", "draining", "unloading", "failed"])
states = st.fixed_dictionaries(
    {
        "residency": residencies,
        "pinned": st.booleans(),
        "in_flight": st.integers(0, 2),
        "footprint_bytes": st.integers(1, 400),
        "load_s": st.one_of(st.none(), st.floats(0.01, 60)),
    }
)
worlds = st.lists(st.tuples(states, st.floats(0, 10)), max_size=12)


def build(world: Any, budget: int) -> tuple[dict[str, ModelCard], Snapshot, dict[str, float]]:
    names = [f"m{i}" for i in range(len(world))]
    made = [state(name, **changes) for name, (changes, _) in zip(names, world, strict=True)]
    rates = {name: rate for name, (_, rate) in zip(names, world, strict=True)}
    return fleet(*names), snapshot(*made, budget=budget), rates


@settings(deadline=None)
@given(worlds, st.integers(0, 1000))
def test_never_over_budget_and_no_model_twice(world: Any, budget: int) -> None:
    cards, system, rates = build(world, budget)
    plan = propose(cards, system, rates)
    assert sum(system.models[name].footprint_bytes for name in plan.preload) <= budget
    assert len(set(plan.preload)) == len(plan.preload)
    assert set(plan.preload) <= set(plan.value)
    assert all(value > 0 for value in plan.value.values())


@settings(deadline=None)
@given(worlds, st.integers(0, 1000))
def test_equal_input_gives_an_equal_plan_in_any_order(world: Any, budget: int) -> None:
    cards, system, rates = build(world, budget)
    backwards = dict(reversed(cards.items()))
    assert propose(cards, system, rates) == propose(backwards, system, dict(reversed(rates.items())))


@settings(deadline=None)
@given(worlds, st.integers(0, 1000))
def test_a_fleet_that_is_as_planned_is_left_as_it_is(world: Any, budget: int) -> None:
    cards, system, rates = build(world, budget)
    plan = propose(cards, system, rates)
    carried_out = {
        name: msgspec.structs.replace(s, residency="ready" if name in plan.preload else "cold")
        for name, s in system.models.items()
        if s.residency != "failed"
    }
    served = msgspec.structs.replace(system, models=carried_out)
    left = {name: cards[name] for name in carried_out}
    assert set(propose(left, served, rates).preload) == set(plan.preload)


@settings(deadline=None)
@given(worlds, st.integers(0, 1000))
def test_nothing_more_would_fit(world: Any, budget: int) -> None:
    cards, system, rates = build(world, budget)
    plan = propose(cards, system, rates)
    used = sum(system.models[name].footprint_bytes for name in plan.preload)
    out = set(plan.value) - set(plan.preload)
    assert all(used + system.models[name].footprint_bytes > budget for name in out)


# --- adapters ------------------------------------------------------------------------------------


def specialists(*names: str, of: str = "base") -> dict[str, ModelCard]:
    return {name: card(name, adapter_of=of, memory_hint_bytes=MIB) for name in names}


def shared(*states: ModelState, **adapters: str) -> Snapshot:
    """`adapters`: the base of each, whose state it shares."""
    found = snapshot(*states)
    return msgspec.structs.replace(
        found, models={**found.models, **{name: found.models[base] for name, base in adapters.items()}}
    )


def test_what_is_asked_of_specialists_speaks_for_their_base() -> None:
    cards = fleet("base", "other") | specialists("x", "y")
    now = shared(state("base"), state("other"), x="base", y="base")
    plan = propose(cards, now, {"x": 1.0, "y": 2.0, "other": 2.0})
    assert plan.preload == ("base", "other")
    assert plan.value["base"] == pytest.approx(3.0 / (100 * MIB), rel=1e-4)
    assert set(plan.value) == {"base", "other"}


def test_a_family_is_planned_with_the_bytes_of_all_its_members() -> None:
    cards = {"base": card("base", memory_hint_bytes=249 * MIB)} | specialists("x")
    assert propose(cards, snapshot(), {}).preload == ("base",)
    assert propose(cards | specialists("x", "y"), snapshot(), {}).preload == ()


def test_specialists_do_not_crowd_out_others() -> None:
    """Six specialists in 100 MiB leave room for another base, however often their state is listed."""
    names = [f"s{i}" for i in range(6)]
    cards = fleet("base", "other") | specialists(*names)
    now = shared(state("base", residency="ready"), state("other"), **dict.fromkeys(names, "base"))
    plan = propose(cards, now, {"s0": 1.0, "other": 1.0})
    assert set(plan.preload) == {"base", "other"}
