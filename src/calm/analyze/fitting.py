"""How a field is learned: logistic regression of "is it one of ours?" on their sense, ours against a stock.

The stock is elsewhere.jsonl: everyday questions of many kinds, written for this. Both sides count the same, however
many rows each has, and the ridge is strong enough that a few dozen questions do. Newton's method: a fit of thousands of
rows takes well under a second.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib.resources import files

import msgspec
import numpy as np
from numpy.typing import NDArray

from calm.analyze.domains import DESCRIPTORS
from calm.analyze.fields import Line
from calm.records import Record, Vector

RIDGE = 1e-4
"""Weight of |w|^2 beside the mean loss."""
STEPS = 30
ENOUGH = 1e-9
FOLDS = 5
FEWEST = 8
"""Questions below which no field is learned."""

Rows = NDArray[np.float64]


class Fit(Record, frozen=True, kw_only=True):
    """A field and how well it tells its questions from others."""

    line: Line
    recognised: float | None
    """Share of the held-out questions with P > 1/2; None without any."""
    captured: float
    """Share of the stock taken for ours though it is not, each part by a line that has not seen it."""


class _Everyday(Record, frozen=True, kw_only=True):
    kind: str
    prompt: str


@lru_cache(maxsize=1)
def elsewhere() -> tuple[str, ...]:
    """The stock: everyday questions, and the words of all domains."""
    lines = (files("calm.analyze") / "elsewhere.jsonl").read_text(encoding="utf-8").splitlines()
    asked = [msgspec.json.decode(line, type=_Everyday).prompt for line in lines]
    return (*asked, *(text for texts in DESCRIPTORS.values() for text in texts))


def learn_field(ours: Sequence[str], held_out: Sequence[str], sense: Callable[[str], Vector]) -> Fit | None:
    """The field of these questions; None for fewer than FEWEST. `sense`: of a question (fields.sense_of)."""
    if len(ours) < FEWEST:
        return None
    here, there, unseen = (_sensed(texts, sense) for texts in (ours, elsewhere(), held_out))
    line = fit(here, there)
    captured = 0
    for fold in range(FOLDS):
        others = np.delete(there, np.s_[fold::FOLDS], axis=0)
        captured += int((logits(fit(here, others), there[fold::FOLDS]) > 0).sum())
    return Fit(
        line=line.astype(np.float32),
        recognised=float((logits(line, unseen) > 0).mean()) if len(unseen) else None,
        captured=captured / len(there),
    )


def fit(ours: Rows, others: Rows) -> Rows:
    """(n, d) against (m, d) -> (d + 1,): w and b that minimise the balanced mean log loss + RIDGE |w|^2."""
    x = np.concatenate([ours, others])
    x = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    y = np.concatenate([np.ones(len(ours)), np.zeros(len(others))])
    weight = np.where(y == 1.0, 0.5 / len(ours), 0.5 / len(others))
    ridge = np.full(x.shape[1], 2 * RIDGE)
    ridge[-1] = 1e-9  # b is free; only the matrix has to stay regular
    line = np.zeros(x.shape[1])
    for _ in range(STEPS):
        p = 1.0 / (1.0 + np.exp(-x @ line))
        gradient = x.T @ (weight * (p - y)) + ridge * line
        curvature = (x.T * (weight * p * (1.0 - p))) @ x + np.diag(ridge)
        step = np.linalg.solve(curvature, gradient)
        step *= min(1.0, 8.0 / max(float(np.abs(x @ step).max()), 1e-12))  # no leap over the flat ends
        line -= step
        if float(step @ gradient) < ENOUGH:
            break
    return line


def logits(line: Rows, rows: Rows) -> Rows:
    return np.asarray(rows @ line[:-1] + line[-1])


def _sensed(texts: Sequence[str], sense: Callable[[str], Vector]) -> Rows:
    return np.asarray([sense(text) for text in texts], np.float64)
