"""Specialists in replay: one simulated engine for a base and its adapters, whole trials and their books."""

from __future__ import annotations

import pytest
from tests.unit.replay_setting import MB, card, house, model, poisson, workload

from calm.errors import BadInput
from calm.profile import Length
from calm.records import ModelCard
from calm.registry.adapters import completed
from calm.replay.house import House, run_trial, whole_fleet_bytes
from calm.replay.study import check_setups
from calm.report.plot_residency import residency_spans
from calm.report.records import Setup, Trial

NAMES = ("s0", "s1", "s2")
PROFILES = {
    "base": model(batching="continuous"),
    **{name: model(memory_bytes=MB, load_s=0.0, load_j=0.0, quality={"default": 0.9}) for name in NAMES},
    "other": model(quality={"default": 0.1}),
}


BASE = card("base")
CARDS = {
    "base": BASE,
    **{
        name: completed(ModelCard(name=name, description=f"{name} things", adapter_of="base"), BASE)
        for name in NAMES
    },
    "other": card("other"),
}


def made(cards: dict[str, ModelCard] = CARDS, budget_bytes: int = 220 * MB) -> House:
    return house(dict(PROFILES), cards=dict(cards), budget_bytes=budget_bytes)


def played(setup: Setup, count: int = 40, cards: dict[str, ModelCard] = CARDS) -> Trial:
    return run_trial(made(cards), poisson(1.0, count), setup)


@pytest.mark.parametrize("policy", ["calm", "random", "round-robin", "least-loaded", "oracle", "oracle:calm"])
@pytest.mark.parametrize("cache", ["calm", "lru:1", "belady", "belady:1", "none"])
def test_every_request_is_served_within_the_budget(policy: str, cache: str) -> None:
    trial = played(Setup(policy=policy, cache=cache), 25)
    assert [row.status for row in trial.rows] == ["ok"] * 25
    assert trial.peak_bytes <= trial.budget_bytes
    shares = sum(row.energy_j or 0.0 for row in trial.rows)
    assert 0.0 < shares <= (trial.energy_j or 0.0)


def test_specialists_take_turns_on_one_load() -> None:
    """One place in memory, three specialists: with copies of the base every switch would be a load."""
    trial = played(Setup(policy="round-robin", cache="lru:1"), 60)
    only = {name: CARDS[name] for name in ("base", *NAMES)}
    alone = played(Setup(policy="round-robin", cache="lru:1"), 60, only)
    assert alone.loads == 1
    assert {row.model for row in alone.rows} == set(only)
    assert trial.loads > alone.loads
    assert alone.peak_bytes == 103 * MB


def test_a_base_and_its_specialists_have_lanes_of_the_same_time_in_memory() -> None:
    trial = played(Setup(policy="random", cache="lru:1"))
    lanes = residency_spans(trial, trial.duration_s)
    assert set(lanes) == set(CARDS)
    assert lanes["s0"] == lanes["s1"] == lanes["base"] != lanes["other"]
    assert trial.loads == sum(m.new == "loading" and m.model in ("base", "other") for m in trial.moves)


def test_a_specialist_writes_at_its_own_rate_and_as_long_as_it_talks() -> None:
    slow = {**PROFILES, "s0": model(decode_tps={"1": 10.0}, output_tokens={"default": Length(mean=10)})}
    setting = house(slow, cards=dict(CARDS), budget_bytes=220 * MB)
    took = {
        name: run_trial(setting, workload([0.0]), Setup(policy=f"fixed:{name}", cache="none")).rows[0]
        for name in ("base", "s0", "s1")
    }
    assert took["s1"].total_s == pytest.approx(took["base"].total_s)
    assert took["s0"].total_s == pytest.approx(took["base"].total_s - 19 / 20 + 9 / 10)
    assert took["s0"].completion_tokens == 10


def test_the_whole_fleet_counts_its_base_once() -> None:
    assert whole_fleet_bytes(made()) == 203 * MB
    with pytest.raises(BadInput, match=r"cannot hold base \(0.10 GB\)"):
        check_setups([Setup(policy="calm", cache="calm")], made(budget_bytes=101 * MB))


def test_a_specialist_without_its_base_cannot_be_played() -> None:
    orphaned = {"s0": CARDS["s0"], "other": CARDS["other"]}
    with pytest.raises(BadInput, match="s0 runs on base"):
        run_trial(made(orphaned), workload([0.0]), Setup(policy="random", cache="lru"))
