"""One fair order for candidates whose scores are equal, so that no model wins by its name or its place.

Fewest requests in flight first; what is still equal is shuffled by the request's id: every model of the tie
gets its share over many requests, and the same request always gets the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from random import Random

from calm.records import ModelState, Snapshot


def fair_order(
    names: Sequence[str], scores: Sequence[float], snapshot: Snapshot, request_id: str
) -> list[int]:
    """Indices of `names`, lowest score first. Deterministic; independent of the order of `names`."""
    order = sorted(range(len(names)), key=scores.__getitem__)
    if len(set(scores)) == len(scores):
        return order
    shuffler: Random | None = None
    fair: list[int] = []
    for _, tied in groupby(order, key=scores.__getitem__):
        group = list(tied)
        if len(group) > 1:
            shuffler = shuffler or Random(request_id)
            group = _settled(group, names, snapshot, shuffler)
        fair += group
    return fair


def load(state: ModelState | None) -> int:
    """Requests at a model, sent or waiting."""
    return state.in_flight + state.waiting if state is not None else 0


def _settled(tied: list[int], names: Sequence[str], snapshot: Snapshot, shuffler: Random) -> list[int]:
    """The fewest requests in flight first, equals of that too in the request's own order."""
    tied.sort(key=names.__getitem__)
    shuffler.shuffle(tied)
    return sorted(tied, key=lambda i: load(snapshot.models.get(names[i])))
