"""Which quantisation of a base answers fastest and with the fewest joules at equal quality, on the engine we ship.

    python -m benchmarks.quantisation --data DIR [--bases ...] [--types ...] [--adapters NAME@BASE=FILE ...]

    as-is   the authors' file
    Q4_0    every quantised tensor of the blocks re-quantised (calm.sources.requantise: what `[source.convert]` does)
    Q8_0    the same
    Q4_K    the same by ggml's own quantiser, without importance matrix. Rows that are no multiple of 256 cannot be
            Q4_K and become Q5_0, as in llama.cpp's `quantize`: SmolLM2-135M's rows of 576 and Gemma-3-270M's of 640,
            which leaves ffn_down (both) and Gemma's attn_output

Everything starts from the same file, so no type can be better than the authors' own; embeddings, norms and output stay
as they are. Speed: in every round every type on every thread count, in random order, in a fresh engine: load, resident
bytes, queries of 200 words answered in 8 tokens (prefill rate, latency, joules of the process) and one answer of 48
tokens (decode rate). Nothing is cached between queries.

Quality, on rows of the test parts, the same for all types: what the judge says of the base's answers and of the
adapters' on their own sets; and, where the answer is one of few options, a forced choice read off the probabilities of
the first token, whose log loss sees differences that right or wrong does not. All against as-is, paired by row.

Figures are on disk as they come (OUT/*.jsonl); the same command continues.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import importlib.util
import math
import random
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from string import ascii_uppercase
from typing import TypeVar

import msgspec
import numpy as np
from msgspec.structs import replace as changed
from numpy.typing import NDArray

from benchmarks.real_engine import Resident, Stock, add_options, ask, opened, resident, start, stock
from benchmarks.specialists import SETS as SPECIALIST_SETS
from benchmarks.specialists import limit_of, queries_of, sets_for
from benchmarks.studies import shown, table
from calm.bench.fitting import aggregate_rate
from calm.bench.measure_engine import Laboratory
from calm.bench.measure_plan import query_s
from calm.bench.measure_texts import story, words
from calm.cli.profile_view import board
from calm.errors import BadInput, CalmError, UpstreamRejected
from calm.gguf import read_header
from calm.records import ModelCard, Record
from calm.report.intervals import Interval, difference, interval, ratio
from calm.report.units import seconds, size
from calm.sources.requantise import requantise
from calm.workloads.files import json_rows
from calm.workloads.judge import judge
from calm.workloads.prompts import MAX_LISTED_LABELS
from calm.workloads.records import Query

AS_IS = "as-is"
TYPES = (AS_IS, "Q4_0", "Q8_0", "Q4_K")
BASES = ("smollm2-135m", "gemma-3-270m")
SETS = ("commonsenseqa", "arc_challenge", "pubmedqa", "headlines_finance")
QUERY_WORDS, QUERY_TOKENS, QUERIES = 200, 8, 5
DECODE_TOKENS = 48
ROUND_S = 20.0
"""Guess, for the progress bar."""
CHAT = "/v1/chat/completions"
TOP = 100
ABSENT = 1e-6
"""Probability of an option that is not among the first TOP tokens."""

Rows = NDArray[np.float32]
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


class Subject(Record, frozen=True, kw_only=True):
    """One file of one base."""

    base: str
    type: str
    path: Path
    file_bytes: int
    mix: str
    """Types of the blocks' matrices, with their number."""

    @property
    def name(self) -> str:
        return f"{self.base}-{self.type.lower()}"


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


# --- files ------------------------------------------------------------------------------------------


def subject(base: str, type_name: str, original: Path, directory: Path) -> Subject:
    """The base in a type; converted once into `directory`. Raises BadInput for a type nobody can make."""
    path = original
    if type_name != AS_IS:
        path = directory / f"{base}-{type_name}.gguf"
        if not path.exists():
            partial = path.with_suffix(".part")
            convert(original, partial, type_name)
            partial.rename(path)
    return Subject(base=base, type=type_name, path=path, file_bytes=path.stat().st_size, mix=mix(path))


def convert(source: Path, target: Path, type_name: str) -> None:
    if type_name == "Q4_K":
        with_ggml(source, target)
    else:
        requantise(source, target, type_name, lambda _: None)


def mix(path: Path) -> str:
    """`Q5_0 x 180, Q4_K x 30`."""
    tensors = read_header(path).tensors.values()
    counts = Counter(
        tensor.type_name for tensor in tensors if tensor.name.startswith("blk.") and tensor.quantised
    )
    return ", ".join(f"{name} x {count}" for name, count in counts.most_common())


