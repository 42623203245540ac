"""The learning method under latency, energy, lengths and quality: Bayesian linear regression that forgets.

For each model a normal-inverse-gamma posterior is kept in information form (precision L, vector h, noise
a and b). Old observations fade with a factor `forgetting`, towards the prior and not towards nothing:

    L <- f L + (1-f) L0 + z z'      h <- f h + (1-f) h0 + z y      w = L^-1 h
    a <- f a + (1-f) a0 + 1         b <- f b + (1-f) b0 + e^2 / (1 + z' L^-1 z)

(stabilised forgetting: Kulhavy and Zarrop 1993; the Bayesian update: Bishop 2006, 3.3). L is always L0 plus a
sum of outer products, so the covariance can never wind up, however long a feature goes unexcited, and the
update is a solve of a well-conditioned system. Three guards make it fit for a service: non-finite inputs are
ignored; a residual counts at most `_CLIP_SD` standard deviations (Huber); residuals that stay on one side
shed nine tenths of the memory, so a level shift is followed within a handful of observations (a two-sided
exponentially weighted test after Roberts 1959).

Rows are models. Prediction is vectorised over rows, learning touches one row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from calm.records import Belief

Array = NDArray[np.float64]
Rows = NDArray[np.intp]
_T = TypeVar("_T", bound=np.generic)

_CLIP_SD = 4.0
_CLIP_AFTER = 3
_SHIFT_MEMORY = 0.8
_SHIFT_CLIP_SD = 3.0
_SHIFT_LIMIT = 1.5  # 4.5 standard deviations of the statistic under white noise
_SHIFT_KEEP = 0.1
_LOG_VARIANCE_CAP = 1.0  # a lognormal's mean explodes with its variance; a cold prior must not
_ABSURD = 1e9  # larger features or targets would swamp a double's digits for good
_FLOOR = 0.05  # a relative prediction never falls under this part of its prior


@dataclass(frozen=True)
class Prior:
    """What is believed before any data. `strength[i]`: pseudo-observations that hold coefficient i."""

    mean: tuple[float, ...]
    strength: tuple[float, ...]
    noise_sd: float
    noise_strength: float = 4.0


class RowState(msgspec.Struct, frozen=True, array_like=True):
    """One row's posterior, as stored in a checkpoint: float64 arrays as bytes."""

    vector: bytes
    precision: bytes
    noise: tuple[float, float]
    observations: int
    shift: float
    base: bytes
    unit: bytes = b""


