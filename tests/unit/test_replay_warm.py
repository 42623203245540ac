"""A warm start in replay: asked and rated before a trial, learned from, and not counted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec.structs import replace
from tests.unit import test_cli_replay as command
from tests.unit.replay_setting import house, model, workload

from calm.cli.replay import REMARK, remarks
from calm.errors import BadInput
from calm.replay.study import load_of, run_jobs
from calm.report.records import Setup, Trial
from calm.workloads.records import Workload

place, replayed = command.place, command.run
SETUP = Setup(policy="calm", cache="calm", goal="quality")
MODELS = {
    "poor": model(quality={"default": 0.1}, quality_sd=0.01),
    "good": model(quality={"default": 0.9}, quality_sd=0.01),
}


def asking(count: int) -> Callable[[int], Workload]:
    """Every seed has queries of its own."""

    def of(seed: int) -> Workload:
        made = workload([5.0 * i for i in range(count)], seed)
        own = tuple(replace(query, id=f"{seed}-{query.id}") for query in made.queries)
        return replace(made, queries=own)

    return of


def run(warm_start: int, feedback: float = 1.0) -> Trial:
    built = house(MODELS, feedback=feedback)
    return next(run_jobs([(SETUP, 0)], built, asking(12), 1, warm_start))


def share_of_good(trial: Trial) -> float:
    return sum(row.model == "good" for row in trial.rows) / len(trial.rows)


def test_what_is_counted_stays_the_same_workload() -> None:
    cold, warm = run(0), run(20)
    asked = [(row.query_id, row.arrived_s) for row in cold.rows]
    assert [row.query_id for row in warm.rows] == [query_id for query_id, _ in asked]
    assert [row.arrived_s for row in warm.rows] == pytest.approx([at_s for _, at_s in asked])
    assert warm.duration_s == pytest.approx(cold.duration_s, abs=10.0)


def test_it_is_rated_whatever_share_of_the_trial_is() -> None:
    """Nothing of the trial itself is rated: who is good can only be known from the warm start."""
    assert share_of_good(run(20, feedback=0.0)) == 1.0
    assert share_of_good(run(0, feedback=0.0)) < 1.0


def test_it_asks_other_queries_of_another_seed() -> None:
    counted, warm = load_of(asking(12), 0, 20)
    assert warm is not None
    assert len(warm.queries) == 20
    assert not {query.id for query in warm.queries} & {query.id for query in counted.queries}
    assert warm.seed != counted.seed
    assert load_of(asking(12), 0, 0) == (counted, None)


def test_too_few_queries_are_said_before_anything_runs() -> None:
    only = asking(3)(0)
    with pytest.raises(BadInput, match="too few queries") as caught:
        next(run_jobs([(SETUP, 0)], house(MODELS), lambda _: only, 1, 1))
    assert caught.value.field == "warm_start"


def test_a_study_says_that_it_was_warm() -> None:
    assert remarks(0) == (REMARK,)
    assert remarks(100) == (REMARK, "100 rated requests before each trial are not counted")


def test_the_command_keeps_cold_and_warm_trials_apart(place: Path) -> None:
    assert replayed("--out", "cold").exit_code == 0
    done = replayed("--out", "warm", "--warm-start", "2")
    assert done.exit_code == 0, done.output
    assert "2 rated requests before each trial are not counted" in done.output
    assert replayed("--out", "warm", "--warm-start", "2").exit_code == 0
    for directory, more in (("cold", ("--warm-start", "2")), ("warm", ())):
        refused = replayed("--out", directory, *more)
        assert (refused.exit_code, "warm_start" in refused.stderr) == (1, True), refused.output


def test_the_command_refuses_more_than_the_queries_allow(place: Path) -> None:
    done = replayed("--out", "study", "--warm-start", "3", requests="10")
    assert done.exit_code == 1
    assert "error: --warm-start 3: the sets have too few queries" in done.stderr
    assert not (place / "study").exists()
