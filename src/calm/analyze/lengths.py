"""How long a model's answer will be: the largest unknown in latency and energy alike.

The logarithm of the length is linear in a few things known beforehand, and its noise is large, so the whole
lognormal is kept and cut at `max_tokens` (or the room left in the context): the expected value is that of
min(length, cap), in closed form. An answer that stopped at the cap says only "at least this long" (censored):
it is learned as the mean of the distribution's tail above the cap, the E-step of a Tobit model (Tobin 1958;
Dempster, Laird and Rubin 1977).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from calm.analyze.evidence import Prior
from calm.analyze.maths import ONE, Maths, N, Pair
from calm.analyze.regression import LogLearner, Posterior, belief, log_moments
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
_LONGEST_LOG = 100.0  # exp(2 * 100) is still a double
_WIDEST = 1.2  # of the logarithm's sd: a cold prior must not promise a book

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


class LengthPredictor(LogLearner):
    """Tokens of one sample of the answer."""

    name = "output_tokens"

    def __init__(self) -> None:
        super().__init__(_PRIOR, _FORGETTING)

    def add(self, row: int, prior_tokens: float | None = None) -> None:
        first = math.log(max(1.0, prior_tokens or DEFAULT_OUTPUT_TOKENS))
        self._bank.reset(row, (first, *_PRIOR.mean[1:]))

    def predict_one(self, row: int, x: Case, cap: float = math.inf) -> Belief:
        return belief(output_tokens(ONE, self.of(row), x, max(1.0, cap)))

    def learn_one(self, row: int, x: Case, tokens: float, censored: bool = False) -> bool:
        """`censored`: the answer was cut off at `tokens`, it would have been longer."""
        if not 1.0 <= tokens < math.inf:
            return False
        if not censored:
            return self._learn(row, x, tokens)
        mu, variance = log_moments(self.of(row), x)
        longer = tail_mean(mu, math.sqrt(variance), math.log(tokens))
        return self._learn(row, x, math.exp(min(longer, 20.0)))


def output_tokens(m: Maths[N], of: Posterior[N], x: Sequence[N | float], cap: N) -> Pair[N]:
    """Mean and sd of min(length, cap) for features as in `Case`; the cap is inf where there is none."""
    mu, variance = log_moments(of, x)
    return capped_lognormal(m, mu, m.smaller(m.sqrt(variance), _WIDEST), cap)


def capped_lognormal(m: Maths[N], mu: N, sigma: N, cap: N) -> Pair[N]:
    """Mean and sd of min(X, cap), log X ~ Normal(mu, sigma), cap >= 1. Truncated-moment identity of the lognormal."""
    bounded = m.smaller(cap, 1e12)
    mu, half = m.smaller(mu, _LONGEST_LOG), sigma * sigma / 2
    edge = (m.log(bounded) - mu) / sigma
    above = (1.0 - normal_cdf(m, edge)) * bounded
    typical = m.exp(mu + half)
    first = typical * normal_cdf(m, edge - sigma) + above
    wide = typical * m.exp(half)
    second = wide * wide * normal_cdf(m, edge - 2.0 * sigma) + bounded * above
    mean = m.smaller(m.larger(first, 1.0), cap)
    return mean, m.sqrt(m.larger(second - first * first, 0.0))


def normal_cdf(m: Maths[N], z: N) -> N:
    """Standard normal distribution by the tanh approximation (Page 1977), error under 2e-4."""
    return 0.5 + 0.5 * m.tanh(_SQRT_2_PI * z * (1.0 + 0.044715 * z * z))


def tail_mean(mu: float, sigma: float, edge: float) -> float:
    """E[Y | Y > edge] for Y ~ Normal(mu, sigma): mu + sigma * (inverse Mills ratio)."""
    z = (edge - mu) / sigma
    if z > 8.0:  # both densities underflow; the tail's mean is one over the hazard away
        return edge + sigma / z
    density = math.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    return mu + sigma * density / (0.5 * math.erfc(z / math.sqrt(2)))
