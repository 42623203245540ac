"""One fair order for candidates whose scores are equal, so that no model wins by its name or its place.

Fewest requests in flight first; what is still equal is shuffled by the request's id: every model of the tie
gets its share over many requests, and the same request always gets the same order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
    states = snapshot.models
    keys = [(score, load(states.get(name))) for name, score in zip(names, scores, strict=True)]
    order.sort(key=keys.__getitem__)
    shuffler = Random(request_id)
    return [i for _, tied in groupby(order, key=keys.__getitem__) for i in _shuffled(tied, names, shuffler)]


def load(state: ModelState | None) -> int:
    """Requests at a model, sent or waiting."""
    return state.in_flight + state.waiting if state is not None else 0


def _shuffled(tied: Iterable[int], names: Sequence[str], shuffler: Random) -> list[int]:
    group = sorted(tied, key=names.__getitem__)
    if len(group) > 1:
        shuffler.shuffle(group)
    return group
