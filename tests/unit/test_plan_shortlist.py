"""Ranking only who may win: the first places must be those of ranking everybody."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calm.plan.columns import Array, Columns, columns_of, figures, only
from calm.plan.policies import make_policy
from calm.plan.score import Tuning
from calm.plan.shortlist import finalists
from calm.records import (
    Ask,
    Belief,
    Candidate,
    Estimate,
    Features,
    ModelCard,
    ModelState,
    Residency,
    Snapshot,
    Weights,
    Wishes,
)

PLACES = 8
RESIDENCIES: tuple[Residency, ...] = ("ready", "cold", "loading", "failed")
FEATURES = Features(
    prompt_chars=1,
    prompt_tokens=1.0,
    language="en",
    embedding=None,
    embedder=None,
    turns=1,
    max_tokens=None,
    samples=1,
    conversation=None,
    wants_json=False,
    wants_tools=False,
)


class Table(Mapping[str, Estimate]):
    """Estimates that are also columns, as the Analyzer's are."""

    def __init__(self, estimates: Mapping[str, Estimate]) -> None:
        self._estimates = dict(estimates)
        found = self._estimates.values()
        self.queue_s = column([e.queue_s.mean for e in found])
        self.total_s = column([e.total_s.mean for e in found])
        self.total_sd_s = column([e.total_s.sd for e in found])
        self.energy_j = column([e.energy_j.mean if e.energy_j else None for e in found])
        self.cost_usd = column([e.cost_usd for e in found])
        self.quality = column([e.quality.mean for e in found])
        self.quality_sd = column([e.quality.sd for e in found])

    def __getitem__(self, name: str) -> Estimate:
        return self._estimates[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._estimates)

    def __len__(self) -> int:
        return len(self._estimates)

    def only(self, names: Sequence[str]) -> Table:
        return Table({name: self._estimates[name] for name in names})


def column(values: Sequence[float | None]) -> Array:
    return np.asarray([np.nan if value is None else value for value in values], np.float64)


def ask(request_id: str = "r", **wishes: Any) -> Ask:
    return Ask(
        request_id=request_id,
        kind="chat",
        query="hello",
        prompt_chars=5,
        body={},
        requires=frozenset(),
        wishes=Wishes(**wishes),
    )


def number(draw: random.Random, *special: float | None) -> float | None:
    """Often one of a few values, so that models tie; sometimes an odd one."""
    kind = draw.random()
    if special and kind < 0.1:
        return draw.choice(special)
    return draw.choice((0.25, 1.0, 4.0)) if kind < 0.4 else draw.lognormvariate(0.0, 2.0)


def estimate(draw: random.Random, name: str) -> Estimate:
    zero = Belief(mean=0.0, sd=0.0)
    total_s, joules = number(draw, 0.0, float("nan"), float("inf"), 1e5), number(draw, None, 0.0)
    quality = draw.choice((0.3, 0.5, draw.uniform(-0.1, 1.1), float("nan")))
    return Estimate(
        model=name,
        prompt_tokens=10,
        cached_tokens=0,
        output_tokens=zero,
        queue_s=Belief(mean=draw.choice((0.0, 0.0, draw.uniform(0.0, 60.0))), sd=0.0),
        load_s=zero,
        prefill_s=zero,
        decode_s=zero,
        ttft_s=zero,
        total_s=Belief(mean=total_s or 0.0, sd=number(draw, 0.0, float("inf")) or 0.0),
        energy_j=None if joules is None else Belief(mean=joules, sd=0.0),
        quality=Belief(mean=quality, sd=draw.choice((0.0, 0.2, draw.random()))),
        cost_usd=number(draw, None, 0.0),
    )


def state(draw: random.Random, name: str) -> ModelState:
    return ModelState(
        model=name,
        residency=draw.choice(RESIDENCIES),
        pinned=draw.random() < 0.1,
        in_flight=draw.choice((0, 0, 1, 3)),
        waiting=draw.choice((0, 0, 2)),
        slots=4,
        threads=1,
        footprint_bytes=draw.choice((50, 100, draw.randint(1, 300))),
        footprint_measured=True,
        load_s=draw.choice((None, 2.0)),
        last_used_s=draw.choice((None, 40.0, 99.0)),
        failures=0,
    )


