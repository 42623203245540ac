"""Knowledge as Parquet, for notebooks and for training elsewhere. Columns: docs/reference/knowledge.md.

Rows stream from one read transaction into row groups of `ROW_GROUP` rows, so memory does not grow with the
database and the server may go on writing. Every file is finished under a temporary name, then renamed.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from calm.errors import BadInput
from calm.records import Decision, Estimate, Record
from calm.stores.rows import OUTCOME_COLUMNS, decode_decision, unpack_vector
from calm.stores.schema import open_reader

if TYPE_CHECKING:
    import pyarrow as pa

ROW_GROUP = 5_000
Table = Literal["requests", "feedback", "events"]
ALL_TABLES: tuple[Table, ...] = ("requests", "feedback", "events")
Values = dict[str, object]

# Columns of the requests table that go out as they are.
PLAIN: Mapping[str, str] = {
    "seq": "int64", "id": "string", "wall_s": "float64", "kind": "string", "tenant": "string",
    "pinned": "string", "stream": "bool", "query": "string", "prompt_chars": "int64",
    "prompt_tokens": "float64", "language": "string", "turns": "int64", "max_tokens": "int64",
    "samples": "int64", "conversation": "string", "wants_json": "bool", "wants_tools": "bool",
    "embedder": "string", "policy": "string", "goal": "string", "chosen": "string", "decision_s": "float64",
}  # fmt: skip
VECTORS = ("embedding", "form")
"""Only when asked for."""
PREDICTED = ("ttft_s", "total_s", "output_tokens", "energy_j", "quality")
OBSERVED: Mapping[str, str] = {
    "wall_s": "float64", "model": "string", "status": "string", "queue_s": "float64", "load_s": "float64",
    "prefill_s": "float64", "ttft_s": "float64", "total_s": "float64", "prompt_tokens": "int64",
    "cached_tokens": "int64", "completion_tokens": "int64", "concurrency": "int64", "memory_bytes": "int64",
    "energy_j": "float64", "energy_meter": "string", "energy_kind": "string", "finish_reason": "string",
    "error": "string", "attempts": "int64",
}  # fmt: skip
FEEDBACK: Mapping[str, str] = {
    "request_id": "string", "wall_s": "float64", "rating": "float64", "source": "string", "comment": "string",
}  # fmt: skip
EVENTS: Mapping[str, str] = {
    "seq": "int64", "wall_s": "float64", "kind": "string", "model": "string", "detail": "string",
}  # fmt: skip

SINCE = "(:since IS NULL OR {}wall_s >= :since)"
REQUESTS_SQL = f"""
SELECT r.*, {", ".join(f"o.{name} AS o_{name}" for name in OUTCOME_COLUMNS)},
  (SELECT count(*) FROM feedback f WHERE f.request_id = r.id) AS feedback_count,
  (SELECT avg(rating) FROM feedback f WHERE f.request_id = r.id) AS feedback_mean
FROM requests r LEFT JOIN outcomes o ON o.request_id = r.id WHERE {SINCE.format("r.")} ORDER BY r.seq
"""


class ExportReport(Record, frozen=True, kw_only=True):
    """Rows of each table, bytes of each file written."""

    rows: Mapping[str, int]
    bytes: Mapping[str, int]


def export_parquet(
    db_path: Path,
    out: Path,
    *,
    since: float | None = None,
    tables: Sequence[Table] = ALL_TABLES,
    embeddings: bool = False,
    overwrite: bool = False,
) -> ExportReport:
    """Writes `out`/TABLE.parquet for each table; `since` is Unix seconds, None: everything.

    Raises BadInput when a file is there already and `overwrite` is not given, KnowledgeError when the
    database cannot be read. After an error in the writing no file of `out` has changed.
    """
    targets = {table: out / f"{table}.parquet" for table in tables}
    if not overwrite:
        refuse_existing(targets.values())
    with closing(open_reader(db_path)) as connection, ExitStack() as cleanup:
        out.mkdir(parents=True, exist_ok=True)
        connection.execute("BEGIN")
        rows: dict[str, int] = {}
        partial: dict[str, Path] = {}
        for table, target in targets.items():
            partial[table] = target.with_name(f".{target.name}.{os.getpid()}.partial")
            cleanup.callback(partial[table].unlink, missing_ok=True)
            rows[table] = write_table(connection, table, partial[table], since, embeddings)
        for table, target in targets.items():
            partial[table].replace(target)
    return ExportReport(rows=rows, bytes={path.name: path.stat().st_size for path in targets.values()})


def refuse_existing(paths: Iterable[Path]) -> None:
    existing = [str(path) for path in paths if path.exists()]
    if existing:
        raise BadInput(
            f"{', '.join(existing)} already there: name another folder, or use --force", field="out"
        )


def write_table(
    connection: sqlite3.Connection, table: Table, path: Path, since: float | None, embeddings: bool
) -> int:
    """Streams one table into one file; returns its rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = requests_schema(embeddings) if table == "requests" else pa.schema(fields_of(table))
    rows = 0
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for group in row_groups(select(connection, table, since)):
            values = [request_values(row, embeddings) if table == "requests" else dict(row) for row in group]
            writer.write_table(pa.Table.from_pylist(values, schema=schema), row_group_size=ROW_GROUP)
            rows += len(values)
    return rows


