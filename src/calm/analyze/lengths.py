"""How long a model's answer will be: the largest unknown in latency and energy alike.

The logarithm of the length is linear in a few things known beforehand, and its noise is large, so the whole
lognormal is kept and cut at `max_tokens` (or the room left in the context): the expected value is that of
min(length, cap), in closed form. An answer that stopped at the cap says only "at least this long" (censored):
it is learned as the mean of the distribution's tail above the cap, the E-step of a Tobit model (Tobin 1958;
Dempster, Laird and Rubin 1977).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from calm.analyze.regression import Array, LogLearner, Prior, Rows, RowState
from calm.records import Belief, Features

DEFAULT_OUTPUT_TOKENS = 150.0

_PRIOR = Prior(
    mean=(math.log(DEFAULT_OUTPUT_TOKENS), 0.0, 0.0, -0.5, 0.4),
    strength=(0.7, 8.0, 8.0, 4.0, 3.0),
    noise_sd=0.9,
)
_CENTRE_PROMPT = math.log(60.0)
_CENTRE_CAP = math.log(256.0)
_FORGETTING = 0.985
_SQRT_2_PI = math.sqrt(2 / math.pi)
_SHIFTS = (0.0, 1.0, 2.0)

Case = tuple[float, float, float, float, float]
"""(1, log prompt, log max_tokens, structured, verbosity), each centred near zero but the first."""


def case(features: Features, verbosity: float = 0.0) -> Case:
    """`verbosity`: how much the question looks like one with a long answer, about -1 .. 1."""
    cap = features.max_tokens
    return (
        1.0,
        math.log(max(features.prompt_tokens, 1.0)) - _CENTRE_PROMPT,
        0.0 if cap is None or cap < 1 else math.log(cap) - _CENTRE_CAP,
        float(features.wants_json or features.wants_tools),
        verbosity,
    )


class LengthPredictor:
    """Tokens of one sample of the answer."""

    name = "output_tokens"

    def __init__(self) -> None:
        self._learner = LogLearner(_PRIOR, _FORGETTING)

    def add(self, row: int, prior_tokens: float | None = None) -> None:
        self._learner.bank.grow(row + 1)
        first = math.log(max(1.0, prior_tokens or DEFAULT_OUTPUT_TOKENS))
        self._learner.bank.reset(row, (first, *_PRIOR.mean[1:]))

    def predict(self, rows: Rows, x: Array, cap: Array) -> tuple[Array, Array]:
        """Mean and sd of min(length, cap) for features (m, 5) and caps (m,), inf where there is none."""
        mu, sigma = self._learner.predict_log(rows, x)
        return capped_lognormal(mu, np.minimum(sigma, 1.2), cap)

    def predict_one(self, row: int, x: Case, cap: float = math.inf) -> Belief:
        mean, sd = self.predict(np.asarray([row]), np.asarray([x]), np.asarray([cap]))
        return Belief(mean=float(mean[0]), sd=float(sd[0]))

    def learn_one(self, row: int, x: Case, tokens: float, censored: bool = False) -> bool:
        """`censored`: the answer was cut off at `tokens`, it would have been longer."""
        if not 1.0 <= tokens < math.inf:
            return False
        if not censored:
            return self._learner.learn_one(row, x, tokens)
        mu, sigma = self._learner.predict_log(np.asarray([row]), np.asarray([x]))
        longer = tail_mean(float(mu[0]), float(sigma[0]), math.log(tokens))
        return self._learner.learn_one(row, x, math.exp(min(longer, 20.0)))

    def state(self, row: int) -> RowState | None:
        return self._learner.state(row)

    def restore(self, row: int, state: RowState) -> bool:
        return self._learner.restore(row, state)


def capped_lognormal(mu: Array, sigma: Array, cap: Array) -> tuple[Array, Array]:
    """Mean and sd of min(X, cap), log X ~ Normal(mu, sigma). Truncated-moment identity of the lognormal."""
    cap = np.maximum(cap, 1.0)
    bounded = np.minimum(cap, 1e12)
    edge = (np.log(bounded) - mu) / sigma
    below, below_first, below_second = normal_cdf(edge - np.multiply.outer(_SHIFTS, sigma))
    above = 1.0 - below
    typical = np.exp(mu + sigma * sigma / 2)
    first = typical * below_first + bounded * above
    second = (typical * np.exp(sigma * sigma / 2)) ** 2 * below_second + bounded * bounded * above
    mean = np.minimum(np.maximum(first, 1.0), cap)
    return mean, np.sqrt(np.maximum(second - first * first, 0.0))


def normal_cdf(z: Array) -> NDArray[np.float64]:
    """Standard normal distribution by the tanh approximation (Page 1977), error under 2e-4."""
    return np.asarray(0.5 + 0.5 * np.tanh(_SQRT_2_PI * z * (1.0 + 0.044715 * z * z)))


def tail_mean(mu: float, sigma: float, edge: float) -> float:
    """E[Y | Y > edge] for Y ~ Normal(mu, sigma): mu + sigma * (inverse Mills ratio)."""
    z = (edge - mu) / sigma
    if z > 8.0:  # both densities underflow; the tail's mean is one over the hazard away
        return edge + sigma / z
    density = math.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    return mu + sigma * density / (0.5 * math.erfc(z / math.sqrt(2)))
