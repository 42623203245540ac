"""The floor under quality: the price that keeps a promise, the account over decisions, and how an aim is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.test_plan_score import ask, estimate, snapshot, state

from calm.errors import BadInput
from calm.plan.floor import (
    EVERY,
    EXPLORATION,
    LEAST_SEEN,
    MOST_DEBT,
    MOST_PRICE,
    STEPS,
    WINDOW,
    Options,
    QualityFloor,
    checked_floor,
    fair_price,
    keeper,
    options,
    quality_at,
    tuning_for,
    undominated,
)
from calm.plan.goals import GOALS, Aim, read_aim
from calm.plan.policies import make_policy
from calm.plan.score import Tuning
from calm.records import Candidate, Estimate, ModelCard, Term, Weights

SPEED = Weights(latency=1.0, energy=0.0, quality=1.0)
UNEXPLORING = Tuning(exploration=0.0)

# --- the price ------------------------------------------------------------------------------------

eighths = st.integers(0, 32).map(lambda n: n / 8)
qualities = st.integers(0, 64).map(lambda n: n / 64)
promises = st.integers(1, 63).map(lambda n: n / 64)
prices = st.integers(1, 64 * 8).map(lambda n: n / 8)


@st.composite
def decisions(draw: st.DrawFn) -> Options:
    """Costs and qualities in fractions that are exact, regret as scored without optimism."""
    drawn = draw(st.lists(st.tuples(eighths, qualities), min_size=1, max_size=5))
    best = max(quality for _, quality in drawn)
    return tuple(undominated((cost, best - quality, quality) for cost, quality in drawn))


windows = st.lists(decisions(), min_size=1, max_size=12)


@given(windows, promises)
def test_the_price_keeps_the_promise_and_a_little_less_does_not(seen: list[Options], promised: float) -> None:
    price = fair_price(seen, promised)
    if quality_at(seen, MOST_PRICE) < promised:
        assert price == (MOST_PRICE, MOST_PRICE)
        return
    assert quality_at(seen, price.high) >= promised
    assert 0.0 <= price.low < price.high <= MOST_PRICE
    assert price.high - price.low == pytest.approx(MOST_PRICE / 2**STEPS)
    if price.low > 0.0:
        assert quality_at(seen, price.low) < promised


@given(windows, prices, prices)
def test_a_higher_price_never_brings_less_quality(seen: list[Options], one: float, other: float) -> None:
    """So where the highest price does not reach a promise, none does."""
    low, high = sorted((one, other))
    assert quality_at(seen, low) <= quality_at(seen, high)


@given(windows, promises, promises)
def test_more_is_never_promised_for_less(seen: list[Options], one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert fair_price(seen, low).high <= fair_price(seen, high).high


@given(st.lists(st.tuples(eighths, eighths, qualities), min_size=1, max_size=8), prices)
def test_who_is_left_out_could_never_have_been_chosen(
    found: list[tuple[float, float, float]], price: float
) -> None:
    kept = list(undominated(found))
    assert set(kept) <= set(found)
    assert min(c + price * lost for c, lost, _ in kept) == min(c + price * lost for c, lost, _ in found)


def test_a_window_of_two_models_in_figures() -> None:
    """Saving 0.25 of cost costs 0.5 of quality: from a price of 0.5 on the dear model is worth it."""
    seen: list[Options] = [((0.0, 0.5, 0.4), (0.25, 0.0, 0.9))]
    assert fair_price(seen, 0.7) == pytest.approx((0.5, 0.5), abs=1e-5)
    assert fair_price(seen, 0.95) == (MOST_PRICE, MOST_PRICE)
    assert fair_price(seen, 0.3) == pytest.approx((0.0, 0.0), abs=1e-5)


# --- the account ----------------------------------------------------------------------------------


def served(
    floor: QualityFloor,
    count: int,
    fleet: Mapping[str, Estimate],
    *,
    weights: Weights = SPEED,
    policy: str = "calm",
) -> list[str]:
    """Who serves each of `count` requests, all models resident and idle."""
    cards = {name: ModelCard(name=name, description=name) for name in fleet}
    chooser = make_policy(policy, tuning=UNEXPLORING)
    now = snapshot(*(state(name) for name in fleet))
    chosen = []
    for number in range(count):
        used = floor.weights(weights)
        ranked = chooser.rank(ask(f"r{number}"), None, now, cards, fleet, {}, used)  # type: ignore[arg-type]
        floor.decided(ranked, fleet, used)
        chosen.append(ranked[0].model)
    return chosen


def fleet_of(**models: tuple[float, float]) -> dict[str, Estimate]:
    """name=(seconds, quality)"""
    return {name: estimate(name, seconds, quality) for name, (seconds, quality) in models.items()}


TWO = fleet_of(cheap=(1.0, 0.5), dear=(4.0, 0.9))


def mean_quality(chosen: Sequence[str], fleet: Mapping[str, Estimate] = TWO) -> float:
    return fmean(fleet[name].quality.mean for name in chosen)


@pytest.mark.parametrize("promised", [0.55, 0.7, 0.85])
@pytest.mark.parametrize(
    "weights", [SPEED, Weights(latency=0.1, energy=0.0, quality=0.9), Weights(latency=5.0, quality=0.0)]
)
def test_the_mean_is_the_promise_whatever_weight_quality_had(promised: float, weights: Weights) -> None:
    chosen = served(QualityFloor(promised), 600, TWO, weights=weights)
    assert mean_quality(chosen[100:]) == pytest.approx(promised, abs=0.02)
    assert set(chosen[100:]) == {"cheap", "dear"}


def test_requests_that_differ_are_served_where_quality_is_cheap() -> None:
    """For half of the requests the dear model is little better: those are the ones to save on."""
    floor, draw = QualityFloor(0.75), Random(5)
    plain, hard = fleet_of(cheap=(1.0, 0.8), dear=(4.0, 0.9)), fleet_of(cheap=(1.0, 0.3), dear=(4.0, 0.9))
    found: dict[str, list[str]] = {"plain": [], "hard": []}
    for _ in range(800):
        kind, fleet = draw.choice((("plain", plain), ("hard", hard)))
        found[kind] += served(floor, 1, fleet)
    late = {kind: chosen[50:] for kind, chosen in found.items()}
    assert set(late["plain"]) == {"cheap"}
    assert late["hard"].count("dear") > late["hard"].count("cheap")
    both = [*(plain[name].quality.mean for name in late["plain"])]
    both += [hard[name].quality.mean for name in late["hard"]]
    assert fmean(both) == pytest.approx(0.75, abs=0.03)


def test_a_promise_nobody_can_keep_gets_the_best() -> None:
    floor = QualityFloor(0.95)
    chosen = served(floor, 100, TWO)
    assert set(chosen[LEAST_SEEN:]) == {"dear"}
    assert floor.in_force == MOST_PRICE
    assert floor.debt <= MOST_DEBT


def test_a_promise_everybody_keeps_gets_the_cheapest() -> None:
    chosen = served(QualityFloor(0.3), 100, TWO, weights=Weights(latency=0.1, quality=1.0))
    assert set(chosen[: LEAST_SEEN - 1]) == {"dear"}
    assert set(chosen[LEAST_SEEN:]) == {"cheap"}


def test_quality_that_turns_out_worse_is_noticed_though_it_cost_nothing() -> None:
    floor = QualityFloor(0.7)
    before = fleet_of(cheap=(1.0, 0.8), dear=(4.0, 0.9))
    assert set(served(floor, 200, before)[LEAST_SEEN:]) == {"cheap"}
    assert floor.in_force == pytest.approx(0.0, abs=1e-5)
    after = served(floor, 600, TWO)
    assert mean_quality(after[WINDOW:]) == pytest.approx(0.7, abs=0.02)
    assert {"cheap", "dear"} == set(after[WINDOW : 2 * WINDOW])


@pytest.mark.parametrize("growth", [1 / 20_000, -1 / 20_000, 1 / 2_000])
def test_the_promise_is_kept_while_predictions_drift(growth: float) -> None:
    """The window looks back: on a drift the price it gives is always a little too low, or too high."""
    floor, chosen = QualityFloor(0.7), []
    for number in range(1000):
        chosen += served(floor, 1, fleet_of(cheap=(1.0, 0.5), dear=(4.0 * (1 + number * growth), 0.9)))
    assert mean_quality(chosen[250:]) == pytest.approx(0.7, abs=0.02)


def test_the_operators_own_weight_counts_until_a_price_is_found() -> None:
    floor = QualityFloor(0.7)
    assert floor.in_force is None
    assert floor.weights(SPEED) == SPEED
    served(floor, LEAST_SEEN - 1, TWO)
    assert floor.weights(SPEED) == SPEED
    served(floor, 1, TWO)
    assert floor.weights(SPEED).quality == floor.in_force
    assert floor.weights(Weights(latency=2.0, energy=1.0, cost=1.0)).quality == 4 * (floor.in_force or 0.0)


def test_the_price_is_found_anew_every_few_decisions() -> None:
    floor, seen = QualityFloor(0.7), set()
    for number in range(1, 5 * EVERY):
        served(floor, 1, TWO)
        if number % EVERY:
            continue
        seen.add(id(floor.price))
    assert len(seen) == 4


@pytest.mark.parametrize("policy", ["random", "round-robin", "least-loaded", "fixed:cheap"])
def test_other_policies_are_left_alone_and_teach_nothing(policy: str) -> None:
    floor = QualityFloor(0.7)
    assert set(served(floor, 50, TWO, policy=policy)) <= set(TWO)
    assert (floor.price, floor.debt) == (None, 0.0)
    assert mean_quality(served(floor, 600, TWO)[100:]) == pytest.approx(0.7, abs=0.02)


def test_where_only_quality_counts_there_is_nothing_to_price() -> None:
    floor, only = QualityFloor(0.7), Weights(latency=0.0, energy=0.0, quality=1.0)
    assert set(served(floor, 50, TWO, weights=only)) == {"dear"}
    assert floor.weights(only) == only
    assert (floor.price, floor.debt) == (None, 0.0)


def test_one_model_serves_whatever_was_promised() -> None:
    alone = fleet_of(cheap=(1.0, 0.5))
    assert set(served(QualityFloor(0.7), 50, alone)) == {"cheap"}


def test_a_prediction_that_is_no_number_is_not_reckoned_with() -> None:
    floor, nan = QualityFloor(0.7), float("nan")
    broken = {"cheap": estimate("cheap", 1.0, nan), "dear": TWO["dear"]}
    served(floor, 20, broken)
    served(floor, 20, {"cheap": estimate("cheap", 1.0, nan)})
    assert abs(floor.debt) <= MOST_DEBT
    assert mean_quality(served(floor, 600, TWO)[200:]) == pytest.approx(0.7, abs=0.02)


def test_a_decisions_options_are_costs_without_quality() -> None:
    weights = Weights(latency=3.0, energy=1.0, quality=9.0, cost=0.0)
    terms = {
        "a": {"latency": 0.4, "others": 0.2, "energy": 0.8, "quality": 0.3, "luck": 9.0},
        "b": {"latency": 0.9, "energy": 0.9, "quality": 0.3},
        "c": {"latency": 1.0, "energy": 1.0, "quality": 0.0},
    }
    ranked = [
        Candidate(
            model=name,
            score=0.0,
            terms=tuple(Term(name=n, value=None, regret=r, weight=1.0) for n, r in of.items()),
        )
        for name, of in terms.items()
    ]
    found = options(ranked, fleet_of(a=(1, 0.5), b=(1, 0.5), c=(1, 0.8)), weights)
    assert found == (
        (pytest.approx((3 * 0.6 + 0.8) / 4), 0.3, 0.5),  # the latency's weight, and that of what others lose
        (1.0, 0.0, 0.8),
    )


def test_with_a_floor_the_untried_are_tried() -> None:
    cards = {name: ModelCard(name=name, description=name) for name in ("known", "untried")}
    fleet = {
        "known": estimate("known", 1.0, 0.5, sd=0.05),
        "untried": estimate("untried", 1.0, 0.45, sd=0.25),
    }
    first = {}
    for floor in (None, 0.7):
        chooser = make_policy("calm", tuning=tuning_for(floor))
        first[floor] = chooser.rank(ask(), None, snapshot(), cards, fleet, {}, SPEED)[0].model  # type: ignore[arg-type]
    assert first == {None: "known", 0.7: "untried"}
    assert tuning_for(None) == Tuning()
    assert tuning_for(0.7) == Tuning(exploration=EXPLORATION)


# --- how it is written ----------------------------------------------------------------------------


@pytest.mark.parametrize("promised", [0.0, 1.0, -0.5, 70.0, float("nan"), float("inf")])
def test_a_floor_lies_between_nothing_and_perfect(promised: float) -> None:
    for make in (QualityFloor, keeper, checked_floor):
        with pytest.raises(BadInput, match="above 0 and below 1") as caught:
            make(promised)
        assert caught.value.field == "quality_floor"


def test_no_floor_needs_no_keeper() -> None:
    assert keeper(None) is None
    assert Aim().keeper() is None
    kept = Aim(quality_floor=0.7).keeper()
    assert kept is not None
    assert kept.promised == 0.7


TWICE = Weights(latency=1.0, energy=0.0, quality=2.0, cost=0.0)


@pytest.mark.parametrize(
    ("text", "aim"),
    [
        (None, Aim("balanced")),
        ("", Aim("balanced")),
        ("energy", Aim("energy")),
        ("latency=1,quality=2", Aim(None, TWICE)),
        (" latency = 1 , quality = 2 ", Aim(None, TWICE)),
        ("quality>=0.7", Aim("balanced", None, 0.7)),
        ("quality >= .7", Aim("balanced", None, 0.7)),
        ("energy,quality>=0.7", Aim("energy", None, 0.7)),
        ("quality>=0.7,energy", Aim("energy", None, 0.7)),
        ("latency=1,quality=2,quality>=0.7", Aim(None, TWICE, 0.7)),
    ],
)
def test_an_aim_is_a_goal_weights_a_floor_or_both(text: str | None, aim: Aim) -> None:
    assert read_aim(text) == aim
    assert aim.wanted == (aim.weights or GOALS[aim.goal or "balanced"])


def test_an_aim_may_name_a_goal_of_ones_own() -> None:
    assert read_aim("night,quality>=0.6", {**GOALS, "night": SPEED}) == Aim("night", None, 0.6)


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("speed", "goal"),
        ("speed=1", "goal"),
        ("latency=fast", "goal"),
        ("latency=-1", "goal.latency"),
        ("latency=nan", "goal.latency"),
        ("latency=0", "goal"),
        ("latency>=1", "goal"),
        ("quality>0.7", "goal"),
        ("quality>=", "goal"),
        ("quality>=much", "goal"),
        ("quality>=1.2", "goal"),
        ("quality>=0", "goal"),
        ("quality>=0.7,quality>=0.8", "goal"),
        ("energy,latency", "goal"),
        ("energy,latency=1", "goal"),
        ("speed,quality>=0.7", "goal"),
    ],
)
def test_a_senseless_aim_is_refused_with_its_field(text: str, field: str) -> None:
    with pytest.raises(BadInput) as caught:
        read_aim(text)
    assert caught.value.field == field
    assert caught.value.message.startswith("goal")


@given(st.text(alphabet="qualitenrgy>=,.0123456789 -", max_size=24))
def test_any_text_is_an_aim_or_a_plain_error(text: str) -> None:
    try:
        aim = read_aim(text)
    except BadInput as error:
        field = error.field or ""
    else:
        aim.keeper()
        field = "goal"
    assert field.startswith("goal")