def with_ggml(source: Path, target: Path) -> None:
    """Q4_K where rows divide into its blocks of 256, else Q5_0."""
    from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, LlamaFileType
    from gguf.constants import GGUFValueType
    from gguf.quants import dequantize, quantize

    reader = GGUFReader(source)
    writer = GGUFWriter(target, str(reader.fields["general.architecture"].contents()))
    for key, field in reader.fields.items():
        if key == "general.file_type":
            writer.add_file_type(LlamaFileType.MOSTLY_Q4_K_S)
        elif not key.startswith("GGUF.") and key != "general.architecture":
            kind = field.types[0]
            sub = field.types[-1] if kind == GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), kind, sub_type=sub)
    plain = (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16)
    for tensor in reader.tensors:
        if not tensor.name.startswith("blk.") or tensor.tensor_type in plain:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
            continue
        weights = dequantize(tensor.data, tensor.tensor_type)
        if weights.shape[-1] % 256:
            writer.add_tensor(
                tensor.name,
                quantize(weights, GGMLQuantizationType.Q5_0),
                raw_dtype=GGMLQuantizationType.Q5_0,
            )
        else:
            writer.add_tensor(tensor.name, q4_k(weights), raw_dtype=GGMLQuantizationType.Q4_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def q4_k(weights: Rows) -> NDArray[np.uint8]:
    """By ggml's own quantiser: the gguf library has none for K-quants. Raises BadInput when it is not to be had."""
    number, block, block_bytes = 12, 256, 144
    rows, width = weights.shape
    contiguous = np.ascontiguousarray(weights, dtype=np.float32)
    made = np.zeros((rows, width // block * block_bytes), dtype=np.uint8)
    written = ggml_quantiser()(
        number,
        contiguous.ctypes.data_as(ctypes.POINTER(ctypes.c_float)),
        made.ctypes.data_as(ctypes.c_void_p),
        0,
        rows,
        width,
        None,
    )
    if written != made.nbytes:
        raise BadInput(f"ggml wrote {written} bytes of Q4_K, {made.nbytes} expected", field="types")
    return made


def ggml_quantiser() -> Callable[..., int]:
    """`ggml_quantize_chunk` of the llama.cpp that serves. Raises BadInput."""
    spec = importlib.util.find_spec("xllamacpp.xllamacpp")
    if spec is None or spec.origin is None:
        raise BadInput("Q4_K needs xllamacpp (pip install xllamacpp)", field="types")
    try:
        found = ctypes.CDLL(spec.origin).ggml_quantize_chunk
    except (OSError, AttributeError):
        raise BadInput(
            "this xllamacpp exports no ggml_quantize_chunk: leave out Q4_K", field="types"
        ) from None
    pointer = ctypes.POINTER(ctypes.c_float)
    found.argtypes = [
        ctypes.c_int, pointer, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, pointer,
    ]  # fmt: skip
    found.restype = ctypes.c_size_t
    quantiser: Callable[..., int] = found
    return quantiser


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


# --- quality ----------------------------------------------------------------------------------------


async def score(lab: Laboratory, model: Resident, query: Query) -> tuple[float, float | None, float | None]:
    """(quality of the answer, forced choice right, its log loss). A refused prompt is worth 0. Raises EngineLost."""
    try:
        said = (await ask(lab, model, query.prompt, limit_of(query.dataset))).answered
        first = await first_token(lab, model, query) if options_of(query) else None
    except UpstreamRejected:
        return 0.0, None, None
    quality = judge(query, said.text) or 0.0
    return (quality, None, None) if first is None else (quality, *forced_choice(query, first))


def options_of(query: Query) -> tuple[str, ...]:
    """What may be said first; none where there are too many, or they are not told apart by their first word."""
    if query.answer_type == "choice":
        return tuple(ascii_uppercase[: len(query.choices)])
    if query.answer_type == "yes/no/maybe":
        return ("yes", "no", "maybe")
    few = query.answer_type == "label" and len(query.choices) <= MAX_LISTED_LABELS
    return query.choices if few else ()


class _Token(Record, frozen=True, kw_only=True):
    token: str
    logprob: float


class _Content(Record, frozen=True, kw_only=True):
    top_logprobs: tuple[_Token, ...] = ()


class _Logprobs(Record, frozen=True, kw_only=True):
    content: tuple[_Content, ...] = ()


class _Choice(Record, frozen=True, kw_only=True):
    logprobs: _Logprobs | None = None


class _Reply(Record, frozen=True, kw_only=True):
    choices: tuple[_Choice, ...]


async def first_token(lab: Laboratory, model: Resident, query: Query) -> Mapping[str, float]:
    """Probability of what may come first, by the token's text. Raises EngineLost."""
    adapter = model.endpoint.adapter
    body = {
        "model": model.endpoint.model,
        "messages": [{"role": "user", "content": query.prompt}],
        "max_tokens": 1,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": TOP,
        "cache_prompt": True,
        **({} if adapter is None else {"lora": [{"id": adapter, "scale": 1.0}]}),
    }
    async with lab.upstream.post(model.endpoint, CHAT, msgspec.json.encode(body)) as reply:
        told = msgspec.json.decode(await reply.read(), type=_Reply)
    shown_first = told.choices[0].logprobs
    tokens = shown_first.content[0].top_logprobs if shown_first and shown_first.content else ()
    return {token.token: math.exp(token.logprob) for token in tokens}


def forced_choice(query: Query, first: Mapping[str, float]) -> tuple[float, float]:
    """(1 when the right option is the most probable, -ln of its share among the options).

    A token speaks for the only option it begins: ` neut` for neutral, nothing for `n` of neutral and none.
    """
    options = options_of(query)
    mass = dict.fromkeys(options, ABSENT)
    for token, probability in first.items():
        begun = token.strip().casefold()
        meant = [option for option in options if begun and option.casefold().startswith(begun)]
        if len(meant) == 1:
            mass[meant[0]] += probability
    right = next(option for option in options if option.casefold() == (query.answer or "").casefold())
    best = max(mass, key=lambda option: mass[option])
    return float(best == right), -math.log(mass[right] / sum(mass.values()))


# --- on disk ----------------------------------------------------------------------------------------


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


# --- measuring --------------------------------------------------------------------------------------


def stock_of(at_hand: Stock, of: Subject) -> Stock:
    """The base under the file's name, and its adapters on it."""
    own = [card for card in at_hand.cards.values() if card.adapter_of == of.base]
    cards = [changed(at_hand.cards[of.base], name=of.name), *(changed(c, adapter_of=of.name) for c in own)]
    return replace(
        at_hand, cards={card.name: card for card in cards}, given={**at_hand.given, of.name: of.path}
    )


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


# --- figures ----------------------------------------------------------------------------------------


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


# --- the command ------------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    parser.add_argument("--data", metavar="DIR", help="directory of the query sets; without it only speed")
    parser.add_argument(
        "--bases", nargs="+", default=list(BASES), metavar="NAME", help=f"default: {' '.join(BASES)}"
    )
    parser.add_argument(
        "--types", nargs="+", default=list(TYPES), choices=TYPES, metavar="TYPE", help="default: all"
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], metavar="N", help="default: 1 2")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="of speed; 0: none (default: 7)")
    parser.add_argument(
        "--sets", nargs="+", default=list(SETS), metavar="NAME", help=f"default: {' '.join(SETS)}"
    )
    parser.add_argument("--limit", type=int, default=200, metavar="N", help="rows per set (default: 200)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/quantisation"), metavar="DIR")
    options = parser.parse_args(arguments)
    if AS_IS not in options.types:
        options.types = [AS_IS, *options.types]
    return options


