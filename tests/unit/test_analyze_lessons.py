"""What an outcome may teach, case by case, and the lognormal arithmetic under lengths."""

from __future__ import annotations

import math
import random

import msgspec
import numpy as np
import pytest

from calm.analyze import lessons
from calm.analyze.calibration import Calibration
from calm.analyze.checkpoint import Memory, ModelMemory, decode, encode
from calm.analyze.lengths import LengthPredictor, capped_lognormal, normal_cdf, tail_mean
from calm.analyze.maths import MANY
from calm.records import Belief, Outcome, Reading

OK = Outcome(
    request_id="r",
    model="m",
    status="ok",
    wall_s=0.0,
    queue_s=1.0,
    load_s=2.0,
    ttft_s=3.5,
    total_s=13.5,
    prompt_tokens=100,
    cached_tokens=40,
    completion_tokens=101,
    energy=Reading(joules=50.0, meter="t", kind="measured"),
    finish_reason="stop",
)
CHANGED = msgspec.structs.replace


def test_a_whole_answer_teaches_everything() -> None:
    assert lessons.uncached_tokens(OK) == 60
    assert lessons.prefill_s(OK) == pytest.approx(0.5)
    assert lessons.tpot_s(OK, 1, None) == pytest.approx(0.1)
    assert lessons.length(OK, 1) == (101, False)
    assert lessons.joules(OK) == (50.0, 60.0, 101.0)
    assert lessons.service_s(OK) == pytest.approx(10.5)


def test_the_engine_s_own_prompt_time_wins() -> None:
    assert lessons.prefill_s(CHANGED(OK, prefill_s=0.3)) == 0.3


def test_side_by_side_samples_share_the_time() -> None:
    assert lessons.tpot_s(CHANGED(OK, completion_tokens=202), 2, None) == pytest.approx(0.1)
    assert lessons.length(CHANGED(OK, completion_tokens=202), 2) == (101, False)


def test_a_cancelled_answer_teaches_speed_but_no_length_and_no_energy() -> None:
    cancelled = CHANGED(OK, status="cancelled")
    assert lessons.prefill_s(cancelled) == pytest.approx(0.5)
    assert lessons.tpot_s(cancelled, 1, None) == pytest.approx(0.1)
    assert lessons.length(cancelled, 1) is None
    assert lessons.joules(cancelled) is None


@pytest.mark.parametrize("status", ["error", "rejected"])
def test_a_failure_teaches_nothing(status: str) -> None:
    failed = CHANGED(OK, status=status)
    assert lessons.prefill_s(failed) is None
    assert lessons.tpot_s(failed, 1, 0.5) is None
    assert lessons.length(failed, 1) is None
    assert lessons.service_s(failed) is None


def test_without_streaming_the_prompt_s_expected_time_is_taken_off() -> None:
    whole = CHANGED(OK, ttft_s=None)
    assert lessons.prefill_s(whole) is None
    assert lessons.tpot_s(whole, 1, 0.5) == pytest.approx(0.1)
    assert lessons.tpot_s(whole, 1, None) is None
    assert lessons.tpot_s(CHANGED(whole, status="cancelled"), 1, 0.5) is None


def test_unknown_counts_stay_unknown() -> None:
    blind = CHANGED(OK, prompt_tokens=None, completion_tokens=None)
    assert lessons.uncached_tokens(blind) is None
    assert lessons.tpot_s(blind, 1, None) is None
    assert lessons.joules(blind) is None


def test_a_few_tokens_measure_no_decoder() -> None:
    assert lessons.tpot_s(CHANGED(OK, completion_tokens=2), 1, None) is None


def test_an_answer_cut_off_is_censored() -> None:
    assert lessons.length(CHANGED(OK, finish_reason="length"), 1) == (101, True)


def test_capped_lognormal_agrees_with_simulation() -> None:
    draws = np.exp(np.random.default_rng(0).normal(4.0, 0.8, 200_000))
    for cap in (10.0, 60.0, 300.0, math.inf):
        mean, sd = capped_lognormal(MANY, np.asarray([4.0]), np.asarray([0.8]), np.asarray([cap]))
        cut = np.minimum(draws, cap)
        assert mean[0] == pytest.approx(cut.mean(), rel=0.02)
        assert sd[0] == pytest.approx(cut.std(), rel=0.05, abs=0.04 * min(cap, 100))


def test_normal_cdf_and_tail_mean() -> None:
    z = np.asarray([-60.0, -3.0, 0.0, 1.64, 60.0])
    exact = [0.5 * math.erfc(-value / math.sqrt(2)) for value in z]
    assert normal_cdf(MANY, z) == pytest.approx(exact, abs=3e-4)
    assert tail_mean(0.0, 1.0, 0.0) == pytest.approx(math.sqrt(2 / math.pi))
    assert tail_mean(0.0, 1.0, 50.0) == pytest.approx(50.0, abs=0.1)
    assert tail_mean(0.0, 1.0, -50.0) == pytest.approx(0.0, abs=1e-6)


def test_censored_lengths_are_not_taken_for_the_whole() -> None:
    draw = random.Random(0)
    plain, aware = LengthPredictor(), LengthPredictor()
    for estimator in (plain, aware):
        estimator.add(0, 64.0)
    x = (1.0, 0.0, 0.0, 0.0, 0.0)
    for _ in range(300):
        length = math.exp(draw.gauss(math.log(200), 0.6))
        plain.learn_one(0, x, min(length, 128.0))
        aware.learn_one(0, x, min(length, 128.0), censored=length >= 128.0)
    truth = 200 * math.exp(0.18)
    assert abs(aware.predict_one(0, x).mean - truth) < abs(plain.predict_one(0, x).mean - truth)
    assert aware.predict_one(0, x, cap=128.0).mean <= 128.0


def test_calibration_reports_error_bias_and_coverage() -> None:
    calibration = Calibration(window=4)
    for observed in (1.0, 2.0, 2.0, 2.0, 4.0):
        calibration.saw("m", "total_s", Belief(mean=2.0, sd=0.1), observed)
    calibration.saw("m", "energy_j", None, 3.0)
    calibration.saw("m", "ttft_s", Belief(mean=1.0, sd=1.0), None)
    report = calibration.report()
    assert set(report["m"]) == {"total_s"}
    accuracy = report["m"]["total_s"]
    assert (accuracy.observations, accuracy.mape, accuracy.coverage, accuracy.bias) == (
        4,
        0.125,
        0.75,
        -0.125,
    )
    calibration.forget("m")
    assert calibration.report() == {}


@pytest.mark.parametrize(
    "damage", [lambda d: b"", lambda d: d[:-1], lambda d: b"X" + d[1:], lambda d: d[:40] + b"!" + d[41:]]
)
def test_a_damaged_checkpoint_is_none(damage: object) -> None:
    data = encode(Memory("basis", {"m": ModelMemory("id", {})}))
    assert decode(data) is not None
    assert callable(damage)
    assert decode(damage(data)) is None
