"""The QoS score of the `calm` policy: how much worse than the best candidate a model is, term by term.

    score(m) = sum_t w_t * regret_t(m)            weights divided by their sum; lower is better
    regret_quality = q_best - q_m                 q = mean + exploration * sd, at most 1
                     1 for a specialist out of its field: an adapter with q_m < q_best / 2
    regret_latency = log2(L_m / L_best) / 4       at most 2; L = total seconds, risk-averse under a deadline
    regret_energy, regret_cost                    the same ratio in joules and dollars
    regret_others  = log2((L_m + D_m) / L_m) / 4  D = seconds that choosing m costs other requests

latency + others is log2((L_m + D_m) / L_best) / 4: what others lose has the latency's weight and unit. They lose
the reloads of what is evicted for m; and whoever comes while this request waits stands behind it and waits for
its load and service too, which by Little's law are (arrival rate x wait) / (requests served side by side). Without a
queue that is nothing; in overload it is what decides, where every model's own latency is the same long wait.

A specialist answers everything in the form of its own field, and quickly: "Why is the sky blue?" with "blue". Where it
promises less than half of what another model does, that is no answer, whatever it saves. Promises are means here:
optimism of a few hundredths would hide who can write a query at all where the best is right once in twenty times.

Ratios and not absolute values, because absolute seconds saturate exactly when it matters
(docs/decisions/0005-qos-score.md).
A value unknown for one model counts as the worst known one; known for none, the term is left out and the
other weights share its part (which changes no order, it only keeps scores on one scale).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import accumulate
from math import exp, inf, isfinite, log1p, log2, sqrt
from typing import NamedTuple

from calm.plan.engines import engines
from calm.plan.feasible import price_of
from calm.plan.ties import fair_order
from calm.records import (
    Ask,
    Belief,
    Candidate,
    Estimate,
    ModelCard,
    ModelState,
    Record,
    Snapshot,
    Term,
    Weights,
)

OCTAVES = 4.0
"""Doublings of latency, joules or dollars that weigh as much as the whole range of quality."""
IN_FIELD = 0.5
"""Share of the best candidate's expected quality below which a specialist is out of its field."""
STRAYED = 1.0
"""Quality regret of a specialist out of its field: that of no answer at all."""
CAP = 2.0
"""A ratio's largest regret: beyond eight doublings a model is out of the question anyway."""
FLOOR_S = 0.01
FLOOR_J = 0.01
FLOOR_USD = 1e-5
"""Below these nobody notices a difference, so a ratio between smaller values is no regret."""
REUSE_S = 60.0
"""Time constant after which an idle resident model is taken to be no longer wanted."""


_UNLOADED = ("cold", "failed")


class Tuning(Record, frozen=True, kw_only=True):
    """How the score treats uncertainty.

    exploration: optimism about quality in sd. Small, because that is the sd of one answer, noise included.
    risk: pessimism about latency in sd of its logarithm; applied only to requests with a deadline.
    """

    exploration: float = 0.1
    risk: float = 1.0


class _Column(NamedTuple):
    """One term over all candidates: values as used, None where unknown, and their regrets."""

    name: str
    weight: float
    values: Sequence[float | None]
    regrets: Sequence[float]


def score_all(
    ask: Ask,
    snapshot: Snapshot,
    cards: Mapping[str, ModelCard],
    estimates: Mapping[str, Estimate],
    weights: Weights,
    tuning: Tuning = Tuning(),  # noqa: B008 - immutable
) -> tuple[Candidate, ...]:
    """Every card once, best first, scores ascending. Terms of weight 0 and terms nobody knows are left out.

    A card without an estimate counts as the worst known one in every term. Ties: see plan.ties.
    """
    names = list(cards)
    found = [estimates.get(name) for name in names]
    columns = _columns(ask, snapshot, cards, found, weights, tuning)
    shares = shares_of([(column.name, column.weight) for column in columns])
    terms = list(zip(*map(_terms, columns, shares), strict=True)) or [()] * len(names)
    scores = _sums(columns, shares, len(names))
    return tuple(
        Candidate(model=names[i], score=scores[i], terms=terms[i])
        for i in fair_order(names, scores, snapshot, ask.request_id)
    )


