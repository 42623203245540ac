"""What every knowledge store promises (ports.KnowledgeStore, ports.Recall, ports.EventLog)."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import pytest

from calm.clock import ManualClock
from calm.ports import EventLog, KnowledgeStore, Recall
from calm.records import Ask, Candidate, Decision, Features, Feedback, Outcome, Weights
from calm.stores.sqlite import SqliteStore


class Store(KnowledgeStore, EventLog, Recall, Protocol):
    """All three seams of one store."""


@pytest.fixture(params=["sqlite"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    made = SqliteStore(tmp_path / "k.sqlite3", retention_days=30.0, max_requests=1000, clock=ManualClock())
    yield made
    made.close()


def decide(store: Store, name: str) -> None:
    ask = Ask(request_id=name, kind="chat", query="q", prompt_chars=1, body={}, requires=frozenset())
    features = Features(
        prompt_chars=1, prompt_tokens=1.0, language="en", embedding=np.array([1.0, 0.0], np.float32),
        embedder="e", turns=1, max_tokens=None, samples=1, conversation=None, wants_json=False,
        wants_tools=False,
    )  # fmt: skip
    decision = Decision(
        request_id=name, policy="calm", goal=None, weights=Weights(),
        ranked=(Candidate(model="m", score=0.1, terms=()),), refused=(), estimates={}, snapshot_revision=1,
        decision_s=0.001, wall_s=1_700_000_000.0,
    )  # fmt: skip
    store.record_decision(ask, features, decision)


def test_what_was_recorded_is_recalled_at_once(store: Store) -> None:
    decide(store, "r1")
    found = store.decision("r1")
    assert found is not None
    assert (found.outcome, found.feedback) == (None, ())
    store.record_outcome(Outcome(request_id="r1", model="m", status="ok", wall_s=1_700_000_001.0))
    found = store.decision("r1")
    assert found is not None
    assert found.outcome is not None
    assert found.outcome.status == "ok"
    features = store.features_of("r1")
    assert features is not None
    assert features.embedding is not None
    assert [item.request_id for item in store.recent(5)] == ["r1"]


def test_unknown_energy_stays_unknown(store: Store) -> None:
    decide(store, "r1")
    store.record_outcome(Outcome(request_id="r1", model="m", status="ok", wall_s=1_700_000_001.0))
    found = store.decision("r1")
    assert found is not None
    assert found.outcome is not None
    assert found.outcome.energy is None
    assert store.summary().models[0].observed_energy_j is None
    assert store.summary().energy == ()


def test_feedback_may_come_for_what_is_not_known(store: Store) -> None:
    store.record_feedback(Feedback(request_id="nobody", rating=1.0, source="user", wall_s=1_700_000_000.0))
    assert store.summary().feedback == 1
    assert store.decision("nobody") is None


def test_checkpoints_by_name(store: Store) -> None:
    store.checkpoint("a", b"1")
    store.checkpoint("b", b"2")
    store.checkpoint("a", b"3")
    assert (store.restore("a"), store.restore("b"), store.restore("c")) == (b"3", b"2", None)


def test_events_are_counted(store: Store) -> None:
    store.record_event("goal", detail={"name": "energy"})
    store.record_event("load", model="m")
    assert store.summary().events == 2


async def test_reads_are_safe_from_threads(store: Store) -> None:
    for index in range(20):
        decide(store, f"r{index}")
    found = await asyncio.gather(*(asyncio.to_thread(store.decision, f"r{index}") for index in range(20)))
    assert [item.request_id for item in found if item is not None] == [f"r{index}" for index in range(20)]


def test_flush_and_close_may_be_repeated(store: Store) -> None:
    store.flush()
    store.flush()
    store.close()
    store.close()
