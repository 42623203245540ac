"""Whole trials: what goes in comes out, baselines meet theory, and the books balance."""

from __future__ import annotations

import asyncio
from itertools import accumulate
from random import Random
from statistics import fmean
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.replay_setting import (
    MB,
    SERVICE_S,
    TOKENS,
    card,
    every,
    house,
    model,
    poisson,
    workload,
)

from calm.clock import ManualClock
from calm.errors import BadInput
from calm.profile import Length, MachineProfile
from calm.records import ChatSpec, EngineSpec
from calm.replay.house import House, run_trial
from calm.replay.machine import SimulatedMachine, Work
from calm.replay.simtime import run_simulated
from calm.replay.study import run_jobs
from calm.report.records import Row, Setup, Trial
from calm.workloads.records import Workload
from calm.workloads.workload import rated

CALM = Setup(policy="calm", cache="calm")
FIXED = Setup(policy="fixed:a", cache="none")
UNEQUAL = {
    "a": model(quality={"default": 0.3}, decode_tps={"1": 60.0}),
    "b": model(quality={"default": 0.6}, memory_bytes=60 * MB, load_jitter=0.2),
    "c": model(quality={"default": 0.9}, memory_bytes=140 * MB, batching="continuous", jitter=0.2),
}


def rows_of(trial: Trial, status: str = "ok") -> list[Row]:
    return [row for row in trial.rows if row.status == status]


def lindley_s(arrivals_s: tuple[float, ...], service_s: float) -> list[float]:
    """Times in a first-come, first-served queue with one server."""
    free_s, found = 0.0, []
    for arrived_s in arrivals_s:
        free_s = max(free_s, arrived_s) + service_s
        found.append(free_s - arrived_s)
    return found


# --- every request has a row ------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["calm", "random", "round-robin", "least-loaded", "oracle", "oracle:calm"])
@pytest.mark.parametrize("cache", ["calm", "lru:2", "belady", "none"])
def test_every_request_has_a_row_in_the_order_asked(policy: str, cache: str) -> None:
    load = poisson(1.0, 25)
    trial = run_trial(house(UNEQUAL), load, Setup(policy=policy, cache=cache))
    assert [row.query_id for row in trial.rows] == [query.id for query in load.queries]
    assert [row.arrived_s for row in trial.rows] == pytest.approx(load.arrivals_s)
    assert {row.status for row in trial.rows} == {"ok"}
    assert all(row.completion_tokens == TOKENS for row in trial.rows)
    assert all(row.quality is not None and row.energy_j is not None for row in trial.rows)
    assert (trial.engine, trial.seed, trial.setup.policy) == ("simulated", 0, policy)


@settings(max_examples=12)
@given(
    st.lists(st.floats(0.0, 3.0), min_size=1, max_size=15),
    st.sampled_from(["calm", "random", "least-loaded"]),
    st.sampled_from(["calm", "lru", "lfu:1", "fifo"]),
    st.sampled_from(["fifo", "stcf"]),
    st.integers(1, 4),
)
def test_the_books_balance(gaps_s: list[float], policy: str, cache: str, queue: str, cores: int) -> None:
    load = workload(list(accumulate(gaps_s)))
    trial = run_trial(house(UNEQUAL, cores=cores), load, Setup(policy=policy, cache=cache, queue=queue))
    assert len(rows_of(trial)) == len(load.queries)
    assert trial.peak_bytes <= trial.budget_bytes
    assert all(sample.used_bytes <= trial.budget_bytes for sample in trial.samples)
    assert trial.loads == sum(move.new == "loading" for move in trial.moves)
    assert all(0 <= move.at_s <= trial.duration_s for move in trial.moves), "tearing down is no part of it"
    assert trial.energy_j is not None
    assert sum(row.energy_j or 0.0 for row in trial.rows) <= trial.energy_j + 1e-6
    assert all(row.total_s >= (row.ttft_s or 0.0) >= row.queue_s + row.load_s - 1e-6 for row in trial.rows)


def test_a_trial_is_a_function_of_its_arguments() -> None:
    built, load = house(UNEQUAL, feedback=0.5), poisson(1.5, 40)
    for setup in (CALM, Setup(policy="random", cache="lru:2")):
        assert run_trial(built, load, setup) == run_trial(built, load, setup)


def test_processes_change_no_figure() -> None:
    built = house(UNEQUAL)
    jobs = [(CALM, 0), (Setup(policy="random", cache="lru"), 1)]

    def found(processes: int) -> dict[tuple[Setup, int], Trial]:
        trials = run_jobs(jobs, built, lambda seed: poisson(1.5, 20, seed), processes)
        return {(trial.setup, trial.seed): trial for trial in trials}

    assert found(1) == found(2)