def _columns(
    ask: Ask,
    snapshot: Snapshot,
    cards: Mapping[str, ModelCard],
    found: Sequence[Estimate | None],
    weights: Weights,
    tuning: Tuning,
) -> list[_Column]:
    """The terms that count, latency first and what others lose behind it."""
    columns: list[_Column | None] = []
    if weights.latency > 0:
        risk = tuning.risk if ask.wishes.deadline_s is not None else 0.0
        seconds = [None if e is None else _pessimistic(e.total_s, risk) for e in found]
        columns.append(_ratio("latency", weights.latency, seconds, FLOOR_S))
        columns.append(_others(weights.latency, seconds, others_s(snapshot, cards, found)))
    if weights.energy > 0:
        joules = [None if e is None or e.energy_j is None else _known(e.energy_j.mean) for e in found]
        columns.append(_ratio("energy", weights.energy, joules, FLOOR_J))
    if weights.quality > 0:
        qualities = [None if e is None else _optimistic(e.quality, tuning.exploration) for e in found]
        expected = [None if e is None else _optimistic(e.quality, 0.0) for e in found]
        adapters = [card.adapter_of is not None for card in cards.values()]
        columns.append(_quality(weights.quality, qualities, expected, adapters))
    if weights.cost > 0:
        dollars = [e if e is None else _dollars(e, c) for e, c in zip(found, cards.values(), strict=True)]
        columns.append(_ratio("cost", weights.cost, dollars, FLOOR_USD))
    return [column for column in columns if column is not None]


# --- one term ------------------------------------------------------------------------------------


def _ratio(name: str, weight: float, values: Sequence[float | None], floor: float) -> _Column | None:
    known = _without_none(values)
    if not known:
        return None
    best, worst = max(min(known), floor), max(known)
    filled = known if len(known) == len(values) else [worst if value is None else value for value in values]
    return _Column(name, weight, values, _octaves(filled, best))


