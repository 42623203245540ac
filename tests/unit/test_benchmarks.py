"""The benchmarks' own arithmetic: arguments, planned clients, claims and reports. Nothing is started here."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import decision, soak, soak_claims, soak_client  # noqa: E402
from benchmarks.soak_claims import Kill, Sample, Seen, Stored, judge  # noqa: E402
from benchmarks.soak_client import Call, Ending  # noqa: E402


def call(tag: str = "soak-0", **fields: object) -> Call:
    return Call(tag=tag, at_s=0.0, model="calm", prompt="Hi", max_tokens=8, **fields)  # type: ignore[arg-type]


def complete(tag: str) -> Ending:
    return Ending(
        call(tag),
        how="complete",
        status=200,
        request_id=f"id-{tag}",
        model="smol",
        ttft_s=0.5,
        total_s=1.0,
        finish={"stop"},
    )


def refused(tag: str) -> Ending:
    return Ending(
        call(tag),
        how="refused",
        status=429,
        code="queue_full",
        request_id=f"id-{tag}",
        retry_after="3",
        total_s=0.01,
    )


def sample(**fields: int) -> Sample:
    base = Sample(
        at_s=0.0,
        budget_bytes=100,
        used_bytes=90,
        cores=2,
        threads_in_use=2,
        queue_length=3,
        in_flight=2,
    )
    return replace(base, **fields)  # type: ignore[arg-type]


def stored(tag: str, status: str = "ok", model: str | None = "smol") -> Stored:
    return Stored(tag, f"id-{tag}", status, model, 1, None)


def good() -> Seen:
    """A run about which nothing can be said."""
    return Seen(
        endings=[complete("soak-0"), refused("soak-1")],
        samples=[sample()],
        stored=[stored("soak-0"), stored("soak-1", "rejected", None)],
        kill=Kill(model="smol", pid=1, at_s=2.0, in_flight=1),
        answers_after={"smol": "complete"},
        dropped=0.0,
        capacity_rps=1.0,
        wanted_rps=10.0,
        offered_rps=9.9,
        deadline_s=5.0,
        max_queue=4,
        drained=sample(queue_length=0, in_flight=0, threads_in_use=0),
        exit_code=0,
    )


def failing(seen: Seen) -> list[str]:
    return [verdict.claim for verdict in judge(seen) if not verdict.holds]


# --- claims -----------------------------------------------------------------------------------------


def test_a_clean_run_passes_every_claim() -> None:
    assert failing(good()) == []
    assert all(verdict.detail == "" for verdict in judge(good()))


def spoilt(name: str) -> Seen:
    """The clean run with one thing wrong."""
    seen = good()
    first, second = seen.endings
    match name:
        case "hung":
            seen.endings[0] = replace(first, how="hung")
        case "cut":
            seen.endings[0] = replace(first, how="cut")
        case "no overload":
            seen.endings, seen.stored = [first], seen.stored[:1]
        case "no retry-after":
            seen.endings[1] = replace(second, retry_after=None)
        case "no finish":
            seen.endings[0] = replace(first, finish=set())
        case "lost record":
            seen.stored = seen.stored[:1]
        case "lost outcome":
            seen.stored[0] = replace(seen.stored[0], status=None)
        case "twice":
            seen.stored.append(stored("soak-0"))
        case "dropped":
            seen.dropped = 2.0
        case "status":
            seen.stored[0] = stored("soak-0", "error")
        case "id":
            seen.stored[0] = replace(seen.stored[0], request_id="another")
        case "model":
            seen.stored[0] = stored("soak-0", model="another")
        case "budget":
            seen.samples.append(sample(used_bytes=101))
        case "threads":
            seen.samples.append(sample(threads_in_use=3))
        case "queue":
            seen.samples.append(sample(queue_length=5))
        case "late":
            seen.endings[0] = replace(first, total_s=5.5)
        case "never back":
            seen.answers_after = {"smol": "refused engine_lost"}
        case "no kill":
            seen.kill = None
        case "held":
            seen.drained = sample(in_flight=1)
        case "orphan":
            seen.left_behind = ["process 7"]
        case "exit":
            seen.exit_code = None
    return seen


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("hung", "hung"),
        ("cut", "hung"),
        ("no overload", "more than the box"),
        ("no retry-after", "come back"),
        ("no finish", "whole"),
        ("lost record", "record is lost"),
        ("lost outcome", "record is lost"),
        ("twice", "record is lost"),
        ("dropped", "record is lost"),
        ("status", "what the clients saw"),
        ("id", "what the clients saw"),
        ("model", "what the clients saw"),
        ("budget", "budget"),
        ("threads", "threads"),
        ("queue", "queue"),
        ("late", "p99"),
        ("never back", "killed"),
        ("no kill", "killed"),
        ("held", "held"),
        ("orphan", "SIGTERM"),
        ("exit", "SIGTERM"),
    ],
)
def test_each_fault_fails_its_claim(name: str, words: str) -> None:
    assert any(words in claim for claim in failing(spoilt(name))), failing(spoilt(name))


def test_a_client_that_left_at_once_may_be_unknown_but_a_later_one_may_not() -> None:
    seen = good()
    left = Ending(call("soak-2", leave_after_s=0.01), how="left", total_s=0.01)
    seen.endings.append(left)
    assert failing(seen) == []
    seen.endings[-1] = replace(left, total_s=1.0)
    assert failing(seen) == ["no record is lost: one decision and one outcome for each request"]


def test_the_report_names_what_failed() -> None:
    seen = spoilt("hung")
    text = soak.report(seen, judge(seen))
    assert "FAIL  no request hung; each ended in exactly one way: 1 hung" in text
    assert "capacity 1.00 requests/s" in text


def test_records_are_read_with_their_outcomes(tmp_path: Path) -> None:
    path = tmp_path / "knowledge.sqlite3"
    with sqlite3.connect(path) as database:
        migration = ROOT / "src" / "calm" / "stores" / "migrations" / "0001_knowledge.sql"
        database.executescript(migration.read_text())
        database.execute("INSERT INTO requests (id, conversation) VALUES ('a', 'soak-0'), ('b', 'after-x')")
        database.execute("INSERT INTO requests (id, conversation) VALUES ('c', 'soak-1')")
        database.execute("INSERT INTO outcomes (request_id, status, attempts) VALUES ('a', 'ok', 2)")
    database.close()
    assert soak_claims.read_records(path, "soak-") == [
        Stored("soak-0", "a", "ok", None, 2, None),
        Stored("soak-1", "c", None, None, None, None),
    ]


def test_figures_of_nothing_are_nothing() -> None:
    found = soak_claims.figures(Seen())
    assert found["requests"] == 0
    assert found["accepted_total_s"] is None


# --- clients ----------------------------------------------------------------------------------------


def plan(count: int = 2000, seed: int = 1) -> list[Call]:
    return soak_client.calls(count, ["a", "b"], 20.0, seed=seed, leavers=0.1, patience_s=5.0, name="soak")


def test_the_same_seed_offers_the_same_requests() -> None:
    assert plan() == plan()
    assert plan() != plan(seed=2)


def test_arrivals_models_and_leavers_are_as_asked() -> None:
    made = plan()
    assert len({one.tag for one in made}) == len(made)
    assert made == sorted(made, key=lambda one: one.at_s)
    assert len(made) / made[-1].at_s == pytest.approx(20.0, rel=0.1)
    assert sum(one.leaves for one in made) / len(made) == pytest.approx(0.1, abs=0.03)
    assert sum(one.model == "calm" for one in made) / len(made) == pytest.approx(0.5, abs=0.05)
    assert {one.model for one in made} == {"calm", "a", "b"}


def test_error_codes_are_read_from_openai_bodies_only() -> None:
    assert soak_client.error_code(b'{"error": {"message": "m", "code": "queue_full"}}') == "queue_full"
    assert soak_client.error_code(b'{"choices": [{"delta": {"content": "\\"error\\""}}]}') is None
    assert soak_client.error_code(b"<html>") is None


def test_a_chunk_tells_model_first_token_and_finish() -> None:
    ending = Ending(call())
    soak_client.note(ending, b'{"model": "m", "choices": [{"delta": {"role": "assistant"}}]}', 0.1)
    assert ending.ttft_s is None
    soak_client.note(ending, b'{"model": "m", "choices": [{"delta": {"content": "Hi"}}]}', 0.2)
    soak_client.note(ending, b'{"choices": [{"delta": {}, "finish_reason": "stop"}]}', 0.3)
    assert (ending.model, ending.ttft_s, ending.finish) == ("m", 0.2, {"stop"})


# --- soak's server ----------------------------------------------------------------------------------


def test_the_server_gets_its_own_state_and_none_of_our_settings(tmp_path: Path) -> None:
    ours = {"CALM_SERVER__PORT": "1", "CALM_CONFIG": "x", "CALM_CACHE_DIR": "/c", "PATH": "/bin"}
    theirs = soak.environment(ours, tmp_path)
    assert "CALM_SERVER__PORT" not in theirs
    assert "CALM_CONFIG" not in theirs
    assert theirs["CALM_CACHE_DIR"] == "/c"
    assert theirs["CALM_STATE_DIR"] == str(tmp_path / "state")


def test_dropped_records_are_read_from_the_metrics() -> None:
    assert soak.dropped_records("# HELP x\ncalm_records_dropped_total 3.0\n") == 3.0
    assert soak.dropped_records("") is None


@pytest.mark.parametrize("given", [["--requests", "1"], ["--leavers", "2"], ["--overload", "0"]])
def test_soak_refuses_senseless_arguments(given: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        soak.arguments(given)
    assert caught.value.code == 2


# --- decision ---------------------------------------------------------------------------------------


def test_queries_never_repeat_and_vary_in_length() -> None:
    texts = list(islice(decision.queries(3), 500))
    assert len(set(texts)) == 500
    assert min(map(len, texts)) < 60
    assert max(map(len, texts)) > 3000


def test_large_fleets_are_distinct_cards_and_small_ones_the_real_ones() -> None:
    assert len(decision.cards(2)) == 2
    fleet = decision.cards(50)
    assert len(fleet) == 50
    assert all(name == card.name for name, card in fleet.items())
    assert "smollm2-135m" in fleet


def test_large_fleets_get_fewer_decisions() -> None:
    assert [decision.fewer(1000, size) for size in (3, 10, 30, 1000)] == [1000, 1000, 333, 300]
    assert decision.fewer(40, 1000) == 40


@pytest.mark.parametrize(("p50", "p99", "word"), [(0.5, 1.0, "PASS"), (1.5, 2.0, "FAIL"), (0.5, 9.0, "FAIL")])
def test_the_goal_is_judged(p50: float, p99: float, word: str) -> None:
    assert decision.verdict({"variant": "v", "p50_ms": p50, "p99_ms": p99}).startswith(word)


def test_the_parts_of_a_decision_stand_in_the_report() -> None:
    row = {
        "variant": "calm, 3 models",
        "models": 3,
        "p50_ms": 0.5,
        "p99_ms": 1.0,
        "max_ms": 2.0,
        "decisions": 10,
        "rss_mb": 100.0,
        "parts_p50_ms": {"embed": 0.1, "rank": 0.02},
        "p50_spread": "0.5",
        "p99_spread": "1.0",
    }
    text = decision.report([row])
    assert "100.0" in text
    assert "20.0" in text
    assert text.endswith("(goal p50 < 1 ms, p99 < 5 ms)")
    large = row | {"variant": "calm, 1,000 models", "models": 1000, "p99_ms": 5.5}
    assert decision.report([row, large]).endswith("FAIL  calm, 1,000 models: p99 5.500 ms (goal < 5 ms)")


# --- the shell script -------------------------------------------------------------------------------


def test_fresh_explains_itself_and_refuses_unknown_arguments() -> None:
    script = str(ROOT / "benchmarks" / "fresh.sh")
    told = subprocess.run([script, "--help"], capture_output=True, text=True, check=True)
    assert "--no-test" in told.stdout
    assert subprocess.run([script, "--nonsense"], capture_output=True, check=False).returncode == 2
