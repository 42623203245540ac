"""The knowledge store: what goes in comes out, bounded, migrated, and recovered after damage."""

from __future__ import annotations

import math
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from calm.clock import ManualClock
from calm.records import (
    FORM,
    Ask,
    Belief,
    Candidate,
    Decision,
    Estimate,
    Features,
    Feedback,
    Outcome,
    Reading,
    Refusal,
    Term,
    Weights,
)
from calm.stores import schema
from calm.stores.reads import KnowledgeReader
from calm.stores.retention import DAY_S
from calm.stores.schema import KnowledgeError, Migration, load_migrations, open_writer
from calm.stores.sqlite import SqliteStore

WALL_S = 1_700_000_000.0


def make_ask(request_id: str, query: str = "a secret question") -> Ask:
    return Ask(
        request_id=request_id,
        kind="chat",
        query=query,
        prompt_chars=len(query),
        body={"messages": []},
        requires=frozenset(["chat"]),
        tenant="alice",
    )


FORM_OF_IT = tuple(np.linspace(-2.5, 2.5, FORM).astype(np.float16).tolist())


def make_features(seed: int = 0) -> Features:
    vector = np.random.default_rng(seed).normal(size=64).astype(np.float32)
    return Features(
        prompt_chars=17,
        prompt_tokens=np.float64(4.5),
        language="en",
        embedding=vector / np.linalg.norm(vector),
        embedder="test-64",
        turns=2,
        max_tokens=100,
        samples=1,
        conversation="c1",
        wants_json=False,
        wants_tools=True,
        form=FORM_OF_IT,
    )


def make_estimate(model: str, total_s: float = 2.0) -> Estimate:
    belief = Belief(mean=total_s, sd=0.1)
    return Estimate(
        model=model,
        prompt_tokens=10.0,
        cached_tokens=0.0,
        output_tokens=Belief(mean=50.0, sd=5.0),
        queue_s=belief,
        load_s=belief,
        prefill_s=belief,
        decode_s=belief,
        ttft_s=Belief(mean=0.5, sd=0.1),
        total_s=belief,
        energy_j=Belief(mean=12.0, sd=1.0),
        quality=Belief(mean=0.7, sd=0.1),
    )


def make_decision(request_id: str, wall_s: float = WALL_S, score: float = 0.25) -> Decision:
    terms = (Term(name="latency", value=2.0, regret=0.5, weight=0.5),)
    return Decision(
        request_id=request_id,
        policy="calm",
        goal="balanced",
        weights=Weights(),
        ranked=(
            Candidate(model="small", score=score, terms=terms),
            Candidate(model="large", score=0.5, terms=()),
        ),
        refused=(Refusal(model="remote", constraint="privacy", reason="the prompt may not leave"),),
        estimates={"small": make_estimate("small"), "large": make_estimate("large", 5.0)},
        snapshot_revision=3,
        decision_s=0.0004,
        wall_s=wall_s,
    )


def make_outcome(request_id: str, wall_s: float = WALL_S + 1.0, model: str = "small") -> Outcome:
    return Outcome(
        request_id=request_id,
        model=model,
        status="ok",
        wall_s=wall_s,
        queue_s=0.1,
        load_s=0.2,
        prefill_s=0.3,
        ttft_s=0.6,
        total_s=1.5,
        prompt_tokens=11,
        cached_tokens=3,
        completion_tokens=40,
        concurrency=2,
        memory_bytes=123_456_789,
        energy=Reading(joules=9.5, meter="rapl", kind="attributed"),
        finish_reason="stop",
        error=None,
        attempts=2,
    )


def make_feedback(request_id: str, rating: float = 4.0) -> Feedback:
    return Feedback(request_id=request_id, rating=rating, source="user", wall_s=WALL_S + 5.0, comment="good")


Opener = Callable[..., SqliteStore]


@pytest.fixture
def opener(tmp_path: Path) -> Iterator[Opener]:
    opened: list[SqliteStore] = []

    def open_store(**options: object) -> SqliteStore:
        defaults = {"retention_days": None, "max_requests": None, "clock": ManualClock()}
        store = SqliteStore(tmp_path / "k.sqlite3", **(defaults | options))  # type: ignore[arg-type]
        opened.append(store)
        return store

    yield open_store
    for store in opened:
        store.close()