class Bank:
    """Independent regressions, one a row, that share their dimension and the shape of their prior.

    `spread` is the covariance of the coefficients with the noise variance multiplied in.
    """

    def __init__(self, prior: Prior, forgetting: float, dtype: type[np.floating] = np.float64) -> None:
        """`dtype` of the stored covariances: float32 halves the memory a wide bank has to read."""
        self.d = len(prior.mean)
        self._prior = prior
        self._forget = forgetting
        self._noise0 = (prior.noise_strength, prior.noise_strength * prior.noise_sd**2)
        self._precision0 = np.diag(np.asarray(prior.strength, np.float64))
        self._base: Array = np.zeros((0, self.d))
        self.coefficients: Array = np.zeros((0, self.d))
        self._spread: NDArray[np.floating] = np.zeros((0, self.d, self.d), dtype)
        self._precision: Array = np.zeros((0, self.d, self.d))
        self._vector: Array = np.zeros((0, self.d))
        self._noise: Array = np.zeros(0)
        self._rows: list[_Scalars] = []

    def grow(self, rows: int) -> None:
        """Makes room for `rows` rows; new ones hold the prior."""
        have = len(self._rows)
        if rows <= have:
            return
        extra = max(rows - have, have // 2)
        self._base = extended(self._base, extra)
        self.coefficients = extended(self.coefficients, extra)
        self._spread = extended(self._spread, extra)
        self._precision = extended(self._precision, extra)
        self._vector = extended(self._vector, extra)
        self._noise = extended(self._noise, extra)
        for row in range(have, have + extra):
            self._rows.append(_Scalars(*self._noise0))
            self.reset(row)

    @property
    def rows(self) -> int:
        return len(self._rows)

    def observations(self, row: int) -> int:
        return self._rows[row].observations

    def reset(self, row: int, mean: Sequence[float] | None = None) -> None:
        """Back to the prior, whose mean may be the row's own."""
        self._base[row] = self._prior.mean if mean is None else mean
        self._rows[row] = _Scalars(*self._noise0)
        self._precision[row] = self._precision0
        self._vector[row] = self._precision0 @ self._base[row]
        self._solve(row)

    def predict(self, rows: Rows, z: Array) -> tuple[Array, Array, Array]:
        """(mean, variance of the mean, variance of the noise) for rows (m,) and features (m, d)."""
        mean = np.vecdot(z, self.coefficients.take(rows, axis=0))
        reach = np.matvec(self._spread.take(rows, axis=0), z)
        return mean, np.vecdot(z, reach), self._noise.take(rows)

    def predict_same(self, rows: Rows, z: Array) -> tuple[Array, Array]:
        """(mean, variance of the mean) of many rows for one and the same features (d,)."""
        z = z.astype(self._spread.dtype)
        most = 2 * len(rows) >= self.rows  # then gathering the matrices costs more than reading them all
        variance = (self._spread @ z @ z)[rows] if most else self._spread[rows] @ z @ z
        return self.coefficients[rows] @ z, np.maximum(variance, 0.0).astype(np.float64)

    def noise_sd(self, row: int) -> float:
        """Standard deviation of single observations around the row's mean."""
        return float(self._noise[row] ** 0.5)

    def predict_one(self, row: int, z: Array) -> tuple[float, float, float]:
        """As `predict`, for one row; z has shape (d,)."""
        spread = float(z.dot(self._spread[row].dot(z)))
        return float(z.dot(self.coefficients[row])), spread, self._rows[row].noise

    def learn_one(self, row: int, z: Array, y: float) -> bool:
        """One observation. False, and nothing changed, when it is not finite or absurdly large."""
        if not (math.isfinite(y) and abs(y) < _ABSURD and float(np.abs(z).max()) < _ABSURD):
            return False
        mean, spread, noise = self.predict_one(row, z)
        scalars = self._rows[row]
        sd = math.sqrt(spread + noise)
        error = y - mean
        if scalars.observations >= _CLIP_AFTER:
            error = min(max(error, -_CLIP_SD * sd), _CLIP_SD * sd)
            if scalars.shifted(error / sd):
                self._fade(row, _SHIFT_KEEP)
        self._fade(row, self._forget)
        self._precision[row] += z[:, None] * z
        self._vector[row] += z * (mean + error)
        scalars.learn(error * error / (1.0 + spread / noise), self._forget, self._noise0)
        self._solve(row)
        return True

    def _fade(self, row: int, keep: float) -> None:
        self._precision[row] *= keep
        self._precision[row] += (1 - keep) * self._precision0
        self._vector[row] *= keep
        self._vector[row] += (1 - keep) * self._precision0.dot(self._base[row])

    def _solve(self, row: int) -> None:
        covariance = np.linalg.inv(self._precision[row])
        self.coefficients[row] = covariance.dot(self._vector[row])
        self._noise[row] = self._rows[row].noise
        self._spread[row] = covariance * self._rows[row].noise

    def state(self, row: int) -> RowState | None:
        """The row's posterior, None while it is the prior."""
        scalars = self._rows[row]
        if not scalars.observations:
            return None
        return RowState(
            self._vector[row].tobytes(),
            self._precision[row][np.triu_indices(self.d)].tobytes(),
            (scalars.strength, scalars.total),
            scalars.observations,
            scalars.shift,
            self._base[row].tobytes(),
        )

    def restore(self, row: int, state: RowState) -> bool:
        """False, with the row untouched, when the state does not fit or is not sane."""
        triangle = self.d * (self.d + 1) // 2
        if (len(state.vector), len(state.base), len(state.precision)) != (
            8 * self.d,
            8 * self.d,
            8 * triangle,
        ):
            return False
        vector, base = np.frombuffer(state.vector), np.frombuffer(state.base)
        precision = _symmetric(np.frombuffer(state.precision), self.d)
        numbers = (vector, base, precision, np.asarray([*state.noise, state.shift]))
        if not all(np.isfinite(part).all() for part in numbers):
            return False
        if min(state.noise) <= 0 or state.observations < 1 or not _positive(precision):
            return False
        self._vector[row], self._base[row], self._precision[row] = vector, base, precision
        self._rows[row] = _Scalars(*state.noise, state.observations, state.shift)
        self._solve(row)
        return True


@dataclass(slots=True)
class _Scalars:
    """A row's plain numbers: the noise's strength a and total b, the count, the shift statistic."""

    strength: float
    total: float
    observations: int = 0
    shift: float = 0.0

    @property
    def noise(self) -> float:
        return self.total / self.strength

    def learn(self, square: float, keep: float, start: tuple[float, float]) -> None:
        self.strength = keep * self.strength + (1 - keep) * start[0] + 1.0
        self.total = keep * self.total + (1 - keep) * start[1] + square
        self.observations += 1

    def shifted(self, standardised: float) -> bool:
        """One more residual; True when they have stayed on one side for too long."""
        step = min(max(standardised, -_SHIFT_CLIP_SD), _SHIFT_CLIP_SD)
        self.shift = _SHIFT_MEMORY * self.shift + (1 - _SHIFT_MEMORY) * step
        if abs(self.shift) <= _SHIFT_LIMIT:
            return False
        self.shift = 0.0
        return True


class LogLearner:
    """A positive quantity whose logarithm is linear in the features: multiplicative effects and noise."""

    def __init__(self, prior: Prior, forgetting: float = 0.98) -> None:
        self.bank = Bank(prior, forgetting)

    def predict_log(self, rows: Rows, x: Array) -> tuple[Array, Array]:
        """Mean and standard deviation of the logarithm."""
        mean, spread, noise = self.bank.predict(rows, x)
        return mean, np.sqrt(spread + noise)

    def predict(self, rows: Rows, x: Array) -> tuple[Array, Array]:
        """Mean and standard deviation of the quantity itself (a lognormal's)."""
        mu, sigma = self.predict_log(rows, x)
        variance = np.minimum(sigma * sigma, _LOG_VARIANCE_CAP)
        mean = np.exp(np.maximum(np.minimum(mu + variance / 2, 30.0), -30.0))
        return mean, mean * np.sqrt(np.expm1(variance))

    def predict_one(self, row: int, x: Sequence[float]) -> Belief:
        return _belief(self.predict(np.asarray([row]), np.asarray([x], np.float64)))

    def learn_one(self, row: int, x: Sequence[float], y: float) -> bool:
        """False when y is not a positive finite number."""
        if not 0.0 < y < float("inf"):
            return False
        return self.bank.learn_one(row, np.asarray(x, np.float64), math.log(y))

    def state(self, row: int) -> RowState | None:
        return self.bank.state(row)

    def restore(self, row: int, state: RowState) -> bool:
        return self.bank.restore(row, state)


class RelativeLearner:
    """A non-negative sum of parts, y = sum_i x_i unit_i w_i, whose noise grows with y.

    `unit` carries the prior in natural units (seconds a token, joules a token), so every weight w_i starts
    at its prior mean near 1 and one prior fits a phone and a data centre. An observation is divided by its
    expected size: weighted least squares for a constant relative error.
    """

    def __init__(self, prior: Prior, forgetting: float = 0.98) -> None:
        self.bank = Bank(prior, forgetting)
        self.unit: Array = np.ones((0, self.bank.d))

    def grow(self, rows: int) -> None:
        self.bank.grow(rows)
        extra = self.bank.rows - len(self.unit)
        if extra:
            self.unit = np.concatenate([self.unit, np.ones((extra, self.bank.d))])

    def reset(self, row: int, unit: Sequence[float]) -> None:
        """Back to the prior, with the row's own units (all positive)."""
        self.bank.reset(row)
        self.unit[row] = unit

    def predict(self, rows: Rows, x: Array) -> tuple[Array, Array]:
        scaled = x * self.unit.take(rows, axis=0)
        mean, spread, noise = self.bank.predict(rows, scaled)
        mean = np.maximum(mean, np.maximum(_FLOOR * np.add.reduce(scaled, axis=1), 1e-12))
        return mean, np.sqrt(spread + noise * mean * mean)

    def predict_one(self, row: int, x: Sequence[float]) -> Belief:
        return _belief(self.predict(np.asarray([row]), np.asarray([x], np.float64)))

    def learn_one(self, row: int, x: Sequence[float], y: float) -> bool:
        """False when y is negative or not finite, or the features are all zero."""
        scaled = np.asarray(x, np.float64) * self.unit[row]
        whole = float(np.add.reduce(scaled))
        if not 0.0 <= y < math.inf or not 0.0 < whole < math.inf:
            return False
        mean = float(scaled.dot(self.bank.coefficients[row]))
        size = max(mean, _FLOOR * whole, 0.5 * y, 1e-12)
        return self.bank.learn_one(row, scaled / size, y / size)

    def state(self, row: int) -> RowState | None:
        state = self.bank.state(row)
        return None if state is None else msgspec.structs.replace(state, unit=self.unit[row].tobytes())

    def restore(self, row: int, state: RowState) -> bool:
        unit = np.frombuffer(state.unit) if len(state.unit) == 8 * self.bank.d else None
        if unit is None or not (np.isfinite(unit).all() and (unit > 0).all()):
            return False
        if not self.bank.restore(row, state):
            return False
        self.unit[row] = unit
        return True


def _belief(pair: tuple[Array, Array]) -> Belief:
    return Belief(mean=float(pair[0][0]), sd=float(pair[1][0]))


def extended(array: NDArray[_T], extra: int) -> NDArray[_T]:
    """Rows of zeros put at the end."""
    return np.concatenate([array, np.zeros((extra, *array.shape[1:]), array.dtype)])


def _symmetric(triangle: Array, d: int) -> Array:
    matrix = np.zeros((d, d))
    matrix[np.triu_indices(d)] = triangle
    return matrix + np.triu(matrix, 1).T


def _positive(matrix: Array) -> bool:
    try:
        np.linalg.cholesky(matrix)
    except np.linalg.LinAlgError:
        return False
    return True
