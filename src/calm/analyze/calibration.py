"""How far the predictions can be trusted: prediction beside observation, the last 200 for each model.

Reported as mean absolute percentage error and as coverage: how often the observation fell inside the
predicted mean +- 1.64 sd. An honest normal spread covers 90 %.
"""

from __future__ import annotations

from collections import deque

import msgspec

from calm.records import Belief

WINDOW = 200
COVERED_SD = 1.64

_SMALLEST = 1e-9


class Accuracy(msgspec.Struct, frozen=True, kw_only=True):
    """Of one model and one quantity. `mape` and `coverage` are shares, 0.25 is 25 %."""

    observations: int
    mape: float
    coverage: float
    bias: float
    """Mean signed relative error: positive when predictions are too high."""


class Calibration:
    """A window of (relative error, covered) for each (model, quantity)."""

    def __init__(self, window: int = WINDOW) -> None:
        self._window = window
        self._seen: dict[str, dict[str, deque[tuple[float, bool]]]] = {}

    def saw(self, model: str, metric: str, predicted: Belief | None, observed: float | None) -> None:
        """Nothing is noted when either is unknown or the observation is zero (no percentage of zero)."""
        if predicted is None or observed is None or not _SMALLEST < abs(observed) < float("inf"):
            return
        error = (predicted.mean - observed) / abs(observed)
        covered = abs(predicted.mean - observed) <= COVERED_SD * predicted.sd
        metrics = self._seen.setdefault(model, {})
        metrics.setdefault(metric, deque(maxlen=self._window)).append((error, covered))

    def forget(self, model: str) -> None:
        self._seen.pop(model, None)

    def report(self) -> dict[str, dict[str, Accuracy]]:
        """By model, then by quantity; only what was observed at least once."""
        return {
            model: {metric: accuracy(list(seen)) for metric, seen in metrics.items()}
            for model, metrics in self._seen.items()
        }


def accuracy(seen: list[tuple[float, bool]]) -> Accuracy:
    count = len(seen)
    return Accuracy(
        observations=count,
        mape=sum(abs(error) for error, _ in seen) / count,
        coverage=sum(covered for _, covered in seen) / count,
        bias=sum(error for error, _ in seen) / count,
    )
