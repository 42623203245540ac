"""Reads of the knowledge database, beside a running writer or without one.

Every call opens a read-only connection of its own (a fifth of a millisecond): nothing is shared between
threads, and a database that was moved aside is never read by mistake.
"""

from __future__ import annotations

import hashlib
import logging
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import cast

from calm.records import (
    Features,
    KnowledgeSummary,
    MeterKind,
    MeterSummary,
    ModelSummary,
    StoredRequest,
)
from calm.stores.rows import to_features, to_feedback, to_outcome, to_stored
from calm.stores.schema import open_reader

log = logging.getLogger(__name__)


class KnowledgeReader:
    """Implements ports.Recall on a database file. Thread-safe. Every call may raise KnowledgeError."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def decision(self, request_id: str) -> StoredRequest | None:
        with closing(open_reader(self._path)) as connection:
            row = connection.execute("SELECT * FROM requests WHERE id = ?", (request_id,)).fetchone()
            return None if row is None else assemble(connection, row)

    def features_of(self, request_id: str) -> Features | None:
        with closing(open_reader(self._path)) as connection:
            row = connection.execute("SELECT * FROM requests WHERE id = ?", (request_id,)).fetchone()
            return None if row is None else to_features(row, with_embedding=True)

    def recent(
        self, limit: int = 50, *, model: str | None = None, status: str | None = None
    ) -> tuple[StoredRequest, ...]:
        """Newest first. `model` is the one that answered, or the first choice while nothing has ended."""
        sql, values = recent_sql(model, status)
        with closing(open_reader(self._path)) as connection:
            rows = connection.execute(sql, (*values, limit)).fetchall()
            return tuple(assemble(connection, row) for row in rows)

    def summary(self) -> KnowledgeSummary:
        with closing(open_reader(self._path)) as connection:
            connection.execute("BEGIN")
            return summarise(connection)

    def restore(self, name: str) -> bytes | None:
        """The newest checkpoint; None when there is none or its checksum is wrong (which is logged)."""
        with closing(open_reader(self._path)) as connection:
            row = connection.execute(
                "SELECT state, checksum FROM estimators WHERE name = ?", (name,)
            ).fetchone()
        if row is None:
            return None
        state = bytes(row["state"])
        if checksum(state) == row["checksum"]:
            return state
        log.error("the stored state of estimator %s has a wrong checksum: it starts from its priors", name)
        return None


def checksum(state: bytes) -> str:
    return hashlib.sha256(state).hexdigest()


def recent_sql(model: str | None, status: str | None) -> tuple[str, tuple[str, ...]]:
    conditions, values = [], []
    if model is not None:
        conditions.append("coalesce(o.model, r.chosen) = ?")
        values.append(model)
    if status is not None:
        conditions.append("o.status = ?")
        values.append(status)
    where = f" WHERE {' AND '.join(conditions)}" if conditions else ""
    sql = f"SELECT r.* FROM requests r LEFT JOIN outcomes o ON o.request_id = r.id{where}"
    return f"{sql} ORDER BY r.seq DESC LIMIT ?", tuple(values)


def assemble(connection: sqlite3.Connection, row: sqlite3.Row) -> StoredRequest:
    key = (row["id"],)
    outcome = connection.execute("SELECT * FROM outcomes WHERE request_id = ?", key).fetchone()
    ratings = connection.execute("SELECT * FROM feedback WHERE request_id = ? ORDER BY seq", key).fetchall()
    return to_stored(
        row, None if outcome is None else to_outcome(outcome), tuple(to_feedback(item) for item in ratings)
    )


MODELS_SQL = """
SELECT o.model AS model, count(*) AS requests, coalesce(sum(o.status = 'ok'), 0) AS ok,
  avg(CASE WHEN o.status = 'ok' THEN o.ttft_s END) AS observed_ttft_s,
  avg(CASE WHEN o.status = 'ok' AND o.model = r.chosen THEN r.predicted_ttft_s END) AS predicted_ttft_s,
  avg(CASE WHEN o.status = 'ok' THEN o.total_s END) AS observed_total_s,
  avg(CASE WHEN o.status = 'ok' AND o.model = r.chosen THEN r.predicted_total_s END) AS predicted_total_s,
  avg(CASE WHEN o.status = 'ok' THEN o.completion_tokens END) AS observed_output_tokens,
  avg(CASE WHEN o.status = 'ok' AND o.model = r.chosen THEN r.predicted_output_tokens END)
    AS predicted_output_tokens,
  avg(CASE WHEN o.status = 'ok' THEN o.energy_j END) AS observed_energy_j,
  avg(CASE WHEN o.status = 'ok' AND o.model = r.chosen THEN r.predicted_energy_j END) AS predicted_energy_j,
  (SELECT avg(f.rating) FROM feedback f JOIN outcomes p ON p.request_id = f.request_id
   WHERE p.model = o.model) AS rating
FROM outcomes o LEFT JOIN requests r ON r.id = o.request_id
WHERE o.model IS NOT NULL GROUP BY o.model ORDER BY requests DESC, model
"""
METERS_SQL = """
SELECT energy_meter AS meter, energy_kind AS kind, count(*) AS requests, sum(energy_j) AS joules
FROM outcomes WHERE energy_j IS NOT NULL GROUP BY energy_meter, energy_kind ORDER BY joules DESC
"""


def summarise(connection: sqlite3.Connection) -> KnowledgeSummary:
    """What is stored, as one snapshot; `dropped` is 0, since a reader cannot know it."""
    since = connection.execute("SELECT wall_s FROM requests ORDER BY seq LIMIT 1").fetchone()
    statuses = connection.execute("SELECT status, count(*) FROM outcomes GROUP BY status").fetchall()
    return KnowledgeSummary(
        requests=count(connection, "requests"),
        feedback=count(connection, "feedback"),
        events=count(connection, "events"),
        since_wall_s=since["wall_s"] if since else None,
        statuses={str(status): int(number) for status, number in statuses},
        models=tuple(ModelSummary(**dict(row)) for row in connection.execute(MODELS_SQL)),
        energy=to_meters(connection.execute(METERS_SQL).fetchall()),
        dropped=0,
    )


def to_meters(rows: Sequence[sqlite3.Row]) -> tuple[MeterSummary, ...]:
    return tuple(
        MeterSummary(
            meter=row["meter"],
            kind=cast(MeterKind, row["kind"]),
            requests=row["requests"],
            joules=row["joules"],
        )
        for row in rows
    )


def count(connection: sqlite3.Connection, table: str) -> int:
    (number,) = connection.execute(f"SELECT count(*) FROM {table}").fetchone()
    return int(number)
