"""A floor under quality, held at the least latency and energy: the weight of quality as the price of a promise.

An operator knows what quality was promised, not what weight buys it. So the weight is found: of the last WINDOW
decisions it is remembered what every candidate would have cost in latency and energy and what quality it
promised, and the price is the least at which those decisions, made again, keep the promise on average. That
is the Lagrange multiplier of "least cost subject to mean quality", solved on what is actually being asked
(after constrained routing such as MESS+, Woisetschlaeger et al. 2025, but without a controller that has to be
tuned or can swing).

Few models make few steps, so no single price need hit the promise. Then two neighbouring prices are used in
turns, the dearer one while the account of promised and expected quality is in debt.

It reckons with predicted quality, which ratings correct, and not with the ratings themselves: those come when the
answer has been waited for, and a controller that sees its effect minutes later swings.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from math import inf
from typing import NamedTuple

from msgspec.structs import replace

from calm.errors import BadInput
from calm.plan.score import Tuning
from calm.records import Candidate, Estimate, Weights

WINDOW = 128
"""Decisions that the price is found on."""
EVERY = 8
"""Decisions after which it is found anew."""
LEAST_SEEN = 8
MOST_PRICE = 64.0
"""Of quality, in multiples of the other weights' sum: beyond it nothing else counts."""
STEPS = 24
"""Halvings of the price's interval: to one in sixteen million of MOST_PRICE."""
MOST_DEBT = 4.0
"""Answers: an old debt is not paid back by overdoing it later."""

EXPLORATION = 1.0
"""Of a policy that keeps a floor, in sd of the mean quality: least cost needs to know what everybody can do."""

Options = tuple[tuple[float, float, float], ...]
"""Of one decision, for every candidate: cost in weighted regrets, quality regret as scored, quality expected."""


class Price(NamedTuple):
    """Two neighbouring prices with the mean quality each would have brought."""

    low: float
    high: float


class QualityFloor:
    """Keeps the window and the account. `promised` is 0..1; raises BadInput (field `quality_floor`) otherwise."""

    def __init__(self, promised: float) -> None:
        if not 0.0 < promised < 1.0:
            raise BadInput(
                f"quality_floor must be above 0 and below 1, not {promised:g}", field="quality_floor"
            )
        self.promised = promised
        self.debt = 0.0
        """Promised less expected quality, summed over decisions, within MOST_DEBT either way."""
        self.price: Price | None = None
        """None until enough was decided: the operator's own weight counts till then."""
        self._seen: deque[Options] = deque(maxlen=WINDOW)
        self._since = 0

    def weights(self, weights: Weights) -> Weights:
        """The operator's weights with the price in place of the quality's."""
        others = weights.latency + weights.energy + weights.cost
        if self.price is None or others <= 0.0:
            return weights
        return replace(weights, quality=others * (self.price.high if self.debt > 0 else self.price.low))

    def decided(
        self, ranked: Sequence[Candidate], estimates: Mapping[str, Estimate], weights: Weights
    ) -> None:
        """A request went to the first of `ranked`, which was ranked by `weights`."""
        expected = estimates[ranked[0].model].quality.mean
        self.debt = min(MOST_DEBT, max(-MOST_DEBT, self.debt + self.promised - expected))
        self._seen.append(options(ranked, estimates, weights))
        self._since += 1
        if self._since >= EVERY and len(self._seen) >= LEAST_SEEN:
            self._since = 0
            self.price = fair_price(self._seen, self.promised)


def options(ranked: Sequence[Candidate], estimates: Mapping[str, Estimate], weights: Weights) -> Options:
    """What a decision was between, with the weights other than quality's scaled to sum 1."""
    of = {
        "latency": weights.latency,
        "others": weights.latency,
        "energy": weights.energy,
        "cost": weights.cost,
    }
    total = (weights.latency + weights.energy + weights.cost) or 1.0
    found = []
    for candidate in ranked:
        cost = sum(of.get(term.name, 0.0) * term.regret for term in candidate.terms) / total
        lost = next((term.regret for term in candidate.terms if term.name == "quality"), 0.0)
        found.append((cost, lost, estimates[candidate.model].quality.mean))
    return tuple(found)


def fair_price(seen: Sequence[Options] | deque[Options], promised: float) -> Price:
    """The prices just below and at which the decisions bring `promised` on average; the most where none does."""
    low, high = 0.0, MOST_PRICE
    if quality_at(seen, high) < promised:
        return Price(high, high)
    for _ in range(STEPS):
        middle = (low + high) / 2
        if quality_at(seen, middle) < promised:
            low = middle
        else:
            high = middle
    return Price(low, high)


def quality_at(seen: Sequence[Options] | deque[Options], price: float) -> float:
    """Mean expected quality of the decisions, had quality had this price."""
    total = 0.0
    for candidates in seen:
        best, quality = inf, 0.0
        for cost, lost, expected in candidates:
            score = cost + price * lost
            if score < best:
                best, quality = score, expected
        total += quality
    return total / len(seen)


def tuning_for(floor: float | None) -> Tuning:
    """How the score treats uncertainty, with a floor and without."""
    return Tuning() if floor is None else Tuning(exploration=EXPLORATION)
