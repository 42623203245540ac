"""Studies: what is refused before anything runs, the grid of hindsight, the bound on the load."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import msgspec
import pytest
from tests.unit.replay_setting import MB, SERVICE_S, card, every, house, model, workload

from calm.errors import BadInput, SourceError
from calm.records import ChatSpec, Weights
from calm.replay.study import (
    GRID_STEPS,
    best_in_hindsight,
    check_load,
    check_setups,
    chosen,
    grid,
    jobs_of,
    least_s,
    overload,
    qos_loss,
    run_jobs,
)
from calm.report.records import Row, Setup, Trial

CALM = Setup(policy="calm", cache="calm")


def setup(**fields: Any) -> Setup:
    return msgspec.structs.replace(CALM, **fields)


def trial(of: Setup, seed: int = 0, *rows: Row) -> Trial:
    return Trial(
        setup=of, seed=seed, workload="w", engine="simulated", rows=rows, duration_s=1.0, budget_bytes=1,
        peak_bytes=0, loads=0,
    )  # fmt: skip


def row(total_s: float = 1.0, quality: float | None = 1.0, **fields: Any) -> Row:
    base: dict[str, Any] = {"query_id": "q", "domain": "d", "arrived_s": 0.0, "model": "a", "status": "ok"}
    return Row(**{**base, "total_s": total_s, "quality": quality, "energy_j": 1.0, **fields})


# --- what is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"policy": "nope"}, r"no policy 'nope'.*oracle, oracle:calm, hindsight"),
        ({"policy": "fixed:nope"}, "no such model; known: a, b, c"),
        ({"policy": "paper:speed"}, "choose each mode once"),
        ({"cache": "mru"}, r"'mru' is not known.*none, belady\[:K\]"),
        ({"cache": "lru:0"}, "1 or more"),
        ({"cache": "belady:0"}, "1 or more"),
        ({"cache": "belady:³"}, "1 or more"),
        ({"cache": "belady:"}, "1 or more"),
        ({"goal": "nope"}, "nope"),
    ],
)
def test_a_setup_that_cannot_run_is_refused_in_one_line(fields: dict[str, str], said: str) -> None:
    with pytest.raises(BadInput, match=said) as refusal:
        check_setups([CALM, setup(**fields)], house())
    assert "\n" not in refusal.value.message


@pytest.mark.parametrize("policy", ["calm", "oracle", "oracle:calm", "hindsight", "random:3", "fixed:b"])
@pytest.mark.parametrize("cache", ["none", "belady", "belady:2", "lru:1", "calm"])
def test_what_can_run_is_let_through(policy: str, cache: str) -> None:
    check_setups([Setup(policy=policy, cache=cache)], house())


def test_a_budget_below_the_largest_model_is_refused_with_both_figures() -> None:
    with pytest.raises(BadInput, match=r"0\.09 GB cannot hold a \(0\.10 GB\).*all models take 0\.30 GB"):
        check_setups([CALM], house(budget_bytes=90 * MB))


def test_a_card_that_claims_more_than_the_profile_counts_in_the_budget() -> None:
    cards = {"a": card("a", memory_hint_bytes=500 * MB)}
    with pytest.raises(BadInput, match=r"cannot hold a \(0\.50 GB\)"):
        check_setups([CALM], house({"a": model()}, cards=cards, budget_bytes=200 * MB))


def test_the_paper_s_policy_needs_its_embedder() -> None:
    with pytest.raises(SourceError, match="none is configured"):
        check_setups([setup(policy="paper")], house())


def test_the_embedder_is_made_once_for_all_checks() -> None:
    made = []

    class Embedder:
        name, dimensions = "e", 2

        def embed(self, text: str) -> object:
            return (1.0, 0.0)

    def make() -> Any:
        made.append(1)
        return Embedder()

    check_setups([setup(policy="paper"), setup(policy="paper:latency")], house(minilm=make))
    assert len(made) == 1


# --- the bound on the load ------------------------------------------------------------------------------


def test_the_least_work_of_a_request_is_that_of_the_engine_at_its_best() -> None:
    assert least_s(model(), "math", 40, None) == pytest.approx(SERVICE_S + 1 / 20)
    batched = model(batching="continuous", decode_tps={"1": 20.0, "4": 60.0}, cached_tokens=10.0)
    assert least_s(batched, "math", 40, 6) == pytest.approx(0.1 + 30 / 200 + 6 / 60)
    assert least_s(model(cached_tokens=100.0), "math", 40, None) == pytest.approx(0.1 + 1.0)


def test_overload_is_least_work_over_the_machine_s_time() -> None:
    load = every(1.0, 11)
    each_s = least_s(model(), "math", 40, None)
    assert overload(["a"], house(), load) == pytest.approx(11 * each_s / 10)
    assert overload(["a", "b", "c"], house(), load) == pytest.approx(11 * each_s / 3 / 10)
    assert overload(["a", "b", "c"], house(cores=2), load) == pytest.approx(11 * each_s / 2 / 10)
    quick = house({"a": model(), "b": model(decode_tps={"1": 1e9}, overhead_s=0.0)})
    assert overload(["a", "b"], quick, load) == pytest.approx(11 * 0.2 / 2 / 10)
    terse = house({"a": model()}, cards={"a": card("a", chat=ChatSpec(answer_tokens=6))})
    assert overload(["a"], terse, load) == pytest.approx(11 * least_s(model(), "math", 40, 6) / 10)


def test_more_than_a_model_can_ever_serve_is_refused() -> None:
    load = every(0.05, 100)
    check_load([CALM], house(), load)
    with pytest.raises(BadInput, match=r"times what a can serve at best: lower --rate.*--overload"):
        check_load([CALM, setup(policy="fixed:a")], house(), load)
    with pytest.raises(BadInput, match="the fastest models together"):
        check_load([CALM], house(), every(0.001, 100))


def test_one_request_is_never_too_much() -> None:
    check_load([CALM], house(), workload([0.0]))


# --- hindsight ------------------------------------------------------------------------------------------


def test_the_grid_has_every_point_once_and_weights_that_sum_to_one() -> None:
    points = grid(setup(policy="hindsight", cache="lru"))
    assert len(set(points)) == len(points) == (GRID_STEPS + 1) * (GRID_STEPS + 2) // 2
    for point in points:
        assert point.goal is not None
        assert sum(float(pair.partition("=")[2]) for pair in point.goal.split(",")) == pytest.approx(1.0)
    assert {point.cache for point in points} == {"lru"}


def test_jobs_run_seed_by_seed_and_none_twice() -> None:
    asked = [CALM, setup(policy="hindsight"), setup(policy="hindsight", goal="energy"), CALM]
    jobs = jobs_of(asked, (0, 1))
    assert len(jobs) == len(set(jobs)) == 2 * (1 + len(grid(asked[1])))
    assert [seed for _, seed in jobs] == sorted(seed for _, seed in jobs)


def test_every_point_of_the_grid_can_run() -> None:
    built = house({"a": model(), "b": model()})
    jobs = jobs_of([setup(policy="hindsight")], (0,))
    found = list(run_jobs(jobs[:3], built, lambda seed: every(5.0, 2, seed), processes=1))
    assert [(t.setup, t.seed) for t in found] == list(jobs[:3])


def test_the_least_loss_over_all_seeds_is_chosen() -> None:
    points = grid(setup(policy="hindsight"))
    one_lucky_seed = {(points[5], 1): 1.0}
    trials = [
        trial(
            point, seed, row(quality=0.95 if point is points[3] else one_lucky_seed.get((point, seed), 0.8))
        )
        for point in points
        for seed in (0, 1)
    ]
    best = best_in_hindsight(trials, Weights(latency=0.0, energy=0.0, quality=1.0))
    assert {t.setup for t in best} == {points[3]}
    assert [t.seed for t in best] == [0, 1]
    assert best_in_hindsight([], Weights()) == ()


def test_a_study_shows_one_row_for_hindsight_in_the_order_asked() -> None:
    asked = [setup(policy="hindsight"), CALM]
    trials = [trial(inner, 0, row()) for inner in (*grid(asked[0]), CALM)]
    shown = chosen(asked, trials)
    assert [t.setup.policy for t in shown] == ["hindsight", "calm"]


def test_loss_counts_failures_as_lost_quality_and_doublings_as_octaves() -> None:
    quality = Weights(latency=0.0, energy=0.0, quality=1.0)
    served, failed = row(quality=1.0), row(quality=None, status="timeout")
    assert qos_loss(trial(CALM, 0, served, failed), quality) == pytest.approx(0.5)
    latency = Weights(latency=1.0, energy=0.0, quality=0.0)
    slow, quick = (qos_loss(trial(CALM, 0, row(total_s=s)), latency) for s in (4.0, 1.0))
    assert slow - quick == pytest.approx(2 / 4)
    assert qos_loss(trial(CALM, 0, failed), latency) == float("inf")


# --- processes ------------------------------------------------------------------------------------------


def test_leaving_early_stops_the_rest() -> None:
    """The generator is closed with jobs left over; nothing of them is run or waited for."""
    jobs = [(CALM, seed) for seed in range(50)]
    trials = run_jobs(jobs, house(), lambda seed: every(1.0, 40, seed), processes=2)
    first = next(trials)
    assert isinstance(trials, Generator)
    trials.close()
    assert first.setup == CALM
    assert next(trials, None) is None
