"""From what was observed to the figures of a profile: pure functions over plain numbers.

The service model these belong to stands in calm/profile.py. Times scatter in proportion to themselves, and now
and then another process wakes up and one of them comes out far too long. So lines are fitted to the least
absolute relative error: each point counts by 1 / value, a long prompt does not drown the short ones, and an
outlier has no more pull than any other point. Where a rate is repeated, the median stands for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from calm.profile import Length

Points = Sequence[tuple[float, float]]
"""(x, y), both 0 or more."""
ROUNDS = 50
NEARLY = 1e-6
"""Relative errors below this count alike."""


def line(points: Points) -> tuple[float, float]:
    """(intercept, slope) of y over x with the least absolute relative errors, neither of them below 0.

    A negative one is set to 0 and the other fitted again. Points with y = 0 say nothing and are left out.
    Raises ValueError when none is left.
    """
    known = [(x, y) for x, y in points if y > 0]
    if not known:
        raise ValueError("no point to fit a line to")
    x, y = np.array(known, dtype=float).T
    both = np.column_stack([1 / y, x / y])
    if np.ptp(x) > 0:
        intercept, slope = _least_absolute(both)
        if slope < 0:
            return float(_least_absolute(both[:, :1])[0]), 0.0
        if intercept >= 0:
            return intercept, slope
    return (0.0, _least_absolute(both[:, 1:])[0]) if x.any() else (float(np.median(y)), 0.0)


def _least_absolute(columns: NDArray[np.float64]) -> list[float]:
    """Coefficients that bring `columns` closest to 1 in absolute error, by iteratively reweighted least squares
    (Schlossmacher, JASA 68, 1973)."""
    weight = np.ones(len(columns))
    for _ in range(ROUNDS):
        root = np.sqrt(weight)
        found = np.linalg.lstsq(columns * root[:, None], root, rcond=None)[0]
        weight = 1 / np.maximum(np.abs(columns @ found - 1), NEARLY)
    return [float(value) for value in found]


def prefill_rate(points: Points) -> tuple[float, float]:
    """(tokens per second, seconds before the first of them) from (tokens read, seconds) of single prompts.

    Raises ValueError where more tokens did not take longer.
    """
    intercept_s, token_s = line(points)
    if token_s <= 0:
        raise ValueError("longer prompts did not take longer to read")
    return 1 / token_s, intercept_s


def aggregate_rate(arrivals_s: Sequence[Sequence[float]]) -> float | None:
    """Tokens per second of all sequences together while all of them decode, from when each token arrived.

    The window runs from the last of the first tokens to the first of the last ones. None where the sequences
    never decoded at the same time.
    """
    if not arrivals_s or any(len(times) < 2 for times in arrivals_s):
        return None
    begin_s, end_s = max(times[0] for times in arrivals_s), min(times[-1] for times in arrivals_s)
    tokens = sum(begin_s < at_s <= end_s for times in arrivals_s for at_s in times)
    return tokens / (end_s - begin_s) if end_s > begin_s and tokens else None


def service_s(
    prompt_tokens: float,
    output_tokens: float,
    *,
    overhead_s: float,
    prefill_tps: float,
    decode_tps: float,
) -> float:
    """Seconds the service model gives one request alone; `prompt_tokens` are those not in the prefix cache.
    The first token comes with the end of the prompt."""
    return overhead_s + prompt_tokens / prefill_tps + max(0.0, output_tokens - 1) / decode_tps


def log_spread(ratios: Sequence[float]) -> float:
    """Sigma of the lognormal that these ratios look drawn from: half the width of their logs' central 68 %.

    For a normal distribution that is its standard deviation; unlike it, one outlier hardly moves it. 0 for
    fewer than two.
    """
    logs = [math.log(ratio) for ratio in ratios if ratio > 0]
    if len(logs) < 2:
        return 0.0
    low, high = np.quantile(logs, (0.15866, 0.84134))
    return float(high - low) / 2


def relative_spread(values: Sequence[float]) -> float:
    """`log_spread` of values around their median."""
    return log_spread([value / float(np.median(values)) for value in values]) if values else 0.0


def slowdown(ratios: Sequence[float]) -> float:
    """Median of (time among others / time alone), at least 1: company never makes an engine faster."""
    return max(1.0, float(np.median(ratios))) if ratios else 1.0


def length_of(tokens: Sequence[int]) -> Length:
    """Mean and standard deviation of answer lengths. Raises ValueError for none."""
    if not tokens:
        raise ValueError("no answer to take the length of")
    sd = float(np.std(tokens, ddof=1)) if len(tokens) > 1 else 0.0
    return Length(mean=max(1.0, float(np.mean(tokens))), sd=sd)


def rounded(value: float, digits: int = 4) -> float:
    """To so many significant digits: a profile is read by people too."""
    return float(f"{value:.{digits}g}")
