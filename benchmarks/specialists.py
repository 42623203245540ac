"""Each specialist, each base, TinyLlama and the majority answer, on the held-out rows of each set.

    python -m benchmarks.specialists --data DIR [--limit 100] [--sets ...] [--models ...] [--adapters NAME@BASE=FILE ...]

Every model is asked the same rows of a set's test part (calm.workloads.held_out), which no trainer has seen: bases and
TinyLlama on all sets, a specialist on those it was made for (`--everyone`: on all). One request at a time, the prompt
read whole each time (no cached prefix), greedy, on engines that stay loaded with the threads they have in service. The
engine is asked without CALM's server between: see benchmarks/real_engine.py for why.

Rows come in small blocks of one set, blocks in random order, and all models answer a block, in an order drawn anew for
each, before the next begins: what the machine does meanwhile hits all alike.

Every answer is on disk before the next is asked (OUT/answers.jsonl, which `calm replay --answers` reads too); the same
command continues. Answers of other weights, threads or length limits are kept there and not counted.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from benchmarks.real_engine import Reply, Resident, Stock, add_options, ask, opened, resident, stock
from benchmarks.studies import shown, table
from calm.bench.measure_answers import AnswerBook
from calm.bench.measure_engine import Laboratory
from calm.bench.measure_plan import query_s
from calm.cli.profile_view import board
from calm.errors import BadInput, CalmError, UpstreamRejected
from calm.records import ModelCard, Record
from calm.report.intervals import Interval, difference, interval, ratio
from calm.workloads.files import json_rows
from calm.workloads.held_out import part_of
from calm.workloads.judge import judge
from calm.workloads.queries import query_of
from calm.workloads.records import Query, Recorded
from calm.workloads.rows import Row
from calm.workloads.sets import read_set

SETS_OF = {
    "finance": ("headlines_finance",),
    "medical": ("pubmedqa", "medqa"),
    "support": ("banking77",),
    "sql": ("spider_dev",),
    "math": ("gsm8k", "svamp"),
    "reading": ("squad_dev",),
}
"""What the shipped specialists were made for, by name without the second base's suffix (finance-gemma)."""
SETS = tuple(name for names in SETS_OF.values() for name in names)
REFERENCE = "tinyllama-1.1b"
GOAL = 0.25
"""A specialist's latency and joules to the reference's: below."""

MAX_TOKENS = {
    "headlines_finance": 8, "pubmedqa": 8, "medqa": 8, "commonsenseqa": 8, "arc_challenge": 8,
    "banking77": 24, "clinc150": 24, "squad_dev": 32, "spider_dev": 128, "gsm8k": 160, "svamp": 160,
}  # fmt: skip
"""Longest answer, in tokens. In SmolLM2's, of train rows: a letter or one of few words 1, the longest label of
banking77 17, spans 20 at the 99th percentile, queries 123, gsm8k's worked solutions 199 at the 90th with their
calculator marks, a quarter less without. Models that end by themselves are not touched by it."""
DEFAULT_MAX_TOKENS = 64
TOLD = 40
"""How often it says how far it is."""

REMARKS = {
    "spider_dev": "test rows are of three databases, all unseen in training; intervals are over questions, "
    "not over databases",
    "svamp": "127 of the 300 official test rows have the words of a train row, in another order or with other numbers",
    "squad_dev": "F1 of words; the test part shares no article with the train part",
}


class Measured(Recorded, frozen=True, kw_only=True):
    """One answer, and what it took. An answers file's line with more on it."""

    dataset: str
    weights: str
    """Digests: own, and the base's."""
    threads: int
    max_tokens: int
    latency_s: float | None = None
    ttft_s: float | None = None
    prefill_s: float | None = None
    energy_j: float | None = None
    cached_tokens: int | None = None
    error: str | None = None
    """Why there is no answer; its quality is 0."""


class Line(Record, frozen=True, kw_only=True):
    """One model on one set. Ratios and differences are against the reference on the same rows."""

    dataset: str
    model: str
    rows: int
    quality: Interval | None
    latency_s: Interval | None = None
    energy_j: Interval | None = None
    prompt_tokens: float | None = None
    output_tokens: float | None = None
    refused: int = 0
    """Rows without an answer."""
    latency_ratio: Interval | None = None
    energy_ratio: Interval | None = None
    quality_gain: Interval | None = None


@dataclass(frozen=True)
class Turn:
    """One question to one model."""

    model: str
    query: Query


# --- what is asked ----------------------------------------------------------------------------------


