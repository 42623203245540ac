"""When requests arrive, for one seed: synthetic processes, and seeded windows of recorded traces.

Requests, duration and rate are bound by one equation, whatever the source:

    requests = 1 + rate x duration        the first arrival at 0, the last at `duration`

Any two say the third. A recorded trace gives that many consecutive arrivals, from a place drawn by the seed,
stretched or pressed linearly to the duration: the shape stays, only the unit of time changes. Given alone, on
a recorded trace, `requests` are taken at their own times, `duration` is a window of that many seconds at its
own times, and `rate` is the whole trace at that mean rate. `NAME:whole` takes its arrivals from the whole trace
instead, each with equal chance: the trace's rise and fall in few requests.

docs/reference/workloads.md lists every combination.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from calm.errors import BadInput
from calm.workloads.files import REFERENCE
from calm.workloads.records import WorkloadSpec
from calm.workloads.traces import FIELD, FILES, Floats, RateSeries, read_rates, read_trace

SYNTHETIC = ("poisson", "constant")
WHOLE = "whole"
MAX_REQUESTS = 1_000_000
"""More than a replay can hold; a mistyped rate must not fill memory."""

_STREAM = 1
"""Arrivals and queries of one seed are drawn from streams of their own: a change of one leaves the other."""


class Extent(NamedTuple):
    """How many, over how long. None: as the source has it."""

    requests: int | None
    duration_s: float | None


def make_arrivals(spec: WorkloadSpec, seed: int) -> tuple[float, ...]:
    """Seconds from the first arrival, which is at 0, ascending. Equal seeds give equal arrivals.

    Raises BadInput (field `arrivals`, `data`, `requests`, `duration` or `rate`) with one line: an unknown
    source, too little or too much said about the load, a trace that is missing, malformed or too short.
    """
    rng = np.random.default_rng((seed, _STREAM))
    name, _, detail = spec.arrivals.partition(":")
    if name in SYNTHETIC and not detail:
        return _seal(_synthetic(name, spec, rng))
    if name == "servegen":
        return _seal(_modulated(read_rates(detail, spec.data), spec, rng))
    if name in FILES and detail in ("", WHOLE):
        return _seal(_recorded(read_trace(name, "", spec.data), spec, rng, thinned=detail == WHOLE))
    if name == "csv" and detail:
        return _seal(_recorded(read_trace(name, detail, spec.data), spec, rng))
    raise BadInput(
        f'"{spec.arrivals}" is no arrival process; there are {", ".join((*SYNTHETIC, *FILES))} (recorded ones '
        f"also as NAME:{WHOLE}), servegen[:MODEL] and csv:FILE; see {REFERENCE}",
        field=FIELD,
    )


def extent(spec: WorkloadSpec) -> Extent:
    """What requests, duration and rate say of the first two; a rate alone says neither.

    Raises BadInput when none or all three are given, or one is out of range.
    """
    requests, duration_s, rate_rps = spec.requests, spec.duration_s, spec.rate_rps
    _check_ranges(spec)
    if requests is not None and duration_s is not None and rate_rps is not None:
        raise BadInput("give two of --requests, --duration and --rate; they say the third", field="rate")
    if requests is None and duration_s is None and rate_rps is None:
        raise BadInput("say how much: give two of --requests, --duration and --rate", field="requests")
    if rate_rps is not None and duration_s is not None:
        requests = 1 + round(min(rate_rps * duration_s, 2.0 * MAX_REQUESTS))
    elif rate_rps is not None and requests is not None:
        duration_s = (requests - 1) / rate_rps
    _check_count(requests or 1)
    return Extent(requests, duration_s)


def _check_ranges(spec: WorkloadSpec) -> None:
    if spec.requests is not None and spec.requests < 1:
        raise BadInput("--requests must be at least 1", field="requests")
    for flag, value in (("duration", spec.duration_s), ("rate", spec.rate_rps)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise BadInput(f"--{flag} must be a number above 0", field=flag)


def _check_count(requests: float) -> None:
    if requests > MAX_REQUESTS:
        raise BadInput(
            f"more than {MAX_REQUESTS:,} requests; give a smaller --requests, --rate or --duration",
            field="requests",
        )


def fit(times_s: Floats, duration_s: float) -> Floats:
    """The same arrivals from 0 to `duration_s`, stretched linearly. They must not all be at one moment."""
    shifted: Floats = times_s - times_s[0]
    if len(shifted) == 1:
        return shifted
    scaled: Floats = np.minimum(shifted / shifted[-1] * duration_s, duration_s)
    scaled[-1] = duration_s
    return scaled


def _seal(times_s: Floats) -> tuple[float, ...]:
    return tuple(times_s.tolist())


# --- synthetic ------------------------------------------------------------------------------------


def _synthetic(name: str, spec: WorkloadSpec, rng: np.random.Generator) -> Floats:
    """Poisson arrivals given how many there are and where the last one is: exponential gaps, scaled.

    (Given its count, a Poisson process is uniform on its interval, whose spacings are scaled exponentials;
    e.g. Ross, Stochastic Processes, 1996, 2.3.) So each seed has the same load and its own bursts.
    """
    requests, duration_s = extent(spec)
    if requests is None or duration_s is None:
        raise BadInput(
            f"{name} arrivals need two of --requests, --duration and --rate; they say the third",
            field="requests",
        )
    gaps = rng.standard_exponential(requests - 1) if name == "poisson" else np.ones(requests - 1)
    return fit(np.cumsum(np.append(0.0, gaps)), duration_s)


# --- recorded -------------------------------------------------------------------------------------


def _recorded(
    trace_s: Floats, spec: WorkloadSpec, rng: np.random.Generator, *, thinned: bool = False
) -> Floats:
    requests, duration_s = extent(spec)
    if requests is None and duration_s is not None:
        if thinned:
            raise BadInput(f"arrivals {spec.arrivals} need --requests, or --rate and --duration", field=FIELD)
        return _seconds_of(trace_s, duration_s, rng)
    if requests is None:
        requests, duration_s = len(trace_s), (len(trace_s) - 1) / (spec.rate_rps or 1.0)
        _check_count(requests)
    window_s = (_thinned if thinned else _consecutive)(trace_s, requests, rng)
    return window_s - window_s[0] if duration_s is None else fit(window_s, duration_s)


def _thinned(trace_s: Floats, requests: int, rng: np.random.Generator) -> Floats:
    """That many arrivals of the whole trace, each equally likely: a thinned process keeps its rate's shape.

    (Lewis and Shedler, Naval Research Logistics 1979.)
    """
    if requests > len(trace_s):
        raise _too_few(requests, trace_s)
    chosen: Floats = np.sort(rng.choice(trace_s, requests, replace=False))
    if requests > 1 and chosen[-1] == chosen[0]:
        raise BadInput("the arrivals drawn are all at one moment; give more --requests", field=FIELD)
    return chosen


def _too_few(requests: int, trace_s: Floats) -> BadInput:
    return BadInput(
        f"{requests} requests wanted, but the trace has {len(trace_s)} arrivals; give a smaller --requests",
        field=FIELD,
    )


def _consecutive(trace_s: Floats, requests: int, rng: np.random.Generator) -> Floats:
    """A window of that many arrivals, uniformly among those that are not all at one moment."""
    if requests > len(trace_s):
        raise _too_few(requests, trace_s)
    if requests == 1:
        return trace_s[:1]
    starts = np.flatnonzero(trace_s[requests - 1 :] > trace_s[: len(trace_s) - requests + 1])
    if not len(starts):
        raise BadInput(
            f"any {requests} arrivals of the trace are at one moment; give more --requests", field=FIELD
        )
    start = int(rng.choice(starts))
    return trace_s[start : start + requests]


def _seconds_of(trace_s: Floats, duration_s: float, rng: np.random.Generator) -> Floats:
    """A window of that many seconds, from an arrival on, uniformly among the arrivals it may start with."""
    last = int(np.searchsorted(trace_s, trace_s[-1] - duration_s, side="right"))
    if not last:
        covered_s = trace_s[-1] - trace_s[0]
        raise BadInput(
            f"{duration_s:g} s wanted, but the trace covers {covered_s:g} s; give --requests or --rate as well",
            field=FIELD,
        )
    start = int(rng.integers(last))
    end = int(np.searchsorted(trace_s, trace_s[start] + duration_s, side="right"))
    _check_count(end - start)
    window_s: Floats = trace_s[start:end] - trace_s[start]
    return window_s


# --- ServeGen: a rate that changes over the day, and bursts ----------------------------------------


def _modulated(series: RateSeries, spec: WorkloadSpec, rng: np.random.Generator) -> Floats:
    """Arrivals drawn from ServeGen's windows (Xiang et al. 2025, arXiv 2505.09999): Gamma gaps, rate changing.

    A stretch of the series keeps its own times; its rates are multiplied so that the number of requests comes
    out. Gaps are drawn in operational time, where the rate is 1, as a Gamma renewal process with the window's
    coefficient of variation, and carried to the clock by inverting the cumulative rate (Gerhardt and Nelson
    2009, INFORMS J. Computing 21(4)).
    """
    requests, duration_s = _extent_of_series(spec, float(series.edges_s[-1]))
    edges_s, cvs, expected = _stretch(series, _start(series, requests, duration_s, rng), duration_s)
    if requests is None:
        requests = 1 + round(float(expected[-1]))
        _check_count(requests)
    total = float(expected[-1]) if duration_s is not None else requests - 1.0
    operational = _gamma_walk(requests, total, cvs, expected, rng)
    times_s: Floats = np.maximum.accumulate(np.interp(operational, expected, edges_s))
    return times_s if duration_s is None else fit(times_s, duration_s)


def _extent_of_series(spec: WorkloadSpec, whole_s: float) -> Extent:
    """A rate alone means the whole series at that mean rate."""
    found = extent(spec)
    if found != (None, None) or spec.rate_rps is None:
        return found
    requests = 1 + round(min(spec.rate_rps * whole_s, 2.0 * MAX_REQUESTS))
    _check_count(requests)
    return Extent(requests, whole_s)


def _start(
    series: RateSeries, requests: int | None, duration_s: float | None, rng: np.random.Generator
) -> int:
    """A window with requests to start in, uniformly among those from which on the series is long enough."""
    length_s = duration_s or 0.0
    starts_s, end_s = series.edges_s[:-1], series.edges_s[-1]
    left = np.cumsum((np.diff(series.edges_s) * series.rates_rps)[::-1])[::-1]
    wanted = 0.0 if duration_s is not None or requests is None else requests - 1.0
    possible = np.flatnonzero((series.rates_rps > 0) & (starts_s + length_s <= end_s) & (left >= wanted))
    if not len(possible):
        raise BadInput(
            f"{f'{length_s:g} s' if duration_s else f'{requests} requests'} wanted, but the series covers "
            f"{end_s:g} s and {int(left[0])} requests; give less, or both --requests and --duration",
            field=FIELD,
        )
    return int(rng.choice(possible))


def _stretch(series: RateSeries, first: int, duration_s: float | None) -> tuple[Floats, Floats, Floats]:
    """From that window on: (edges from 0, CV per window, requests expected up to each edge)."""
    edges_s = series.edges_s[first:] - series.edges_s[first]
    if duration_s is not None:
        edges_s = np.append(edges_s[edges_s < duration_s], duration_s)
    windows = slice(first, first + len(edges_s) - 1)
    expected = np.cumsum(np.append(0.0, np.diff(edges_s) * series.rates_rps[windows]))
    return edges_s, series.cvs[windows], expected


def _gamma_walk(
    requests: int, total: float, cvs: Floats, expected: Floats, rng: np.random.Generator
) -> Floats:
    """Operational times from 0 to `total`; each gap has the CV of the window it is expected in."""
    if requests == 1:
        return np.zeros(1)
    due = np.arange(requests - 1) * (total / (requests - 1))
    window = np.clip(np.searchsorted(expected, due, side="right") - 1, 0, len(cvs) - 1)
    variance = np.maximum(cvs[window], 1e-3) ** 2
    gaps = rng.gamma(1.0 / variance, variance) + 1e-12  # extreme CVs underflow: never all at one moment
    return fit(np.cumsum(np.append(0.0, gaps)), total)
