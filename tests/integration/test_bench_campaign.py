"""A whole campaign on real servers: `calm serve` processes in front of a scripted engine, so no weights run."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from calm.backends.fake import FakeEngineServer, Script
from calm.bench.campaign import Campaign, Terms, interleaved, still_missing
from calm.bench.client import Judge
from calm.bench.trials import Ledger, read_ledger
from calm.registry import load_fleet
from calm.report.files import StudyDirectory
from calm.report.records import Setup, Trial
from calm.settings import Settings
from calm.workloads.records import Query, Workload

REQUESTS = 6
SETUPS = (Setup(policy="round-robin", cache="calm"), Setup(policy="fixed:second", cache="lru"))
SEEDS = (0, 1)


@pytest.fixture
async def engine() -> AsyncIterator[FakeEngineServer]:
    async with FakeEngineServer(Script(answer=("4", "2"), prompt_tokens=5)) as server:
        yield server


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Everything temporary lies here, so that a test can see what was left behind."""
    own = tmp_path / "tmp"
    own.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(own))
    return own


@pytest.fixture
def terms(engine: FakeEngineServer, tmp_path: Path) -> Terms:
    fleet = tmp_path / "fleet"
    fleet.mkdir()
    for name in ("first", "second"):
        (fleet / f"{name}.toml").write_text(
            f'name = "{name}"\ndescription = "A scripted model."\nplacement = "local"\n'
            f'[engine]\nkind = "openai"\nurl = "{engine.base_url}"\n'
        )
    return Terms(
        base=Settings(),
        fleet=fleet,
        cards=load_fleet(fleet).fleet,
        budget_bytes=1_000_000,
        deadline_s=30.0,
        max_tokens=8,
        feedback=1.0,
    )


def workload_of(seed: int) -> Workload:
    return Workload(
        name="poisson x made up",
        seed=seed,
        arrivals_s=tuple(0.02 * number for number in range(REQUESTS)),
        queries=tuple(
            Query(
                id=f"q{seed}-{number}", dataset="d", domain="math", prompt=f"What is {number}?", answer="42"
            )
            for number in range(REQUESTS)
        ),
    )


def exact(query: Query, text: str) -> float:
    return float(text == query.answer)


def a_campaign(
    terms: Terms, workload_of: Callable[[int], Workload], judge: Judge, keep: Callable[[Trial], None]
) -> Campaign:
    """On a machine that is otherwise idle."""
    return Campaign(terms, workload_of, judge, keep, busy=lambda: 0.0)


def left_behind(root: Path) -> list[str]:
    """Processes and directories of trials."""
    children = psutil.Process().children(recursive=True)
    alive = [str(child.pid) for child in children if child.status() != psutil.STATUS_ZOMBIE]
    return [*alive, *(path.name for path in root.glob("calm-trial-*"))]


async def test_every_candidate_is_measured_on_every_seed(
    terms: Terms, root: Path, engine: FakeEngineServer
) -> None:
    trials: list[Trial] = []
    campaign = a_campaign(terms, workload_of, exact, trials.append)
    await campaign.run(interleaved(SETUPS, SEEDS))

    assert {(trial.setup, trial.seed) for trial in trials} == {(s, seed) for s in SETUPS for seed in SEEDS}
    assert [note for note in campaign.notes if not note.endswith(" late")] == []  # a busy machine may be
    assert left_behind(root) == []
    for trial in trials:
        rows = trial.rows
        assert [row.query_id for row in rows] == [f"q{trial.seed}-{n}" for n in range(REQUESTS)]
        assert {(row.status, row.quality, row.hit) for row in rows} == {("ok", 1.0, True)}
        assert {(row.prompt_tokens, row.completion_tokens) for row in rows} == {(5, 2)}
        assert all(row.decision_s is not None and 0 < row.decision_s < row.total_s for row in rows)
        assert all(row.ttft_s is not None and row.ttft_s <= row.total_s for row in rows)
        assert (trial.engine, trial.loads, trial.energy_j, trial.budget_bytes) == ("real", 0, None, 1_000_000)
        assert trial.samples
        assert trial.duration_s >= workload_of(0).duration_s
    by_setup = {trial.setup: {row.model for row in trial.rows} for trial in trials}
    assert by_setup == {SETUPS[0]: {"first", "second"}, SETUPS[1]: {"second"}}
    assert all(seen.body["temperature"] == 0 and seen.body["max_tokens"] == 8 for seen in engine.seen)