# --- against theory -----------------------------------------------------------------------------------


def test_an_idle_resident_model_serves_in_its_own_time() -> None:
    trial = run_trial(house(), every(10.0, 5), FIXED)
    assert [row.total_s for row in trial.rows] == pytest.approx([SERVICE_S] * 5)
    assert [row.ttft_s for row in trial.rows] == pytest.approx([0.3] * 5)
    assert {row.hit for row in trial.rows} == {True}
    assert trial.loads == 0


def test_the_first_request_of_a_cold_model_waits_for_its_load() -> None:
    trial = run_trial(house(), every(10.0, 3), Setup(policy="fixed:a", cache="lru"))
    assert [row.total_s for row in trial.rows] == pytest.approx([1.0 + SERVICE_S, SERVICE_S, SERVICE_S])
    assert [row.load_s for row in trial.rows] == pytest.approx([1.0, 0.0, 0.0])
    assert [row.hit for row in trial.rows] == [False, True, True]
    assert trial.loads == 1
    assert trial.peak_bytes == 100 * MB


def test_a_serial_engine_is_a_first_come_first_served_queue() -> None:
    load = poisson(0.7 / SERVICE_S, 200)
    trial = run_trial(house(), load, FIXED)
    assert [row.total_s for row in trial.rows] == pytest.approx(
        lindley_s(load.arrivals_s, SERVICE_S), abs=1e-5
    )


def test_such_a_queue_has_the_wait_of_m_d_1() -> None:
    """rho D / (2 (1 - rho)), Pollaczek and Khinchine; on the engine itself, because it takes many requests."""
    clock, service_s, rho, count = ManualClock(), 1.0, 0.5, 20_000
    simulated = SimulatedMachine(MachineProfile(name="m", cores=1), clock)
    engine, random, waits_s = simulated.make(model()), Random(3), []

    async def client() -> None:
        arrived_s, work = clock.now(), Work(service_s, 1, 1.0)
        engine.admit(work)
        await work.done
        waits_s.append(clock.now() - arrived_s - service_s)

    async def main() -> None:
        clients = []
        for _ in range(count):
            await asyncio.sleep(random.expovariate(rho / service_s))
            clients.append(asyncio.create_task(client()))
        await asyncio.gather(*clients)

    run_simulated(main(), clock)
    assert fmean(waits_s) == pytest.approx(rho * service_s / (2 * (1 - rho)), rel=0.05)


def test_cores_let_so_many_engines_work_at_once() -> None:
    burst = workload([0.0, 0.0, 0.0])
    one, three = (
        run_trial(house(cores=cores), burst, Setup(policy="round-robin", cache="none")) for cores in (1, 3)
    )
    assert sorted(row.total_s for row in one.rows) == pytest.approx([SERVICE_S * i for i in (1, 2, 3)])
    assert [row.total_s for row in three.rows] == pytest.approx([SERVICE_S] * 3)


def test_a_batch_is_faster_than_a_queue() -> None:
    batched = model(batching="continuous", decode_tps={"1": 20.0, "4": 60.0})
    burst = workload([0.0] * 4)
    trial = run_trial(house({"a": batched}), burst, Setup(policy="fixed:a", cache="none"))
    assert max(row.total_s for row in trial.rows) == pytest.approx(4 * 0.3 + (TOKENS - 1) * 4 / 60)


def test_a_prefix_that_the_engine_has_is_not_read_again() -> None:
    trial = run_trial(house({"a": model(cached_tokens=20.0)}), every(10.0, 2), FIXED)
    assert [row.ttft_s for row in trial.rows] == pytest.approx([0.3, 0.3 - 20 / 200])


# --- caches -------------------------------------------------------------------------------------------


def test_none_keeps_everything_resident_whatever_the_budget() -> None:
    trial = run_trial(house(), every(2.0, 9), Setup(policy="round-robin", cache="none"))
    assert trial.loads == 0
    assert {row.hit for row in trial.rows} == {True}
    assert trial.peak_bytes == trial.budget_bytes == 300 * MB
    assert [(m.at_s, m.model, m.new) for m in trial.moves] == [(0.0, name, "ready") for name in "abc"]


def test_what_was_loaded_before_the_workload_is_not_on_its_bill() -> None:
    trial = run_trial(house(), every(10.0, 3), FIXED)
    busy_s = 3 * SERVICE_S
    idle_s = 3 * trial.duration_s - busy_s
    assert trial.energy_j == pytest.approx(50 * busy_s + 5 * idle_s)


