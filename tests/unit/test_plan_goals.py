"""Named goals and weights: which of the four sources counts, and what is refused."""

from __future__ import annotations

import pytest

from calm.errors import BadInput
from calm.plan.goals import GOALS, checked, named, resolve
from calm.records import Weights, Wishes

MINE = Weights(latency=1.0, energy=0.0, quality=0.0, cost=0.0)


def test_without_any_wish_the_balanced_goal_counts() -> None:
    assert resolve(Wishes()) == ("balanced", GOALS["balanced"])
    assert resolve(Wishes(), goal=None) == ("balanced", GOALS["balanced"])


def test_balanced_is_the_default_of_weights() -> None:
    assert GOALS["balanced"] == Weights()


@pytest.mark.parametrize("goal", ["latency", "energy", "quality"])
def test_each_goal_weighs_its_own_metric_most(goal: str) -> None:
    weights = GOALS[goal]
    assert max(weights.__struct_fields__, key=lambda name: float(getattr(weights, name))) == goal
    assert sum(getattr(weights, name) for name in weights.__struct_fields__) == pytest.approx(1.0)


def test_precedence_from_the_nearest_to_the_farthest() -> None:
    operators = Weights(latency=0.0, energy=1.0, quality=0.0)
    assert resolve(Wishes(weights=MINE, goal="energy"), goal="quality", weights=operators) == (None, MINE)
    assert resolve(Wishes(goal="energy"), goal="quality", weights=operators)[0] == "energy"
    assert resolve(Wishes(), goal="quality", weights=operators) == (None, operators)
    assert resolve(Wishes(), goal="quality") == ("quality", GOALS["quality"])


def test_an_operator_may_name_goals_of_its_own() -> None:
    assert resolve(Wishes(goal="night"), goals={**GOALS, "night": MINE}) == ("night", MINE)


def test_an_unknown_goal_is_refused_with_the_choices() -> None:
    with pytest.raises(
        BadInput, match="no goal 'cheap'; choose one of balanced, latency, energy, quality"
    ) as e:
        resolve(Wishes(goal="cheap"))
    assert e.value.field == "calm.goal"
    with pytest.raises(BadInput) as e:
        named("cheap")
    assert e.value.field == "goal"


@pytest.mark.parametrize("bad", [-0.1, float("nan"), float("inf")])
def test_a_weight_that_is_no_weight_is_refused_with_its_field(bad: float) -> None:
    with pytest.raises(BadInput, match="at least 0") as e:
        resolve(Wishes(weights=Weights(energy=bad)))
    assert e.value.field == "calm.weights.energy"


def test_all_zero_weights_say_nothing() -> None:
    with pytest.raises(BadInput, match="at least one weight must be above 0") as e:
        checked(Weights(latency=0, energy=0, quality=0, cost=0))
    assert e.value.field == "weights"
