"""What the soak claims, each claim a pure function of what was seen: clients, samples, records, processes."""

from __future__ import annotations

import sqlite3
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.soak_client import Ending

FLEETING_S = 0.1
"""A client that left sooner may be gone before the door read its request: then nothing was asked."""
GRACE_S = 0.25
"""A 504 leaves the server when the deadline passes and is seen a moment later."""
EXPECTED: Mapping[str, frozenset[str]] = {
    "complete": frozenset({"ok"}),
    "broken": frozenset({"error", "timeout"}),
    "left": frozenset({"cancelled", "ok", "error", "timeout", "rejected"}),
}
"""How a client saw it end -> what the record may say. Whoever left cannot know how it would have ended."""
REFUSED: Mapping[int, frozenset[str]] = {
    422: frozenset({"rejected"}),
    429: frozenset({"rejected"}),
    503: frozenset({"error"}),
    504: frozenset({"timeout"}),
}


@dataclass(frozen=True)
class Sample:
    """One look at /calm/v1/snapshot."""

    at_s: float
    budget_bytes: int
    used_bytes: int
    cores: int
    threads_in_use: int
    queue_length: int
    in_flight: int


@dataclass(frozen=True)
class Stored:
    """One request as the knowledge base has it. `status` None: its outcome is missing."""

    tag: str
    request_id: str
    status: str | None
    model: str | None
    attempts: int | None
    error: str | None


@dataclass(frozen=True)
class Kill:
    """The engine that got SIGKILL, and what its model had in flight then."""

    model: str
    pid: int
    at_s: float
    in_flight: int


@dataclass
class Seen:
    """Everything the run saw; the claims read it and nothing else."""

    endings: list[Ending] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    stored: list[Stored] = field(default_factory=list)
    kill: Kill | None = None
    answers_after: dict[str, str] = field(default_factory=dict)
    """Model -> how a last request to it ended."""
    dropped: float | None = None
    capacity_rps: float = 0.0
    wanted_rps: float = 0.0
    offered_rps: float = 0.0
    deadline_s: float = 0.0
    max_queue: int = 0
    drained: Sample | None = None
    exit_code: int | None = None
    exit_s: float = 0.0
    left_behind: list[str] = field(default_factory=list)
    rss_before_bytes: int = 0
    rss_after_bytes: int = 0
    engines_peak_bytes: int = 0
    """Proportional set size of all engines together, measured from outside."""
    lag_p99_s: float = 0.0


@dataclass(frozen=True)
class Verdict:
    claim: str
    holds: bool
    detail: str


def read_records(path: Path, prefix: str) -> list[Stored]:
    """Requests whose conversation begins with `prefix`, with their outcomes."""
    sql = """SELECT r.conversation, r.id, o.status, o.model, o.attempts, o.error
             FROM requests r LEFT JOIN outcomes o ON o.request_id = r.id
             WHERE r.conversation LIKE ? ORDER BY r.seq"""
    with closing(sqlite3.connect(path)) as database:
        return [Stored(*row) for row in database.execute(sql, (prefix + "%",))]


def percentile(values: Iterable[float], share: float) -> float:
    """Nearest rank; NaN for none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else float("nan")


def judge(seen: Seen) -> list[Verdict]:
    """Every claim, in the order of a request's life."""
    found = [(claim, check(seen)) for claim, check in CLAIMS]
    return [Verdict(claim, not wrong, "; ".join(wrong)) for claim, wrong in found]


# --- the claims: each returns what speaks against it ----------------------------------------------


def _overload(seen: Seen) -> list[str]:
    refused = sum(e.status == 429 for e in seen.endings)
    wrong = [] if refused else ["nothing was refused: this was no overload"]
    if seen.offered_rps < 0.8 * seen.wanted_rps:
        wrong.append(f"offered {seen.offered_rps:.1f}/s of the wanted {seen.wanted_rps:.1f}/s")
    return wrong