def fill(store: SqliteStore, count: int, wall_s: float = WALL_S) -> None:
    for index in range(count):
        name = f"r{wall_s:.0f}-{index}"
        store.record_decision(make_ask(name), make_features(index), make_decision(name, wall_s))
        store.record_outcome(make_outcome(name, wall_s))


def count_rows(path: Path, table: str) -> int:
    with sqlite3.connect(path) as connection:
        (number,) = connection.execute(f"SELECT count(*) FROM {table}").fetchone()
    connection.close()
    return int(number)


def test_a_request_comes_back_as_it_was(opener: Opener) -> None:
    store = opener()
    store.record_decision(make_ask("r1"), make_features(), make_decision("r1"))
    store.record_outcome(make_outcome("r1"))
    store.record_feedback(make_feedback("r1"))
    stored = store.decision("r1")
    assert stored is not None
    assert stored.decision == make_decision("r1")
    assert stored.outcome == make_outcome("r1")
    assert stored.feedback == (make_feedback("r1"),)
    assert stored.features == msgspec.structs.replace(make_features(), embedding=None, form=None)
    assert (stored.tenant, stored.kind, stored.query) == ("alice", "chat", None)
    assert store.dropped == 0


def test_every_field_of_an_outcome_is_stored(opener: Opener) -> None:
    """A field added to the record and forgotten in the table would come back as its default."""
    outcome = make_outcome("r1")
    by_default = [f.name for f in msgspec.structs.fields(outcome) if getattr(outcome, f.name) == f.default]
    assert by_default == ["error"]


def test_embedding_survives_for_late_feedback(opener: Opener) -> None:
    store = opener()
    store.record_decision(make_ask("r1"), make_features(7), make_decision("r1"))
    features = store.features_of("r1")
    assert features is not None
    assert features.embedding is not None
    assert features.embedding.dtype == np.float32
    expected = make_features(7).embedding
    assert expected is not None
    assert np.allclose(features.embedding, expected, atol=1e-3)


def test_form_survives_for_late_feedback(opener: Opener) -> None:
    store = opener()
    store.record_decision(make_ask("r1"), make_features(7), make_decision("r1"))
    features = store.features_of("r1")
    assert features is not None
    assert features.form == FORM_OF_IT


def test_a_database_of_before_the_form_is_taken_over(opener: Opener, tmp_path: Path) -> None:
    before = open_writer(tmp_path / "k.sqlite3", WALL_S, load_migrations()[:1])
    with before:
        before.execute(
            "INSERT INTO requests (id, prompt_chars, prompt_tokens, language, turns, samples, embedding) "
            "VALUES ('old', 9, 3.0, 'en', 1, 1, ?)",
            (np.ones(4, np.float16).tobytes(),),
        )
    before.close()
    features = opener().features_of("old")
    assert features is not None
    assert features.form is None
    assert features.embedding is not None


def test_embedding_is_left_out_when_not_wanted(opener: Opener) -> None:
    store = opener(store_embeddings=False)
    store.record_decision(make_ask("r1"), make_features(), make_decision("r1"))
    features = store.features_of("r1")
    assert features is not None
    assert features.embedding is None
    assert features.form is None


@pytest.mark.parametrize("store_prompts", [False, True])
def test_prompts_reach_the_disk_only_when_the_operator_says_so(
    opener: Opener, tmp_path: Path, store_prompts: bool
) -> None:
    store = opener(store_prompts=store_prompts)
    store.record_decision(make_ask("r1", "tell nobody"), make_features(), make_decision("r1"))
    stored = store.decision("r1")
    assert stored is not None
    assert stored.query == ("tell nobody" if store_prompts else None)
    store.close()
    on_disk = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert (b"tell nobody" in on_disk) is store_prompts


def test_database_is_private_to_its_owner(opener: Opener, tmp_path: Path) -> None:
    opener()
    modes = {path.name: path.stat().st_mode & 0o077 for path in tmp_path.iterdir()}
    assert set(modes.values()) == {0}, modes


