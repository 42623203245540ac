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

Rows are models. This module is for the small regressions, one to five features each, in plain floats: a row
learns and predicts in microseconds, and a thousand rows predict as columns with the same formulas (`maths`).
`wide` holds the one regression with many features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import mul
from typing import Generic, NamedTuple

import numpy as np

from calm.analyze.evidence import Noise, Prior, RowState, as_bytes, read_state
from calm.analyze.maths import Array, Maths, N, Pair, Span
from calm.analyze.quadratic import diagonal, dot, form, off_diagonal_twice, outer, solved
from calm.records import Belief

_LOG_VARIANCE_CAP = 1.0  # a lognormal's mean explodes with its variance; a cold prior must not
_ABSURD = 1e9  # larger targets would swamp a double's digits for good
_ABSURD_FEATURE = 1e4  # its square meets others' in a determinant
_TINY = 1e-12
_FLOOR = 0.05  # a relative prediction never falls under this part of its prior


class Posterior(NamedTuple, Generic[N]):
    """What predicting needs of one row, or of many as columns."""

    weights: Sequence[N]
    spread: Sequence[N]
    """Covariance of the weights, packed, off-diagonals doubled, the noise variance multiplied in."""
    units: Sequence[N]
    """The prior's weights (relative learners only)."""
    noise: N
    """Variance of single observations."""


@dataclass(slots=True)
class _Row:
    """One regression. `pull` is L0 times the prior's mean, what h fades towards."""

    base: Sequence[float]
    pull: Sequence[float]
    precision: Sequence[float]
    vector: Sequence[float]
    noise: Noise
    weights: Sequence[float]
    spread: Sequence[float]
    units: Sequence[float] = ()
    posterior: Posterior[float] | None = None


