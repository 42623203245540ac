"""What carrying many specialists on one base saves: memory against full copies, and a switch against a load.

    python -m benchmarks.switching [--base smollm2-135m] [--specialists 6] [--rounds 12]

    memory   one engine with N adapters, every one asked, against N engines with a copy of the base each (a merged
             adapter is a copy of the same size; copies are files of their own, so no two engines share pages)
    switch   time to first token of a request to B just after one to A, against one to A just after one to A, on the
             same engine and with prompts of the same length: short ones that share nothing but the template's
             beginning, the same without any use of the cache (the switch alone), and long ones that share all but
             their end. A switch costs the shared prefix, which llama.cpp has to read again for B
    load     start of an engine to the first token of a short prompt, the file in the page cache

Engines are CALM's own llama.cpp backend, at the card's context and slots. Adapters are the fleet's for this base and
those given; missing ones are made up (random weights, rank 16), which cost the engine the same. Rounds are
interleaved: what is compared runs within seconds of each other.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median

import msgspec
import numpy as np
from msgspec.structs import replace as changed

from benchmarks.real_engine import (
    UNCACHED,
    Adding,
    Resident,
    Stock,
    add_options,
    ask,
    opened,
    resident,
    start,
    stock,
)
from benchmarks.studies import shown, table
from calm.bench.measure_engine import Laboratory
from calm.bench.measure_texts import words
from calm.cli.profile_view import board
from calm.errors import BadInput, CalmError
from calm.gguf import read_header
from calm.records import ModelCard, Record
from calm.report.intervals import Interval, difference
from calm.report.units import seconds, size

SHORT_WORDS, PREFIX_WORDS, TAIL_WORDS = 12, 300, 12
TOUCH_WORDS = 100
"""Read by every engine before its memory is read: buffers count once they were used."""
RANK = 16
TARGETS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
KINDS = ("short", "short, nothing cached", "shared prefix")


class Memory(Record, frozen=True, kw_only=True):
    """Resident bytes (proportional set size), everything loaded and asked once."""

    base_bytes: int
    """One engine without adapters."""
    adapters_bytes: int
    """One engine with all of them."""
    copies_bytes: int
    """All engines with a copy each."""
    adapter_files_bytes: int
    copy_files_bytes: int
    specialists: int


class Switch(Record, frozen=True, kw_only=True):
    """Seconds to the first token, by round; and tokens found in the cache."""

    slots: int
    kind: str
    stay_s: tuple[float, ...]
    switch_s: tuple[float, ...]
    stay_cached: float
    switch_cached: float
    prompt_tokens: float

    @property
    def extra_s(self) -> Interval | None:
        """Of a switch, paired by round."""
        return difference(dict(enumerate(self.switch_s)), dict(enumerate(self.stay_s)))


class Loading(Record, frozen=True, kw_only=True):
    """Seconds from start to health, and to the first token, by round."""

    what: str
    ready_s: tuple[float, ...]
    first_token_s: tuple[float, ...]


class Found(Record, frozen=True, kw_only=True):
    base: str
    threads: int
    context: int
    memory: Memory
    switches: tuple[Switch, ...]
    loads: tuple[Loading, ...]
    made_up: int
    """Adapters of random weights among the specialists."""


# --- adapters ---------------------------------------------------------------------------------------


def random_adapter(base: Path, target: Path, seed: int, rank: int = RANK) -> Path:
    """A LoRA adapter that fits the base and says nothing: small random weights, as large as a real one."""
    from gguf import GGUFWriter

    header = read_header(base)
    draw = np.random.default_rng(seed)
    writer = GGUFWriter(target, header.architecture or "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(rank))
    for name, tensor in header.tensors.items():
        if name.startswith("blk.") and name.split(".")[2] in TARGETS:
            wide, high = tensor.shape
            a = draw.normal(0.0, wide**-0.5, (rank, wide)).astype(np.float16)
            b = draw.normal(0.0, 1e-3, (high, rank)).astype(np.float16)
            writer.add_tensor(f"{name}.lora_a", a)
            writer.add_tensor(f"{name}.lora_b", b)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def specialists(at_hand: Stock, base: str, count: int, directory: Path) -> tuple[Stock, list[str], int]:
    """The stock with `count` adapters of the base, their names, and how many had to be made up. Raises BadInput."""
    card = at_hand.cards.get(base)
    file = at_hand.weights(card) if card is not None else None
    if card is None or file is None:
        raise BadInput(
            f"{base}: no such model, or its weights are not here (`calm models pull`)", field="base"
        )
    own = [name for name, other in at_hand.cards.items() if other.adapter_of == base][:count]
    made = [f"made-up-{number}" for number in range(count - len(own))]
    files = {name: random_adapter(file, directory / f"{name}.gguf", n) for n, name in enumerate(made)}
    cards = {name: changed(card, name=name, adapter_of=base, source=None) for name in made}
    whole = replace(at_hand, cards={**at_hand.cards, **cards}, given={**at_hand.given, **files})
    return whole, [*own, *made], len(made)


# --- memory -----------------------------------------------------------------------------------------


async def memory(lab: Laboratory, at_hand: Stock, base: str, names: Sequence[str], copies: Stock) -> Memory:
    """Raises CalmError when an engine does not start."""
    card = at_hand.cards[base]
    own = {name: at_hand.cards[name] for name in names}
    lab.watch.stage(base, "memory alone")
    base_bytes = await footprint(lab, {base: card}, at_hand.cards)
    lab.watch.stage(base, f"memory with {len(names)} adapters")
    adapters_bytes = await footprint(lab, own, at_hand.cards)
    lab.watch.stage(base, f"memory of {len(names)} copies")
    full = {name: copy for name, copy in copies.cards.items() if name in copies.given}
    copies_bytes = await footprint(replace(lab, weights=copies.weights), full, copies.cards)
    return Memory(
        base_bytes=base_bytes,
        adapters_bytes=adapters_bytes,
        copies_bytes=copies_bytes,
        adapter_files_bytes=sum(file_bytes(at_hand, card) for card in own.values()),
        copy_files_bytes=sum(file_bytes(copies, card) for card in full.values()),
        specialists=len(names),
    )


async def footprint(lab: Laboratory, cards: Mapping[str, ModelCard], hosts: Mapping[str, ModelCard]) -> int:
    """Bytes of all their engines, at the same time."""
    async with resident(lab, cards, hosts) as ready:
        for number, model in enumerate(ready.values()):
            await ask(lab, model, words(TOUCH_WORDS, number), 8)
        engines = {id(model.engine): model.engine for model in ready.values()}
        return sum(engine.footprint_bytes() or 0 for engine in engines.values())


def file_bytes(at_hand: Stock, card: ModelCard) -> int:
    path = at_hand.weights(card)
    return path.stat().st_size if path is not None else 0


def full_copies(at_hand: Stock, base: str, count: int, directory: Path) -> Stock:
    """The base `count` times, under other names, each with a file of its own. Needs room on the disk."""
    card = at_hand.cards[base]
    source = at_hand.weights(card)
    assert source is not None  # `specialists` looked
    files = {f"copy-{number}": directory / f"copy-{number}.gguf" for number in range(count)}
    for file in files.values():
        shutil.copyfile(source, file)
    return replace(at_hand, cards={name: changed(card, name=name) for name in files}, given=files)


# --- switching --------------------------------------------------------------------------------------


async def switches(
    lab: Laboratory, at_hand: Stock, base: str, names: Sequence[str], slots: int, rounds: int
) -> list[Switch]:
    """Raises CalmError."""
    lab.watch.stage(base, f"switching, {slots} slot(s)")
    hosts = {base: with_slots(at_hand.cards[base], slots)}
    cards = {name: with_slots(at_hand.cards[name], slots) for name in names}
    async with resident(lab, cards, hosts) as ready:
        return [await switching(lab, ready, kind, slots, rounds) for kind in KINDS]


def with_slots(card: ModelCard, slots: int) -> ModelCard:
    return changed(card, engine=changed(card.engine, slots=slots))


async def switching(
    lab: Laboratory, ready: Mapping[str, Resident], kind: str, slots: int, rounds: int
) -> Switch:
    """In each round a random pair of specialists, and both cases in random order."""
    draw = random.Random(f"{kind} {slots}")
    room = replace(lab, upstream=Adding(lab.upstream, UNCACHED)) if "nothing cached" in kind else lab
    spent: dict[bool, list[float]] = defaultdict(list)
    cached: dict[bool, list[int]] = defaultdict(list)
    tokens: list[int] = []
    for number in range(rounds):
        first, second = draw.sample(sorted(ready), 2)
        for switched in draw.sample((False, True), 2):
            before, then = prompts(kind, 2 * number + switched)
            await ask(lab, ready[first], before, 1)
            said = (await ask(room, ready[second if switched else first], then, 1)).answered
            spent[switched].append(said.ttft_s)
            cached[switched].append(said.cached_tokens)
            tokens.append(said.prompt_tokens or 0)
        lab.watch.advance(1.0)
    return Switch(
        slots=slots,
        kind=kind,
        stay_s=tuple(spent[False]),
        switch_s=tuple(spent[True]),
        stay_cached=median(cached[False]),
        switch_cached=median(cached[True]),
        prompt_tokens=median(tokens),
    )


def prompts(kind: str, number: int) -> tuple[str, str]:
    """Two prompts of a kind, of which no other number has any."""
    if kind.startswith("short"):
        return words(SHORT_WORDS, 2 * number), words(SHORT_WORDS, 2 * number + 1)
    prefix = words(PREFIX_WORDS, number)
    return f"{prefix}\n\n{words(TAIL_WORDS, 2 * number)}", f"{prefix}\n\n{words(TAIL_WORDS, 2 * number + 1)}"


# --- loading ----------------------------------------------------------------------------------------


async def loads(
    lab: Laboratory, at_hand: Stock, base: str, names: Sequence[str], copies: Stock, rounds: int
) -> tuple[Loading, ...]:
    """A full copy, and the base with all adapters, interleaved; the first of each does not count: it fills the page
    cache. Raises CalmError."""
    lab.watch.stage(base, "loads")
    copy = next(iter(copies.cards.values()))
    cases = {
        "a full copy": (replace(lab, weights=copies.weights), copy, ()),
        f"the base with {len(names)} adapters": (lab, at_hand.cards[base], [at_hand.cards[n] for n in names]),
    }
    ready_s: dict[str, list[float]] = defaultdict(list)
    first_s: dict[str, list[float]] = defaultdict(list)
    for number in range(rounds + 1):
        for what, (room, card, adapters) in cases.items():
            ready, first = await load_once(room, card, adapters, number)
            lab.watch.advance(1.0)
            if number:
                ready_s[what].append(ready)
                first_s[what].append(first)
    return tuple(
        Loading(what=what, ready_s=tuple(ready_s[what]), first_token_s=tuple(first_s[what])) for what in cases
    )


async def load_once(
    lab: Laboratory, card: ModelCard, adapters: Sequence[ModelCard], number: int
) -> tuple[float, float]:
    """Seconds until healthy, and until the first token of a short prompt is there."""
    begun_s = time.perf_counter()
    engine = await start(lab, card, adapters)
    try:
        healthy_s = time.perf_counter()
        model = Resident(card, engine.endpoint, engine)
        said = (await ask(lab, model, words(SHORT_WORDS, number), 1)).answered
        return healthy_s - begun_s, said.tokens_s[0] - begun_s
    finally:
        await engine.stop()


# --- the command ------------------------------------------------------------------------------------


async def measure(at_hand: Stock, base: str, options: argparse.Namespace, directory: Path) -> Found:
    """Raises CalmError."""
    whole, names, made_up = specialists(at_hand, base, options.specialists, directory)
    copies = full_copies(whole, base, options.specialists, directory)
    # A file that no other process has mapped: its pages would be counted in shares.
    whole = replace(whole, given={**whole.given, base: next(iter(copies.given.values()))})
    slots = dict.fromkeys(options.slots or (1, whole.cards[base].engine.slots))
    async with AsyncExitStack() as stack:
        lab = await stack.enter_async_context(prepared(whole, copies, base, options))
        return Found(
            base=base,
            threads=lab.threads[base],
            context=whole.cards[base].context,
            memory=await memory(lab, whole, base, names, copies),
            switches=tuple(
                [
                    one
                    for count in slots
                    for one in await switches(lab, whole, base, names, count, options.rounds)
                ]
            ),
            loads=await loads(lab, whole, base, names, copies, options.rounds),
            made_up=made_up,
        )


@asynccontextmanager
async def prepared(
    whole: Stock, copies: Stock, base: str, options: argparse.Namespace
) -> AsyncIterator[Laboratory]:
    """The prefix cache as in service; copies get the base's threads."""
    with board() as bar:
        bar.expect(len(options.slots or (1, 4)) * len(KINDS) * options.rounds + 2.0 * (options.rounds + 1))
        async with opened(whole, bar, fields={}, threads=options.threads) as lab:
            threads = {**lab.threads, **dict.fromkeys(copies.cards, lab.threads[base])}
            yield replace(lab, threads=threads)


