"""Everything that runs on the engine: rounds under the stopwatch, rows answered, each on disk as it comes.

Speed and quality stand together because they share the rows' files, which let the same command continue, and the way
a file is put in the place of its base.
"""

from __future__ import annotations

import argparse
import asyncio
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TypeVar

import msgspec
from msgspec.structs import replace as changed

from benchmarks.quantisation.quality import score
from benchmarks.quantisation.weights import Subject
from benchmarks.real_engine import Resident, Stock, ask, opened, resident, start
from benchmarks.specialists import limit_of, sets_for
from calm.bench.fitting import aggregate_rate
from calm.bench.measure_engine import Laboratory
from calm.bench.measure_plan import query_s
from calm.bench.measure_texts import story, words
from calm.cli.profile_view import board
from calm.records import ModelCard, Record
from calm.workloads.files import json_rows
from calm.workloads.records import Query

QUERY_WORDS, QUERY_TOKENS, QUERIES = 200, 8, 5
DECODE_TOKENS = 48
ROUND_S = 20.0
"""Guess, for the progress bar."""

T = TypeVar("T")


class Round(Record, frozen=True, kw_only=True):
    """One fresh engine under the stopwatch."""

    base: str
    type: str
    threads: int
    number: int
    load_s: float
    resident_bytes: int
    prefill_tps: float
    decode_tps: float
    query_s: float
    query_j: float | None


class Scored(Record, frozen=True, kw_only=True):
    """One answer of one model (the base, or an adapter on it) with the base in one type."""

    base: str
    type: str
    model: str
    weights: str
    """Digests, the same for all types of a base: of the authors' file and the template, and of the adapter."""
    dataset: str
    query_id: str
    quality: float
    forced: float | None = None
    """1 when the most probable option is the right one."""
    log_loss: float | None = None
    """-ln of the right option's probability among the options."""


class Lines:
    """JSON lines of one kind, appended as they come; what stands there already is kept."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():  # an interrupted run may have left half a line
            whole, _, _ = path.read_bytes().rpartition(b"\n")
            path.write_bytes(whole + b"\n" if whole else b"")
        self._path = path

    def read(self, kind: type[T]) -> list[T]:
        return [row for _, row in json_rows(self._path, kind, "out")] if self._path.exists() else []

    def add(self, row: Record) -> None:
        with self._path.open("ab") as file:
            file.write(msgspec.json.encode(row) + b"\n")


def stock_of(at_hand: Stock, of: Subject) -> Stock:
    """The base under the file's name, and its adapters on it."""
    own = [card for card in at_hand.cards.values() if card.adapter_of == of.base]
    cards = [changed(at_hand.cards[of.base], name=of.name), *(changed(c, adapter_of=of.name) for c in own)]
    return replace(
        at_hand, cards={card.name: card for card in cards}, given={**at_hand.given, of.name: of.path}
    )


# --- speed ------------------------------------------------------------------------------------------


async def time_round(lab: Laboratory, of: Subject, card: ModelCard, threads: int, number: int) -> Round:
    """Raises CalmError."""
    room = replace(lab, threads={card.name: threads})
    loop = asyncio.get_running_loop()
    begun_s = loop.time()
    engine = await start(room, card)
    load_s = loop.time() - begun_s
    try:
        model = Resident(card, engine.endpoint, engine)
        await ask(room, model, "Hello", 2)
        texts = [words(QUERY_WORDS, QUERIES * number + n) for n in range(QUERIES)]
        replies = [await ask(room, model, text, QUERY_TOKENS, endless=True) for text in texts]
        told = await ask(room, model, story(number), DECODE_TOKENS, endless=True)
        footprint = engine.footprint_bytes() or 0
    finally:
        await engine.stop()
    joules = [reply.energy_j for reply in replies if reply.energy_j is not None]
    read = [reply.answered for reply in replies]
    return Round(
        base=of.base,
        type=of.type,
        threads=threads,
        number=number,
        load_s=load_s,
        resident_bytes=footprint,
        prefill_tps=median((said.read_tokens or 0) / (said.prefill_s or said.ttft_s) for said in read),
        decode_tps=aggregate_rate([told.answered.tokens_s]) or 0.0,
        query_s=median(said.total_s for said in read),
        query_j=median(joules) if joules else None,
    )


