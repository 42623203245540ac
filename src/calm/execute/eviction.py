"""Which model leaves memory first: eviction policies as pure functions, and the choice of victims.

calm      ours: lowest (expected reuse rate x reload cost) per byte, as the planner forecasts it;
          while there is no plan recency stands in for the rate
          (after GreedyDual-Size, Cao and Irani, USITS 1997)
lru       least recently used, the CALM paper's cache (arXiv 2602.03632)
lfu       least frequently used since it was loaded, the oldest use breaks ties
fifo      longest in memory
NAME:K    the same, and at most K models resident: the paper's cap, in addition to the byte budget

`calm` also gives turns: while a waiter needs memory that busy models hold, each of them goes on serving its own
waiters for TURN_SHARE of the time that waiter has waited, so that a long queue is served in batches by model. With
the others the head of the queue gets its way at once, and under overload every few requests pay a load.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from calm.errors import BadInput

Rank = tuple[float, float]

TURN_SHARE = 0.2
"""Of the wait so far: nobody waits more than so much longer per model before him, however long the queue is."""


class Standing(msgspec.Struct, frozen=True, kw_only=True):
    """What an eviction policy may know of one resident model."""

    model: str
    footprint_bytes: int
    loaded_at_s: float
    last_used_s: float
    uses: int
    """Grants since it was loaded."""
    load_s: float | None
    value: float | None
    """PlacementPlan.value: what keeping it saves, per byte; None while there is no plan."""


class EvictionPolicy(Protocol):
    @property
    def name(self) -> str:
        """The spec it was parsed from."""
        ...

    @property
    def max_resident(self) -> int | None:
        """At most so many local models in memory; None: only bytes count."""
        ...

    @property
    def turn_share(self) -> float:
        """How much longer a busy model keeps its place, as a share of the wait of whoever needs it."""
        ...

    def keep(self, standing: Standing, at_s: float) -> Rank:
        """How much keeping this model is worth; the lowest goes first."""
        ...


class RankedEviction:
    """An eviction policy that ranks by one function."""

    def __init__(self, rule: str, keep: Callable[[Standing, float], Rank], max_resident: int | None) -> None:
        self.name = rule if max_resident is None else f"{rule}:{max_resident}"
        self.max_resident = max_resident
        self.turn_share = TURN_SHARE if rule == "calm" else 0.0
        self._keep = keep

    def keep(self, standing: Standing, at_s: float) -> Rank:
        return self._keep(standing, at_s)

    def __repr__(self) -> str:
        return f"RankedEviction({self.name!r})"


def keep_calm(standing: Standing, at_s: float) -> Rank:
    """Waiting saved per byte kept. Without a plan the age of the last use stands for the reuse rate."""
    if standing.value is not None:
        return standing.value, standing.last_used_s
    reload_s = standing.load_s if standing.load_s is not None else 1.0
    age_s = max(at_s - standing.last_used_s, 0.0)
    return reload_s / (age_s + 1.0) / max(standing.footprint_bytes, 1), standing.last_used_s


def keep_lru(standing: Standing, at_s: float) -> Rank:
    return standing.last_used_s, standing.loaded_at_s


def keep_lfu(standing: Standing, at_s: float) -> Rank:
    return float(standing.uses), standing.last_used_s


def keep_fifo(standing: Standing, at_s: float) -> Rank:
    return standing.loaded_at_s, standing.last_used_s


RULES: dict[str, Callable[[Standing, float], Rank]] = {
    "calm": keep_calm,
    "lru": keep_lru,
    "lfu": keep_lfu,
    "fifo": keep_fifo,
}


def parse_eviction(spec: str) -> EvictionPolicy:
    """`calm`, `lru`, `lfu`, `fifo`, each optionally with `:K`. Raises BadInput with what is allowed."""
    rule, colon, count = spec.strip().lower().partition(":")
    if rule not in RULES:
        raise BadInput(
            f"eviction {spec!r} is not known; use one of {', '.join(RULES)}; lru:3 keeps at most 3 models",
            field="eviction",
        )
    if not colon:
        return RankedEviction(rule, RULES[rule], None)
    if not count.isascii() or not count.isdigit() or int(count) < 1:
        raise BadInput(
            f"eviction {spec!r}: after the colon stands how many models may be resident, 1 or more",
            field="eviction",
        )
    return RankedEviction(rule, RULES[rule], int(count))


def choose_victims(
    policy: EvictionPolicy,
    standings: Sequence[Standing],
    at_s: float,
    *,
    short_bytes: int,
    short_count: int = 0,
    first: frozenset[str] = frozenset(),
) -> tuple[str, ...] | None:
    """The models to evict so that `short_bytes` and `short_count` places come free; None if all are too few.

    Taken in the policy's order (`first` before all others), then every one that turned out unnecessary
    is kept, the most worth keeping first: no proper subset of the answer would do.
    """
    ordered = sorted(standings, key=lambda s: (s.model not in first, policy.keep(s, at_s), s.model))
    taken: list[Standing] = []
    for standing in ordered:
        if _enough(taken, short_bytes, short_count):
            break
        taken.append(standing)
    if not _enough(taken, short_bytes, short_count):
        return None
    for standing in reversed(tuple(taken)):
        without = [other for other in taken if other is not standing]
        if _enough(without, short_bytes, short_count):
            taken = without
    return tuple(standing.model for standing in taken)


def _enough(taken: Sequence[Standing], short_bytes: int, short_count: int) -> bool:
    return len(taken) >= short_count and sum(s.footprint_bytes for s in taken) >= short_bytes
