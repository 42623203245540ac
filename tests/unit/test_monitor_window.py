"""Rates and histories: right in the mean, bounded, O(1), and the same after a restart."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm.monitor.window import WINDOW, CountWindow, Rate, Ring, Workload
from calm.records import Outcome, OutcomeStatus, Reading


def outcome(
    model: str | None, total_s: float = 1.0, status: OutcomeStatus = "ok", joules: float | None = None
) -> Outcome:
    energy = None if joules is None else Reading(joules=joules, meter="test", kind="modelled")
    return Outcome(request_id="r", model=model, status=status, wall_s=0.0, total_s=total_s, energy=energy)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=350))
def test_ring_holds_the_last_hundred(values: list[float]) -> None:
    ring = Ring()
    for value in values:
        ring.add(value)
    last = values[-WINDOW:]
    assert ring.values() == last
    assert ring.mean == pytest.approx(math.fsum(last) / len(last), rel=1e-9, abs=1e-4)
    assert ring.quantile(0.5) in last
    assert ring.quantile(1.0) == max(last)


def test_ring_ignores_what_is_not_finite() -> None:
    ring = Ring()
    ring.add(math.nan)
    ring.add(math.inf)
    assert ring.mean is None
    assert ring.quantile(0.5) is None


@pytest.mark.parametrize("rps", [0.2, 5.0, 200.0])
def test_rate_of_a_steady_stream_is_right_from_the_start(rps: float) -> None:
    rate = Rate()
    for index in range(int(30 * rps) + 1):
        rate.event(1000.0 + index / rps)
    assert rate.rps(1030.0) == pytest.approx(rps, rel=0.25)


def test_rate_halves_with_each_half_life() -> None:
    rate = Rate(half_life_s=10.0)
    rate.resume(8.0, at_s=0.0)
    assert rate.rps(0.0) == pytest.approx(8.0, rel=1e-3)
    assert rate.rps(10.0) == pytest.approx(4.0, rel=1e-3)
    assert rate.rps(1e9) == pytest.approx(0.0, abs=1e-12)


def test_rate_survives_a_clock_that_stands_still() -> None:
    rate = Rate()
    for _ in range(10):
        rate.event(5.0)
    assert 0 < rate.rps(5.0) < 100
    assert Rate().rps(3.0) == 0.0


def test_count_window_forgets_whole_seconds() -> None:
    window = CountWindow(seconds=10)
    for at_s in (0.1, 0.9, 5.5, 9.9):
        window.event(at_s)
    assert window.total(9.9) == 4
    assert window.total(10.5) == 2
    assert window.total(1000.0) == 0
    window.event(1000.0)
    assert window.total(1003.0) == 1


def test_history_is_the_paper_s_means() -> None:
    workload = Workload()
    for total_s, joules in ((1.0, 10.0), (3.0, 30.0)):
        workload.observed(outcome("m", total_s, joules=joules))
    workload.rated("m", 4)
    workload.rated("m", 9)
    history = workload.histories()["m"]
    assert (history.latency_s, history.energy_j, history.rating) == (2.0, 20.0, 4.0)
    assert history.memory_bytes is None
    assert history.observations == 2


def test_only_whole_answers_count_as_observations() -> None:
    workload = Workload()
    workload.observed(outcome("m", status="cancelled"))
    workload.observed(outcome("m", status="error"))
    workload.observed(outcome(None))
    assert workload.histories() == {}


def test_rates_by_model() -> None:
    workload = Workload()
    for second in range(60):
        workload.arrived(float(second), model="a" if second % 4 else "b")
    rates = workload.per_model_rate(60.0)
    assert workload.rate_rps(60.0) == pytest.approx(1.0, rel=0.1)
    assert workload.window_rps(59.5) == pytest.approx(1.0)
    assert rates["a"] == pytest.approx(0.75, rel=0.15)
    assert rates["a"] + rates["b"] == pytest.approx(workload.rate_rps(60.0), rel=0.05)


def test_dump_and_load_keep_histories_and_rates() -> None:
    first = Workload()
    for second in range(200):
        first.arrived(float(second), model="a")
        first.observed(outcome("a", total_s=float(second)))
    second_life = Workload()
    assert second_life.load(first.dump(200.0), at_s=7.0)
    assert second_life.histories() == first.histories()
    assert second_life.percentiles() == first.percentiles()
    assert second_life.rate_rps(7.0) == pytest.approx(first.rate_rps(200.0), rel=1e-3)


@pytest.mark.parametrize("data", [b"", b"nonsense", b"\x93\x01\x02\x03"])
def test_a_damaged_dump_is_refused(data: bytes) -> None:
    workload = Workload()
    assert not workload.load(data, 0.0)
    assert workload.histories() == {}


def test_invented_model_names_do_not_grow_without_end() -> None:
    workload = Workload()
    for index in range(5000):
        workload.chosen(f"m{index}", float(index))
    assert len(workload.per_model_rate(5000.0)) <= 4096
    workload.removed("m4999")
    assert "m4999" not in workload.per_model_rate(5000.0)
