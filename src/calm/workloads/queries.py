"""What is asked: domain sets (answers are judged) and routing tables (the quality is known beforehand).

    domains:gsm8k,pubmedqa      sets of the data directory; `domains:all` for every one
    table:routerdc7:gsm8k,mmlu  a routing table of the data directory, or a file; some tasks or all

An answers file beside either says what each model of the fleet is known to answer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import msgspec

from calm.errors import BadInput
from calm.records import Record
from calm.workloads.answers import merged, models_in, read_answers
from calm.workloads.files import REFERENCE
from calm.workloads.held_out import part_of
from calm.workloads.names import names_in
from calm.workloads.prompts import render
from calm.workloads.records import Query, Recorded, WorkloadSpec
from calm.workloads.rows import Row
from calm.workloads.sets import read_set, set_names
from calm.workloads.tables import read_table

FIELD = "queries"
HELD_OUT = "held-out"
ALL = "all"


class Selection(Record, frozen=True, kw_only=True):
    """The queries a workload draws from, at least one, and what a reader of its figures must know of them."""

    queries: tuple[Query, ...]
    notes: tuple[str, ...] = ()


def load_queries(spec: WorkloadSpec, models: Collection[str]) -> Selection:
    """The queries that `spec` names, for a fleet of `models`; never an empty selection.

    Of a table, and with an answers file, only queries whose outcome is known for every model stay; `notes` say
    how many were left out. Raises BadInput (field `queries`, `answers` or `data`) with one line: an unknown
    source, set, table, task or split; a malformed file; nothing left.
    """
    kind, _, rest = spec.queries.partition(":")
    if kind == "domains" and rest:
        selection = _of_sets(spec, rest)
    elif kind == "table" and rest:
        selection = _of_table(spec, rest, models)
    else:
        raise BadInput(
            f'"{spec.queries}" is no query source; give domains:NAME,... or table:NAME[:TASK,...]; '
            f"see {REFERENCE}",
            field=FIELD,
        )
    return selection if spec.answers is None else _with_answers(selection, Path(spec.answers), models)


# --- domain sets ------------------------------------------------------------------------------------


def _of_sets(spec: WorkloadSpec, listed: str) -> Selection:
    names = set_names(spec.data) if listed == ALL else _words(listed)
    parts = {name: _of_split(read_set(spec.data, name), spec.split) for name in names}
    empty = [name for name, rows in parts.items() if not rows]
    if empty and (listed != ALL or len(empty) == len(parts)):
        raise BadInput(
            f"{', '.join(empty)}: no rows of split {spec.split}; leave out or drop --split", field=FIELD
        )
    if not parts:
        raise BadInput(f'"domains:{listed}" names no set; see {REFERENCE}', field=FIELD)
    queries = tuple(query_of(row) for rows in parts.values() for row in rows)
    notes = (f"without {', '.join(empty)}: no rows of split {spec.split}",) if empty else ()
    return Selection(queries=queries, notes=notes)


# --- routing tables ---------------------------------------------------------------------------------


def _of_table(spec: WorkloadSpec, rest: str, models: Collection[str]) -> Selection:
    name, _, tasks = rest.partition(":")
    table = read_table(spec.data, name)
    rows = _of_split(_of_tasks(table, tasks), spec.split)
    if not rows:
        raise BadInput(f"{_base(name)}: no rows{_of(spec.split)}; see {REFERENCE}", field=FIELD)
    names = names_in(models, {model for row in rows for model in row.scores})
    queries = [query_of(row, _known(row, names)) for row in rows]
    kept = tuple(query for query in queries if query.known.keys() >= set(models))
    if not kept:
        theirs = sorted({model for row in rows for model in row.scores})
        raise BadInput(
            f"{_base(name)}: no row has a score for every model of the fleet; "
            f"table: {', '.join(theirs) or 'none'}; fleet: {', '.join(models)}",
            field=FIELD,
        )
    return Selection(queries=kept, notes=_left_out(_base(name), len(kept), len(queries), "score"))


def _of_tasks(rows: tuple[Row, ...], listed: str) -> tuple[Row, ...]:
    """Rows of the tasks listed, all for none. Raises BadInput for a task the table does not have."""
    wanted = _words(listed)
    there = dict.fromkeys(row.dataset for row in rows)
    for task in wanted:
        if task not in there:
            raise BadInput(f'no task "{task}"; the table has: {", ".join(sorted(there))}', field=FIELD)
    return tuple(row for row in rows if row.dataset in wanted) if wanted else rows


def _known(row: Row, names: Mapping[str, str]) -> dict[str, Recorded]:
    return {
        model: Recorded(query_id=row.id, model=model, quality=row.scores[theirs])
        for model, theirs in names.items()
        if theirs in row.scores
    }


# --- answers files ----------------------------------------------------------------------------------


def _with_answers(selection: Selection, path: Path, models: Collection[str]) -> Selection:
    answers = read_answers(path, models)
    filled = [
        msgspec.structs.replace(query, known=merged(query.known, answers.get(query.id, {})))
        for query in selection.queries
    ]
    kept = tuple(query for query in filled if query.known.keys() >= set(models))
    if not kept:
        raise BadInput(
            f"{path}: no query was answered by every model of the fleet; "
            f"file: {', '.join(models_in(path)) or 'none'}; fleet: {', '.join(models)}",
            field="answers",
        )
    notes = _left_out(path.name, len(kept), len(filled), "answer")
    return Selection(queries=kept, notes=(*selection.notes, *notes))


# --- small parts ------------------------------------------------------------------------------------


def query_of(row: Row, known: Mapping[str, Recorded] | None = None) -> Query:
    """A row as something to ask."""
    return Query(
        id=row.id,
        dataset=row.dataset,
        domain=row.domain,
        prompt=render(row),
        answer=row.answer,
        answer_type=row.answer_type,
        choices=row.choices,
        known=known or {},
    )


def _of_split(rows: Sequence[Row], split: str | None) -> tuple[Row, ...]:
    """`train` and `test` as the rows name them; `held-out`: the part that no trainer of ours has seen."""
    if split == HELD_OUT:
        return part_of(rows, "test")
    return tuple(row for row in rows if split in (None, row.split))


def _left_out(source: str, kept: int, total: int, what: str) -> tuple[str, ...]:
    if kept == total:
        return ()
    return (f"{source}: {total - kept} of {total} queries left out, no {what} of every model of the fleet",)


def _words(listed: str) -> tuple[str, ...]:
    words: Iterable[str] = (word.strip() for word in listed.split(","))
    return tuple(dict.fromkeys(word for word in words if word))


def _of(split: str | None) -> str:
    return f" of split {split}" if split else ""


def _base(name: str) -> str:
    return Path(name).name