def chosen_rows(data: str | None, name: str, limit: int | None, seed: int) -> tuple[Row, ...]:
    """Rows of a set's test part, drawn by the seed, whatever the order of the file. Raises BadInput."""
    rows = sorted(part_of(read_set(data, name), "test"), key=lambda row: row.id)
    if not rows:
        raise BadInput(f"{name} has no test part", field="sets")
    drawn = random.Random(f"{seed} {name}").sample(rows, len(rows))
    return tuple(drawn[:limit])


def queries_of(data: str | None, name: str, limit: int | None, seed: int) -> tuple[Query, ...]:
    """The same as queries. Raises BadInput for a set whose answers nobody can judge."""
    found = tuple(query_of(row) for row in chosen_rows(data, name, limit, seed))
    if any(judge(query, query.answer or "") is None for query in found[:1]):
        raise BadInput(f"{name}: its answers cannot be judged; leave it out", field="sets")
    return found


def sets_for(card: ModelCard, sets: Sequence[str], everyone: bool) -> tuple[str, ...]:
    """Those a model is asked: all, for a specialist its own. One of another name gets all."""
    if card.adapter_of is None or everyone:
        return tuple(sets)
    own = SETS_OF.get(card.name) or SETS_OF.get(card.name.rpartition("-")[0])
    return tuple(sets) if own is None else tuple(name for name in sets if name in own)


def plan(
    asked: Mapping[str, Sequence[str]], queries: Mapping[str, Sequence[Query]], block: int, seed: int
) -> tuple[Turn, ...]:
    """Who is asked what, in which order. `asked`: sets by model; `queries`: by set."""
    draw = random.Random(seed)
    blocks = [rows[at : at + block] for rows in queries.values() for at in range(0, len(rows), block)]
    draw.shuffle(blocks)
    turns: list[Turn] = []
    for rows in blocks:
        models = [model for model, sets in asked.items() if rows[0].dataset in sets]
        draw.shuffle(models)
        turns += [Turn(model, query) for model in models for query in rows]
    return tuple(turns)


def limit_of(dataset: str) -> int:
    return MAX_TOKENS.get(dataset, DEFAULT_MAX_TOKENS)


# --- asking -----------------------------------------------------------------------------------------


