"""Parquet export: every row once, joined, from a running store, all or nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from calm.clock import ManualClock
from calm.errors import BadInput
from calm.records import (
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
    Weights,
)
from calm.stores import export
from calm.stores.export import export_parquet
from calm.stores.schema import KnowledgeError
from calm.stores.sqlite import SqliteStore

REFERENCE = Path(__file__).parents[2] / "docs" / "reference" / "knowledge.md"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    opened = SqliteStore(tmp_path / "k.sqlite3", retention_days=None, max_requests=None, clock=ManualClock())
    yield opened
    opened.close()


def record(store: SqliteStore, name: str, wall_s: float, answered_by: str | None = "small") -> None:
    belief = Belief(mean=1.0, sd=0.1)
    estimates = {
        model: Estimate(
            model=model, prompt_tokens=1.0, cached_tokens=0.0, output_tokens=belief, queue_s=belief,
            load_s=belief, prefill_s=belief, decode_s=belief, ttft_s=belief,
            total_s=Belief(mean=total_s, sd=0.1), energy_j=None, quality=belief,
        )
        for model, total_s in (("small", 2.0), ("large", 7.0))
    }  # fmt: skip
    ask = Ask(
        request_id=name, kind="chat", query="q", prompt_chars=1, body={}, requires=frozenset(), stream=True
    )
    features = Features(
        prompt_chars=1, prompt_tokens=1.0, language="en", embedding=np.array([0.6, 0.8], np.float32), form=(0.5, -1.0),
        embedder="e", turns=1, max_tokens=None, samples=1, conversation=None, wants_json=False,
        wants_tools=False,
    )  # fmt: skip
    decision = Decision(
        request_id=name, policy="calm", goal=None, weights=Weights(),
        ranked=(Candidate(model="small", score=0.1, terms=()), Candidate(model="large", score=0.2, terms=())),
        refused=(Refusal(model="far", constraint="privacy", reason="local only"),),
        estimates=estimates, snapshot_revision=1, decision_s=0.001, wall_s=wall_s,
    )  # fmt: skip
    store.record_decision(ask, features, decision)
    if answered_by is not None:
        energy = Reading(joules=3.0, meter="rapl", kind="attributed")
        store.record_outcome(
            Outcome(
                request_id=name, model=answered_by, status="ok", wall_s=wall_s, total_s=2.5, energy=energy
            )
        )


def test_rows_are_joined(store: SqliteStore, tmp_path: Path) -> None:
    record(store, "a", 100.0)
    record(store, "b", 200.0, answered_by="large")
    record(store, "c", 300.0, answered_by=None)
    for rating in (2.0, 5.0):
        store.record_feedback(Feedback(request_id="a", rating=rating, source="user", wall_s=400.0))
    store.record_event("load", model="small", detail={"load_s": 0.5})
    store.flush()
    report = export_parquet(tmp_path / "k.sqlite3", tmp_path / "out", embeddings=True)
    assert report.rows == {"requests": 3, "feedback": 2, "events": 1}
    assert set(report.bytes) == {"requests.parquet", "feedback.parquet", "events.parquet"}
    a, b, c = pq.read_table(tmp_path / "out" / "requests.parquet").to_pylist()
    assert (a["id"], a["stream"], a["observed_energy_j"], a["observed_energy_meter"]) == (
        "a",
        True,
        3.0,
        "rapl",
    )
    assert (a["feedback_count"], a["feedback_mean"]) == (2, 3.5)
    assert [(item["model"], item["rank"], item["predicted_total_s"]) for item in a["candidates"]] == [
        ("small", 1, 2.0),
        ("large", 2, 7.0),
    ]
    assert a["refused"] == [{"model": "far", "constraint": "privacy", "reason": "local only"}]
    np.testing.assert_allclose(a["embedding"], [0.6, 0.8], atol=1e-3)
    assert a["form"] == [0.5, -1.0]
    assert (a["predicted_total_s"], b["predicted_total_s"]) == (2.0, 7.0)
    assert (c["observed_status"], c["predicted_total_s"], c["feedback_mean"]) == (None, 2.0, None)
    (event,) = pq.read_table(tmp_path / "out" / "events.parquet").to_pylist()
    assert event["detail"] == '{"load_s":0.5}'


def test_since_and_tables_narrow_the_export(store: SqliteStore, tmp_path: Path) -> None:
    record(store, "old", 100.0)
    record(store, "new", 200.0)
    store.flush()
    report = export_parquet(tmp_path / "k.sqlite3", tmp_path / "out", since=150.0, tables=("requests",))
    assert report.rows == {"requests": 1}
    table = pq.read_table(tmp_path / "out" / "requests.parquet")
    assert table["id"].to_pylist() == ["new"]
    assert not {"embedding", "form"} & set(table.column_names)


def test_rows_stream_in_groups(store: SqliteStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "ROW_GROUP", 4)
    for index in range(10):
        record(store, f"r{index}", float(index))
    store.flush()
    export_parquet(tmp_path / "k.sqlite3", tmp_path / "out")
    file = pq.ParquetFile(tmp_path / "out" / "requests.parquet")
    assert [file.metadata.row_group(index).num_rows for index in range(file.num_row_groups)] == [4, 4, 2]


def test_an_existing_file_is_kept_unless_told(store: SqliteStore, tmp_path: Path) -> None:
    store.flush()
    target = tmp_path / "out" / "events.parquet"
    target.parent.mkdir()
    target.write_text("mine")
    with pytest.raises(BadInput, match=r"events\.parquet already there"):
        export_parquet(tmp_path / "k.sqlite3", tmp_path / "out")
    assert target.read_text() == "mine"
    export_parquet(tmp_path / "k.sqlite3", tmp_path / "out", overwrite=True)
    assert pq.read_table(target).num_rows == 0


def test_a_failed_export_leaves_nothing(
    store: SqliteStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(store, "a", 1.0)
    store.flush()

    def broken(*_: object) -> object:
        raise OSError("disk full")

    monkeypatch.setattr(export, "candidates", broken)
    with pytest.raises(OSError, match="disk full"):
        export_parquet(tmp_path / "k.sqlite3", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_export_works_without_a_server(store: SqliteStore, tmp_path: Path) -> None:
    record(store, "a", 1.0)
    store.close()
    assert export_parquet(tmp_path / "k.sqlite3", tmp_path / "out").rows["requests"] == 1


def test_a_missing_database_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(KnowledgeError, match="no knowledge database"):
        export_parquet(tmp_path / "none.sqlite3", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_every_column_is_documented() -> None:
    text = REFERENCE.read_text()
    columns = set(export.requests_schema(True).names) | set(export.FEEDBACK) | set(export.EVENTS)
    documented = set(re.findall(r"`([a-z_]+)`", text))
    assert columns - documented == set()
