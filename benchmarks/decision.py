"""What a decision costs: from a request's text to a ranked list of models, embedding included.

In one process, with the real Monitor, Analyzer, policies and residency machine; only the engines are scripted
(a decision never touches them). Every query is a text not seen before, so no cache of embeddings helps, and a
resident model's state changes between two decisions, so that no two see the same snapshot. As in
service the garbage collector runs and the last 2,048 decisions stay in memory. Each variant is a process of
its own, which first makes as many decisions as are kept (fewer for large fleets); then the variants take
turns, round by round, so that machine noise hits all alike. The breakdown comes from a second pass, since
reading the clock between the parts costs a little itself.

    make bench-decision
    python benchmarks/decision.py --rounds 3 --decisions 300 --models 3 10
    python benchmarks/decision.py --profile            # where the time goes, by function
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import gc
import io
import json
import multiprocessing
import os
import platform
import pstats
import random
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec
import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.gateway import spread
from calm.analyze.analyzer import Analyzer
from calm.backends.fake import FakeBackend, Script
from calm.backends.upstream import HttpUpstream
from calm.clock import SystemClock
from calm.execute.dispatch import Dispatcher
from calm.execute.events import Limits
from calm.execute.executor import Executor
from calm.gateway.relay import encode_for
from calm.loop import RECENT, RECORDED, Orchestrator, Parts, Steering
from calm.meters.absent import AbsentMeter
from calm.meters.ledger import EnergyLedger
from calm.monitor.features import extract
from calm.monitor.language import LanguageDetector
from calm.monitor.resources import Resources
from calm.monitor.window import Workload
from calm.plan import goals as goal_book
from calm.plan.feasible import feasible, within_limits
from calm.plan.policies import make_policy
from calm.plan.shortlist import finalists
from calm.ports import Embedder
from calm.records import Ask, Decision, Features, ModelCard, Outcome, Reading, Vector
from calm.registry import load_fleet
from calm.settings import cache_dir
from calm.sources.assets import cached_minilm
from calm.stores.sqlite import SqliteStore
from calm.wiring import make_embedder, make_minilm

FLEET = Path(__file__).parents[1] / "fleet"
P50_GOAL_MS, P99_GOAL_MS = 1.0, 5.0
SUBJECTS = (
    "compound interest", "a broken bicycle chain", "the treaty of Westphalia", "photosynthesis", "taxes",
    "my sister's wedding", "binary search trees", "a sprained ankle", "sourdough bread", "the offside rule",
    "quantum tunnelling", "a noisy neighbour", "PostgreSQL indexes", "the water cycle", "a job interview",
    "renting a flat in Lyon", "vaccines", "jazz harmony", "a delayed flight", "shares", "beekeeping",
)  # fmt: skip
FORMS = (
    "hi, {0}?",
    "What is {0}?",
    "Tell me about {0} in {1} words.",
    "Summarise what is known about {0} and compare it with case {1}.",
    "Qu'est-ce que tu peux me dire sur {0}, numéro {1} ?",
    "Schreibe mir bitte eine kurze E-Mail über {0}, Aktenzeichen {1}.",
    "Write a Python function that models {0}; it takes {1} arguments and returns a list. Add a unit test.",
    "SELECT name FROM orders WHERE id = {1}; -- why is this slow when the table is about {0}?",
    "我想了解一下关于{0}的事情，编号{1}，请用中文简单说明。",
    "A patient aged {1} asks about {0}. Which symptoms would make you refer them to a specialist, and why?",
)
PARAGRAPH = (
    "Yesterday, on page {1} of the report about {0}, I read that most of what we believed was wrong, that "
    "the figures had been taken from another year, and that nobody had checked them since. "
)


# --- the requests ---------------------------------------------------------------------------------


def queries(seed: int) -> Iterator[str]:
    """Texts that never repeat: three quarters of a line, one quarter of 400 to 6,000 characters."""
    draw = random.Random(seed)
    number = 0
    while True:
        number += 1
        text = draw.choice(FORMS).format(draw.choice(SUBJECTS), number)
        if draw.random() < 0.25:
            told = PARAGRAPH.format(draw.choice(SUBJECTS), number)
            text = f"{told * draw.randint(2, 30)}{text}"
        yield f"{text} ({number})"


def asks(seed: int) -> Iterator[Ask]:
    """Streaming chat requests as the door makes them."""
    for number, text in enumerate(queries(seed)):
        yield Ask(
            request_id=f"bench-{seed}-{number}",
            kind="chat",
            query=text,
            prompt_chars=len(text),
            body={"messages": [{"role": "user", "content": text}]},
            requires=frozenset({"chat"}),
            stream=True,
            max_tokens=256 if number % 2 else None,
            conversation=f"{seed}-{number}",
            arrived_s=time.monotonic(),
        )


# --- the house ------------------------------------------------------------------------------------


def cards(count: int) -> dict[str, ModelCard]:
    """The default fleet's bases, its specialists on them, and beyond it copies of the bases that are about something
    else and differ in speed."""
    served = [card for card in load_fleet(FLEET).fleet.values() if card.engine.kind == "llamacpp"]
    real = {card.name: card for card in sorted(served, key=lambda card: card.adapter_of is not None)}
    draw, names = random.Random(count), [card.name for card in served if card.adapter_of is None]
    for number in range(count - len(real)):
        base = real[names[number % len(names)]]
        priors = msgspec.structs.replace(
            base.priors, decode_tps=draw.uniform(10, 200), quality={"default": draw.uniform(0.2, 0.8)}
        )
        name = f"synthetic-{number}"
        real[name] = msgspec.structs.replace(
            base, name=name, description=f"Questions about {draw.choice(SUBJECTS)}, {number}.", priors=priors
        )
    return dict(list(real.items())[:count])


async def no_weights(_: ModelCard) -> Path | None:
    return None


@asynccontextmanager
async def house(count: int, policy: str, embedder: Embedder | None) -> AsyncIterator[Orchestrator]:
    """An Orchestrator over `count` models, ten of them in memory, that has learned from some answers."""
    clock = SystemClock()
    async with AsyncExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="calm-bench-")))
        store = SqliteStore(root / "knowledge.sqlite3", retention_days=None, max_requests=None, clock=clock)
        stack.callback(store.close)
        backend = FakeBackend(default=Script(footprint_bytes=400_000_000), listen=False)
        executor = Executor(
            {}, {"llamacpp": backend}, no_weights, clock, Limits(cores=16, budget_bytes=10 * 450_000_000)
        )
        stack.push_async_callback(executor.close, 0.0)
        ledger = EnergyLedger(AbsentMeter(), clock)
        upstream = await stack.enter_async_context(HttpUpstream())
        dispatcher = Dispatcher(
            executor=executor, upstream=upstream, ledger=ledger, clock=clock, encode=encode_for, attempts=1
        )
        parts = Parts(
            clock=clock,
            executor=executor,
            dispatcher=dispatcher,
            analyzer=Analyzer(embedder),
            workload=Workload(),
            resources=Resources(),
            ledger=ledger,
            store=store,
            embedder=embedder,
            language=LanguageDetector(),
            deadline_s=300.0,
        )
        loop = Orchestrator(
            parts, Steering(policy=make_policy(policy, embedder=lambda: make_minilm(cache_dir())))
        )
        loop.use_fleet(cards(count))
        for name in list(loop.fleet)[:10]:
            await executor.load(name)
        teach(loop)
        yield loop


def teach(loop: Orchestrator, answers: int = 300) -> None:
    """Outcomes and ratings for every model in turn: learned state costs more than priors do."""
    draw, parts, names = random.Random(5), loop.parts, list(loop.fleet)
    for number, ask in zip(range(answers), asks(seed=99), strict=False):
        model = names[number % len(names)]
        features = extract(ask, parts.embedder, parts.language)
        outcome = Outcome(
            request_id=ask.request_id,
            model=model,
            status="ok",
            wall_s=0.0,
            prefill_s=0.01 * draw.uniform(0.5, 2) * features.prompt_tokens,
            ttft_s=0.4,
            total_s=0.4 + draw.uniform(0.5, 5),
            prompt_tokens=int(features.prompt_tokens) + 12,
            cached_tokens=0,
            completion_tokens=draw.randint(5, 200),
            energy=Reading(joules=draw.uniform(1, 20), meter="scripted", kind="modelled"),
            finish_reason="stop",
        )
        parts.analyzer.learn(ask, features, None, outcome)
        parts.analyzer.rate(features, model, draw.uniform(1, 5))
        parts.workload.observed(outcome)


def stir(loop: Orchestrator) -> None:
    """A resident model's state is a new record afterwards, and says the same."""
    name = next(iter(loop.fleet))
    loop.parts.executor.pin(name)
    loop.parts.executor.unpin(name)


