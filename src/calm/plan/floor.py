"""A floor under quality, held at the least latency and energy: the weight of quality as the price of a promise.

An operator knows what quality was promised, not what weight buys it. So the weight is found: of the last WINDOW
decisions it is remembered what every candidate would have cost in latency and energy and what quality it
promised, and the price is the least at which those decisions, made again, keep the promise on average. That
is the Lagrange multiplier of "least cost subject to mean quality", solved on what is actually being asked
(after constrained routing such as MESS+, Woisetschlaeger et al. 2025, but without a controller that has to be
tuned or can swing).

Few models make few steps, so no single price need hit the promise; and predictions move on while the window
looks back. So a little more and a little less than the price are charged in turns, more while the account of
promised and expected quality is in debt.

It reckons with predicted quality, which ratings correct, and not with the ratings themselves: those come when the
answer has been waited for, and a controller that sees its effect minutes later swings.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import inf, isfinite
from operator import itemgetter
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
LEAST_PRICE = 1e-6
"""Decides nothing but between equals; at 0 the score would leave quality out and nothing could be learned of it."""
STEPS = 24
"""Halvings of the price's interval: to one in sixteen million of MOST_PRICE."""
MARGIN = 0.1
"""Of the price, to either side. At 0 predictions that drift, if only by a ten-thousandth a request, stay on one
side of both prices, and the promise is broken for as long as they drift."""
MOST_DEBT = 4.0
"""Answers: an old debt is not paid back by overdoing it later."""

EXPLORATION = 1.0
"""Of a policy that keeps a floor, in sd of the mean quality: least cost needs to know what everybody can do."""

Options = tuple[tuple[float, float, float], ...]
"""Of one decision, cheapest first: cost in weighted regrets, quality regret as scored, quality expected."""


class Price(NamedTuple):
    """Two neighbouring prices with the mean quality each would have brought."""

    low: float
    high: float


class QualityFloor:
    """Keeps the window and the account. Raises BadInput (field `quality_floor`) as `checked_floor` does."""

    def __init__(self, promised: float) -> None:
        self.promised = checked_floor(promised)
        self.debt = 0.0
        """Promised less expected quality, summed over decisions, within MOST_DEBT either way."""
        self.price: Price | None = None
        """None until enough was decided: the operator's own weight counts till then."""
        self._seen: deque[Options] = deque(maxlen=WINDOW)
        self._since = 0

    @property
    def in_force(self) -> float | None:
        """What quality costs now, in multiples of the other weights' sum. None: not found yet."""
        if self.price is None:
            return None
        if self.debt > 0:
            return min(MOST_PRICE, self.price.high * (1 + MARGIN))
        return self.price.low * (1 - MARGIN) if self.price.low < MOST_PRICE else MOST_PRICE

    def weights(self, weights: Weights) -> Weights:
        """The operator's weights with the price in place of the quality's; as they are where only quality counts."""
        others, price = others_sum(weights), self.in_force
        if others <= 0.0:
            return weights
        quality = weights.quality if price is None else others * price
        return replace(weights, quality=max(quality, others * LEAST_PRICE))

    def decided(
        self, ranked: Sequence[Candidate], estimates: Mapping[str, Estimate], weights: Weights
    ) -> None:
        """A request went to the first of `ranked`, which was ranked by `weights`.

        Nothing is learned where no price could have changed the choice: by a policy without a term for quality,
        or where nothing but quality counts.
        """
        expected = estimates[ranked[0].model].quality.mean
        if not (isfinite(expected) and others_sum(weights) > 0.0 and weighs_quality(ranked[0])):
            return
        self.debt = min(MOST_DEBT, max(-MOST_DEBT, self.debt + self.promised - expected))
        self._seen.append(options(ranked, estimates, weights))
        self._since += 1
        if self._since >= EVERY and len(self._seen) >= LEAST_SEEN:
            self._since = 0
            self.price = fair_price(self._seen, self.promised)


def options(ranked: Sequence[Candidate], estimates: Mapping[str, Estimate], weights: Weights) -> Options:
    """What a decision was between, with the weights other than quality's scaled to sum 1.

    Only candidates that some price could choose: who costs more and loses as much quality is left out.
    """
    of = {
        "latency": weights.latency,
        "others": weights.latency,
        "energy": weights.energy,
        "cost": weights.cost,
    }
    total = others_sum(weights) or 1.0
    found = []
    for candidate in ranked:
        expected = estimates[candidate.model].quality.mean
        if not isfinite(expected):
            continue
        cost = sum(of.get(term.name, 0.0) * term.regret for term in candidate.terms) / total
        lost = next((term.regret for term in candidate.terms if term.name == "quality"), 0.0)
        found.append((cost, lost, expected))
    return tuple(undominated(found))


def undominated(found: Iterable[tuple[float, float, float]]) -> Iterator[tuple[float, float, float]]:
    least = inf
    for option in sorted(found, key=itemgetter(0, 1)):
        if option[1] < least:
            least = option[1]
            yield option


def others_sum(weights: Weights) -> float:
    """What quality is weighed against."""
    return weights.latency + weights.energy + weights.cost


def weighs_quality(candidate: Candidate) -> bool:
    return any(term.name == "quality" for term in candidate.terms)


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


def checked_floor(promised: float, *, field: str = "quality_floor") -> float:
    """The same figure. Raises BadInput unless it is above 0 and below 1."""
    if not 0.0 < promised < 1.0:
        raise BadInput(
            f"{field}: a floor under quality must be above 0 and below 1, not {promised:g}", field=field
        )
    return promised


def keeper(promised: float | None) -> QualityFloor | None:
    """A fresh account of a floor, None for none. Raises BadInput (field `quality_floor`)."""
    return None if promised is None else QualityFloor(promised)


def tuning_for(floor: float | None) -> Tuning:
    """How the score treats uncertainty, with a floor and without."""
    return Tuning() if floor is None else Tuning(exploration=EXPLORATION)
