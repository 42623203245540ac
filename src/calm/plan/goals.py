"""Named goals, so that a caller can say what matters without choosing numbers.

Read the weights as exchange rates. One doubling of latency costs w_latency / 4 and one point of quality (of
100) costs w_quality / 100, so w_latency / w_quality * 25 is how many points of quality a doubling is worth:

    goal      latency  energy  quality  cost   a doubling of ... is worth so many points of quality
    balanced    .30     .20      .50     0     latency 15, joules 10
    latency     .70     .10      .20     0     latency 88, joules 13
    energy      .10     .70      .20     0     latency 13, joules 88
    quality     .10     .05      .85     0     latency  3, joules 1.5

`quality` keeps a little of the others so that of two equally good models the quicker one answers; `latency`
and `energy` keep enough quality that a useless model is not taken for being small. Cost stands at 0 in all of
them: a fleet of small models mostly has no price; an operator who pays per token sets weights, or a caller
max_cost_usd.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from types import MappingProxyType
from typing import NamedTuple

from calm.errors import BadInput
from calm.plan.floor import QualityFloor, checked_floor, keeper
from calm.records import Weights, Wishes

FLOOR_SIGN = ">="

GOALS: Mapping[str, Weights] = MappingProxyType(
    {
        "balanced": Weights(latency=0.3, energy=0.2, quality=0.5, cost=0.0),
        "latency": Weights(latency=0.7, energy=0.1, quality=0.2, cost=0.0),
        "energy": Weights(latency=0.1, energy=0.7, quality=0.2, cost=0.0),
        "quality": Weights(latency=0.1, energy=0.05, quality=0.85, cost=0.0),
    }
)


class Aim(NamedTuple):
    """What an operator asks of the whole: a goal or weights, and perhaps a floor under quality."""

    goal: str | None = "balanced"
    weights: Weights | None = None
    quality_floor: float | None = None

    @property
    def wanted(self) -> Weights:
        return self.weights or named(self.goal or "balanced")

    def keeper(self) -> QualityFloor | None:
        """A fresh account of the floor."""
        return keeper(self.quality_floor)


def read_aim(text: str | None, goals: Mapping[str, Weights] = GOALS) -> Aim:
    """`energy`, `latency=1,quality=2`, `quality>=0.7`, or both with a comma between. Raises BadInput (field `goal`)."""
    parts = [part.strip() for part in (text or "").split(",") if part.strip()]
    floors = [part for part in parts if FLOOR_SIGN in part]
    terms = [part for part in parts if "=" in part and part not in floors]
    names = [part for part in parts if "=" not in part]
    if len(floors) > 1 or len(names) > 1 or (names and terms):
        raise BadInput(
            f'goal {text!r}: a goal\'s name, or weights like "latency=1,quality=2", and at most one '
            f'floor like "quality>=0.7"',
            field="goal",
        )
    floor = _floor(floors[0]) if floors else None
    if terms:
        return Aim(None, _weights(terms), floor)
    name = names[0] if names else "balanced"
    named(name, goals=goals)
    return Aim(name, None, floor)


def _weights(terms: Sequence[str]) -> Weights:
    stated = dict.fromkeys(Weights.__struct_fields__, 0.0)
    for term in terms:
        name, _, figure = (part.strip() for part in term.partition("="))
        if name not in stated:
            raise BadInput(f"goal: no weight {name!r}; there are {', '.join(stated)}", field="goal")
        stated[name] = _number(figure, term)
    return checked(Weights(**stated), field="goal")


def _floor(term: str) -> float:
    name, _, figure = (part.strip() for part in term.partition(FLOOR_SIGN))
    if name != "quality":
        raise BadInput(
            f'goal: "{term}": a floor is kept under quality only, as in "quality>=0.7"', field="goal"
        )
    return checked_floor(_number(figure, term), field="goal")


def _number(text: str, term: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise BadInput(f'goal: "{term}" holds no number', field="goal") from None


def resolve(
    wishes: Wishes,
    *,
    goal: str | None = "balanced",
    weights: Weights | None = None,
    goals: Mapping[str, Weights] = GOALS,
) -> tuple[str | None, Weights]:
    """The goal's name (None where weights were given outright) and the weights that count for one request.

    First that is given: the caller's weights, the caller's goal, the operator's `weights`, the operator's
    `goal`. Raises BadInput with the field's name.
    """
    if wishes.weights is not None:
        return None, checked(wishes.weights, field="calm.weights")
    if wishes.goal is not None:
        return wishes.goal, named(wishes.goal, field="calm.goal", goals=goals)
    if weights is not None:
        return None, checked(weights, field="weights")
    name = goal if goal is not None else "balanced"
    return name, named(name, field="goal", goals=goals)


def named(goal: str, *, field: str = "goal", goals: Mapping[str, Weights] = GOALS) -> Weights:
    """The weights of a goal. Raises BadInput with the choices."""
    if goal not in goals:
        raise BadInput(f"{field}: no goal {goal!r}; choose one of {', '.join(goals)}", field=field)
    return checked(goals[goal], field=field)


def checked(weights: Weights, *, field: str = "weights") -> Weights:
    """The same weights. Raises BadInput when one is negative or not finite, or none is above 0."""
    for name in weights.__struct_fields__:
        value: float = getattr(weights, name)
        if not isfinite(value) or value < 0:
            raise BadInput(
                f"{field}.{name} must be a number of at least 0, not {value}", field=f"{field}.{name}"
            )
    if not any(getattr(weights, name) for name in weights.__struct_fields__):
        raise BadInput(f"{field}: at least one weight must be above 0", field=field)
    return weights
