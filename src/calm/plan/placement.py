"""What is worth keeping in memory: from arrival rates and reload times to a list of models and their values.

The value of having a model resident is the waiting it saves, rate x reload time (seconds saved per second);
memory is what it costs. So the budget is a knapsack, filled greedily by value per byte, which is within one
model of the optimum (Dantzig 1957). Pure: the executor disposes.

Models that nobody asked for yet count with PRIOR_RATE_RPS times their prior quality, so that an idle start
warms useful, small models first; but such a guess only fills free memory, it never displaces a resident.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from calm.plan.engines import families
from calm.records import Forecast, ModelCard, ModelState, PlacementPlan, Snapshot

HYSTERESIS = 1.5
"""A newcomer displaces a resident only when it is worth this many times more per byte: a swap costs both."""
MIN_RATE_RPS = 1e-4
"""About one request in three hours; below it a model counts as not asked for."""
PRIOR_RATE_RPS = 1e-5
"""Rate of a model without history and of prior quality 1; below MIN_RATE_RPS, so real demand outweighs it."""
PRIOR_QUALITY = 0.5
LOAD_BASE_S = 0.3
LOAD_BYTES_PER_S = 5e8
"""Reload time where neither a load was seen nor a prior given: a process start, then reading from disk."""


def forecast(
    previous: Forecast | None,
    observed_rps: Mapping[str, float],
    elapsed_s: float,
    *,
    horizon_s: float = 60.0,
) -> Forecast:
    """Expected rates over the next `horizon_s`, from the rates observed over the last `elapsed_s`.

    An exponentially weighted mean over time with the horizon as its half-life: what was seen a horizon ago
    counts half. A model seen for the first time starts at its observed rate. Models that faded are dropped.
    """
    keep = 0.5 ** (max(elapsed_s, 0.0) / max(horizon_s, 1e-9))
    before = previous.rate_rps if previous is not None else {}
    rates = {
        model: _blend(before.get(model), max(0.0, observed_rps.get(model, 0.0)), keep)
        for model in sorted(before.keys() | observed_rps.keys())
    }
    return Forecast(
        horizon_s=horizon_s, rate_rps={model: rate for model, rate in rates.items() if rate >= MIN_RATE_RPS}
    )


def propose(
    cards: Mapping[str, ModelCard],
    snapshot: Snapshot,
    rates_rps: Mapping[str, float],
    load_s: Mapping[str, float] | None = None,
) -> PlacementPlan:
    """The set of models that should be resident, best first, and the value of each that can be.

    `preload` holds residents that should stay and newcomers to warm; their footprints sum to at most the
    budget. `value` is seconds of waiting saved per second and byte: higher is kept longer. Remote, failed and
    oversized models, and those of unknown size, are in neither. Equal input gives an equal plan, and a fleet
    that already is as planned is left as it is. A plan names engines: an adapter is in memory with its base, and
    what is asked of it speaks for keeping the base.
    """
    found = families(cards).values()
    worths = [w for family in found if (w := _worth(family, snapshot, rates_rps, load_s or {}))]
    worths.sort(key=lambda w: (w.tier, -w.density, w.model))
    return PlacementPlan(
        revision=snapshot.revision,
        preload=_fill(worths, snapshot.budget_bytes),
        value={w.model: w.value for w in worths},
    )


def one_at_a_time(plan: PlacementPlan, snapshot: Snapshot) -> PlacementPlan:
    """The same plan with at most one newcomer, and none while any model is loading.

    Loads that nobody waits for yet must not compete with one another, or with one that somebody waits for,
    for the cores. The next newcomer's turn comes with the next plan.
    """

    def residency(model: str) -> str:
        state = snapshot.models.get(model)
        return state.residency if state is not None else "cold"

    loading = any(state.residency == "loading" for state in snapshot.models.values())
    newcomers = [model for model in plan.preload if residency(model) in ("cold", "failed")]
    later = newcomers if loading else newcomers[1:]
    kept = tuple(model for model in plan.preload if model not in later)
    return PlacementPlan(revision=plan.revision, preload=kept, value=plan.value)


class _Worth(NamedTuple):
    """One model in the knapsack."""

    model: str
    size_bytes: int
    value: float
    density: float
    tier: int
    """0: must stay (pinned or serving); 1: resident or wanted; 2: neither, fills what is free."""


def _worth(
    family: Sequence[ModelCard],
    snapshot: Snapshot,
    rates_rps: Mapping[str, float],
    load_s: Mapping[str, float],
) -> _Worth | None:
    card = family[0]
    state = snapshot.models.get(card.name)
    size = _size_bytes(family, state)
    if (
        card.remote
        or size is None
        or size > snapshot.budget_bytes
        or (state and _failed(state, snapshot.at_s))
    ):
        return None
    rate = sum(max(0.0, rates_rps.get(member.name, 0.0)) for member in family)
    prior = PRIOR_RATE_RPS * max(map(_prior_quality, family))
    saved = (rate + prior) * _reload_s(card, state, size, load_s)
    value = saved / size
    resident = state is not None and state.residency in ("ready", "loading")
    return _Worth(
        model=card.name,
        size_bytes=size,
        value=value,
        density=value * HYSTERESIS if resident else value,
        tier=_tier(state, resident, rate),
    )


def _tier(state: ModelState | None, resident: bool, rate: float) -> int:
    if state is not None and resident and (state.pinned or state.in_flight or state.waiting):
        return 0
    if state is not None and state.pinned:
        return 0
    return 1 if resident or rate >= MIN_RATE_RPS else 2


def _fill(worths: list[_Worth], budget_bytes: int) -> tuple[str, ...]:
    left = budget_bytes
    chosen: list[str] = []
    for worth in worths:
        if worth.size_bytes <= left:
            left -= worth.size_bytes
            chosen.append(worth.model)
    return tuple(chosen)


def _size_bytes(family: Sequence[ModelCard], state: ModelState | None) -> int | None:
    """Bytes to plan with, None where nothing is known: what may not fit is not warmed."""
    if state is not None and state.footprint_bytes > 0:
        return state.footprint_bytes
    base, *adapters = map(_stated_bytes, family)
    return base and base + sum(adapter or 0 for adapter in adapters)


def _stated_bytes(card: ModelCard) -> int | None:
    weights = card.source.bytes if card.source is not None else None
    return card.memory_hint_bytes or weights or None


def _reload_s(card: ModelCard, state: ModelState | None, size: int, load_s: Mapping[str, float]) -> float:
    """Estimated, else last seen, else the card's prior, else from the size."""
    seen = state.load_s if state is not None else None
    for known in (load_s.get(card.name), seen, card.priors.load_s):
        if known is not None and known > 0:
            return known
    return LOAD_BASE_S + size / LOAD_BYTES_PER_S


def _prior_quality(card: ModelCard) -> float:
    stated = card.priors.quality
    return max(stated.values(), default=PRIOR_QUALITY)


def _failed(state: ModelState, at_s: float) -> bool:
    if state.residency == "failed":
        return state.retry_at_s is None or state.retry_at_s > at_s
    return state.retry_at_s is not None and state.retry_at_s > at_s


def _blend(before: float | None, now: float, keep: float) -> float:
    return now if before is None else keep * before + (1.0 - keep) * now