def test_a_load_that_is_under_way_at_the_end_is_on_the_bill_so_far() -> None:
    """Only `a` is asked; `calm` warms `b` meanwhile, which takes longer than the trial."""
    slow = {"a": model(load_j=0.0, load_s=0.0, idle_w=0.0), "b": model(load_s=100.0, load_j=200.0)}
    trial = run_trial(house(slow), every(10.0, 2), Setup(policy="fixed:a", cache="calm"))
    [load] = [m for m in trial.moves if m.model == "b" and m.new == "loading"]
    assert trial.energy_j == pytest.approx(50 * 2 * SERVICE_S + 2.0 * (trial.duration_s - load.at_s))


def test_only_our_cache_loads_ahead_of_demand() -> None:
    asked = Setup(policy="fixed:a", cache="lru")
    assert {m.model for m in run_trial(house(), every(5.0, 4), asked).moves} == {"a"}
    ahead = msgspec.structs.replace(asked, cache="CALM")
    assert {m.model for m in run_trial(house(), every(5.0, 4), ahead).moves} == {"a", "b"}


def test_a_cap_by_count_holds() -> None:
    trial = run_trial(
        house(budget_bytes=300 * MB), every(8.0, 12), Setup(policy="round-robin", cache="fifo:2")
    )
    assert trial.peak_bytes == 200 * MB
    assert trial.loads == 12, "in turn, one place short: every request misses"


def test_belady_of_a_round_keeps_what_comes_soonest() -> None:
    """Three models in turn and two places: MIN loads on every other request, LRU on every one."""
    loads = {
        cache: run_trial(house(), every(8.0, 13), Setup(policy="round-robin", cache=f"{cache}:2")).loads
        for cache in ("lru", "belady")
    }
    assert loads == {"lru": 13, "belady": 8}


@settings(max_examples=8)
@given(st.integers(0, 10_000), st.integers(1, 3), st.integers(3, 5))
def test_belady_never_loads_more_than_another_cache_when_requests_do_not_overlap(
    seed: int, places: int, models: int
) -> None:
    built = house({f"m{i}": model() for i in range(models)}, budget_bytes=10_000 * MB)
    load = every(8.0, 20, seed)
    loads = {
        cache: run_trial(built, load, Setup(policy="random", cache=f"{cache}:{places}")).loads
        for cache in ("lru", "lfu", "fifo", "belady")
    }
    assert loads["belady"] == min(loads.values())


# --- policies -----------------------------------------------------------------------------------------


def test_nobody_s_quality_is_above_the_oracle_s() -> None:
    load = poisson(0.5, 40)

    def quality(policy: str) -> float:
        trial = run_trial(house(UNEQUAL), load, Setup(policy=policy, cache="calm"))
        return fmean(row.quality or 0.0 for row in trial.rows)

    others = [quality(p) for p in ("calm", "random", "fixed:a", "fixed:b", "fixed:c", "oracle:calm")]
    assert quality("oracle") >= max(others)


def test_all_policies_face_the_same_answers() -> None:
    load = poisson(0.5, 30)
    built = house(UNEQUAL)
    fixed = {m: run_trial(built, load, Setup(policy=f"fixed:{m}", cache="calm")) for m in UNEQUAL}
    for row in run_trial(built, load, Setup(policy="random", cache="lru")).rows:
        assert row.model is not None
        [same] = [other for other in fixed[row.model].rows if other.query_id == row.query_id]
        assert (row.quality, row.completion_tokens) == (same.quality, same.completion_tokens)


def test_ratings_teach_and_without_them_nobody_learns_quality() -> None:
    """Equal models by their cards, unlike by their answers: only who is told can know."""
    models = {"a": model(quality={"default": 0.05}), "b": model(quality={"default": 0.95})}
    setup = Setup(policy="calm", cache="none", goal="quality")

    def share_of_b(feedback: float) -> float:
        trial = run_trial(house(models, feedback=feedback), every(3.0, 60), setup)
        return fmean(row.model == "b" for row in trial.rows[30:])

    assert share_of_b(1.0) > 0.8
    swapped = {"a": models["b"], "b": models["a"]}
    untaught = [
        [row.model for row in run_trial(house(m, feedback=0.0), every(3.0, 60), setup).rows]
        for m in (models, swapped)
    ]
    assert untaught[0] == untaught[1], "without ratings the answers' quality reaches nobody"


