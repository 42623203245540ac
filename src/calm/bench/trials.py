"""A trial's record, put together from both sides: what the clients saw and what the server stored.

Status, times and quality are the client's, since latency is what somebody waits. Who was chosen, what the
decision took, waiting, loading, tokens and joules are the server's, read from its knowledge file once it ended.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path

import msgspec

from calm.bench.client import Answer
from calm.records import Outcome, Record, Residency, Snapshot, StoredRequest
from calm.report.records import Move, Row, Sample
from calm.stores.reads import KnowledgeReader
from calm.stores.schema import open_reader
from calm.workloads.records import Query, Workload

IN_MEMORY: frozenset[Residency] = frozenset({"ready", "remote"})
ALL_REQUESTS = -1
"""SQLite's LIMIT for none."""


class Ledger(Record, frozen=True, kw_only=True):
    """What a server that has ended left in its knowledge file. Times are Unix time."""

    requests: Mapping[str, StoredRequest]
    moves: tuple[Move, ...]
    """In order; `at_s` is Unix time here."""


class _Change(Record, frozen=True, kw_only=True):
    old: Residency
    new: Residency


def read_ledger(database: Path) -> Ledger:
    """Raises KnowledgeError when the file cannot be read."""
    stored = KnowledgeReader(database).recent(ALL_REQUESTS)
    with closing(open_reader(database)) as connection:
        events = connection.execute(
            "SELECT wall_s, model, detail FROM events WHERE kind = 'residency' ORDER BY seq"
        ).fetchall()
    moves = (_move(float(wall_s), str(model), str(detail)) for wall_s, model, detail in events)
    return Ledger(requests={item.request_id: item for item in stored}, moves=tuple(moves))


def _move(wall_s: float, model: str, detail: str) -> Move:
    change = msgspec.json.decode(detail, type=_Change)
    return Move(at_s=wall_s, model=model, old=change.old, new=change.new)


# --- rows -------------------------------------------------------------------------------------------


def rows_of(
    workload: Workload,
    answers: Sequence[Answer],
    ledger: Ledger,
    remote: Collection[str],
    hosts: Mapping[str, str] = {},
) -> tuple[Row, ...]:
    """One row for each query, in the workload's order. `remote` models are in nobody's memory: always a hit.

    `hosts`: whose engine serves each model, where that is another's.
    """
    return tuple(
        row_of(query, arrived_s, answer, ledger, remote, hosts)
        for query, arrived_s, answer in zip(workload.queries, workload.arrivals_s, answers, strict=True)
    )


def row_of(
    query: Query,
    arrived_s: float,
    answer: Answer,
    ledger: Ledger,
    remote: Collection[str],
    hosts: Mapping[str, str] = {},
) -> Row:
    stored = ledger.requests.get(answer.request_id or "")
    seen = stored.outcome if stored else None
    return Row(
        query_id=query.id,
        domain=query.domain,
        arrived_s=arrived_s,
        model=_model(stored, seen),
        status=answer.status,
        total_s=answer.total_s,
        ttft_s=answer.ttft_s,
        queue_s=seen.queue_s if seen else 0.0,
        load_s=seen.load_s if seen else 0.0,
        hit=hit(stored, ledger.moves, remote, hosts) if stored else None,
        prompt_tokens=seen.prompt_tokens if seen else None,
        completion_tokens=seen.completion_tokens if seen else None,
        energy_j=seen.energy.joules if seen and seen.energy else None,
        quality=answer.quality,
        decision_s=stored.decision.decision_s if stored and stored.decision.ranked else None,
    )


def _model(stored: StoredRequest | None, seen: Outcome | None) -> str | None:
    if seen is not None and seen.model is not None:
        return seen.model
    return stored.decision.ranked[0].model if stored and stored.decision.ranked else None


def hit(
    stored: StoredRequest,
    moves: Iterable[Move],
    remote: Collection[str],
    hosts: Mapping[str, str] = {},
) -> bool | None:
    """Whether the first choice could take requests when it was chosen; None where nobody was chosen."""
    if not stored.decision.ranked:
        return None
    chosen = stored.decision.ranked[0].model
    engine = hosts.get(chosen, chosen)
    return chosen in remote or residency_at(moves, engine, stored.decision.wall_s) in IN_MEMORY


def residency_at(moves: Iterable[Move], model: str, wall_s: float) -> Residency:
    """The newest state before that moment; cold before the first move."""
    state: Residency = "cold"
    for move in moves:
        if move.at_s > wall_s:
            break
        if move.model == model:
            state = move.new
    return state


# --- the house --------------------------------------------------------------------------------------


def timeline(moves: Iterable[Move], origin_wall_s: float, end_wall_s: float) -> tuple[Move, ...]:
    """Moves on the workload's clock, without those of the server's end.

    What happened before the workload is one move at 0 for each model that was not cold then.
    """
    start: dict[str, Residency] = {}
    later: list[Move] = []
    for move in moves:
        if move.at_s < origin_wall_s:
            start[move.model] = move.new
        elif move.at_s <= end_wall_s:
            later.append(msgspec.structs.replace(move, at_s=move.at_s - origin_wall_s))
    warm = (Move(at_s=0.0, model=m, old="cold", new=state) for m, state in start.items() if state != "cold")
    return (*warm, *later)


def with_adapters(moves: Iterable[Move], hosts: Mapping[str, str]) -> tuple[Move, ...]:
    """Each move of a base followed by the same of its adapters, which are in memory when it is."""
    crews: dict[str, list[str]] = {}
    for model, host in hosts.items():
        if model != host:
            crews.setdefault(host, []).append(model)
    return tuple(
        move if model == move.model else msgspec.structs.replace(move, model=model)
        for move in moves
        for model in (move.model, *crews.get(move.model, ()))
    )


def loads(moves: Iterable[Move]) -> int:
    """Loads in a timeline: those under way when the workload began, and those started since."""
    return sum(move.new == "loading" for move in moves)


def sample_of(snapshot: Snapshot, at_s: float) -> Sample:
    return Sample(
        at_s=at_s,
        used_bytes=snapshot.used_bytes,
        queue_length=snapshot.queue_length,
        in_flight=snapshot.in_flight,
    )


def duration_s(workload: Workload, answers: Sequence[Answer]) -> float:
    """First arrival to last byte."""
    ends_s = (at_s + answer.total_s for at_s, answer in zip(workload.arrivals_s, answers, strict=True))
    return max(ends_s, default=0.0) - min(workload.arrivals_s, default=0.0)
