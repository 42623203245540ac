"""From rows to figures: every type against the authors' file, paired by round or by row, and the tables that show it.

It starts nothing: it takes the rows that measuring.py found, so the arithmetic is tested on rows made up.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from statistics import median

from benchmarks.quantisation.measuring import (
    QUERY_TOKENS,
    QUERY_WORDS,
    Round,
    Scored,
    asked_of,
    label_of,
    stock_of,
)
from benchmarks.quantisation.weights import AS_IS, Subject
from benchmarks.real_engine import Stock
from benchmarks.studies import shown, table
from calm.records import Record
from calm.report.intervals import Interval, difference, interval, ratio
from calm.report.units import seconds, size
from calm.workloads.records import Query


class Speed(Record, frozen=True, kw_only=True):
    """Over rounds: medians and ranges; ratios to as-is of the same rounds."""

    base: str
    type: str
    threads: int
    rounds: int
    file_bytes: int
    mix: str
    resident_bytes: float
    load_s: tuple[float, float, float]
    prefill_tps: tuple[float, float, float]
    decode_tps: tuple[float, float, float]
    query_s: tuple[float, float, float]
    query_j: tuple[float, float, float] | None
    latency_ratio: Interval | None
    energy_ratio: Interval | None


class Quality(Record, frozen=True, kw_only=True):
    """Over rows; differences to as-is on the same rows."""

    base: str
    type: str
    model: str
    dataset: str
    rows: int
    quality: Interval | None
    forced: Interval | None
    log_loss: Interval | None
    quality_change: Interval | None
    log_loss_change: Interval | None


def speeds(rounds: Sequence[Round], subjects: Sequence[Subject], threads: Sequence[int]) -> list[Speed]:
    def of(subject: Subject, type_name: str, count: int) -> dict[int, Round]:
        wanted = (subject.base, type_name, count)
        return {row.number: row for row in rounds if (row.base, row.type, row.threads) == wanted}

    return [
        speed(subject, count, of(subject, subject.type, count), of(subject, AS_IS, count))
        for subject in subjects
        for count in threads
    ]


def speed(of: Subject, threads: int, own: Mapping[int, Round], as_is: Mapping[int, Round]) -> Speed:
    rows = list(own.values())
    joules = [row.query_j for row in rows if row.query_j is not None]
    paired = of.type != AS_IS
    return Speed(
        base=of.base,
        type=of.type,
        threads=threads,
        rounds=len(rows),
        file_bytes=of.file_bytes,
        mix=of.mix,
        resident_bytes=median(row.resident_bytes for row in rows),
        load_s=around([row.load_s for row in rows]),
        prefill_tps=around([row.prefill_tps for row in rows]),
        decode_tps=around([row.decode_tps for row in rows]),
        query_s=around([row.query_s for row in rows]),
        query_j=around(joules) if joules else None,
        latency_ratio=ratio(by_number(own, "query_s"), by_number(as_is, "query_s")) if paired else None,
        energy_ratio=ratio(by_number(own, "query_j"), by_number(as_is, "query_j")) if paired else None,
    )


def by_number(rows: Mapping[int, Round], figure: str) -> dict[int, float | None]:
    return {number: getattr(row, figure) for number, row in rows.items()}


def around(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, smallest, largest."""
    return median(values), min(values), max(values)


def qualities(
    at_hand: Stock, scored: Sequence[Scored], subjects: Sequence[Subject],
    queries: Mapping[str, Sequence[Query]], options: argparse.Namespace,
) -> list[Quality]:  # fmt: skip
    """Of the rows asked now, with the weights at hand."""
    found = []
    for of in subjects:
        own = stock_of(at_hand, of)
        for card in own.cards.values():
            label, digest = label_of(own, card, of)
            for dataset in asked_of(card, queries, options):
                ids = [query.id for query in queries[dataset]]
                rows = {
                    type_name: rows_of(scored, (of.base, type_name, label, digest), ids)
                    for type_name in (of.type, AS_IS)
                }
                found.append(quality(of, label, dataset, rows[of.type], rows[AS_IS]))
    return found


def rows_of(
    scored: Sequence[Scored], wanted: tuple[str, str, str, str], ids: Sequence[str]
) -> dict[int, Scored]:
    """By the place of the query."""
    places = {query_id: at for at, query_id in enumerate(ids)}
    return {
        places[row.query_id]: row
        for row in scored
        if (row.base, row.type, row.model, row.weights) == wanted and row.query_id in places
    }


def quality(
    of: Subject, model: str, dataset: str, own: Mapping[int, Scored], as_is: Mapping[int, Scored]
) -> Quality:
    def figure(rows: Mapping[int, Scored], name: str) -> dict[int, float | None]:
        return {at: getattr(row, name) for at, row in rows.items()}

    paired = of.type != AS_IS
    return Quality(
        base=of.base,
        type=of.type,
        model=model,
        dataset=dataset,
        rows=len(own),
        quality=interval(figure(own, "quality").values()),
        forced=interval(figure(own, "forced").values()),
        log_loss=interval(figure(own, "log_loss").values()),
        quality_change=difference(figure(own, "quality"), figure(as_is, "quality")) if paired else None,
        log_loss_change=difference(figure(own, "log_loss"), figure(as_is, "log_loss")) if paired else None,
    )


# --- what is shown ----------------------------------------------------------------------------------

SPEED = (
    "base", "type", "threads", "file", "resident", "load", "prefill, tok/s", "decode, tok/s", "query, s",
    "query, J", "latency to as-is", "energy to as-is",
)  # fmt: skip
QUALITY = (
    "model", "type", "set", "rows", "judged", "forced choice", "log loss", "judged, to as-is", "log loss, to as-is",
)  # fmt: skip


def report(times: Sequence[Speed], scores: Sequence[Quality]) -> str:
    """Markdown."""
    mixes = {(row.base, row.type): row.mix for row in times}
    parts = [table(SPEED, [speed_cells(row) for row in times])] if times else []
    parts += [f"- {base}, {type_name}: {told}" for (base, type_name), told in mixes.items()]
    parts += [table(QUALITY, [quality_cells(row) for row in scores])] if scores else []
    parts.append(
        "- medians [range] over rounds; ratios of means and differences with 95 % bootstrap intervals, "
        f"paired by round or row; a query is {QUERY_WORDS} words read, {QUERY_TOKENS} tokens written"
    )
    return "\n\n".join(parts)


def speed_cells(row: Speed) -> list[str]:
    return [
        row.base, row.type, str(row.threads), size(row.file_bytes), size(row.resident_bytes),
        f"{seconds(row.load_s[0])} [{seconds(row.load_s[1])}-{seconds(row.load_s[2])}]",
        ranged(row.prefill_tps, 0), ranged(row.decode_tps, 0), ranged(row.query_s, 2),
        ranged(row.query_j, 2) if row.query_j else "-", shown(row.latency_ratio), shown(row.energy_ratio),
    ]  # fmt: skip


def ranged(values: tuple[float, float, float], digits: int) -> str:
    middle, low, high = (f"{value:.{digits}f}" for value in values)
    return f"{middle} [{low}-{high}]"


def quality_cells(row: Quality) -> list[str]:
    return [
        row.model, row.type, row.dataset, str(row.rows), shown(row.quality, 3), shown(row.forced, 3),
        shown(row.log_loss, 3), shown(row.quality_change, 3), shown(row.log_loss_change, 3),
    ]  # fmt: skip