def _without_none(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _octaves(values: Sequence[float], best: float) -> list[float]:
    """log2(value / best) / OCTAVES within 0..CAP. Written for speed: it runs for every model and term."""
    log, cap = log2, CAP * OCTAVES
    doublings = [log(value / best) if value > best else 0.0 for value in values]
    return [d / OCTAVES if d < cap else CAP for d in doublings]


def _quality(
    weight: float,
    values: Sequence[float | None],
    expected: Sequence[float | None],
    adapters: Sequence[bool],
) -> _Column | None:
    """`values`: optimistic, what is compared; `expected`: means, what a specialist has to promise."""
    known, promised = _without_none(values), _without_none(expected)
    if not known:
        return None
    best, worst = max(known), min(known)
    least, enough = min(promised), IN_FIELD * max(promised)
    regrets = [
        STRAYED
        if adapter and (least if mean is None else mean) < enough
        else best - (worst if value is None else value)
        for value, mean, adapter in zip(values, expected, adapters, strict=True)
    ]
    return _Column("quality", weight, values, regrets)


def _others(weight: float, seconds: Sequence[float | None], lost: Sequence[float] | None) -> _Column | None:
    if lost is None:
        return None
    pairs = zip(seconds, lost, strict=True)
    factors = [1.0 + d / max(s or 0.0, FLOOR_S) if d else 1.0 for s, d in pairs]
    return _Column("others", weight, lost, _octaves(factors, 1.0))


def _optimistic(quality: Belief, exploration: float) -> float | None:
    value = quality.mean + exploration * quality.sd
    if 0.0 <= value <= 1.0:
        return value
    return min(1.0, max(0.0, value)) if isfinite(value) else None


def _pessimistic(seconds: Belief, risk: float) -> float | None:
    """mean * exp(risk * s), s the sd of the logarithm of a log-normal with this mean and sd."""
    mean = seconds.mean
    if not isfinite(mean):
        return None
    if risk == 0.0 or mean <= 0.0 or not isfinite(seconds.sd):
        return mean
    return mean * exp(min(8.0, risk * sqrt(log1p((seconds.sd / mean) ** 2))))


def _known(value: float) -> float | None:
    return value if isfinite(value) else None


def _dollars(estimate: Estimate, card: ModelCard) -> float | None:
    cost_usd = price_of(estimate.cost_usd, card)
    return None if cost_usd is None else _known(cost_usd)


# --- what a choice costs others ------------------------------------------------------------------


def others_s(
    snapshot: Snapshot, cards: Mapping[str, ModelCard], found: Sequence[Estimate | None]
) -> list[float] | None:
    """Seconds that other requests are expected to lose by the choice of each card; None: nobody loses any."""
    reloads = displaced_s(snapshot, cards)
    per_s = behind_per_s(snapshot)
    delayed = [0.0 if e is None or not e.queue_s.mean else _delay_s(e, per_s) for e in found]
    if not any(delayed):
        return reloads
    return delayed if reloads is None else [d + r for d, r in zip(delayed, reloads, strict=True)]


def behind_per_s(snapshot: Snapshot) -> float:
    """Requests that come to stand behind one for each second it waits, over how many are served side by side."""
    return snapshot.arrival_rate_rps / max(1, snapshot.in_flight)


def _delay_s(estimate: Estimate, per_s: float) -> float:
    """Of whoever comes to stand behind; 0 where the prediction is no number."""
    wait_s = estimate.queue_s.mean
    delay_s = per_s * wait_s * max(estimate.total_s.mean - wait_s, 0.0)
    return delay_s if isfinite(delay_s) else 0.0


def displaced_s(snapshot: Snapshot, cards: Mapping[str, ModelCard]) -> list[float] | None:
    """Seconds of reloading that others are expected to pay if each card were loaded now; None: nobody pays.

    Victims are idle, unpinned residents, cheapest per byte first; each costs its reload time times the
    chance that it is wanted again, exp(-idle / REUSE_S).
    """
    missing = _missing_bytes(snapshot, cards)
    if not any(missing):
        return None
    victims = sorted(_victim(s, snapshot.at_s) for s in engines(snapshot) if s.residency == "ready")
    freed = list(accumulate(size for _, size, _ in victims))
    cost_s = [0.0, *accumulate(cost for _, _, cost in victims)]
    if cost_s[-1] == 0.0:
        return None
    last = len(freed)
    price_s = {
        need: cost_s[min(bisect_left(freed, need) + 1, last)] if need else 0.0 for need in set(missing)
    }
    return [price_s[need] for need in missing] if any(price_s.values()) else None


def _missing_bytes(snapshot: Snapshot, cards: Mapping[str, ModelCard]) -> list[int]:
    """What has to be freed before each card can be loaded; 0 where nothing has to."""
    free = snapshot.budget_bytes - snapshot.used_bytes
    return [
        state.footprint_bytes - free
        if state is not None and state.footprint_bytes > free and state.residency in _UNLOADED
        else 0
        for state in map(snapshot.models.get, cards)
    ]


def _victim(state: ModelState, at_s: float) -> tuple[float, int, float]:
    """Seconds lost per byte, bytes freed, seconds lost by evicting a model; one that must stay frees none."""
    if state.pinned or state.in_flight or state.waiting:
        return inf, 0, 0.0
    size = state.footprint_bytes
    if state.last_used_s is None or state.load_s is None:
        return 0.0, size, 0.0
    idle_s = at_s - state.last_used_s
    cost_s = state.load_s * exp(-idle_s / REUSE_S) if idle_s > 0 else state.load_s
    return cost_s / (size or 1), size, cost_s


# --- putting the terms together ------------------------------------------------------------------


def shares_of(weights: Sequence[tuple[str, float]]) -> list[float]:
    """The terms' weights divided by their sum; `others` has the latency's and is not counted again."""
    total = sum([weight for name, weight in weights if name != "others"]) or 1.0
    return [weight / total for _, weight in weights]


def _terms(column: _Column, share: float) -> list[Term]:
    name = column.name
    pairs = zip(column.values, column.regrets, strict=True)
    return [Term(name=name, value=value, regret=regret, weight=share) for value, regret in pairs]


def _sums(columns: Sequence[_Column], shares: Sequence[float], count: int) -> list[float]:
    scores = [0.0] * count
    for column, share in zip(columns, shares, strict=True):
        scores = [score + share * regret for score, regret in zip(scores, column.regrets, strict=True)]
    return scores
