"""Of a large fleet, the models worth ranking: the calm score over columns, before any record is made.

Ranking costs a record for each prediction, term and candidate; over a thousand models that is most of a
decision, and all but the best few are thrown away. So the same formula as `plan.score` is first computed for the
whole fleet at once, and only its best go on to be ranked. The result is that of ranking everybody, because

    1  the two ways to compute a score differ by rounding alone, far less than MARGIN, and every model within
       MARGIN of the last place is taken along: so the best `most` are, with all that are equal to them, whose
       order `plan.ties` then draws from the same lot;
    2  the models that regrets are measured against (the best of each term, and the worst, which unknown values
       count as) are taken along too, so `plan.score` gives each model the score it has in the whole fleet.

Other policies rank everybody: whether a policy can do with fewer is its own to say (`Shortlisting`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import compress
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from calm.plan.columns import Array, Columns, columns_of
from calm.plan.feasible import price_of
from calm.plan.score import (
    CAP,
    FLOOR_J,
    FLOOR_S,
    FLOOR_USD,
    IN_FIELD,
    OCTAVES,
    STRAYED,
    Tuning,
    behind_per_s,
    displaced_s,
    shares_of,
)
from calm.ports import Policy
from calm.records import Ask, Estimate, ModelCard, Snapshot, Weights

MARGIN = 1e-9
"""Scores nearer than this may change places by rounding."""


@runtime_checkable
class Shortlisting(Protocol):
    """What a policy offers, beside ports.Policy, that need not see every model of a large fleet."""

    def shortlist(
        self,
        ask: Ask,
        snapshot: Snapshot,
        cards: Mapping[str, ModelCard],
        columns: Columns,
        weights: Weights,
        most: int,
    ) -> Sequence[str]:
        """Names enough for `rank` to put the same models in the same order on its first `most` places."""
        ...


def finalists(
    policy: Policy,
    ask: Ask,
    snapshot: Snapshot,
    cards: Mapping[str, ModelCard],
    estimates: Mapping[str, Estimate],
    weights: Weights,
    most: int,
) -> tuple[Mapping[str, ModelCard], Mapping[str, Estimate]]:
    """The cards that `policy` has to rank for its first `most` places to be right, with their estimates.

    All of them where the policy cannot tell, and where there are no more than twice as many as places.
    """
    columns = columns_of(estimates) if len(cards) > 2 * most else None
    if columns is None or not isinstance(policy, Shortlisting):
        return cards, estimates
    names = policy.shortlist(ask, snapshot, cards, columns, weights, most)
    return {name: cards[name] for name in names}, {name: estimates[name] for name in names}


class _Part(NamedTuple):
    """One term over all models: the values compared, NaN where unknown, and their regrets."""

    name: str
    weight: float
    values: Array
    regrets: Array
    beside: Array | None = None
    """Further values that regrets are measured against."""


def best_scored(
    ask: Ask,
    snapshot: Snapshot,
    cards: Mapping[str, ModelCard],
    columns: Columns,
    weights: Weights,
    tuning: Tuning,
    most: int,
) -> list[str]:
    """Names that `score_all` puts on the first `most` places, and those it measures them against.

    `cards` has the order of the columns, and so has the result.
    """
    parts = [part for part in _parts(ask, snapshot, cards, columns, weights, tuning) if part is not None]
    scores = np.zeros(len(cards))
    for part, share in zip(parts, shares_of([(part.name, part.weight) for part in parts]), strict=True):
        scores += share * part.regrets
    last = float(np.partition(scores, most - 1)[most - 1])
    chosen = scores <= last + MARGIN * (1.0 + last)
    for values in [column for part in parts for column in (part.values, part.beside) if column is not None]:
        chosen[[np.nanargmin(values), np.nanargmax(values)]] = True
    return list(compress(cards, chosen.tolist()))


def _parts(
    ask: Ask,
    snapshot: Snapshot,
    cards: Mapping[str, ModelCard],
    columns: Columns,
    weights: Weights,
    tuning: Tuning,
) -> Iterator[_Part | None]:
    """The terms of `plan.score`, in its order; None for one that nobody knows."""
    if weights.latency > 0:
        seconds = _pessimistic(columns, tuning.risk if ask.wishes.deadline_s is not None else 0.0)
        yield _ratio("latency", weights.latency, seconds, FLOOR_S)
        yield _others(weights.latency, seconds, _others_s(snapshot, cards, columns))
    if weights.energy > 0:
        yield _ratio("energy", weights.energy, _finite(columns.energy_j), FLOOR_J)
    if weights.quality > 0:
        qualities = _finite(columns.quality + tuning.exploration * columns.quality_sd)
        adapters = np.array([card.adapter_of is not None for card in cards.values()])
        yield _quality(weights.quality, qualities, _finite(columns.quality), adapters)
    if weights.cost > 0:
        yield _ratio("cost", weights.cost, _dollars(columns, cards), FLOOR_USD)


def _ratio(name: str, weight: float, values: Array, floor: float) -> _Part | None:
    known = values[~np.isnan(values)]
    if not len(known):
        return None
    filled = np.where(np.isnan(values), known.max(), values)
    return _Part(name, weight, values, _octaves(filled, max(known.min(), floor)))


def _octaves(values: Array, best: float) -> Array:
    return np.minimum(np.log2(np.maximum(values, best) / best) / OCTAVES, CAP)


def _others_s(snapshot: Snapshot, cards: Mapping[str, ModelCard], columns: Columns) -> Array | None:
    reloads, wait_s = displaced_s(snapshot, cards), columns.queue_s
    if not wait_s.any():
        return None if reloads is None else np.asarray(reloads, np.float64)
    known = np.where(np.isfinite(columns.total_s), columns.total_s, 0.0)
    delayed: Array = behind_per_s(snapshot) * wait_s * np.maximum(known - wait_s, 0.0)
    return delayed if reloads is None else delayed + np.asarray(reloads, np.float64)


def _others(weight: float, seconds: Array, lost_s: Array | None) -> _Part | None:
    if lost_s is None:
        return None
    return _Part("others", weight, lost_s, _octaves(1.0 + lost_s / np.fmax(seconds, FLOOR_S), 1.0))


def _quality(weight: float, values: Array, expected: Array, adapters: NDArray[np.bool_]) -> _Part | None:
    values, expected = (np.minimum(np.maximum(column, 0.0), 1.0) for column in (values, expected))
    if np.isnan(values).all():
        return None
    strayed = adapters & (_filled(expected) < IN_FIELD * np.nanmax(expected))
    regrets = np.where(strayed, STRAYED, np.nanmax(values) - _filled(values))
    return _Part("quality", weight, values, regrets, beside=expected)


def _filled(values: Array) -> Array:
    """Unknown ones as the worst known one."""
    return np.where(np.isnan(values), np.nanmin(values), values)


def _pessimistic(columns: Columns, risk: float) -> Array:
    """As in `plan.score`: no spread is added to what has none that is known."""
    mean, sd = _finite(columns.total_s), columns.total_sd_s
    if risk == 0.0:
        return mean
    spread = np.divide(sd, mean, out=np.zeros(len(mean)), where=(mean > 0.0) & np.isfinite(sd))
    widening: Array = np.exp(np.minimum(8.0, risk * np.sqrt(np.log1p(spread * spread))))
    return mean * widening


def _dollars(columns: Columns, cards: Mapping[str, ModelCard]) -> Array:
    found, listed = _finite(columns.cost_usd), list(cards.values())
    for place in np.flatnonzero(np.isnan(columns.cost_usd)).tolist():
        if price_of(None, listed[place]) is not None:
            found[place] = 0.0
    return found


def _finite(values: Array) -> Array:
    """What is not finite is unknown."""
    return np.where(np.isfinite(values), values, np.nan)