def report(found: Found) -> str:
    """Markdown."""
    told = found.memory
    ratio = told.copies_bytes / told.adapters_bytes
    memory_rows = [
        ["the base alone", size(told.base_bytes), ""],
        [f"one base, {told.specialists} adapters", size(told.adapters_bytes), size(told.adapter_files_bytes)],
        [f"{told.specialists} full copies", size(told.copies_bytes), size(told.copy_files_bytes)],
    ]
    made = f", {found.made_up} of them made up" if found.made_up else ""
    return "\n\n".join(
        [
            f"{found.base}: {told.specialists} specialists{made}; {found.threads} thread(s), "
            f"context {found.context} per slot",
            table(["", "resident (PSS)", "files"], memory_rows),
            f"Full copies take {ratio:.2f} times the memory.",
            table(
                ["slots", "prompt", "tokens", "stay, TTFT (cached)", "switch, TTFT (cached)", "more, ms"],
                [switch_cells(row) for row in found.switches],
            ),
            table(
                ["load, page cache warm", "healthy", "first token"], [load_cells(row) for row in found.loads]
            ),
        ]
    )


def switch_cells(row: Switch) -> list[str]:
    extra = row.extra_s
    in_ms = (
        None
        if extra is None
        else changed(
            extra,
            value=1000 * extra.value,
            low=None if extra.low is None else 1000 * extra.low,
            high=None if extra.high is None else 1000 * extra.high,
        )
    )
    stay, switch = (
        f"{spread(row.stay_s)} ({row.stay_cached:g})",
        f"{spread(row.switch_s)} ({row.switch_cached:g})",
    )
    return [str(row.slots), row.kind, f"{row.prompt_tokens:.0f}", stay, switch, shown(in_ms, 1)]