def fleet(draw: random.Random, size: int) -> tuple[dict[str, ModelCard], Table, Snapshot]:
    names = [f"m{i}" for i in draw.sample(range(1000), size)]
    cards = {
        name: ModelCard(
            name=name,
            description="",
            placement=draw.choice(("local", "remote")),
            adapter_of=draw.choice((None, None, "base")),
        )
        for name in names
    }
    states = {name: state(draw, name) for name in names if draw.random() < 0.9}
    system = Snapshot(
        revision=1,
        at_s=100.0,
        models=states,
        budget_bytes=1000,
        used_bytes=draw.choice((0, 950, 1000)),
        cores=2,
        threads_in_use=0,
        queue_length=0,
        in_flight=draw.choice((0, 3)),
        arrival_rate_rps=draw.choice((0.0, 0.5, 20.0)),
    )
    return cards, Table({name: estimate(draw, name) for name in names}), system


def some_weights(draw: random.Random) -> Weights:
    parts = [draw.choice((0.0, 0.3, 1.0, draw.random())) for _ in range(4)]
    return Weights(latency=parts[0], energy=parts[1], quality=parts[2], cost=parts[3])


def ranked(
    spec: str,
    request: Ask,
    system: Snapshot,
    cards: Mapping[str, ModelCard],
    found: Mapping[str, Estimate],
    weights: Weights = Weights(),  # noqa: B008 - immutable
) -> tuple[Candidate, ...]:
    policy = make_policy(spec, tuning=Tuning(exploration=0.2))
    few, estimates = finalists(policy, request, system, cards, found, weights, PLACES)
    return policy.rank(request, FEATURES, system, few, estimates, {}, weights)


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**32), size=st.integers(17, 300), deadline=st.booleans())
def test_the_first_places_are_those_of_ranking_everybody(seed: int, size: int, deadline: bool) -> None:
    draw = random.Random(seed)
    cards, table, system = fleet(draw, size)
    request, weights = ask(f"r{seed}", **({"deadline_s": 9.0} if deadline else {})), some_weights(draw)
    everybody = ranked("calm", request, system, cards, dict(table), weights)
    assert len(everybody) == size
    assert ranked("calm", request, system, cards, table, weights)[:PLACES] == everybody[:PLACES]


def plain(count: int, **changes: Any) -> tuple[dict[str, ModelCard], Table, Snapshot]:
    """Models that differ in nothing but their quality."""
    cards, _, system = fleet(random.Random(1), count)
    one = estimate(random.Random(3), "x")
    base = {field: getattr(one, field) for field in one.__struct_fields__}
    usual = {
        "queue_s": Belief(mean=0.0, sd=0.0),
        "total_s": Belief(mean=1.0, sd=0.5),
        "energy_j": Belief(mean=5.0, sd=0.0),
        "cost_usd": 0.0,
    }
    same = {
        name: Estimate(
            **(base | usual | {"model": name, "quality": Belief(mean=i / count, sd=0.0)} | changes)
        )
        for i, name in enumerate(cards)
    }
    idle = Snapshot(**({f: getattr(system, f) for f in system.__struct_fields__} | {"models": {}}))
    return cards, Table(same), idle


def test_of_a_large_fleet_few_are_ranked() -> None:
    cards, table, system = plain(300)
    few = ranked("calm", ask(), system, cards, table)
    assert PLACES <= len(few) <= PLACES + 8
    assert [c.model for c in few][:3] == list(cards)[:-4:-1]


def test_equals_of_the_last_place_are_all_ranked() -> None:
    cards, table, system = plain(40, quality=Belief(mean=0.5, sd=0.0))
    assert len(ranked("calm", ask(), system, cards, table)) == 40


@pytest.mark.parametrize("size", [1, 2 * PLACES])
def test_a_small_fleet_is_ranked_whole(size: int) -> None:
    cards, table, system = plain(size)
    policy = make_policy("calm")
    assert finalists(policy, ask(), system, cards, table, Weights(), PLACES) == (cards, table)


@pytest.mark.parametrize("spec", ["fixed:m1", "random:1", "round-robin", "least-loaded"])
def test_policies_that_must_see_everybody_do(spec: str) -> None:
    cards, table, system = plain(60)
    assert sorted(c.model for c in ranked(spec, ask(), system, cards, table)) == sorted(cards)


def test_plain_records_are_no_columns() -> None:
    _, table, _ = plain(3)
    assert isinstance(table, Columns)
    assert columns_of(table) is table
    assert columns_of(dict(table)) is None


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_limits_read_the_same_off_columns_and_records(seed: int) -> None:
    _, table, _ = fleet(random.Random(seed), 20)
    assert repr(list(figures(table))) == repr(list(figures(dict(table))))
    names = list(table)[3:9]
    assert list(only(table, names)) == list(only(dict(table), names)) == names