def round_plan(
    subjects: Sequence[Subject], threads: Sequence[int], rounds: int
) -> list[tuple[Subject, int, int]]:
    """(file, threads, round): all of a round before the next, each round in an order of its own."""
    draw = random.Random(0)
    found = []
    for number in range(rounds):
        these = [(of, count, number) for of in subjects for count in threads]
        draw.shuffle(these)
        found += these
    return found


async def time_all(at_hand: Stock, subjects: Sequence[Subject], options: argparse.Namespace) -> list[Round]:
    """Raises CalmError, with everything so far kept."""
    lines = Lines(options.out / "rounds.jsonl")
    found = lines.read(Round)
    done = {(row.base, row.type, row.threads, row.number) for row in found}
    todo = [
        (of, threads, number)
        for of, threads, number in round_plan(subjects, options.threads, options.rounds)
        if (of.base, of.type, threads, number) not in done
    ]
    with board() as bar:
        bar.expect(ROUND_S * len(todo))
        for of, threads, number in todo:
            bar.stage(of.name, f"round {number + 1}, {threads} thread(s)")
            own = stock_of(at_hand, of)
            async with opened(own, bar) as lab:
                row = await time_round(lab, of, own.cards[of.name], threads, number)
            lines.add(row)
            found.append(row)
            bar.advance(ROUND_S)
    return found


# --- quality ----------------------------------------------------------------------------------------


async def score_all(
    at_hand: Stock, subjects: Sequence[Subject], queries: Mapping[str, Sequence[Query]],
    options: argparse.Namespace,
) -> list[Scored]:  # fmt: skip
    """Raises CalmError, with everything so far kept."""
    lines = Lines(options.out / "quality.jsonl")
    found = lines.read(Scored)
    with board() as bar:
        plans = [(of, stock_of(at_hand, of)) for of in subjects]
        bar.expect(sum(expected_s(own, queries, options) for _, own in plans))
        for of, own in plans:
            async with opened(own, bar, threads=max(options.threads)) as lab:
                found += await score_one(lab, of, own, queries, options, found, lines)
    return found


async def score_one(
    lab: Laboratory, of: Subject, own: Stock, queries: Mapping[str, Sequence[Query]],
    options: argparse.Namespace, known: Sequence[Scored], lines: Lines,
) -> list[Scored]:  # fmt: skip
    """What is not known yet of one file, base and adapters."""
    done = {(row.base, row.type, row.model, row.weights, row.query_id) for row in known}
    new = []
    async with resident(lab, own.cards, own.cards) as ready:
        for name, model in ready.items():
            for dataset in asked_of(model.card, queries, options):
                lab.watch.stage(of.name, f"{name} on {dataset}")
                for query in queries[dataset]:
                    label, digest = label_of(own, model.card, of)
                    if (of.base, of.type, label, digest, query.id) in done:
                        continue
                    quality, forced, log_loss = await score(lab, model, query)
                    row = Scored(
                        base=of.base, type=of.type, model=label, weights=digest, dataset=dataset,
                        query_id=query.id, quality=quality, forced=forced, log_loss=log_loss,
                    )  # fmt: skip
                    lines.add(row)
                    new.append(row)
                    lab.watch.advance(query_s(model.card, len(query.prompt), limit_of(dataset)))
    return new


def label_of(own: Stock, card: ModelCard, of: Subject) -> tuple[str, str]:
    """The model's name and digests, whatever the file."""
    return (of.base if card.adapter_of is None else card.name), own.digest(card)


def asked_of(
    card: ModelCard, queries: Mapping[str, Sequence[Query]], options: argparse.Namespace
) -> tuple[str, ...]:
    """Sets of the base, and an adapter's own."""
    return tuple(options.sets) if card.adapter_of is None else sets_for(card, tuple(queries), False)


def expected_s(own: Stock, queries: Mapping[str, Sequence[Query]], options: argparse.Namespace) -> float:
    return sum(
        query_s(card, len(query.prompt), limit_of(dataset))
        for card in own.cards.values()
        for dataset in asked_of(card, queries, options)
        for query in queries[dataset]
    )
