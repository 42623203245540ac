"""One formula, two ways to run it: floats for a few models, columns for many. Both must say the same."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calm.analyze import analyzer as module
from calm.analyze.analyzer import Analyzer
from calm.analyze.evidence import Prior
from calm.analyze.maths import MANY, ONE
from calm.analyze.prediction import Forecasts
from calm.analyze.quadratic import diagonal, dot, form, full, off_diagonal_twice, outer, packed, solved
from calm.analyze.regression import Bank, lognormal, relative
from calm.analyze.wide import WideBank
from calm.plan.columns import Columns
from calm.records import (
    Ask,
    ChatSpec,
    EngineSpec,
    Estimate,
    Features,
    ModelCard,
    ModelState,
    Outcome,
    PriceSpec,
    PriorSpec,
    Reading,
    Residency,
    Snapshot,
    Vector,
)

RESIDENCIES: tuple[Residency, ...] = ("ready", "cold", "loading", "failed")


class Scatter:
    """Any text to a unit vector of its own."""

    name = "scatter"
    dimensions = 64

    def embed(self, text: str) -> Vector:
        vector = np.random.default_rng(list(text.encode())).standard_normal(self.dimensions)
        return np.asarray(vector / np.linalg.norm(vector), np.float32)


SCATTER = Scatter()


def fleet(draw: random.Random, size: int) -> dict[str, ModelCard]:
    def card(name: str) -> ModelCard:
        remote = draw.random() < 0.3
        return ModelCard(
            name=name,
            description=f"{name} knows {draw.random()}",
            domains=("math",) if draw.random() < 0.3 else (),
            placement="remote" if remote else "local",
            context=draw.choice((256, 4096)),
            engine=EngineSpec(kind="openai", url="http://127.0.0.1:1") if remote else EngineSpec(),
            price=PriceSpec(input_usd_per_mtok=draw.random()) if draw.random() < 0.5 else PriceSpec(),
            priors=PriorSpec(
                decode_tps=draw.uniform(1, 300),
                load_s=draw.uniform(0.1, 30),
                energy_j_per_token=draw.choice((None, 0.3)),
                quality={"default": draw.random()},
            ),
            chat=ChatSpec(answer_tokens=draw.choice((None, None, 1, 16))),
        )

    return {f"m{index}": card(f"m{index}") for index in range(size)}


def system(draw: random.Random, cards: dict[str, ModelCard]) -> Snapshot:
    def state(name: str, card: ModelCard) -> ModelState:
        return ModelState(
            model=name,
            residency="remote" if card.remote else draw.choice(RESIDENCIES),
            pinned=False,
            in_flight=draw.randint(0, 5),
            waiting=draw.randint(0, 2),
            slots=4,
            threads=draw.randint(0, 4),
            footprint_bytes=draw.randint(1, 100),
            footprint_measured=True,
            load_s=None,
            last_used_s=None,
            failures=0,
            waiting_work_s=draw.choice((0.0, 3.0)),
        )

    return Snapshot(
        revision=1,
        at_s=0.0,
        models={name: state(name, card) for name, card in cards.items() if draw.random() < 0.9},
        budget_bytes=120,
        used_bytes=60,
        cores=4,
        threads_in_use=draw.randint(0, 4),
        queue_length=0,
        in_flight=0,
    )


def request(draw: random.Random) -> tuple[Ask, Features]:
    query = f"question {draw.random()}"
    ask = Ask(
        request_id=query,
        kind=draw.choice(("chat", "chat", "embeddings")),
        query=query,
        prompt_chars=1,
        body={},
        requires=frozenset(),
        max_tokens=draw.choice((None, 1, 200)),
        samples=draw.choice((1, 3)),
    )
    return ask, Features(
        prompt_chars=1,
        prompt_tokens=draw.uniform(1, 5000),
        language="en",
        embedding=SCATTER.embed(query),
        embedder=SCATTER.name,
        turns=draw.randint(1, 9),
        max_tokens=ask.max_tokens,
        samples=ask.samples,
        conversation=draw.choice((None, "talk")),
        wants_json=draw.random() < 0.3,
        wants_tools=False,
    )


def teach(draw: random.Random, analyzer: Analyzer, names: list[str], lessons: int) -> None:
    for _ in range(lessons):
        ask, features = request(draw)
        name = draw.choice(names)
        outcome = Outcome(
            request_id="r",
            model=name,
            status="ok",
            wall_s=0.0,
            ttft_s=draw.uniform(0.01, 2),
            total_s=draw.uniform(2, 60),
            prompt_tokens=draw.randint(1, 3000),
            completion_tokens=draw.randint(1, 500),
            concurrency=draw.randint(1, 4),
            finish_reason=draw.choice(("stop", "length")),
            energy=Reading(joules=draw.uniform(0.1, 50), meter="t", kind="measured"),
        )
        analyzer.learn(ask, features, None, outcome, draw.randint(1, 4))
        analyzer.loaded(draw.choice(names), draw.uniform(0.1, 9))
        analyzer.rate(features, draw.choice(names), draw.uniform(1, 5))


def assert_same(one: Estimate, other: Estimate) -> None:
    """Means to nine digits. A spread is the root of a cancelling difference: what the last digits of its terms

    differ by (numpy's exp and tanh are not libm's) comes out as the root of it, about 1e-7 of the mean.
    """
    ours, theirs = msgspec.to_builtins(one), msgspec.to_builtins(other)
    assert ours.keys() == theirs.keys()
    assert ours.pop("model") == theirs.pop("model")
    for key, value in ours.items():
        if isinstance(value, dict):
            assert theirs[key]["mean"] == pytest.approx(value["mean"], rel=1e-9, abs=1e-12), key
            assert theirs[key]["sd"] == pytest.approx(
                value["sd"], rel=1e-9, abs=1e-6 * max(1.0, value["mean"])
            ), key
        elif value is None:
            assert theirs[key] is None, key
        else:
            assert theirs[key] == pytest.approx(value, rel=1e-9, abs=1e-12), key


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.integers(1, 6), lessons=st.integers(0, 40))
def test_floats_and_columns_predict_the_same(seed: int, size: int, lessons: int) -> None:
    draw = random.Random(seed)
    cards = fleet(draw, size)
    analyzer = Analyzer(SCATTER)
    analyzer.sync(cards)
    teach(draw, analyzer, list(cards), lessons)
    (ask, features), snapshot = request(draw), system(draw, cards)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "FEW", size)
        few = analyzer.estimate_all(ask, features, snapshot, cards)
        patch.setattr(module, "FEW", 0)
        many = analyzer.estimate_all(ask, features, snapshot, cards)
    assert list(few) == list(many) == list(cards)
    for name in cards:
        assert_same(few[name], many[name])


@pytest.mark.parametrize("few", [0, 100])
def test_a_lesson_shows_at_once_on_both_ways(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FEW", few)
    draw = random.Random(1)
    cards = fleet(draw, 3)
    analyzer = Analyzer(SCATTER)
    ask, features = request(draw)
    snapshot = system(draw, cards)
    before = analyzer.estimate_all(ask, features, snapshot, cards)
    teach(draw, analyzer, ["m1"], 3)
    after = analyzer.estimate_all(ask, features, snapshot, cards)
    assert (after["m0"], after["m2"]) == (before["m0"], before["m2"])
    assert after["m1"].total_s != before["m1"].total_s
    analyzer.changed(replaced(cards["m1"]))
    assert analyzer.estimate_all(ask, features, snapshot, cards)["m1"].prefill_s == before["m1"].prefill_s


@pytest.mark.parametrize("embedder", [None, SCATTER])
def test_any_part_of_a_fleet_in_any_order_is_predicted_the_same(embedder: Scatter | None) -> None:
    draw = random.Random(7)
    cards = fleet(draw, 60)
    analyzer = Analyzer(embedder)
    analyzer.sync(cards)
    teach(draw, analyzer, list(cards), 60)
    for name in ("m3", "m50"):  # their rows go to others
        analyzer.remove(name)
        del cards[name]
    cards["new"] = msgspec.structs.replace(cards["m7"], name="new")
    (ask, features), snapshot = request(draw), system(draw, cards)
    whole = analyzer.estimate_all(ask, features, snapshot, cards)
    for size in (17, 40, len(cards)):
        names = draw.sample(list(cards), size)
        part = analyzer.estimate_all(ask, features, snapshot, {name: cards[name] for name in names})
        assert list(part) == names
        for name in names:
            quality = part[name].quality  # summed in single precision, and the order of sums is BLAS's
            assert quality.mean == pytest.approx(whole[name].quality.mean, abs=1e-6)
            assert_same(msgspec.structs.replace(part[name], quality=whole[name].quality), whole[name])


def test_a_large_fleets_estimates_are_records_and_columns() -> None:
    draw = random.Random(3)
    cards = fleet(draw, 30)
    (ask, features), snapshot = request(draw), system(draw, cards)
    found = Analyzer(SCATTER).estimate_all(ask, features, snapshot, cards)
    assert isinstance(found, Forecasts)
    assert isinstance(found, Columns)
    assert len(found) == 30
    assert found["m4"] is found["m4"]
    assert "nobody" not in found
    assert found.total_s.tolist() == [e.total_s.mean for e in found.values()]
    assert found.total_sd_s.tolist() == [e.total_s.sd for e in found.values()]
    assert found.quality.tolist() == [e.quality.mean for e in found.values()]
    assert found.quality_sd.tolist() == [e.quality.sd for e in found.values()]
    assert unknown_as_none(found.energy_j) == [
        e.energy_j.mean if e.energy_j else None for e in found.values()
    ]
    assert unknown_as_none(found.cost_usd) == [e.cost_usd for e in found.values()]
    few = found.only(["m9", "m2"])
    assert dict(few) == {"m9": found["m9"], "m2": found["m2"]}
    assert few.total_s.tolist() == [found["m9"].total_s.mean, found["m2"].total_s.mean]


def test_a_later_lesson_changes_no_earlier_estimate() -> None:
    draw = random.Random(5)
    cards = fleet(draw, 30)
    analyzer = Analyzer(SCATTER)
    (ask, features), snapshot = request(draw), system(draw, cards)
    one, other = (analyzer.estimate_all(ask, features, snapshot, cards) for _ in range(2))
    before = dict(one)
    teach(draw, analyzer, list(cards), 60)
    assert dict(other) == before


def unknown_as_none(column: np.typing.NDArray[np.float64]) -> list[float | None]:
    return [None if math.isnan(value) else value for value in column.tolist()]


def replaced(card: ModelCard) -> ModelCard:
    """The same card on another engine: nothing learned holds for it."""
    return msgspec.structs.replace(card, engine=msgspec.structs.replace(card.engine, cmd="other"))


def positive(draw: random.Random, d: int) -> np.typing.NDArray[np.float64]:
    root = np.asarray([[draw.gauss(0, 1) for _ in range(d)] for _ in range(d)])
    return np.asarray(root @ root.T + 0.1 * np.eye(d))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), d=st.integers(1, 6))
def test_packed_algebra_is_that_of_matrices(seed: int, d: int) -> None:
    draw = random.Random(seed)
    matrix, z = positive(draw, d), [draw.gauss(0, 2) for _ in range(d)]
    triangle = packed(matrix)
    assert full(triangle, d) == pytest.approx(matrix)
    doubled = [a * b for a, b in zip(triangle, off_diagonal_twice(d), strict=True)]
    assert form(doubled, z) == pytest.approx(float(z @ matrix @ np.asarray(z)))
    assert dot(z, z) == pytest.approx(sum(v * v for v in z))
    assert full(outer(z), d) == pytest.approx(np.outer(z, z))
    assert full(diagonal(z), d) == pytest.approx(np.diag(z))
    solution, inverse = solved(triangle, z)
    assert list(solution) == pytest.approx(list(np.linalg.solve(matrix, z)), rel=1e-6, abs=1e-9)
    assert full(inverse, d) == pytest.approx(np.linalg.inv(matrix), rel=1e-6, abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), d=st.integers(1, 6), lessons=st.integers(0, 30))
def test_small_and_wide_regressions_are_one_method(seed: int, d: int, lessons: int) -> None:
    draw = random.Random(seed)
    prior = Prior(mean=(0.0,) * d, strength=tuple(draw.uniform(0.1, 3) for _ in range(d)), noise_sd=0.3)
    small, wide = Bank(prior, 0.97), WideBank(prior, 0.97)
    small.reset(0)
    wide.grow(1)
    for lesson in range(lessons):
        z = [draw.gauss(0, 1) for _ in range(d)]
        y = sum(z) + draw.gauss(0, 0.3) + (5.0 if lesson > 20 else 0.0)  # a shift, to trip the guards
        assert small.learn_one(0, z, y)
        assert wide.learn_one(0, np.asarray(z), y)
    z = [draw.gauss(0, 1) for _ in range(d)]
    mean, variance, noise = small.predict_one(0, z)
    means, variances = wide.predict_same(np.asarray([0]), np.asarray(z))
    assert mean == pytest.approx(float(means[0]), rel=1e-3, abs=1e-4)  # single precision's covariances
    assert variance == pytest.approx(float(variances[0]), rel=1e-3, abs=1e-5)
    assert math.sqrt(noise) == pytest.approx(wide.noise_sd(0), rel=1e-3)


def test_a_regression_that_rounding_made_singular_still_answers() -> None:
    bank = Bank(replace(PRIOR, strength=(1e-12, 1e-12)), 0.999)
    bank.reset(0)
    for _ in range(5):
        assert bank.learn_one(0, (1e3, 1e3 + 1e-6), 1.0)
    assert all(math.isfinite(number) for number in bank.predict_one(0, (1.0, 1.0)))


@pytest.mark.parametrize("z", [(math.nan, 1.0), (1.0, math.inf), (1e9, 1.0), (-1e9, 1.0)])
def test_absurd_features_are_refused(z: tuple[float, float]) -> None:
    bank = Bank(PRIOR, 0.98)
    bank.reset(0)
    before = bank.of(0)
    assert not bank.learn_one(0, z, 1.0)
    assert bank.of(0) == before


PRIOR = Prior(mean=(1.0, 1.0), strength=(1.0, 1.0), noise_sd=0.3)


def test_columns_grow_with_the_fleet_and_follow_every_reset() -> None:
    bank = Bank(PRIOR, 0.98)
    for size in (1, 2, 9, 40):
        bank.reset(size - 1, mean=(float(size), 0.5), units=(2.0, 3.0))
        assert bank.learn_one(size - 1, (0.5, 0.5), 4.0)
        rows = np.asarray([size - 1, 0])
        columns = relative(MANY, bank.over(rows), (1.0, 2.0))
        for place, row in enumerate(rows.tolist()):
            expected = relative(ONE, bank.of(row), (1.0, 2.0))
            assert [float(part[place]) for part in columns] == pytest.approx(list(expected))
    assert lognormal(ONE, bank.of(0), (1e3, 1e3))[0] == pytest.approx(math.exp(30.0))  # never overflows