# --- measuring ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """One configuration. Crosses to its process as it is."""

    name: str
    models: int
    policy: str
    embedder: str


class Bench:
    """Makes decisions in one house and times them."""

    def __init__(self, loop: Orchestrator, requests: Iterator[Ask]) -> None:
        self.loop = loop
        self._asks = requests
        self._kept: deque[tuple[Ask, Features, Decision]] = deque(maxlen=RECENT)

    def round(self, decisions: int) -> list[float]:
        """Milliseconds of each: what `Orchestrator.serve` does before it dispatches, less the recording."""
        parts, times_ms = self.loop.parts, []
        for _ in range(decisions):
            ask = next(self._asks)
            stir(self.loop)
            started_s = time.perf_counter()
            features = extract(ask, parts.embedder, parts.language)
            decision = self.loop.decide(ask, features)
            times_ms.append((time.perf_counter() - started_s) * 1000)
            self._kept.append((ask, features, decision))
        return times_ms

    def dissect(self, decisions: int) -> dict[str, float]:
        """Median milliseconds of each part."""
        found = []
        for _ in range(decisions):
            stir(self.loop)
            found.append(dissected(self.loop, next(self._asks)))
        return {part: 1000 * statistics.median(one[part] for one in found) for part in found[0]}

    def profile(self, decisions: int) -> str:
        """The functions that cost most. The profiler doubles the cost of small functions."""
        with cProfile.Profile() as profiler:
            self.round(decisions)
        out = io.StringIO()
        pstats.Stats(profiler, stream=out).sort_stats("tottime").print_stats(30)
        return out.getvalue()


