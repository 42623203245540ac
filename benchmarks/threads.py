"""What oversubscribing the cores costs, and that CALM's thread budget does not.

Aggregate decoding speed of llama.cpp engines started by CALM's own backend, in three arrangements:

    solo             one engine with all cores
    naive            two engines at once, each with as many threads as there are cores, libgomp's own spinning
    oversubscribed   the same with the short spinning that CALM sets for every engine
    budgeted         two engines at once, each with its share, cores // 2: what CALM does

The rounds are interleaved, so that a slow minute of the machine hits all three alike.

    python benchmarks/threads.py --weights SmolLM2-135M-Instruct.Q4_1.gguf --rounds 6
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import msgspec

from calm.backends.llamacpp import LlamaCppBackend
from calm.backends.upstream import HttpUpstream
from calm.ports import RunningEngine
from calm.records import EngineSpec, ModelCard
from calm.settings import cache_dir

CHAT = "/v1/chat/completions"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", type=Path, help="a GGUF file (default: SmolLM2 from CALM's cache)")
    parser.add_argument("--rounds", type=int, default=5, help="how often each arrangement runs (default: 5)")
    parser.add_argument("--tokens", type=int, default=16, help="tokens each answer has (default: 16)")
    parser.add_argument("--cores", type=int, default=os.cpu_count() or 1, help="cores to share out")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser.parse_args(arguments)


def cached_weights() -> Path:
    found = next(iter(sorted(cache_dir().rglob("SmolLM2-135M*.gguf"))), None)
    if found is None:
        raise SystemExit("no weights in the cache: run `calm models pull`, or give --weights FILE")
    return found


LIBGOMP_SPINS = "300000"
"""What libgomp takes where nobody sets GOMP_SPINCOUNT."""


def arrangements(cores: int) -> dict[str, tuple[list[int], dict[str, str]]]:
    """Threads of each engine that runs at once, and what its environment has beyond CALM's."""
    share = max(1, cores // 2)
    return {
        "solo": ([cores], {}),
        "naive": ([cores, cores], {"GOMP_SPINCOUNT": LIBGOMP_SPINS}),
        "oversubscribed": ([cores, cores], {}),
        "budgeted": ([share, share], {}),
    }


async def answer(upstream: HttpUpstream, engine: RunningEngine, tokens: int) -> int:
    """Tokens of one answer of exactly `tokens`."""
    body = {"messages": [{"role": "user", "content": "Tell me a story."}]}
    request = msgspec.json.encode({**body, "max_tokens": tokens, "ignore_eos": True, "seed": 1})
    async with upstream.post(engine.endpoint, CHAT, request) as reply:
        decoded = msgspec.json.decode(await reply.read())
    return int(decoded["usage"]["completion_tokens"])


async def tokens_per_second(upstream: HttpUpstream, engines: Sequence[RunningEngine], tokens: int) -> float:
    started = time.perf_counter()
    counts = await asyncio.gather(*(answer(upstream, engine, tokens) for engine in engines))
    return sum(counts) / (time.perf_counter() - started)


async def measure(options: argparse.Namespace, weights: Path, run_dir: Path) -> dict[str, list[float]]:
    """Speeds by arrangement, one per round; every engine answers once beforehand."""
    async with AsyncExitStack() as stack:
        upstream = await stack.enter_async_context(HttpUpstream())
        groups = {
            name: [await started(stack, run_dir, weights, threads, env) for threads in counts]
            for name, (counts, env) in arrangements(options.cores).items()
        }
        for engines in groups.values():
            await tokens_per_second(upstream, engines, 8)
        speeds: dict[str, list[float]] = {name: [] for name in groups}
        for _ in range(options.rounds):
            for name, engines in groups.items():
                speeds[name].append(await tokens_per_second(upstream, engines, options.tokens))
        return speeds


async def started(
    stack: AsyncExitStack, run_dir: Path, weights: Path, threads: int, env: Mapping[str, str]
) -> RunningEngine:
    card = ModelCard(name="bench", description="benchmark", context=1024, engine=EngineSpec(slots=1, env=env))
    engine = await LlamaCppBackend(run_dir).start(card, weights, threads)
    stack.push_async_callback(engine.stop)
    return engine


def table(speeds: dict[str, list[float]], cores: int) -> str:
    solo = statistics.median(speeds["solo"])
    rows = [f"{'arrangement':<16}{'threads':>9}{'median tok/s':>14}{'min - max':>16}{'to solo':>9}"]
    for name, values in speeds.items():
        threads = " + ".join(map(str, arrangements(cores)[name][0]))
        spread = f"{min(values):.1f} - {max(values):.1f}"
        median = statistics.median(values)
        rows.append(f"{name:<16}{threads:>9}{median:>14.1f}{spread:>16}{median / solo:>9.2f}")
    for other in ("naive", "oversubscribed"):
        gains = [mine / theirs for mine, theirs in zip(speeds["budgeted"], speeds[other], strict=True)]
        spread = f"{min(gains):.2f}-{max(gains):.2f}"
        rows.append(f"budgeted is {statistics.median(gains):.2f} ({spread}) times as fast as {other}")
    return "\n".join(rows)


def main() -> None:
    options = parse()
    weights = options.weights or cached_weights()
    with tempfile.TemporaryDirectory(prefix="calm-") as run_dir:
        speeds = asyncio.run(measure(options, weights, Path(run_dir)))
    if options.json:
        print(json.dumps({"cores": options.cores, "tokens_per_second": speeds}, indent=2))
    else:
        print(table(speeds, options.cores))


if __name__ == "__main__":
    main()