def _one_end(seen: Seen) -> list[str]:
    bad = Counter(e.how for e in seen.endings if e.how in ("hung", "cut", "unreached"))
    return [f"{count} {how}" for how, count in bad.items()]


def _finished(seen: Seen) -> list[str]:
    odd = [e.call.tag for e in seen.endings if e.how == "complete" and not e.finish]
    return listed("[DONE] without a finish_reason", odd)


def _come_back(seen: Seen) -> list[str]:
    odd = [e.call.tag for e in seen.endings if e.status == 429 and not (e.retry_after or "").isdigit()]
    return listed("no Retry-After", odd)


def _recorded(seen: Seen) -> list[str]:
    stored = Counter(s.tag for s in seen.stored)
    missing = [e.call.tag for e in seen.endings if not stored[e.call.tag] and not fleeting(e)]
    unfinished = [s.tag for s in seen.stored if s.status is None]
    return [
        *listed("no record", missing),
        *listed("no outcome", unfinished),
        *listed("recorded more than once", [tag for tag, count in stored.items() if count > 1]),
        *listed("recorded but never sent", stored.keys() - {e.call.tag for e in seen.endings}),
        *([f"{seen.dropped:.0f} records dropped"] if seen.dropped else []),
    ]


def fleeting(ending: Ending) -> bool:
    return ending.how == "left" and ending.status is None and ending.total_s < FLEETING_S


def _agree(seen: Seen) -> list[str]:
    stored = {s.tag: s for s in seen.stored}
    pairs = [(e, stored[e.call.tag]) for e in seen.endings if e.call.tag in stored]
    status = [f"{e.call.tag}: {e.how} {e.status or ''} is {s.status!r}" for e, s in pairs if not fits(e, s)]
    ids = [e.call.tag for e, s in pairs if e.request_id and e.request_id != s.request_id]
    models = [e.call.tag for e, s in pairs if e.how == "complete" and e.model != s.model]
    return [*listed("status differs", status), *listed("id differs", ids), *listed("model differs", models)]


def fits(ending: Ending, stored: Stored) -> bool:
    """Whether the record tells what the client saw."""
    expected = REFUSED.get(ending.status or 0) if ending.how == "refused" else EXPECTED.get(ending.how)
    return expected is None or stored.status in expected


def _budget(seen: Seen) -> list[str]:
    over = [s for s in seen.samples if s.used_bytes > s.budget_bytes]
    if not seen.samples:
        return ["no sample was taken"]
    worst = max((s.used_bytes - s.budget_bytes for s in over), default=0)
    return [f"{len(over)} of {len(seen.samples)} samples over, by up to {worst / 1e6:.0f} MB"] if over else []


def _threads(seen: Seen) -> list[str]:
    over = [s for s in seen.samples if s.threads_in_use > s.cores]
    return [f"{len(over)} samples with up to {max(s.threads_in_use for s in over)} threads"] if over else []


def _queue(seen: Seen) -> list[str]:
    longest = max((s.queue_length for s in seen.samples), default=0)
    return [f"{longest} waited"] if longest > seen.max_queue else []


def _bounded(seen: Seen) -> list[str]:
    total_s = [e.total_s for e in seen.endings if e.accepted]
    p99_s = percentile(total_s, 0.99)
    if p99_s <= seen.deadline_s + GRACE_S:
        return []
    return [f"p99 {p99_s:.2f} s of {len(total_s)} accepted"]


def _killed(seen: Seen) -> list[str]:
    if seen.kill is None:
        return ["no engine was busy: none was killed"]
    return [f"{name}: {how}" for name, how in seen.answers_after.items() if how != "complete"]


def _drained(seen: Seen) -> list[str]:
    last = seen.drained
    if last is None or not (last.queue_length or last.in_flight or last.threads_in_use):
        return [] if last else ["the server did not say"]
    return [f"{last.in_flight} in flight, {last.queue_length} waiting, {last.threads_in_use} threads held"]