def test_the_rated_requests_are_the_same_for_every_candidate() -> None:
    drawn = rated(7, 1000, 0.3)
    assert drawn == rated(7, 1000, 0.3)
    assert sum(drawn) == pytest.approx(300, abs=50)
    assert not any(rated(7, 1000, 0.0))
    assert all(rated(7, 1000, 1.0))


def test_a_warm_start_is_lived_through_and_not_counted() -> None:
    setup, load = Setup(policy="fixed:a", cache="lru"), every(10.0, 3)
    cold, warm = (run_trial(house(), load, setup, warm=w) for w in (None, every(5.0, 4, seed=9)))
    assert [row.hit for row in cold.rows] == [False, True, True]
    assert [row.hit for row in warm.rows] == [True, True, True]
    assert [row.arrived_s for row in warm.rows] == pytest.approx(load.arrivals_s)
    assert (cold.loads, warm.loads) == (1, 0)
    assert [(m.at_s, m.model, m.new) for m in warm.moves] == [(0.0, "a", "ready")]
    assert all(sample.at_s >= 0 for sample in warm.samples)
    assert warm.peak_bytes == 100 * MB
    idle_s = warm.duration_s - 3 * SERVICE_S
    assert warm.energy_j == pytest.approx(3 * SERVICE_S * 50 + idle_s * 5)


# --- failures -----------------------------------------------------------------------------------------


def only(built: House, load: Workload, **fields: Any) -> Trial:
    return run_trial(msgspec_house(built, **fields), load, Setup(policy="fixed:a", cache="none"))


def msgspec_house(built: House, **fields: Any) -> House:
    return House(**{**built.__dict__, **fields})


def test_a_deadline_that_passes_is_a_row_too() -> None:
    trial = only(house({"a": model()}), workload([0.0] * 6), deadline_s=3 * SERVICE_S)
    late = rows_of(trial, "timeout") or [row for row in trial.rows if row.status != "ok"]
    assert len(rows_of(trial)) + len(late) == 6
    assert late
    assert all(row.total_s <= 3 * SERVICE_S + 1e-6 for row in trial.rows)
    assert all(row.quality is None for row in late)
    assert trial.energy_j is not None


def test_a_full_queue_turns_away_and_says_so() -> None:
    trial = only(house({"a": model()}), workload([0.0] * 6), max_queue=2)
    refused = [row for row in trial.rows if row.status != "ok"]
    assert len(rows_of(trial)) == 3, "one is served and two wait"
    assert len(refused) == 3
    assert all(row.total_s == 0.0 and row.quality is None for row in refused)


def test_a_model_the_profile_lacks_is_refused_by_name() -> None:
    built = house()
    with pytest.raises(BadInput, match=r"the profile has no z .*`calm profile`"):
        run_trial(msgspec_house(built, fleet={**built.fleet, "z": card("z")}), every(1.0, 1), CALM)


# --- engines elsewhere ----------------------------------------------------------------------------------


def test_a_remote_model_takes_no_memory_no_load_and_none_of_our_cores() -> None:
    cards = {
        "a": card("a"),
        "away": msgspec.structs.replace(
            card("away"), engine=EngineSpec(kind="openai", url="http://192.0.2.1:1", slots=4)
        ),
    }
    models = {"a": model(), "away": model(memory_bytes=1, load_s=0.0, load_j=0.0, active_w=0.0, idle_w=0.0)}
    built = house(models, cores=1, cards=cards, machine={"contention": (1.0, 2.0)}, budget_bytes=100 * MB)
    trial = run_trial(built, workload([0.0, 0.0]), Setup(policy="round-robin", cache="none"))
    assert [row.total_s for row in trial.rows] == pytest.approx([SERVICE_S] * 2)
    assert trial.peak_bytes == 100 * MB
    assert trial.loads == 0


def test_answers_have_the_profile_s_lengths() -> None:
    built = house({"a": model(output_tokens={"default": Length(mean=5), "math": Length(mean=30)})})
    assert {row.completion_tokens for row in run_trial(built, every(5.0, 3), FIXED).rows} == {30}
    capped = msgspec_house(built, max_tokens=8)
    assert {row.completion_tokens for row in run_trial(capped, every(5.0, 3), FIXED).rows} == {8}
    terse = {"a": card("a", chat=ChatSpec(answer_tokens=6))}
    shorter = msgspec_house(capped, fleet=terse)
    assert {row.completion_tokens for row in run_trial(shorter, every(5.0, 3), FIXED).rows} == {6}