class Bank:
    """Independent small regressions, one a row, that share their dimension and the shape of their prior."""

    def __init__(self, prior: Prior, forgetting: float) -> None:
        self.d = len(prior.mean)
        self._prior = prior
        self._forget = forgetting
        self._precision0 = diagonal(prior.strength)
        self._covariance0 = solved(self._precision0, prior.mean)[1]
        self._doubling = off_diagonal_twice(self.d)
        self._rows: list[_Row] = []
        self._columns: Array = np.zeros((self.d + len(self._precision0) + self.d + 1, 0))
        self._stale: set[int] = set()

    def reset(self, row: int, mean: Sequence[float] | None = None, units: Sequence[float] = ()) -> None:
        """Back to the prior, whose mean may be the row's own. Makes room for the row where there is none."""
        while len(self._rows) < row:
            self._place(len(self._rows), self._prior.mean, ())
        self._place(row, self._prior.mean if mean is None else mean, units)

    def of(self, row: int) -> Posterior[float]:
        """In natural units, where the row has any."""
        found = self._rows[row]
        if found.posterior is None:
            found.posterior = _posterior(found, self.d)
        return found.posterior

    def over(self, rows: Span) -> Posterior[Array]:
        """The same of many rows, as columns: to be read now, the next lesson may change them."""
        self._refresh()
        columns = self._columns[:, rows]
        d, end = self.d, len(columns) - self.d - 1
        return Posterior(list(columns[:d]), list(columns[d:end]), list(columns[end:-1]), columns[-1])

    def predict_one(self, row: int, z: Sequence[float]) -> tuple[float, float, float]:
        """(mean, variance of the mean, variance of the noise) of a row, in its own units."""
        found = self._rows[row]
        return dot(found.weights, z), form(found.spread, z), found.noise.variance

    def units(self, row: int) -> Sequence[float]:
        return self._rows[row].units

    def weights(self, row: int) -> Sequence[float]:
        """In the row's own units."""
        return self._rows[row].weights

    def learn_one(self, row: int, z: Sequence[float], y: float) -> bool:
        """One observation. False, and nothing changed, when it is not finite or absurdly large."""
        if not (abs(y) < _ABSURD and sane(z)):
            return False
        mean, spread, variance = self.predict_one(row, z)
        found = self._rows[row]
        error, kept = found.noise.judged(y - mean, math.sqrt(spread + variance))
        keep = kept * self._forget
        lose, target = 1.0 - keep, mean + error
        found.precision = [
            keep * p + lose * p0 + zz
            for p, p0, zz in zip(found.precision, self._precision0, outer(z), strict=True)
        ]
        found.vector = [
            keep * h + lose * h0 + v * target for h, h0, v in zip(found.vector, found.pull, z, strict=True)
        ]
        found.noise.learn(error * error / (1.0 + spread / variance), self._forget, self._prior.noise)
        self._solve(row)
        return True

    def state(self, row: int) -> RowState | None:
        """The row's posterior, None while it is the prior."""
        found = self._rows[row]
        if not found.noise.observations:
            return None
        return RowState(
            as_bytes(found.vector),
            as_bytes(found.precision),
            (found.noise.strength, found.noise.total),
            found.noise.observations,
            found.noise.shift,
            as_bytes(found.base),
            as_bytes(found.units),
        )

    def restore(self, row: int, state: RowState) -> bool:
        """False, with the row untouched, when the state does not fit or is not sane."""
        units = np.frombuffer(state.unit) if len(state.unit) % 8 == 0 else np.zeros(1)
        parts = read_state(state, self.d)
        if parts is None or len(units) != len(self._rows[row].units):
            return False
        if not (np.isfinite(units).all() and (units > 0).all()):
            return False
        vector, precision, base = (part.tolist() for part in parts)
        self._place(row, base, units.tolist())
        found = self._rows[row]
        found.vector, found.precision = vector, precision
        found.noise = Noise(*state.noise, state.observations, state.shift)
        self._solve(row)
        return True

    def _place(self, row: int, mean: Sequence[float], units: Sequence[float]) -> None:
        noise, pull = Noise(*self._prior.noise), tuple(map(mul, self._prior.strength, mean))
        spread = self._scaled(self._covariance0, noise.variance)
        fresh = _Row(tuple(mean), pull, self._precision0, pull, noise, tuple(mean), spread, tuple(units))
        self._rows[row : row + 1] = [fresh]
        self._stale.add(row)

    def _solve(self, row: int) -> None:
        found = self._rows[row]
        found.weights, covariance = solved(found.precision, found.vector)
        found.spread = self._scaled(covariance, found.noise.variance)
        found.posterior = None
        self._stale.add(row)

    def _scaled(self, covariance: Sequence[float], variance: float) -> Sequence[float]:
        return [variance * c for c in map(mul, covariance, self._doubling)]

    def _refresh(self) -> None:
        """Rows that changed since the columns were read last."""
        missing = len(self._rows) - self._columns.shape[1]
        if missing > 0:
            blank = np.zeros((len(self._columns), missing + len(self._rows) // 2))
            self._columns = np.concatenate([self._columns, blank], axis=1)
        if not self._stale:
            return
        rows, nothing = list(self._stale), (0.0,) * self.d
        fresh = [(*of.weights, *of.spread, *(of.units or nothing), of.noise) for of in map(self.of, rows)]
        self._columns[:, rows] = np.asarray(fresh).T
        self._stale.clear()


def _posterior(row: _Row, d: int) -> Posterior[float]:
    units = row.units
    if not units:
        return Posterior(row.weights, row.spread, (), row.noise.variance)
    spread = tuple(map(mul, row.spread, outer(units)))
    return Posterior(tuple(map(mul, row.weights, units)), spread, units, row.noise.variance)


def sane(z: Sequence[float]) -> bool:
    """Finite, and small enough for their squares to be multiplied."""
    return max(z) < _ABSURD_FEATURE and min(z) > -_ABSURD_FEATURE and math.isfinite(sum(z))


class Learner:
    """One bank, a row for each model: the base of the estimators, which say what their features are."""

    def __init__(self, prior: Prior, forgetting: float = 0.98) -> None:
        self._bank = Bank(prior, forgetting)

    def of(self, row: int) -> Posterior[float]:
        return self._bank.of(row)

    def over(self, rows: Span) -> Posterior[Array]:
        return self._bank.over(rows)

    def state(self, row: int) -> RowState | None:
        """None while the row still holds its prior."""
        return self._bank.state(row)

    def restore(self, row: int, state: RowState) -> bool:
        """False, and the row as it was, when the state does not fit."""
        return self._bank.restore(row, state)


class LogLearner(Learner):
    """A positive quantity whose logarithm is linear in the features: multiplicative effects and noise."""

    def _learn(self, row: int, z: Sequence[float], y: float) -> bool:
        """False when y is not a positive finite number."""
        return 0.0 < y < math.inf and self._bank.learn_one(row, z, math.log(y))


class RelativeLearner(Learner):
    """A non-negative sum of parts, y = sum_i x_i unit_i w_i, whose noise grows with y.

    `unit` carries the prior in natural units (seconds a token, joules a token), so every weight w_i starts
    at its prior mean near 1 and one prior fits a phone and a data centre. An observation is divided by its
    expected size: weighted least squares for a constant relative error.
    """

    def _learn(self, row: int, x: Sequence[float], y: float) -> bool:
        """False when y is negative or not finite, or the features are all zero."""
        scaled = list(map(mul, x, self._bank.units(row)))
        whole = sum(scaled)
        if not 0.0 <= y < math.inf or not 0.0 < whole < math.inf:
            return False
        mean = dot(self._bank.weights(row), scaled)
        size = max(mean, _FLOOR * whole, 0.5 * y, _TINY)
        return self._bank.learn_one(row, [v / size for v in scaled], y / size)


def log_moments(of: Posterior[N], z: Sequence[N | float]) -> Pair[N]:
    """Mean and variance of a logarithm."""
    return dot(of.weights, z), form(of.spread, z) + of.noise


def lognormal(m: Maths[N], of: Posterior[N], z: Sequence[N | float]) -> Pair[N]:
    """Mean and standard deviation of a quantity whose logarithm is linear in z."""
    mu, variance = log_moments(of, z)
    variance = m.smaller(variance, _LOG_VARIANCE_CAP)
    mean = m.exp(m.smaller(mu + variance / 2, 30.0))
    return mean, mean * m.sqrt(m.expm1(variance))


def relative_mean(m: Maths[N], of: Posterior[N], x: Sequence[N | float]) -> N:
    """Mean of a non-negative sum of parts, in natural units."""
    return m.larger(dot(of.weights, x), _FLOOR * dot(of.units, x) + _TINY)


def relative(m: Maths[N], of: Posterior[N], x: Sequence[N | float]) -> Pair[N]:
    """Mean and standard deviation of it."""
    mean = relative_mean(m, of, x)
    return mean, m.sqrt(form(of.spread, x) + of.noise * mean * mean)


def belief(pair: Pair[float]) -> Belief:
    return Belief(mean=pair[0], sd=pair[1])