def original(at_hand: Stock, base: str) -> Path:
    """The authors' file. Raises BadInput."""
    card = at_hand.cards.get(base)
    if card is None or card.source is None:
        raise BadInput(f"no model {base!r} with a source in {at_hand.directory}", field="bases")
    path = at_hand.weights(changed(card, source=changed(card.source, convert=None)))
    if path is None:
        raise BadInput(f"{base}: its weights are not here; run `calm models pull {base}`", field="bases")
    return path


def run(options: argparse.Namespace) -> tuple[list[Speed], list[Quality]]:
    """Raises CalmError."""
    at_hand = stock(options.fleet, options.adapters)
    options.out.mkdir(parents=True, exist_ok=True)
    originals = {base: original(at_hand, base) for base in options.bases}
    subjects = [
        subject(base, type_name, path, options.out)
        for base, path in originals.items()
        for type_name in options.types
    ]
    rounds = asyncio.run(time_all(at_hand, subjects, options)) if options.rounds else []
    times = speeds(rounds, subjects, options.threads) if rounds else []
    if not options.data:
        return times, []
    adapters = [card for card in at_hand.cards.values() if card.adapter_of in options.bases]
    theirs = [name for card in adapters for name in sets_for(card, SPECIALIST_SETS, False)]
    names = dict.fromkeys([*options.sets, *theirs])
    queries = {name: queries_of(options.data, name, options.limit, options.seed) for name in names}
    scored = asyncio.run(score_all(at_hand, subjects, queries, options))
    return times, qualities(at_hand, scored, subjects, queries, options)


def main() -> None:
    options = parse()
    try:
        times, scores = run(options)
    except KeyboardInterrupt:
        raise SystemExit(f"stopped; the same command continues from {options.out}") from None
    except CalmError as error:
        raise SystemExit(f"{error.message}; figures so far are in {options.out}") from None
    encoded = msgspec.json.format(msgspec.json.encode({"speed": times, "quality": scores}), indent=2)
    text = report(times, scores)
    (options.out / "table.json").write_bytes(encoded)
    (options.out / "table.md").write_text(text + "\n", encoding="utf-8")
    sys.stdout.write((encoded.decode() if options.json else text) + "\n")


if __name__ == "__main__":
    main()