def test_infinite_scores_and_numpy_numbers_survive(opener: Opener) -> None:
    store = opener()
    decision = make_decision("r1", score=math.inf)
    odd = msgspec.structs.replace(decision, decision_s=np.float64(0.5))
    store.record_decision(make_ask("r1"), make_features(), odd)
    stored = store.decision("r1")
    assert stored is not None
    assert stored.decision.ranked[0].score == math.inf
    assert stored.decision.decision_s == 0.5


def test_unknown_request_is_none(opener: Opener) -> None:
    store = opener()
    assert store.decision("nobody") is None
    assert store.features_of("nobody") is None
    assert store.restore("nothing") is None


def test_recent_is_newest_first_and_filters(opener: Opener) -> None:
    store = opener()
    fill(store, 3)
    store.record_decision(make_ask("failed"), make_features(), make_decision("failed"))
    store.record_outcome(Outcome(request_id="failed", model="large", status="error", wall_s=WALL_S))
    assert [item.request_id for item in store.recent(2)] == ["failed", f"r{WALL_S:.0f}-2"]
    assert [item.request_id for item in store.recent(9, model="large")] == ["failed"]
    assert len(store.recent(9, status="ok")) == 3
    assert store.recent(9, model="large", status="ok") == ()


def test_summary_puts_predicted_beside_observed(opener: Opener) -> None:
    store = opener()
    fill(store, 2)
    store.record_feedback(make_feedback("r1700000000-0", 5.0))
    store.record_outcome(Outcome(request_id="early", model=None, status="rejected", wall_s=WALL_S))
    store.record_event("load", model="small", detail={"load_s": 0.4})
    summary = store.summary()
    assert (summary.requests, summary.feedback, summary.events) == (2, 1, 1)
    assert summary.statuses == {"ok": 2, "rejected": 1}
    assert summary.since_wall_s == WALL_S
    (model,) = summary.models
    assert (model.model, model.requests, model.ok, model.rating) == ("small", 2, 2, 5.0)
    assert (model.observed_total_s, model.predicted_total_s) == (1.5, 2.0)
    assert (model.observed_energy_j, model.predicted_energy_j) == (9.5, 12.0)
    (energy,) = summary.energy
    assert (energy.meter, energy.kind, energy.requests, energy.joules) == ("rapl", "attributed", 2, 19.0)


def test_newest_checkpoint_wins_and_survives_a_restart(opener: Opener) -> None:
    store = opener()
    store.checkpoint("latency", b"old")
    store.checkpoint("latency", b"new\x00state")
    assert store.restore("latency") == b"new\x00state"
    store.close()
    assert opener().restore("latency") == b"new\x00state"


