"""The knowledge base on SQLite: what was predicted beside what happened, kept over restarts.

Recording costs the request path an append to a queue (`writer.py`); reading opens its own connection
(`reads.py`); opening migrates, recovers and marks what an earlier process left unfinished (`schema.py`).
"""

from __future__ import annotations

import logging
import os
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec

from calm.ports import Clock
from calm.records import (
    Ask,
    Decision,
    Features,
    Feedback,
    KnowledgeSummary,
    Outcome,
    StoredRequest,
)
from calm.stores.reads import KnowledgeReader, checksum
from calm.stores.retention import Retention
from calm.stores.rows import ENCODER, AskSummary, Row, feedback_row, outcome_row, request_row, summarise
from calm.stores.schema import KnowledgeError, mark_interrupted, move_aside, open_writer
from calm.stores.writer import Writer

log = logging.getLogger(__name__)

QUEUE_RECORDS = 20_000
"""Records waiting for the disk at most: ten seconds at 1,000 requests a second."""


class RequestEntry(NamedTuple):
    ask: AskSummary
    features: Features
    decision: Decision
    table: str = "requests"

    def row(self) -> Row:
        return request_row(self.ask, self.features, self.decision)


class OutcomeEntry(NamedTuple):
    outcome: Outcome
    table: str = "outcomes"

    def row(self) -> Row:
        return outcome_row(self.outcome)


class FeedbackEntry(NamedTuple):
    feedback: Feedback
    table: str = "feedback"

    def row(self) -> Row:
        return feedback_row(self.feedback)


class EventEntry(NamedTuple):
    wall_s: float
    kind: str
    model: str | None
    detail: Mapping[str, object] | None
    table: str = "events"

    def row(self) -> Row:
        detail = None if self.detail is None else ENCODER.encode(self.detail).decode()
        return self.wall_s, self.kind, self.model, detail


class StateEntry(NamedTuple):
    name: str
    wall_s: float
    state: bytes
    table: str = "estimators"

    def row(self) -> Row:
        return self.name, self.wall_s, self.state, checksum(self.state)


class SqliteStore:
    """Implements ports.KnowledgeStore, ports.EventLog and ports.Recall on one file.

    `retention_days` and `max_requests` bound what is kept (None: no bound). With `store_embeddings` the
    query's embedding is kept (float16) to learn from late ratings; it tells roughly what a prompt was about.
    Raises KnowledgeError when the file is used by another process, too new or not to be opened.
    """

    def __init__(
        self,
        path: Path,
        *,
        store_prompts: bool = False,
        store_embeddings: bool = True,
        retention_days: float | None,
        max_requests: int | None,
        clock: Clock,
        queue_records: int = QUEUE_RECORDS,
    ) -> None:
        self._path = path
        self._clock = clock
        self._store_prompts = store_prompts
        self._store_embeddings = store_embeddings
        self._reader = KnowledgeReader(path)
        retention = Retention(retention_days, max_requests)
        self._lock = OwnerLock(path.with_name(path.name + ".lock"))
        try:
            self._writer = Writer(self._open, retention, clock, capacity=queue_records)
        except BaseException:
            self._lock.release()
            raise
        self._writer.start()

    def _open(self, corrupt: str | None) -> sqlite3.Connection:
        wall_s = self._clock.wall()
        if corrupt is not None:
            move_aside(self._path, wall_s, corrupt)
        connection = open_writer(self._path, wall_s)
        marked = mark_interrupted(connection, wall_s)
        if marked:
            log.warning("%d requests of an earlier process never ended: marked as interrupted", marked)
        return connection

    # --- recording ---

    def record_decision(self, ask: Ask, features: Features, decision: Decision) -> None:
        kept = (
            features
            if self._store_embeddings
            else msgspec.structs.replace(features, embedding=None, form=None)
        )
        self._writer.submit(RequestEntry(summarise(ask, with_query=self._store_prompts), kept, decision))

    def record_outcome(self, outcome: Outcome) -> None:
        self._writer.submit(OutcomeEntry(outcome))

    def record_feedback(self, feedback: Feedback) -> None:
        self._writer.submit(FeedbackEntry(feedback))

    def record_event(
        self, kind: str, *, model: str | None = None, detail: Mapping[str, object] | None = None
    ) -> None:
        self._writer.submit(EventEntry(self._clock.wall(), kind, model, detail))

    def checkpoint(self, name: str, state: bytes) -> None:
        self._writer.submit(StateEntry(name, self._clock.wall(), state), always=True)

    # --- state of the store ---

    @property
    def dropped(self) -> int:
        """Records lost since the start: queue full, or not to be stored."""
        return self._writer.dropped

    @property
    def failure(self) -> str | None:
        """Why knowledge cannot be written right now; None while it can."""
        return self._writer.failure

    def flush(self) -> None:
        """Raises KnowledgeError when the disk refuses."""
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
        self._lock.release()

    # --- reading; sees everything recorded before the call ---

    def decision(self, request_id: str) -> StoredRequest | None:
        found = self._reader.decision(request_id)
        if found is not None and found.outcome is not None:
            return found
        self._settle()
        return self._reader.decision(request_id)

    def features_of(self, request_id: str) -> Features | None:
        found = self._reader.features_of(request_id)
        if found is None:
            self._settle()
            found = self._reader.features_of(request_id)
        return found

    def recent(
        self, limit: int = 50, *, model: str | None = None, status: str | None = None
    ) -> tuple[StoredRequest, ...]:
        self._settle()
        return self._reader.recent(limit, model=model, status=status)

    def summary(self) -> KnowledgeSummary:
        self._settle()
        return msgspec.structs.replace(self._reader.summary(), dropped=self.dropped)

    def restore(self, name: str) -> bytes | None:
        self._settle()
        return self._reader.restore(name)

    def _settle(self) -> None:
        """What is queued becomes readable; where the disk refuses, reads show what is there."""
        try:
            self.flush()
        except KnowledgeError as error:
            log.warning("reading knowledge without the newest records: %s", error)


class OwnerLock:
    """At most one process writes: the kernel drops the lock with its holder, however that one ends."""

    def __init__(self, path: Path) -> None:
        self._fd: int | None = None
        try:
            import fcntl
        except ImportError:
            return  # no advisory locks on this system: SQLite's own still keep the file whole
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(fd)
            raise KnowledgeError(
                f"another CALM writes to {path.with_suffix('')}: stop it, or start this one with another "
                "knowledge file"
            ) from error
        self._fd = fd

    def release(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