def _gone(seen: Seen) -> list[str]:
    wrong = [] if seen.exit_code == 0 else [f"exit code {seen.exit_code}"]
    return [*wrong, *listed("left behind", seen.left_behind)]


def listed(what: str, items: Iterable[str], most: int = 3) -> list[str]:
    """Nothing for none, else the count with the first few."""
    found = sorted(items)
    more = ", ..." if len(found) > most else ""
    return [f"{len(found)} {what} ({', '.join(found[:most])}{more})"] if found else []


CLAIMS: Sequence[tuple[str, Callable[[Seen], list[str]]]] = (
    ("the load was what it says, and more than the box can serve", _overload),
    ("no request hung; each ended in exactly one way", _one_end),
    ("a stream that ends with [DONE] is whole", _finished),
    ("every 429 says when to come back", _come_back),
    ("no record is lost: one decision and one outcome for each request", _recorded),
    ("the records say what the clients saw", _agree),
    ("the memory budget was never exceeded", _budget),
    ("engines never held more threads than there are cores", _threads),
    ("the queue was never longer than its limit", _queue),
    ("p99 of accepted requests is within their deadline", _bounded),
    ("an engine was killed and every model answers afterwards", _killed),
    ("nothing is held once all clients are gone", _drained),
    ("after SIGTERM: exit 0, no process and no file left", _gone),
)


# --- figures --------------------------------------------------------------------------------------


def figures(seen: Seen) -> dict[str, object]:
    """What the run measured, JSON-ready."""
    accepted = [e for e in seen.endings if e.accepted]
    complete = [e for e in accepted if e.how == "complete"]
    refused_s = [e.total_s for e in seen.endings if e.status == 429]
    span_s = max((e.at_s + e.total_s for e in seen.endings), default=0.0)
    return {
        "requests": len(seen.endings),
        "endings": dict(Counter(label(e) for e in seen.endings).most_common()),
        "models": dict(Counter(e.model for e in complete).most_common()),
        "capacity_rps": seen.capacity_rps,
        "offered_rps": seen.offered_rps,
        "completed_rps": len(complete) / span_s if span_s else 0.0,
        "client_lag_p99_s": seen.lag_p99_s,
        "accepted": len(accepted),
        "accepted_ttft_s": spread([e.ttft_s for e in accepted if e.ttft_s is not None]),
        "accepted_total_s": spread([e.total_s for e in accepted]),
        "complete_total_s": spread([e.total_s for e in complete]),
        "refusal_s": spread(refused_s),
        "deadline_s": seen.deadline_s,
        "records": len(seen.stored),
        "statuses": dict(Counter(str(s.status) for s in seen.stored).most_common()),
        "failed_over": sum((s.attempts or 1) > 1 and s.status == "ok" for s in seen.stored),
        "killed": None if seen.kill is None else {"model": seen.kill.model, "in_flight": seen.kill.in_flight},
        "samples": len(seen.samples),
        "budget_bytes": max((s.budget_bytes for s in seen.samples), default=0),
        "used_peak_bytes": max((s.used_bytes for s in seen.samples), default=0),
        "engines_peak_bytes": seen.engines_peak_bytes,
        "threads_peak": max((s.threads_in_use for s in seen.samples), default=0),
        "cores": max((s.cores for s in seen.samples), default=0),
        "queue_peak": max((s.queue_length for s in seen.samples), default=0),
        "max_queue": seen.max_queue,
        "server_rss_bytes": [seen.rss_before_bytes, seen.rss_after_bytes],
        "shutdown_s": seen.exit_s,
    }


def label(ending: Ending) -> str:
    if ending.how in ("refused", "broken"):
        return f"{ending.how} {ending.status if ending.how == 'refused' else ''} {ending.code}".replace(
            "  ", " "
        )
    return ending.how


def spread(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {"p50": statistics.median(values), "p99": percentile(values, 0.99), "max": max(values)}