def test_damaged_checkpoint_is_not_given_back(
    opener: Opener, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = opener()
    store.checkpoint("latency", b"state")
    store.flush()
    with sqlite3.connect(tmp_path / "k.sqlite3") as connection:
        connection.execute("UPDATE estimators SET state = x'00'")
    connection.close()
    assert store.restore("latency") is None
    assert "checksum" in caplog.text


def test_full_queue_drops_and_counts_without_blocking(
    opener: Opener, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = opener(queue_records=10)
    blocker = sqlite3.connect(tmp_path / "k.sqlite3", isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    try:
        fill(store, 100)
        assert store.dropped > 0
    finally:
        blocker.execute("ROLLBACK")
        blocker.close()
    store.flush()
    assert store.summary().dropped == store.dropped
    assert (
        count_rows(tmp_path / "k.sqlite3", "requests") + count_rows(tmp_path / "k.sqlite3", "outcomes")
        == 200 - store.dropped
    )
    assert caplog.text.count("drops records") == 1


def test_one_bad_record_does_not_take_its_batch_along(opener: Opener) -> None:
    store = opener()
    fill(store, 3)
    store.record_event("odd", detail={"object": object()})
    store.record_outcome(msgspec.structs.replace(make_outcome("huge"), memory_bytes=2**70))
    store.record_outcome(msgspec.structs.replace(make_outcome("text"), error="\ud800"))
    store.flush()
    summary = store.summary()
    assert summary.requests == 3
    assert summary.statuses == {"ok": 3}
    assert store.dropped == 3


def test_after_close_records_count_as_dropped(opener: Opener) -> None:
    store = opener()
    store.close()
    store.close()
    store.record_outcome(make_outcome("late"))
    assert store.dropped == 1
    with pytest.raises(KnowledgeError, match="closed"):
        store.flush()


def test_records_from_many_threads_all_arrive(opener: Opener) -> None:
    store = opener()

    def work(number: int) -> None:
        for index in range(50):
            store.record_outcome(make_outcome(f"{number}-{index}"))
            if index % 20 == 0:
                store.flush()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.summary().statuses == {"ok": 200}


def test_unended_requests_of_an_earlier_process_are_marked(opener: Opener) -> None:
    store = opener()
    fill(store, 1)
    store.record_decision(make_ask("cut"), make_features(), make_decision("cut"))
    store.close()
    later = opener()
    stored = later.decision("cut")
    assert stored is not None
    assert stored.outcome is not None
    assert (stored.outcome.status, stored.outcome.error) == ("error", "interrupted")
    assert later.summary().statuses == {"ok": 1, "error": 1}
    later.record_decision(make_ask("running"), make_features(), make_decision("running"))
    running = later.decision("running")
    assert running is not None
    assert running.outcome is None


def test_only_one_process_writes(opener: Opener) -> None:
    first = opener()
    with pytest.raises(KnowledgeError, match="another CALM"):
        opener()
    first.close()
    opener().flush()


def test_row_cap_keeps_the_newest(opener: Opener, tmp_path: Path) -> None:
    store = opener(max_requests=20)
    for hour in range(10):
        fill(store, 20, WALL_S + 3600.0 * hour)
        store.flush()
    store.close()
    assert count_rows(tmp_path / "k.sqlite3", "requests") == 20
    assert count_rows(tmp_path / "k.sqlite3", "outcomes") == 20
    reader = KnowledgeReader(tmp_path / "k.sqlite3")
    assert reader.recent(1)[0].request_id == f"r{WALL_S + 9 * 3600:.0f}-19"


def test_old_rows_are_forgotten(opener: Opener, tmp_path: Path) -> None:
    clock = ManualClock(wall_s=WALL_S)
    store = opener(retention_days=2.0, clock=clock)
    fill(store, 5, WALL_S)
    store.record_event("load", model="small")
    store.record_feedback(make_feedback("r1"))
    store.flush()
    clock.advance(3 * DAY_S)
    fill(store, 2, clock.wall())
    store.flush()
    store.close()
    path = tmp_path / "k.sqlite3"
    assert {table: count_rows(path, table) for table in ("requests", "outcomes", "events", "feedback")} == {
        "requests": 2,
        "outcomes": 2,
        "events": 0,
        "feedback": 0,
    }


def test_deleted_pages_go_back_to_the_file_system(opener: Opener, tmp_path: Path) -> None:
    clock = ManualClock(wall_s=WALL_S)
    store = opener(retention_days=1.0, clock=clock)
    fill(store, 400)
    store.flush()
    before = page_count(tmp_path / "k.sqlite3")
    clock.advance(2 * DAY_S)
    store.record_event("tick")
    store.flush()
    store.close()
    assert page_count(tmp_path / "k.sqlite3") < before / 2


def page_count(path: Path) -> int:
    connection = sqlite3.connect(path)
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    connection.close()
    return int(pages)


def test_migrations_are_numbered_without_gaps() -> None:
    assert [step.version for step in load_migrations()] == list(range(1, len(load_migrations()) + 1))


def test_a_migration_runs_once_and_keeps_the_rows(opener: Opener, tmp_path: Path) -> None:
    store = opener()
    fill(store, 2)
    store.close()
    next_step = Migration(99, "0099_more.sql", "ALTER TABLE requests ADD COLUMN colour TEXT;\n")
    for _ in range(2):
        connection = open_writer(tmp_path / "k.sqlite3", WALL_S, (*load_migrations(), next_step))
        assert connection.execute("SELECT count(*), count(colour) FROM requests").fetchone() == (2, 0)
        connection.close()


def test_a_failing_migration_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "k.sqlite3"
    open_writer(path, WALL_S).close()
    broken = Migration(99, "0099_broken.sql", "CREATE TABLE extra (x);\nCREATE TABLE extra (x);\n")
    with pytest.raises(KnowledgeError, match="extra"):
        open_writer(path, WALL_S, (*load_migrations(), broken))
    connection = open_writer(path, WALL_S)
    assert connection.execute("SELECT count(*) FROM sqlite_master WHERE name='extra'").fetchone() == (0,)
    connection.close()


def test_a_newer_schema_is_refused_with_what_to_do(opener: Opener, tmp_path: Path) -> None:
    opener().close()
    newer = Migration(99, "0099_next.sql", "CREATE TABLE next (x);\n")
    open_writer(tmp_path / "k.sqlite3", WALL_S, (*load_migrations(), newer)).close()
    with pytest.raises(KnowledgeError, match="upgrade CALM"):
        opener()
    with pytest.raises(KnowledgeError, match="upgrade CALM"):
        KnowledgeReader(tmp_path / "k.sqlite3").summary()


@pytest.mark.parametrize("damage", ["not a database at all" * 100, ""])
def test_a_file_that_is_no_database_is_moved_aside(
    opener: Opener, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    (tmp_path / "k.sqlite3").write_text(damage)
    store = opener()
    fill(store, 1)
    assert store.summary().requests == 1
    aside = list(tmp_path.glob("k.sqlite3.corrupt-*"))
    assert [path.read_text() for path in aside] == ([damage] if damage else [])
    assert ("corrupt" in caplog.text) is bool(damage)


def test_damage_inside_is_found_after_a_crash(opener: Opener, tmp_path: Path) -> None:
    store = opener()
    fill(store, 200)
    store.close()
    path = tmp_path / "k.sqlite3"
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE meta SET value='0' WHERE key='clean'")
        (root,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name='requests'").fetchone()
    connection.close()
    data = bytearray(path.read_bytes())
    data[(root - 1) * 4096 : root * 4096] = b"\xff" * 4096
    path.write_bytes(data)
    assert opener().summary().requests == 0
    assert list(tmp_path.glob("k.sqlite3.corrupt-*"))


def test_corruption_while_running_starts_a_fresh_file(
    opener: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opener()
    fill(store, 1)
    store.flush()
    writer = store._writer
    calls: list[object] = []
    real_write = writer._write

    def failing_once(batch: object) -> None:
        if not calls:
            calls.append(batch)
            raise schema.corrupt_error("database disk image is malformed")
        real_write(batch)  # type: ignore[arg-type]

    monkeypatch.setattr(writer, "_write", failing_once)
    fill(store, 2, WALL_S + 1)
    with pytest.raises(KnowledgeError, match="malformed"):
        store.flush()
    store.close()
    assert KnowledgeReader(tmp_path / "k.sqlite3").summary().requests == 2
    (aside,) = (path for path in tmp_path.glob("k.sqlite3.corrupt-*") if path.name[-1] == "Z")
    assert count_rows(aside, "requests") == 1


def test_disk_trouble_is_survived_and_reported(opener: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    store = opener()
    real_write = store._writer._write

    def full(batch: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(store._writer, "_write", full)
    fill(store, 2)
    with pytest.raises(KnowledgeError, match="disk is full"):
        store.flush()
    assert store.failure == "database or disk is full"
    monkeypatch.setattr(store._writer, "_write", real_write)
    store.close()
    assert KnowledgeReader(store._path).summary().requests == 2


def test_closing_with_a_full_disk_counts_what_is_lost(
    opener: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opener()

    def full(batch: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(store._writer, "_write", full)
    fill(store, 3)
    store.close()
    assert store.dropped == 6


def test_a_folder_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(KnowledgeError, match="cannot write"):
        open_writer(tmp_path / "file" / "k.sqlite3", WALL_S)


def test_reading_what_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(KnowledgeError, match="no knowledge database"):
        KnowledgeReader(tmp_path / "none.sqlite3").summary()
