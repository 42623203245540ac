"""Figures are found again in data that were made from them, exactly, and nearly so beside outliers."""

from __future__ import annotations

import math
import random
from statistics import NormalDist

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm.bench.fitting import (
    aggregate_rate,
    length_of,
    line,
    log_spread,
    prefill_rate,
    relative_spread,
    rounded,
    service_s,
    slowdown,
)

RATES = st.floats(1.0, 5000.0)
OVERHEADS = st.floats(0.0, 2.0)
LENGTHS = st.lists(st.integers(1, 4000), min_size=2, max_size=30, unique=True)


@given(st.floats(0.0, 200.0), st.floats(0.01, 50.0), LENGTHS)
def test_a_line_is_recovered(intercept: float, slope: float, xs: list[int]) -> None:
    found = line([(x, intercept + slope * x) for x in xs])
    assert found == pytest.approx((intercept, slope), rel=1e-3, abs=1e-3 * (intercept + slope * max(xs)))


@given(RATES, OVERHEADS, LENGTHS)
def test_a_prefill_rate_is_recovered(tps: float, overhead_s: float, lengths: list[int]) -> None:
    points = [(n, overhead_s + n / tps) for n in lengths]
    found_tps, found_s = prefill_rate(points)
    for n, seconds in points:
        assert found_s + n / found_tps == pytest.approx(seconds, rel=1e-3)


@given(st.floats(20.0, 500.0), st.floats(0.0, 0.1), st.floats(2.0, 20.0))
def test_a_few_prompts_that_took_far_too_long_move_nothing(
    tps: float, overhead_s: float, times: float
) -> None:
    lengths = [10, 20, 35, 50, 75, 100, 150, 200, 300, 400, 600]
    points = [(n, overhead_s + n / tps) for n in lengths]
    for place in (2, 7):
        n, seconds = points[place]
        points[place] = (n, seconds * times)
    found_tps, found_s = prefill_rate(points)
    assert found_tps == pytest.approx(tps, rel=0.02)
    assert found_s == pytest.approx(overhead_s, abs=0.02 * (overhead_s + 10 / tps) + 1e-6)


@given(st.lists(st.tuples(st.floats(0, 1e4), st.floats(0.001, 1e4)), min_size=1, max_size=20))
def test_no_line_has_a_negative_part(points: list[tuple[float, float]]) -> None:
    intercept, slope = line(points)
    assert intercept >= 0
    assert slope >= 0
    assert math.isfinite(intercept + slope)


def test_lines_through_too_little() -> None:
    assert line([(4, 2.0)]) == pytest.approx((0.0, 0.5))
    assert line([(0, 2.0)]) == (2.0, 0.0)
    with pytest.raises(ValueError, match="no point"):
        line([(1, 0.0)])
    with pytest.raises(ValueError, match="longer prompts"):
        prefill_rate([(10, 1.0), (20, 0.5), (40, 0.2)])


@given(st.integers(1, 8), st.floats(1.0, 500.0), st.integers(3, 60))
def test_the_rate_of_sequences_that_decode_together(count: int, each_tps: float, tokens: int) -> None:
    """Started one after the other by less than they overlap; prompts are read before the first token."""
    step_s = 1 / each_tps
    offsets = [index * step_s * 0.01 for index in range(count)]
    arrivals = [[offset + n * step_s for n in range(tokens)] for offset in offsets]
    found = aggregate_rate(arrivals)
    assert found is not None
    exact = count * each_tps
    assert found == pytest.approx(exact, rel=2 / (tokens - 1))


def test_sequences_that_never_met_have_no_common_rate() -> None:
    assert aggregate_rate([[0.0, 1.0], [2.0, 3.0]]) is None
    assert aggregate_rate([[0.0, 1.0], [0.5]]) is None
    assert aggregate_rate([[0.0, 0.0]]) is None
    assert aggregate_rate([]) is None


@given(st.floats(0.01, 1.0), st.integers(0, 1000))
def test_the_spread_of_a_lognormal_is_its_sigma(sigma: float, seed: int) -> None:
    quantiles = [math.exp(sigma * NormalDist().inv_cdf((i + 0.5) / 400)) for i in range(400)]
    random.Random(seed).shuffle(quantiles)
    assert log_spread(quantiles) == pytest.approx(sigma, rel=0.02)
    scaled = [3.0 * q for q in quantiles]
    assert relative_spread(scaled) == pytest.approx(sigma, rel=0.02)
    assert log_spread([*quantiles, 1e6]) == pytest.approx(sigma, rel=0.03)


def test_one_value_has_no_spread() -> None:
    assert log_spread([2.0]) == relative_spread([]) == relative_spread([3.0]) == 0.0


@given(st.lists(st.floats(0.1, 10.0), max_size=9))
def test_company_never_speeds_up(ratios: list[float]) -> None:
    assert slowdown(ratios) >= 1.0


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=50))
def test_lengths_are_at_least_one_token(tokens: list[int]) -> None:
    found = length_of(tokens)
    assert found.mean >= 1
    assert found.sd >= 0


def test_no_answers_have_no_length() -> None:
    with pytest.raises(ValueError, match="no answer"):
        length_of([])


def test_the_first_token_comes_with_the_prompt() -> None:
    rates = {"overhead_s": 0.5, "prefill_tps": 10.0, "decode_tps": 4.0}
    assert service_s(20, 1, **rates) == 2.5
    assert service_s(20, 9, **rates) == 4.5


def test_figures_are_rounded_to_digits_not_to_places() -> None:
    assert rounded(0.000123456) == 0.0001235
    assert rounded(123456.0) == 123500.0