class Worker:
    """A Bench in a process of its own; one call at a time."""

    def __init__(self, variant: Variant, seed: int) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.variant = variant
        self.rounds: list[list[float]] = []
        self.parts: dict[str, float] = {}
        self.rss_bytes = 0
        self._pipe, theirs = spawn.Pipe()
        self.process = spawn.Process(target=work, args=(theirs, variant, seed), daemon=True)
        self.process.start()
        theirs.close()

    def call(self, what: str, decisions: int) -> object:
        try:
            self._pipe.send((what, decisions))
            return self._pipe.recv()
        except (EOFError, OSError):
            raise SystemExit(f"the process of {self.variant.name!r} ended; see above") from None

    def close(self) -> None:
        self._pipe.close()
        self.process.join(10)


def work(pipe: Connection, variant: Variant, seed: int) -> None:
    """What a Worker's process does until the pipe closes."""
    asyncio.run(obey(pipe, variant, seed))


async def obey(pipe: Connection, variant: Variant, seed: int) -> None:
    async with house(variant.models, variant.policy, make_embedder(variant.embedder, cache_dir())) as loop:
        bench = Bench(loop, asks(seed))
        gc.collect()
        gc.freeze()  # as the server does once it is built
        does: Mapping[str, Callable[[int], object]] = {
            "round": bench.round,
            "dissect": bench.dissect,
            "profile": bench.profile,
        }
        with suppress(EOFError):
            while True:
                what, decisions = pipe.recv()
                pipe.send(does[what](decisions))