async def test_answers_are_rated_and_the_requests_of_a_warm_start_are_not_counted(
    terms: Terms, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledgers: list[Ledger] = []

    def remembering(database: Path) -> Ledger:
        ledgers.append(read_ledger(database))
        return ledgers[-1]

    monkeypatch.setattr("calm.bench.campaign.read_ledger", remembering)
    trials: list[Trial] = []
    warm, cold = replace(terms, warm_start=3, feedback=0.0), replace(terms, feedback=1.0)
    for some in (warm, cold):
        await a_campaign(some, workload_of, exact, trials.append).run(interleaved(SETUPS[:1], (0,)))

    assert [len(trial.rows) for trial in trials] == [REQUESTS, REQUESTS]
    assert [len(ledger.requests) for ledger in ledgers] == [REQUESTS + 3, REQUESTS]
    ratings = [[f.rating for item in ledger.requests.values() for f in item.feedback] for ledger in ledgers]
    assert ratings == [[5.0] * 3, [5.0] * REQUESTS]


async def test_an_interrupted_campaign_resumes_with_what_is_missing(
    terms: Terms, root: Path, tmp_path: Path
) -> None:
    jobs = interleaved(SETUPS, SEEDS)
    first_kept, study = asyncio.Event(), StudyDirectory(tmp_path / "study", "same")

    def keep(trial: Trial) -> None:
        study.keep(trial)
        first_kept.set()

    running = asyncio.create_task(a_campaign(terms, workload_of, exact, keep).run(jobs))
    await first_kept.wait()
    running.cancel()
    await asyncio.wait({running})
    assert running.cancelled()
    assert left_behind(root) == []

    again = StudyDirectory(tmp_path / "study", "same")

    def keep_again(trial: Trial) -> None:
        again.keep(trial)

    done = [trial for job in jobs if (trial := again.find(job.setup, job.seed))]
    missing = still_missing(jobs, done)
    assert missing == jobs[1:]
    await a_campaign(terms, workload_of, exact, keep_again).run(missing)
    assert set(StudyDirectory(tmp_path / "study", "same").kept()) == {(job.setup, job.seed) for job in jobs}


def killer(times: int) -> Callable[[Query, str], float]:
    """A judge that kills the server instead, the first `times` times it is asked."""
    left = times

    def judge(query: Query, text: str) -> float:
        nonlocal left
        if left:
            left -= 1
            for child in psutil.Process().children():
                os.kill(child.pid, signal.SIGKILL)
        return exact(query, text)

    return judge


async def test_a_server_that_dies_costs_its_trial_and_no_other(terms: Terms, root: Path) -> None:
    trials: list[Trial] = []
    campaign = a_campaign(terms, workload_of, killer(1), trials.append)
    jobs = interleaved(SETUPS, (0,))
    await campaign.run(jobs)

    assert [trial.setup for trial in trials] == [jobs[1].setup]
    assert len(campaign.notes) == 1
    assert f"{jobs[0].title} is missing: the server ended with code -9" in campaign.notes[0]
    assert left_behind(root) == []


async def test_a_server_that_does_not_come_up_says_why(terms: Terms, root: Path) -> None:
    """The command line refuses this policy before; a server that is given it all the same ends at once."""
    campaign = a_campaign(terms, workload_of, exact, lambda trial: None)
    await campaign.run(interleaved((Setup(policy="clam", cache="calm"),), (0,)))
    assert "the server did not come up: error: no policy 'clam'" in campaign.notes[0]


async def test_an_engine_that_refuses_some_is_in_the_rows_and_in_the_notes(
    terms: Terms, root: Path, engine: FakeEngineServer
) -> None:
    engine.script.error_status, engine.script.error_times = 400, 2
    trials: list[Trial] = []
    campaign = a_campaign(terms, workload_of, exact, trials.append)
    await campaign.run(interleaved(SETUPS[1:], (0,)))
    rows = trials[0].rows
    assert sorted(row.status for row in rows) == ["error"] * 2 + ["ok"] * 4
    assert {(row.quality, row.model) for row in rows if row.status == "error"} == {(None, "second")}
    assert "2 of 6 requests failed, most often: " in campaign.notes[0]


async def test_other_work_on_the_machine_is_noted(terms: Terms, root: Path) -> None:
    campaign = Campaign(terms, workload_of, exact, lambda trial: None, busy=lambda: 0.83)
    jobs = interleaved(SETUPS[1:], (0,))
    await campaign.run(jobs)
    assert campaign.notes == [f"{jobs[0].title}: other work took 83 % of the processors before it"]


async def test_a_trial_in_which_everything_failed_is_not_kept(
    terms: Terms, root: Path, engine: FakeEngineServer
) -> None:
    """Something else is broken; kept, it would count as done when the campaign is resumed."""
    engine.script.error_status = 400
    trials: list[Trial] = []
    campaign = a_campaign(terms, workload_of, exact, trials.append)
    await campaign.run(interleaved(SETUPS[1:], (0,)))
    assert trials == []
    assert "is missing: 6 of 6 requests failed" in campaign.notes[0]
