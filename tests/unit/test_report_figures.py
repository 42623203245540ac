"""Figures and intervals: failures never flatter, unknown stays unknown, and intervals never warn."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm.report.figures import figures_of, percentile, quality_of
from calm.report.intervals import coverage, difference, interval, ratio
from calm.report.records import Row, Setup, Trial

SLO_S = 10.0
FINITE = st.floats(-1e6, 1e6, allow_nan=False)
SECONDS = st.floats(0.001, 1e4)


def row(total_s: float = 1.0, **changes: Any) -> Row:
    base: dict[str, Any] = {
        "query_id": "q", "domain": "d", "arrived_s": 0.0, "model": "a", "status": "ok", "quality": 1.0,
    }  # fmt: skip
    return Row(**(base | {"total_s": total_s} | changes))


def trial(*rows: Row, **changes: Any) -> Trial:
    base: dict[str, Any] = {
        "setup": Setup(policy="calm", cache="lru"), "seed": 0, "workload": "w", "engine": "simulated", "rows": rows,
        "duration_s": 100.0, "budget_bytes": 10, "peak_bytes": 5, "loads": 2,
    }  # fmt: skip
    return Trial(**(base | changes))


# --- failures ------------------------------------------------------------------------------------


@given(st.lists(SECONDS, min_size=1, max_size=20), st.lists(SECONDS, max_size=20))
def test_failures_change_no_latency_and_cost_completion_slo_and_quality(
    answered: list[float], failed: list[float]
) -> None:
    good = [row(seconds) for seconds in answered]
    bad = [row(seconds, status="timeout", quality=None) for seconds in failed]
    alone, together = figures_of(trial(*good), SLO_S), figures_of(trial(*good, *bad), SLO_S)
    share = len(good) / len(good + bad)
    assert (together.mean_s, together.p99_s) == (alone.mean_s, alone.p99_s)
    assert together.completed == share
    assert together.quality == pytest.approx(share)
    assert together.judged_quality == alone.judged_quality == 1.0
    assert together.slo_attainment == pytest.approx((alone.slo_attainment or 0) * share)


def test_a_quick_failure_misses_the_slo() -> None:
    assert figures_of(trial(row(0.1, status="error", quality=None)), SLO_S).slo_attainment == 0


def test_exactly_the_slo_is_in_time() -> None:
    assert figures_of(trial(row(SLO_S), row(SLO_S + 0.1)), SLO_S).slo_attainment == 0.5


def test_a_failed_request_lends_its_queueing_and_first_token_to_no_mean() -> None:
    figures = figures_of(trial(row(1, ttft_s=0.5), row(9, status="error", ttft_s=8.0, queue_s=5.0)), SLO_S)
    assert (figures.ttft_mean_s, figures.queue_mean_s) == (0.5, 0.0)


# --- quality -------------------------------------------------------------------------------------


def test_unanswered_counts_as_nothing_and_unjudgeable_not_at_all() -> None:
    rows = [row(quality=1.0), row(quality=None), row(status="rejected", quality=None)]
    assert quality_of(rows) == 0.5


def test_where_no_answer_could_be_judged_quality_is_unknown() -> None:
    assert quality_of([row(quality=None), row(status="error", quality=None)]) is None


def test_where_everything_failed_quality_is_zero() -> None:
    assert quality_of([row(status="error", quality=None)] * 3) == 0.0


# --- the rest ------------------------------------------------------------------------------------


def test_a_trial_without_requests_has_no_figures_but_its_counts() -> None:
    figures = figures_of(trial(duration_s=0.0), SLO_S)
    known = {name for name in figures.__struct_fields__ if getattr(figures, name) is not None}
    assert known == {"requests", "loads", "peak_bytes", "model_shares"}


def test_energy_is_attributed_over_metered_rows_and_total_over_all() -> None:
    rows = [row(energy_j=10.0), row(energy_j=20.0), row(energy_j=None), row(status="error", energy_j=30.0)]
    figures = figures_of(trial(*rows, energy_j=100.0), SLO_S)
    assert (figures.energy_j_per_request, figures.total_j_per_request) == (20.0, 25.0)


def test_unknown_energy_is_not_zero() -> None:
    figures = figures_of(trial(row()), SLO_S)
    assert (figures.energy_j_per_request, figures.total_j_per_request) == (None, None)


def test_hit_rate_is_over_decisions_and_shares_over_requests() -> None:
    rows = [
        row(hit=True),
        row(hit=False),
        row(hit=True, model="b"),
        row(hit=None, model=None, status="rejected"),
    ]
    figures = figures_of(trial(*rows), SLO_S)
    assert figures.hit_rate == pytest.approx(2 / 3)
    assert list(figures.model_shares.items()) == [("a", 0.5), ("b", 0.25)]


def test_throughput_counts_completed_requests() -> None:
    assert figures_of(trial(row(), row(status="error")), SLO_S).throughput_rps == pytest.approx(0.01)


def test_figures_survive_json() -> None:
    figures = figures_of(trial(row(decision_s=0.001)), SLO_S)
    assert msgspec.json.decode(msgspec.json.encode(figures), type=type(figures)) == figures


@given(st.lists(FINITE, min_size=1), st.floats(0, 100))
def test_percentiles_are_numpys_linear_ones(values: list[float], percent: float) -> None:
    assert percentile(values, percent) == float(np.percentile(values, percent, method="linear"))


# --- intervals -----------------------------------------------------------------------------------


def test_an_interval_surrounds_its_mean_and_is_the_same_again() -> None:
    found = interval([1.0, 2.0, 3.0, 4.0, 9.0])
    assert found is not None
    assert found.low is not None
    assert found.high is not None
    assert 1 < found.low < found.value == 3.8 < found.high < 9
    assert found == interval([1.0, 2.0, 3.0, 4.0, 9.0])


@given(st.lists(FINITE, min_size=2, max_size=8))
def test_no_values_make_scipy_warn_or_leave_the_range(values: list[float]) -> None:
    found = interval(values)
    assert found is not None
    slack = 1e-9 * max(1.0, *map(abs, values))
    if found.low is not None and found.high is not None:
        assert min(values) - slack <= found.low <= found.high <= max(values) + slack


def test_one_seed_has_a_value_and_no_interval() -> None:
    found = interval([None, 3.0, float("nan")])
    assert found is not None
    assert (found.value, found.low, found.high, found.n) == (3.0, None, None, 1)


@pytest.mark.parametrize("value", [0.0, 0.1, 7e9])
def test_seeds_that_agree_give_a_point(value: float) -> None:
    found = interval([value] * 5)
    assert found is not None
    assert found.low == found.high == found.value == pytest.approx(value)


def test_no_seed_no_interval() -> None:
    assert interval([]) is None
    assert interval([None]) is None
    assert difference({0: 1.0}, {1: 1.0}) is None
    assert ratio({}, {}) is None


def test_a_ratio_is_paired_by_seed() -> None:
    """Seeds differ tenfold, the candidate takes half on each: the ratio is sure of it, the seeds are not."""
    baseline = {seed: float(10**seed) for seed in range(5)}
    found = ratio({seed: value / 2 for seed, value in baseline.items()} | {9: 1e9}, baseline)
    assert found is not None
    assert found.n == 5
    assert (found.value, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))


def test_a_ratio_to_nothing_is_unknown() -> None:
    assert ratio({0: 1.0, 1: 1.0}, {0: 0.0, 1: 0.0}) is None


def test_a_ratio_to_sometimes_nothing_has_a_value_and_no_bounds() -> None:
    found = ratio({0: 1.0, 1: 2.0}, {0: 0.0, 1: 4.0})
    assert found is not None
    assert (found.value, found.high) == (0.75, None)


@given(st.lists(st.tuples(SECONDS, SECONDS), min_size=2, max_size=6))
def test_ratios_of_positive_values_never_warn(pairs: list[tuple[float, float]]) -> None:
    found = ratio({i: a for i, (a, _) in enumerate(pairs)}, {i: b for i, (_, b) in enumerate(pairs)})
    assert found is not None
    assert found.value > 0


def test_a_difference_has_a_sign() -> None:
    found = difference({0: 0.6, 1: 0.7, 2: 0.65}, {0: 0.5, 1: 0.5, 2: 0.5})
    assert found is not None
    assert found.value == pytest.approx(0.15)
    assert found.low is not None
    assert found.low > 0


def test_few_seeds_are_said_to_cover_less() -> None:
    shares = [coverage(seeds) for seeds in (1, 2, 3, 5, 10, 40)]
    assert shares[0] is None
    known = [share for share in shares if share is not None]
    assert known == sorted(known)
    assert known[-1] < 0.95
