"""How sure a figure is: 95 % bootstrap intervals over seeds, alone and paired between two candidates.

The seed is the unit that is drawn again, not the request: requests of one trial wait for one another and are
not independent. All candidates of a seed face the same questions at the same times, so a ratio or a difference
is taken seed by seed, which leaves the seeds' own ups and downs out of it.

Intervals are bias-corrected and accelerated (BCa, Efron 1987) where that is defined, percentile intervals
where it is not; scipy does both. The generator is seeded, so equal input gives equal intervals. With few
seeds any bootstrap interval is too narrow, for it can only rearrange what was seen: see `coverage`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from calm.errors import BadInput
from calm.records import Record

LEVEL = 0.95
RESAMPLES = 4999
RNG_SEED = 20260203
MISSING_EXTRA = "pip install 'calm-orchestrator[bench]'"
_COVERAGE = ((20, 0.92), (10, 0.88), (5, 0.84), (3, 0.71), (2, 0.49))
"""Share of 600 drawn studies whose interval held the true mean, by seeds; normal and lognormal (sigma 0.5) values."""

Samples = NDArray[np.float64]
Statistic = Callable[..., Samples]


class Interval(Record, frozen=True, kw_only=True):
    """A figure over seeds, and where it would lie in 95 % of such studies."""

    value: float
    """Mean over seeds, or ratio of means, or mean difference."""
    low: float | None
    """None where one seed says nothing about the spread; equal to `high` where all seeds agree."""
    high: float | None
    n: int
    """Seeds."""


def interval(values_per_seed: Iterable[float | None]) -> Interval | None:
    """The mean over seeds. Seeds without the figure are left out; None where no seed has it."""
    values = [value for value in values_per_seed if value is not None and math.isfinite(value)]
    return _resampled(_mean, values) if values else None


def coverage(seeds: int) -> float | None:
    """What share of such intervals really holds the true mean, measured on drawn values; None for one seed."""
    return next((share for least, share in _COVERAGE if seeds >= least), None)


def ratio(
    candidate_by_seed: Mapping[int, float | None], baseline_by_seed: Mapping[int, float | None]
) -> Interval | None:
    """Mean of the candidate over mean of the baseline, over the seeds that both have.

    Below 1 the candidate has less. None where they share no seed or the baseline's mean is 0.
    """
    candidate, baseline = _paired(candidate_by_seed, baseline_by_seed)
    if not baseline or math.fsum(baseline) == 0:
        return None
    return _resampled(_ratio, candidate, baseline)


def difference(
    candidate_by_seed: Mapping[int, float | None], baseline_by_seed: Mapping[int, float | None]
) -> Interval | None:
    """Mean of candidate minus baseline, over the seeds that both have; None where they share none."""
    candidate, baseline = _paired(candidate_by_seed, baseline_by_seed)
    return interval(a - b for a, b in zip(candidate, baseline, strict=True))


def _paired(
    first: Mapping[int, float | None], second: Mapping[int, float | None]
) -> tuple[list[float], list[float]]:
    pairs = [(first[seed], second[seed]) for seed in sorted(first.keys() & second.keys())]
    known = [
        (a, b) for a, b in pairs if a is not None and b is not None and math.isfinite(a) and math.isfinite(b)
    ]
    return [a for a, _ in known], [b for _, b in known]


def _resampled(statistic: Statistic, *samples: list[float]) -> Interval:
    data = tuple(np.asarray(sample, dtype=np.float64) for sample in samples)
    value, count = float(statistic(*data, axis=-1)), len(samples[0])
    if count < 2:
        return Interval(value=value, low=None, high=None, n=count)
    low, high = (value, value) if _constant(data) else _bounds(statistic, data)
    return Interval(value=value, low=low, high=high, n=count)


def _constant(data: tuple[Samples, ...]) -> bool:
    """No resample can differ: all values are equal, up to rounding."""
    return all(bool(np.ptp(sample) <= 1e-12 * np.max(np.abs(sample))) for sample in data)


def _bounds(statistic: Statistic, data: tuple[Samples, ...]) -> tuple[float | None, float | None]:
    """BCa, else percentile, else unknown: a ratio whose baseline is 0 in some resample has no bounds."""
    for method in ("BCa", "percentile"):
        low, high = _bootstrap(statistic, data, method)
        if math.isfinite(low) and math.isfinite(high):
            return low, high
    return None, None


def _bootstrap(statistic: Statistic, data: tuple[Samples, ...], method: str) -> tuple[float, float]:
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter(
            "ignore"
        )  # scipy warns where BCa is undefined; the caller sees that it is not finite
        result = _scipy_stats().bootstrap(
            data,
            statistic,
            n_resamples=RESAMPLES,
            confidence_level=LEVEL,
            method=method,
            paired=len(data) > 1,
            vectorized=True,
            rng=np.random.default_rng(RNG_SEED),
        )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def _mean(values: Samples, axis: int = -1) -> Samples:
    return np.asarray(np.mean(values, axis=axis))


def _ratio(candidate: Samples, baseline: Samples, axis: int = -1) -> Samples:
    return np.asarray(np.mean(candidate, axis=axis) / np.mean(baseline, axis=axis))


def _scipy_stats() -> ModuleType:
    try:
        return import_module("scipy.stats")
    except ImportError:
        raise BadInput(f"intervals need scipy: {MISSING_EXTRA}", field="out") from None
