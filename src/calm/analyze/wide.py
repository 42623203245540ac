"""The learning method of `regression` for many features at once, in matrices: quality has 64.

The same posterior, forgetting and guards. Covariances are kept packed and in single precision, because
predicting a whole fleet is bound by reading them: the variance of every row for one question is then a single
product of a matrix with the question's packed outer product.
"""

from __future__ import annotations

import math
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from calm.analyze.evidence import Noise, Prior, RowState, as_bytes, read_state
from calm.analyze.maths import Array, Rows
from calm.analyze.quadratic import full

_T = TypeVar("_T", bound=np.generic)
_ABSURD = 1e9  # larger features or targets would swamp a double's digits for good


class WideBank:
    """Independent regressions, one a row, that share their dimension and their prior."""

    def __init__(self, prior: Prior, forgetting: float) -> None:
        self.d = len(prior.mean)
        self._prior = prior
        self._forget = forgetting
        self._base: Array = np.asarray(prior.mean, np.float64)
        self._precision0 = np.diag(np.asarray(prior.strength, np.float64))
        self._upper = np.triu_indices(self.d)
        self._doubled = np.where(self._upper[0] == self._upper[1], 1.0, 2.0)
        self._noise: list[Noise] = []
        self.coefficients: Array = np.zeros((0, self.d))
        self._precision: Array = np.zeros((0, self.d, self.d))
        self._vector: Array = np.zeros((0, self.d))
        self._spread: NDArray[np.float32] = np.zeros((0, len(self._doubled)), np.float32)

    def grow(self, rows: int) -> None:
        """Makes room for `rows` rows; new ones hold the prior."""
        have = len(self._noise)
        if rows <= have:
            return
        extra = max(rows - have, have // 2)
        self.coefficients = extended(self.coefficients, extra)
        self._precision = extended(self._precision, extra)
        self._vector = extended(self._vector, extra)
        self._spread = extended(self._spread, extra)
        for row in range(have, have + extra):
            self._noise.append(Noise(*self._prior.noise))
            self.reset(row)

    def reset(self, row: int) -> None:
        """Back to the prior."""
        self._noise[row] = Noise(*self._prior.noise)
        self._precision[row] = self._precision0
        self._vector[row] = self._precision0 @ self._base
        self._solve(row)

    def predict_same(self, rows: Rows, z: Array) -> tuple[Array, Array]:
        """(mean, variance of the mean) of rows, at least one, for one and the same features (d,)."""
        narrow = z.astype(np.float32)
        pairs = narrow.take(self._upper[0]) * narrow.take(self._upper[1])
        used = self._spread[: int(rows.max()) + 1]
        most = 2 * len(rows) >= len(used)  # then gathering costs more than reading them all
        # vecdot, not @: a threaded BLAS would spin on the cores that the engines are using.
        variance = np.vecdot(used, pairs)[rows] if most else np.vecdot(used[rows], pairs)
        return np.vecdot(self.coefficients[rows], z), np.maximum(variance, 0.0).astype(np.float64)

    def noise_sd(self, row: int) -> float:
        """Standard deviation of single observations around the row's mean."""
        return math.sqrt(self._noise[row].variance)

    def learn_one(self, row: int, z: Array, y: float) -> bool:
        """One observation. False, and nothing changed, when it is not finite or absurdly large."""
        if not (abs(y) < _ABSURD and float(np.abs(z).max()) < _ABSURD):
            return False
        means, spreads = self.predict_same(np.asarray([row]), z)
        mean, spread, noise = float(means[0]), float(spreads[0]), self._noise[row]
        error, kept = noise.judged(y - mean, math.sqrt(spread + noise.variance))
        self._fade(row, kept * self._forget)
        self._precision[row] += z[:, None] * z
        self._vector[row] += z * (mean + error)
        noise.learn(error * error / (1.0 + spread / noise.variance), self._forget, self._prior.noise)
        self._solve(row)
        return True

    def state(self, row: int) -> RowState | None:
        """The row's posterior, None while it is the prior."""
        noise = self._noise[row]
        if not noise.observations:
            return None
        return RowState(
            as_bytes(self._vector[row]),
            as_bytes(self._precision[row][self._upper]),
            (noise.strength, noise.total),
            noise.observations,
            noise.shift,
            as_bytes(self._base),
        )

    def restore(self, row: int, state: RowState) -> bool:
        """False, with the row untouched, when the state does not fit or is not sane."""
        parts = read_state(state, self.d)
        if parts is None:
            return False
        self._vector[row], self._precision[row] = parts[0], full(parts[1], self.d)
        self._noise[row] = Noise(*state.noise, state.observations, state.shift)
        self._solve(row)
        return True

    def _fade(self, row: int, keep: float) -> None:
        self._precision[row] *= keep
        self._precision[row] += (1 - keep) * self._precision0
        self._vector[row] *= keep
        self._vector[row] += (1 - keep) * self._precision0.dot(self._base)

    def _solve(self, row: int) -> None:
        covariance = np.linalg.inv(self._precision[row])
        self.coefficients[row] = covariance.dot(self._vector[row])
        self._spread[row] = covariance[self._upper] * (self._doubled * self._noise[row].variance)


def extended(array: NDArray[_T], extra: int) -> NDArray[_T]:
    """Rows of zeros put at the end."""
    return np.concatenate([array, np.zeros((extra, *array.shape[1:]), array.dtype)])