def fields_of(table: Table) -> list[tuple[str, pa.DataType]]:
    return typed(FEEDBACK if table == "feedback" else EVENTS)


def typed(columns: Mapping[str, str], prefix: str = "") -> list[tuple[str, pa.DataType]]:
    import pyarrow as pa

    types = {"int64": pa.int64(), "float64": pa.float64(), "string": pa.string(), "bool": pa.bool_()}
    return [(prefix + name, types[kind]) for name, kind in columns.items()]


def requests_schema(embeddings: bool) -> pa.Schema:
    import pyarrow as pa

    predicted = dict.fromkeys(PREDICTED, "float64")
    candidate = pa.struct(
        typed({"model": "string", "rank": "int64", "score": "float64"}) + typed(predicted, "predicted_")
    )
    refusal = pa.struct(typed({"model": "string", "constraint": "string", "reason": "string"}))
    fields = [
        *typed(PLAIN),
        ("candidates", pa.list_(candidate)),
        ("refused", pa.list_(refusal)),
        *typed(predicted, "predicted_"),
        *typed(OBSERVED, "observed_"),
        ("feedback_count", pa.int64()),
        ("feedback_mean", pa.float64()),
    ]
    vectors = [(name, pa.list_(pa.float32())) for name in VECTORS] if embeddings else []
    return pa.schema([*fields, *vectors])


def select(connection: sqlite3.Connection, table: Table, since: float | None) -> sqlite3.Cursor:
    plain = f"SELECT * FROM {table} WHERE {SINCE.format('')} ORDER BY seq"
    return connection.execute(REQUESTS_SQL if table == "requests" else plain, {"since": since})


def row_groups(cursor: sqlite3.Cursor) -> Iterator[list[sqlite3.Row]]:
    while group := cursor.fetchmany(ROW_GROUP):
        yield group


def request_values(row: sqlite3.Row, embeddings: bool) -> Values:
    decision = decode_decision(row["decision"])
    answered = decision.estimates.get(row["o_model"] or row["chosen"] or "")
    values: Values = {name: bool(row[name]) if kind == "bool" else row[name] for name, kind in PLAIN.items()}
    values |= {f"observed_{name}": row[f"o_{name}"] for name in OBSERVED}
    values |= predictions(answered)
    values |= {name: row[name] for name in ("feedback_count", "feedback_mean")}
    values["candidates"], values["refused"] = candidates(decision), refusals(decision)
    if embeddings:
        vectors = {name: unpack_vector(row[name]) for name in VECTORS}
        values |= {name: None if vector is None else vector.tolist() for name, vector in vectors.items()}
    return values


def predictions(estimate: Estimate | None) -> Values:
    """Means of what was predicted; None where nothing was."""
    beliefs = {name: getattr(estimate, name, None) for name in PREDICTED}
    return {f"predicted_{name}": None if belief is None else belief.mean for name, belief in beliefs.items()}


def candidates(decision: Decision) -> list[Values]:
    return [
        {"model": item.model, "rank": rank, "score": item.score}
        | predictions(decision.estimates.get(item.model))
        for rank, item in enumerate(decision.ranked, start=1)
    ]


def refusals(decision: Decision) -> list[Values]:
    return [
        {"model": item.model, "constraint": item.constraint, "reason": item.reason}
        for item in decision.refused
    ]
