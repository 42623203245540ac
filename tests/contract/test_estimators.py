"""One suite that every online estimator passes: learns, follows drift, stays sane, survives a restart."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from calm.analyze.energy import Energy
from calm.analyze.evidence import RowState
from calm.analyze.latency import Decode, LoadTime, Prefill
from calm.analyze.lengths import LengthPredictor
from calm.analyze.quality import Quality
from calm.analyze.tokens import TokenCounter
from calm.records import Belief, ModelCard, PriorSpec

CARD = ModelCard(
    name="m",
    description="a model",
    priors=PriorSpec(decode_tps=20.0, prefill_tps=100.0, load_s=4.0, energy_j_per_token=2.0),
)


@dataclass(frozen=True)
class Subject:
    """An estimator, how its cases are drawn, and a world it should learn."""

    make: Callable[[], Any]
    case: Callable[[random.Random], Any]
    truth: Callable[[Any], float]
    shifted: Callable[[Any], float]
    noise: float = 0.1
    garbage: tuple[float, ...] = (math.nan, math.inf, -math.inf, -1.0)
    seen: int = 150


def _added(estimator: Any, *args: Any) -> Any:
    estimator.add(0, *args)
    estimator.add(1, *args)
    return estimator


def state_of(estimator: Any) -> RowState | None:
    """Of row 0; quality, which learns field by field, tells several."""
    if isinstance(estimator, Quality):
        return estimator.states(0).get("quality")
    found: RowState | None = estimator.state(0)
    return found


def restored(estimator: Any, state: RowState) -> bool:
    known = {"quality": state} if isinstance(estimator, Quality) else state
    return bool(estimator.restore(0, known))


SUBJECTS = {
    "tokens": Subject(
        lambda: _added(TokenCounter()),
        lambda r: (float(r.randint(1, 4)), r.uniform(5, 800)),
        lambda x: 25.0 * x[0] + 1.3 * x[1],
        lambda x: 5.0 * x[0] + 0.7 * x[1],
    ),
    "lengths": Subject(
        lambda: _added(LengthPredictor(), 200.0),
        lambda r: (1.0, r.uniform(-2, 2), 0.0, float(r.random() < 0.3), r.uniform(-1, 1)),
        lambda x: math.exp(3.5 + 0.3 * x[1] - 1.0 * x[3] + 0.4 * x[4]),
        lambda x: math.exp(6.0 + 0.3 * x[1] - 1.0 * x[3] + 0.4 * x[4]),
    ),
    "load": Subject(
        lambda: _added(LoadTime(), CARD),
        lambda r: (1.0,),
        lambda x: 0.6,
        lambda x: 9.0,
    ),
    "prefill": Subject(
        lambda: _added(Prefill(), CARD),
        lambda r: (r.uniform(10, 900), float(r.randint(1, 4)), 1),
        lambda x: 0.02 + x[0] / 400 * (1 + 0.6 * (x[1] - 1)),
        lambda x: 0.05 + x[0] / 60 * (1 + 0.6 * (x[1] - 1)),
    ),
    "decode": Subject(
        lambda: _added(Decode(), CARD),
        lambda r: (float(r.randint(1, 4)), r.randint(1, 2)),
        lambda x: 0.011 * x[0] ** 0.6 * x[1] ** -0.4,
        lambda x: 0.1 * x[0] ** 0.6 * x[1] ** -0.4,
    ),
    "energy": Subject(
        lambda: _added(Energy(), 2.0),
        lambda r: (r.uniform(10, 900), r.uniform(5, 400)),
        lambda x: 3.0 + 0.02 * x[0] + 0.3 * x[1],
        lambda x: 3.0 + 0.5 * x[0] + 5.0 * x[1],
    ),
    "quality": Subject(
        lambda: _added(Quality(None), CARD),
        lambda r: None,
        lambda x: 0.8,
        lambda x: 0.2,
        noise=0.05,
        garbage=(math.nan, math.inf, -0.1, 1.1),
        seen=150,
    ),
}


@pytest.fixture(params=SUBJECTS.values(), ids=SUBJECTS.keys())
def subject(request: pytest.FixtureRequest) -> Subject:
    found: Subject = request.param
    return found


def teach(subject: Subject, estimator: Any, count: int, *, shifted: bool = False, seed: int = 1) -> None:
    draw = random.Random(seed)
    world = subject.shifted if shifted else subject.truth
    for _ in range(count):
        x = subject.case(draw)
        assert estimator.learn_one(0, x, world(x) * math.exp(draw.gauss(0, subject.noise)))


def error(subject: Subject, estimator: Any, *, shifted: bool = False, row: int = 0) -> float:
    """Mean absolute relative error on fresh cases."""
    draw = random.Random(99)
    world = subject.shifted if shifted else subject.truth
    cases = [subject.case(draw) for _ in range(50)]
    return sum(abs(estimator.predict_one(row, x).mean / world(x) - 1) for x in cases) / len(cases)


def beliefs(subject: Subject, estimator: Any, row: int = 0) -> list[Belief]:
    draw = random.Random(7)
    return [estimator.predict_one(row, subject.case(draw)) for _ in range(20)]


def test_improves_on_its_prior(subject: Subject) -> None:
    estimator = subject.make()
    before = error(subject, estimator)
    teach(subject, estimator, subject.seen)
    assert error(subject, estimator) < min(0.12, before / 2)


def test_a_dozen_observations_already_help(subject: Subject) -> None:
    estimator = subject.make()
    before = error(subject, estimator)
    teach(subject, estimator, 12)
    assert error(subject, estimator) < 0.7 * before


def test_rows_do_not_influence_each_other(subject: Subject) -> None:
    estimator = subject.make()
    before = beliefs(subject, estimator, row=1)
    teach(subject, estimator, 20)
    assert beliefs(subject, estimator, row=1) == before


def test_follows_drift(subject: Subject) -> None:
    estimator = subject.make()
    teach(subject, estimator, 300)
    teach(subject, estimator, 80, shifted=True, seed=2)
    assert error(subject, estimator, shifted=True) < 0.25


def test_spread_is_finite_never_negative_and_shrinks(subject: Subject) -> None:
    estimator = subject.make()
    before = beliefs(subject, estimator)
    teach(subject, estimator, subject.seen)
    after = beliefs(subject, estimator)
    assert all(math.isfinite(b.sd) and b.sd >= 0 and math.isfinite(b.mean) for b in before + after)
    assert sum(b.sd / b.mean for b in after) < sum(b.sd / b.mean for b in before)


def test_spread_never_winds_up_when_nothing_new_is_seen(subject: Subject) -> None:
    estimator = subject.make()
    prior = max(b.sd / max(b.mean, 1e-9) for b in beliefs(subject, estimator))
    x = subject.case(random.Random(3))
    for _ in range(3000):
        estimator.learn_one(0, x, subject.truth(x))
    assert all(math.isfinite(b.sd) for b in beliefs(subject, estimator))
    assert max(b.sd / max(b.mean, 1e-9) for b in beliefs(subject, estimator)) < 20 * prior


def test_garbage_is_refused_and_changes_nothing(subject: Subject) -> None:
    estimator = subject.make()
    teach(subject, estimator, 10)
    before = beliefs(subject, estimator)
    x = subject.case(random.Random(5))
    assert not any(estimator.learn_one(0, x, y) for y in subject.garbage)
    assert beliefs(subject, estimator) == before


def test_one_wild_observation_does_not_ruin_it(subject: Subject) -> None:
    estimator = subject.make()
    teach(subject, estimator, subject.seen)
    x = subject.case(random.Random(5))
    wild = 1.0 - subject.truth(x) if isinstance(estimator, Quality) else 50 * subject.truth(x)
    assert estimator.learn_one(0, x, wild)
    assert error(subject, estimator) < 0.25


def test_state_round_trip_predicts_identically_and_goes_on_learning(subject: Subject) -> None:
    first, second = subject.make(), subject.make()
    assert state_of(first) is None
    teach(subject, first, 40)
    state = state_of(first)
    assert state is not None
    assert restored(second, state)
    assert beliefs(subject, second) == beliefs(subject, first)
    teach(subject, first, 5, seed=8)
    teach(subject, second, 5, seed=8)
    assert beliefs(subject, second) == beliefs(subject, first)


def test_a_state_that_does_not_fit_is_refused(subject: Subject) -> None:
    import msgspec

    estimator = subject.make()
    teach(subject, estimator, 10)
    state = state_of(estimator)
    assert state is not None
    before = beliefs(subject, estimator)
    nans = np.full(len(state.vector) // 8, np.nan).tobytes()
    for bad in (
        msgspec.structs.replace(state, vector=state.vector[:-8]),
        msgspec.structs.replace(state, vector=nans),
        msgspec.structs.replace(state, precision=bytes(len(state.precision))),
        msgspec.structs.replace(state, noise=(0.0, 1.0)),
        msgspec.structs.replace(state, observations=-1),
    ):
        assert not restored(estimator, bad)
    assert beliefs(subject, estimator) == before