class Stopwatch:
    """Calls something and remembers how long that took."""

    def __init__(self, embedder: Embedder | None, language: Callable[[str], str]) -> None:
        self.name = embedder.name if embedder else ""
        self.dimensions = embedder.dimensions if embedder else 0
        self.embed_s = self.language_s = 0.0
        self._embedder = embedder
        self._language = language

    def embed(self, text: str) -> Vector:
        assert self._embedder is not None
        started_s = time.perf_counter()
        vector = self._embedder.embed(text)
        self.embed_s = time.perf_counter() - started_s
        return vector

    def language(self, text: str) -> str:
        started_s = time.perf_counter()
        found = self._language(text)
        self.language_s = time.perf_counter() - started_s
        return found


def dissected(loop: Orchestrator, ask: Ask) -> dict[str, float]:
    """Seconds of each part of one decision: the calls of `Orchestrator.decide` with a clock between them."""
    clock, parts, steering = time.perf_counter, loop.parts, loop.steering
    watch = Stopwatch(parts.embedder, parts.language)
    marks = [clock()]
    features = extract(ask, watch if parts.embedder else None, watch.language)
    marks.append(clock())
    snapshot = loop.snapshot()
    _, weights = goal_book.resolve(ask.wishes, goal=steering.goal, goals=steering.goals)
    marks.append(clock())
    kept, refused = feasible(ask, features, snapshot, loop.fleet)
    marks.append(clock())
    estimates = parts.analyzer.estimate_all(ask, features, snapshot, kept)
    marks.append(clock())
    within, refused = within_limits(estimates, kept, ask, ask.arrived_s, refused)
    able = kept if within is estimates else {name: kept[name] for name in within}
    marks.append(clock())
    left, within = finalists(steering.policy, ask, snapshot, able, within, weights, RECORDED)
    marks.append(clock())
    histories = parts.workload.histories()
    steering.policy.rank(ask, features, snapshot, left, within, histories, weights)
    marks.append(clock())
    names = ("features", "snapshot", "feasible", "estimate", "limits", "shortlist", "rank")
    found = {name: after - before for name, before, after in zip(names, marks, marks[1:], strict=False)}
    found["features"] -= watch.embed_s + watch.language_s
    return {"embed": watch.embed_s, "language": watch.language_s, **found}


def plan(sizes: Sequence[int]) -> Iterator[Variant]:
    """Every variant; MiniLM's only where its weights are."""
    for size in sizes:
        yield Variant(f"calm, {size:,} models", size, "calm", "static")
    yield Variant("calm, no embedder", 3, "calm", "none")
    if cached_minilm(cache_dir()) is None:
        print("MiniLM is not in the cache (calm models pull --assets): left out", file=sys.stderr)
        return
    yield Variant("calm, MiniLM", 3, "calm", "minilm")
    yield Variant("paper, MiniLM", 3, "paper", "minilm")