def load_cells(row: Loading) -> list[str]:
    return [row.what, spread(row.ready_s), spread(row.first_token_s)]


def spread(values: Sequence[float]) -> str:
    """Median and range."""
    return f"{seconds(median(values))} [{seconds(min(values))}-{seconds(max(values))}]"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    parser.add_argument(
        "--base", nargs="+", default=["smollm2-135m"], metavar="NAME", help="default: smollm2-135m"
    )
    parser.add_argument("--specialists", type=int, default=6, metavar="N", help="at least 2 (default: 6)")
    parser.add_argument(
        "--rounds", type=int, default=12, metavar="N", help="of switches and loads (default: 12)"
    )
    parser.add_argument("--slots", type=int, nargs="+", metavar="N", help="default: 1 and the card's")
    parser.add_argument("--threads", type=int, metavar="N", help="of every engine (default: as in service)")
    options = parser.parse_args(arguments)
    if options.specialists < 2 or options.rounds < 1:
        parser.error("--specialists must be at least 2 and --rounds at least 1")
    return options


def run(options: argparse.Namespace) -> list[Found]:
    """One base after the other. Raises CalmError."""
    at_hand = stock(options.fleet, options.adapters)
    found = []
    for base in options.base:
        with tempfile.TemporaryDirectory(prefix="calm-switching-") as directory:
            found.append(asyncio.run(measure(at_hand, base, options, Path(directory))))
    return found


def main() -> None:
    options = parse()
    try:
        found = run(options)
    except CalmError as error:
        raise SystemExit(error.message) from None
    if options.json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(found), indent=2).decode() + "\n")
    else:
        sys.stdout.write("\n\n".join(map(report, found)) + "\n")


if __name__ == "__main__":
    main()