class Ledger:
    """The answers on disk, and those among them that count for these weights, threads and limits."""

    def __init__(self, path: Path, weights: Mapping[str, str], threads: Mapping[str, int]) -> None:
        """Raises BadInput for a file of something else."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._book = AnswerBook(path)  # cuts a torn last line off
        self._weights, self._threads = weights, threads
        kept = [row for _, row in json_rows(path, Measured, "out")] if path.exists() else []
        self.rows = {(row.model, row.query_id): row for row in kept if self._counts(row)}

    def add(self, turn: Turn, quality: float, reply: Reply | None, error: str | None = None) -> None:
        said = reply.answered if reply is not None else None
        row = Measured(
            query_id=turn.query.id,
            model=turn.model,
            quality=quality,
            prompt_tokens=said.prompt_tokens if said else None,
            output_tokens=said.output_tokens if said else None,
            answer=said.text if said else None,
            dataset=turn.query.dataset,
            weights=self._weights[turn.model],
            threads=self._threads[turn.model],
            max_tokens=limit_of(turn.query.dataset),
            latency_s=said.total_s if said else None,
            ttft_s=said.ttft_s if said else None,
            prefill_s=said.prefill_s if said else None,
            energy_j=reply.energy_j if reply else None,
            cached_tokens=said.cached_tokens if said else None,
            error=error,
        )
        self._book.add(row)
        self.rows[row.model, row.query_id] = row

    def todo(self, turns: Iterable[Turn]) -> list[Turn]:
        return [turn for turn in turns if (turn.model, turn.query.id) not in self.rows]

    def of(self, model: str, queries: Sequence[Query]) -> dict[int, Measured]:
        """By the place of the query: what pairs the models."""
        found = {at: self.rows.get((model, query.id)) for at, query in enumerate(queries)}
        return {at: row for at, row in found.items() if row is not None}

    def _counts(self, row: Measured) -> bool:
        now = (self._weights.get(row.model), self._threads.get(row.model), limit_of(row.dataset))
        return (row.weights, row.threads, row.max_tokens) == now


async def put(lab: Laboratory, model: Resident, turn: Turn, ledger: Ledger) -> None:
    """One question. Raises EngineLost; a prompt that the engine refuses is an answer of quality 0."""
    try:
        reply = await ask(lab, model, turn.query.prompt, limit_of(turn.query.dataset))
    except UpstreamRejected as refusal:
        ledger.add(turn, 0.0, None, refusal.message)
    else:
        ledger.add(turn, judge(turn.query, reply.answered.text) or 0.0, reply)


async def measure(
    at_hand: Stock, models: Mapping[str, ModelCard], turns: Sequence[Turn], options: argparse.Namespace
) -> Ledger:
    """Ask what is not answered yet. Raises CalmError when an engine fails, with all answers kept."""
    with board() as bar:
        async with opened(at_hand, bar, threads=options.threads) as lab:
            ledger = Ledger(
                options.out / "answers.jsonl",
                {name: at_hand.digest(card) for name, card in models.items()},
                {name: lab.threads[name] for name in models},
            )
            todo = ledger.todo(turns)
            if todo:
                bar.expect(sum(expected_s(models[turn.model], turn.query) for turn in todo))
                async with resident(lab, used(models, todo), at_hand.cards) as ready:
                    await go(lab, ready, todo, ledger)
            return ledger


def used(models: Mapping[str, ModelCard], turns: Iterable[Turn]) -> dict[str, ModelCard]:
    names = {turn.model for turn in turns}
    return {name: card for name, card in models.items() if name in names}


async def go(lab: Laboratory, ready: Mapping[str, Resident], todo: Sequence[Turn], ledger: Ledger) -> None:
    every = max(1, len(todo) // TOLD)
    for number, turn in enumerate(todo):
        if number % every == 0:
            lab.watch.stage(f"{number} of {len(todo)}", "questions")
        await put(lab, ready[turn.model], turn, ledger)
        lab.watch.advance(expected_s(ready[turn.model].card, turn.query))


def expected_s(card: ModelCard, query: Query) -> float:
    return query_s(card, len(query.prompt), limit_of(query.dataset))


# --- figures ----------------------------------------------------------------------------------------


def majority(data: str | None, name: str) -> str:
    """The most frequent answer of the train part; of several equally frequent ones the first in the alphabet."""
    counts = Counter(row.answer for row in part_of(read_set(data, name), "train") if row.answer)
    if not counts:
        raise BadInput(f"{name} has no train part", field="sets")
    return min(counts, key=lambda answer: (-counts[answer], answer)).split("\n")[0]


def majority_line(
    dataset: str, answer: str, queries: Sequence[Query], reference: Mapping[int, Measured]
) -> Line:
    """What always giving that answer is worth."""
    quality = {at: judge(query, answer) for at, query in enumerate(queries)}
    return Line(
        dataset=dataset,
        model=f'majority ("{answer if len(answer) <= 24 else answer[:23] + "…"}")',
        rows=len(quality),
        quality=interval(quality.values()),
        quality_gain=difference(quality, {at: row.quality for at, row in reference.items()}),
    )


def line(dataset: str, model: str, rows: Mapping[int, Measured], reference: Mapping[int, Measured]) -> Line:
    def by_place(
        found: Mapping[int, Measured], figure: Callable[[Measured], float | None]
    ) -> dict[int, float | None]:
        return {at: figure(row) for at, row in found.items()}

    def latency(row: Measured) -> float | None:
        return row.latency_s

    def energy(row: Measured) -> float | None:
        return row.energy_j

    own = rows is reference
    return Line(
        dataset=dataset,
        model=model,
        rows=len(rows),
        quality=interval(row.quality for row in rows.values()),
        latency_s=interval(row.latency_s for row in rows.values()),
        energy_j=interval(row.energy_j for row in rows.values()),
        prompt_tokens=mean([row.prompt_tokens for row in rows.values()]),
        output_tokens=mean([row.output_tokens for row in rows.values()]),
        refused=sum(row.error is not None for row in rows.values()),
        latency_ratio=None if own else ratio(by_place(rows, latency), by_place(reference, latency)),
        energy_ratio=None if own else ratio(by_place(rows, energy), by_place(reference, energy)),
        quality_gain=None
        if own
        else difference(
            by_place(rows, lambda row: row.quality), by_place(reference, lambda row: row.quality)
        ),
    )


def mean(values: Sequence[int | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def lines(
    ledger: Ledger, asked: Mapping[str, Sequence[str]], queries: Mapping[str, Sequence[Query]],
    data: str | None, reference: str,
) -> tuple[Line, ...]:  # fmt: skip
    """By set: specialists and bases as asked, then the majority answer."""
    found: list[Line] = []
    for dataset, rows in queries.items():
        theirs = ledger.of(reference, rows)
        for model, sets in asked.items():
            if dataset in sets:
                own = theirs if model == reference else ledger.of(model, rows)
                found.append(line(dataset, model, own, theirs))
        found.append(majority_line(dataset, majority(data, dataset), rows, theirs))
    return tuple(found)


# --- what is shown ----------------------------------------------------------------------------------

HEADERS = ("set", "model", "rows", "quality", "latency, s", "J", "prompt", "out")
AGAINST = ("set", "model", "quality gain", "latency ratio", "energy ratio", f"both under {GOAL:g}")


def report(
    found: Sequence[Line], specialists: Sequence[str], reference: str, threads: Mapping[str, int]
) -> str:
    """Markdown: the table, and every specialist against the reference."""
    parts = [table(HEADERS, [cells(row) for row in found])]
    against = [row for row in found if row.model in specialists]
    if against and any(row.quality_gain for row in against):
        parts += [f"Against {reference}, on the same rows:", table(AGAINST, [versus(row) for row in against])]
    datasets = dict.fromkeys(row.dataset for row in found)
    parts += [f"- {name}: {REMARKS[name]}" for name in datasets if name in REMARKS]
    counts = ", ".join(f"{name} {count}" for name, count in threads.items())
    refused = [f"{row.model} on {row.dataset}: {row.refused}" for row in found if row.refused]
    parts += [f"- rows without an answer, counted as wrong: {'; '.join(refused)}"] if refused else []
    parts.append(f"- means with 95 % bootstrap intervals over rows; threads: {counts}")
    return "\n\n".join(parts)


def cells(row: Line) -> list[str]:
    counts = [
        f"{count:.0f}" if count is not None else "-" for count in (row.prompt_tokens, row.output_tokens)
    ]
    return [
        row.dataset, row.model, str(row.rows), shown(row.quality, 3),
        shown(row.latency_s), shown(row.energy_j), *counts,
    ]  # fmt: skip


def versus(row: Line) -> list[str]:
    goal = "-"
    if row.latency_ratio is not None and row.energy_ratio is not None:
        goal = "yes" if max(row.latency_ratio.value, row.energy_ratio.value) < GOAL else "no"
    ratios = (shown(row.latency_ratio, 3), shown(row.energy_ratio, 3))
    return [row.dataset, row.model, shown(row.quality_gain, 3), *ratios, goal]


# --- the command ------------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    parser.add_argument("--data", required=True, metavar="DIR", help="directory of the query sets")
    parser.add_argument(
        "--sets", nargs="+", default=list(SETS), metavar="NAME", help="default: all of the specialists"
    )
    parser.add_argument(
        "--models", nargs="+", default=[], metavar="NAME", help="default: all that run on llama.cpp"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="rows per set (default: its whole test part)")
    parser.add_argument(
        "--everyone", action="store_true", help="ask specialists the other domains' rows as well"
    )
    parser.add_argument("--reference", default=REFERENCE, metavar="NAME", help=f"default: {REFERENCE}")
    parser.add_argument(
        "--block", type=int, default=4, metavar="N", help="rows before the models change (default: 4)"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="of every engine (default: as in service)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/specialists"), metavar="DIR")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> tuple[Sequence[Line], str]:
    """Raises CalmError."""
    at_hand = stock(options.fleet, options.adapters)
    models = at_hand.chosen(options.models)
    queries = {name: queries_of(options.data, name, options.limit, options.seed) for name in options.sets}
    asked = {name: sets_for(card, options.sets, options.everyone) for name, card in models.items()}
    turns = plan(asked, queries, options.block, options.seed)
    ledger = asyncio.run(measure(at_hand, models, turns, options))
    found = lines(ledger, asked, queries, options.data, options.reference)
    threads = {row.model: row.threads for row in ledger.rows.values() if row.model in models}
    specialists = [name for name, card in models.items() if card.adapter_of is not None]
    return found, report(found, specialists, options.reference, threads)


def main() -> None:
    options = parse()
    try:
        found, text = run(options)
    except KeyboardInterrupt:
        raise SystemExit(f"stopped; the same command continues from {options.out}") from None
    except CalmError as error:
        raise SystemExit(f"{error.message}; answers so far are in {options.out}") from None
    encoded = msgspec.json.format(msgspec.json.encode(found), indent=2)
    (options.out / "table.json").write_bytes(encoded)
    (options.out / "table.md").write_text(text + "\n", encoding="utf-8")
    sys.stdout.write((encoded.decode() if options.json else text) + "\n")


if __name__ == "__main__":
    main()