def fewer(decisions: int, models: int) -> int:
    """As many decisions of a large fleet as cost about as much as those of ten models, and enough for a p99."""
    return min(decisions, max(300, decisions * 10 // max(10, models)))


def measure(args: argparse.Namespace) -> list[Worker]:
    workers = [Worker(variant, seed) for seed, variant in enumerate(plan(args.models))]
    for worker in workers:
        worker.call("round", fewer(RECENT, worker.variant.models))
    for number in range(args.rounds):
        for worker in workers:
            times_ms = worker.call("round", fewer(args.decisions, worker.variant.models))
            assert isinstance(times_ms, list)
            worker.rounds.append(times_ms)
        print(f"round {number + 1}/{args.rounds} done", file=sys.stderr)
    for worker in workers:
        worker.rss_bytes = psutil.Process(worker.process.pid).memory_info().rss
        parts = worker.call("dissect", fewer(args.decisions, worker.variant.models))
        assert isinstance(parts, dict)
        worker.parts = parts
    if args.profile:
        print(workers[0].call("profile", args.decisions), file=sys.stderr)
    for worker in workers:
        worker.close()
    return workers


# --- the report -----------------------------------------------------------------------------------


def percentile(values: Sequence[float], share: float) -> float:
    """Nearest rank of what is not empty."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def row(worker: Worker) -> dict[str, object]:
    """Figures of one variant, JSON-ready; percentiles are medians over rounds."""
    p50 = [statistics.median(one) for one in worker.rounds]
    p99 = [percentile(one, 0.99) for one in worker.rounds]
    return {
        "variant": worker.variant.name,
        "models": worker.variant.models,
        "p50_ms": statistics.median(p50),
        "p99_ms": statistics.median(p99),
        "max_ms": max(max(one) for one in worker.rounds),
        "decisions": sum(map(len, worker.rounds)),
        "rss_mb": worker.rss_bytes / 1e6,
        "parts_p50_ms": worker.parts,
        "p50_spread": spread(p50, 3),
        "p99_spread": spread(p99, 3),
    }


def report(rows: Sequence[Mapping[str, object]]) -> str:
    parts = list(parts_of(rows[0]))
    heads = [
        f"\n{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "milliseconds from text to ranking, medians over rounds (range)\n",
        f"{'variant':20} {'p50':>22} {'p99':>24} {'max':>8} {'decisions':>10} {'RSS MB':>7}",
    ]
    times = [
        f"{one['variant']:20} {one['p50_spread']:>22} {one['p99_spread']:>24} "
        f"{one['max_ms']:8.2f} {one['decisions']:10,} {one['rss_mb']:7.0f}"
        for one in rows
    ]
    title = f"{'':20} " + " ".join(f"{part:>9}" for part in parts)
    split = [
        f"{one['variant']:20} " + " ".join(f"{1000 * parts_of(one)[part]:9.1f}" for part in parts)
        for one in rows
    ]
    return "\n".join(
        [*heads, *times, "\nmedian of each part, microseconds", title, *split, "", *verdicts(rows)]
    )


def parts_of(one: Mapping[str, object]) -> dict[str, float]:
    parts = one["parts_p50_ms"]
    assert isinstance(parts, dict)
    return parts


def verdict(first: Mapping[str, object]) -> str:
    """Whether the goals hold for the first variant."""
    p50, p99 = float(str(first["p50_ms"])), float(str(first["p99_ms"]))
    good = p50 < P50_GOAL_MS and p99 < P99_GOAL_MS
    goal = f"goal p50 < {P50_GOAL_MS:g} ms, p99 < {P99_GOAL_MS:g} ms"
    return f"{'PASS' if good else 'FAIL'}  {first['variant']}: p50 {p50:.3f} ms, p99 {p99:.3f} ms ({goal})"


def verdicts(rows: Sequence[Mapping[str, object]]) -> Iterator[str]:
    """The first variant by both goals, the largest fleet by that for the tail."""
    yield verdict(rows[0])
    largest = max(rows, key=lambda one: int(str(one["models"])))
    if largest["models"] != rows[0]["models"]:
        p99 = float(str(largest["p99_ms"]))
        word = "PASS" if p99 < P99_GOAL_MS else "FAIL"
        yield f"{word}  {largest['variant']}: p99 {p99:.3f} ms (goal < {P99_GOAL_MS:g} ms)"


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds of every variant (default 5)")
    parser.add_argument(
        "--decisions",
        type=int,
        default=1000,
        help="decisions of a round; fewer for large fleets (default 1000)",
    )
    parser.add_argument(
        "--models", type=int, nargs="+", default=[3, 10, 100, 1000], help="fleet sizes; the first is judged"
    )
    parser.add_argument("--profile", action="store_true", help="also profile the first variant, on stderr")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    args = parser.parse_args(given)
    if min(args.rounds, args.decisions, *args.models) < 1:
        parser.error("--rounds, --decisions and --models must be at least 1")
    return args


def main() -> None:
    args = arguments()
    rows = [row(worker) for worker in measure(args)]
    print(report(rows))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
