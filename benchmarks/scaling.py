"""How decisions, adaptation ticks, hit rate and latency grow: 10 to 1,000 models, 1 to 1,000 requests per second.

    python benchmarks/scaling.py [--requests 1000] [--seeds 3]

Simulated time for the engines, this machine's time for the code: every decision and every tick of the loop that
serves is timed while it runs. The fleet is synthetic: sizes from 0.1 to 8 GB, rates that follow from them, forty
domains with a specialist each in turn, questions by Zipf's law over the domains. One machine for all: 256 cores
and 100 GB for models.
"""

from __future__ import annotations

import argparse
import gc
import math
import time
from collections.abc import Awaitable, Callable
from random import Random
from typing import ParamSpec, TypeVar

import numpy as np

from benchmarks.studies import table
from calm.analyze.domains import DESCRIPTORS
from calm.loop import Orchestrator
from calm.profile import Length, MachineProfile, ModelProfile, Profile
from calm.records import EngineSpec, ModelCard
from calm.replay.house import House, run_trial
from calm.report.figures import figures_of
from calm.report.records import Setup
from calm.workloads.records import Query, Workload

MODELS = (10, 100, 1000)
RATES_RPS = (1, 10, 100, 1000)
BUDGET_BYTES = 100_000_000_000
CORES = 256
SLO_S = 10.0
DOMAINS = tuple(DESCRIPTORS)

P = ParamSpec("P")
T = TypeVar("T")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    rows = []
    for models in MODELS:
        for rate in RATES_RPS:
            cells = [cell(models, rate, options.requests, seed) for seed in range(options.seeds)]
            medians = [float(np.median(column)) for column in zip(*cells, strict=True)]
            rows.append([f"{models:,}", f"{rate:,}", *map(shown, medians, FORMATS)])
            print(table(HEADERS, rows[-1:]).splitlines()[-1], flush=True)
    print("\n" + table(HEADERS, rows))


HEADERS = (
    "models", "requests/s", "decision p50 ms", "p99 ms", "tick p50 ms", "p99 ms", "mean latency s", "p99 s",
    "hit rate %", "loads per 100", "in memory GB", "us per request",
)  # fmt: skip
FORMATS = ("{:.2f}", "{:.2f}", "{:.2f}", "{:.2f}", "{:.2f}", "{:.2f}", "{:.1f}", "{:.1f}", "{:.0f}", "{:.0f}")


def shown(value: float, style: str) -> str:
    return style.format(value)


def cell(models: int, rate_rps: float, requests: int, seed: int) -> tuple[float, ...]:
    """One trial: timings of the code in ms, then figures of the trial."""
    house = House(
        fleet=fleet(models),
        profile=profile(models),
        budget_bytes=BUDGET_BYTES,
        max_tokens=64,
        feedback=0.1,
    )
    decisions, ticks = Stopwatch(), Stopwatch()
    gc.collect()
    began_s = time.perf_counter()
    trial = run_trial(
        house,
        workload(models, rate_rps, requests, seed),
        Setup(policy="calm", cache="calm"),
        watch=lambda loop: time_both(loop, decisions, ticks),
    )
    whole_s = time.perf_counter() - began_s
    found = figures_of(trial, SLO_S)
    return (
        *decisions.milliseconds(),
        *ticks.milliseconds(),
        found.mean_s or math.nan,
        found.p99_s or math.nan,
        100 * (found.hit_rate or 0.0),
        100 * trial.loads / requests,
        trial.peak_bytes / 1e9,
        1e6 * whole_s / requests,
    )


class Stopwatch:
    """Times of one function."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def around(self, function: Callable[P, T]) -> Callable[P, T]:
        def timed(*args: P.args, **kwargs: P.kwargs) -> T:
            began_s = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds.append(time.perf_counter() - began_s)

        return timed

    def around_async(self, function: Callable[P, Awaitable[None]]) -> Callable[P, Awaitable[None]]:
        async def timed(*args: P.args, **kwargs: P.kwargs) -> None:
            began_s = time.perf_counter()
            await function(*args, **kwargs)
            self.seconds.append(time.perf_counter() - began_s)

        return timed

    def milliseconds(self) -> tuple[float, float]:
        p50, p99 = np.percentile(self.seconds, [50, 99])
        return 1e3 * float(p50), 1e3 * float(p99)


def time_both(loop: Orchestrator, decisions: Stopwatch, ticks: Stopwatch) -> None:
    loop.decide = decisions.around(loop.decide)  # type: ignore[method-assign]
    loop.adapt = ticks.around_async(loop.adapt)  # type: ignore[method-assign, assignment]


# --- what is served -------------------------------------------------------------------------------


def fleet(models: int) -> dict[str, ModelCard]:
    return {name: card(name, index) for index, name in enumerate(names(models))}


def names(models: int) -> list[str]:
    return [f"m{index:04}" for index in range(models)]


def domain_of(index: int) -> str:
    return DOMAINS[index % len(DOMAINS)]


def card(name: str, index: int) -> ModelCard:
    domain = domain_of(index)
    return ModelCard(
        name=name,
        description=f"Specialist for {domain.replace('_', ' ')}: {DESCRIPTORS[domain][0]}",
        domains=(domain,),
        memory_hint_bytes=size_bytes(index),
        engine=EngineSpec(slots=8, threads=1),
        context=8192,
    )


def size_bytes(index: int) -> int:
    """0.1 to 8 GB, log-uniform."""
    return int(1e8 * 80 ** Random(index).random())


def profile(models: int) -> Profile:
    return Profile(
        machine=MachineProfile(name="synthetic", cores=CORES),
        models={name: model_profile(index) for index, name in enumerate(names(models))},
    )


def model_profile(index: int) -> ModelProfile:
    """Rates inverse to the bytes read for a token; larger is a little better."""
    size = size_bytes(index)
    alone_tps = 20e9 / size
    good = 0.6 + 0.1 * math.log10(size / 1e8)
    return ModelProfile(
        memory_bytes=size,
        load_s=0.3 + size / 1e9,
        prefill_tps=10 * alone_tps,
        decode_tps={"1": alone_tps, "8": 4 * alone_tps},
        overhead_s=0.005,
        jitter=0.1,
        active_w=5.0,
        idle_w=0.01,
        output_tokens={"default": Length(mean=40, sd=20)},
        quality={"default": good - 0.3, domain_of(index): good},
    )


def workload(models: int, rate_rps: float, requests: int, seed: int) -> Workload:
    """Poisson arrivals; domains by Zipf's law (exponent 1), among those the fleet has a specialist for."""
    random = Random(f"{seed}|{rate_rps}")
    domains = DOMAINS[: min(models, len(DOMAINS))]
    weights = [1 / rank for rank in range(1, len(domains) + 1)]
    at_s, arrivals, queries = 0.0, [], []
    for number in range(requests):
        arrivals.append(at_s)
        at_s += random.expovariate(rate_rps)
        domain = random.choices(domains, weights)[0]
        text = f"{random.choice(DESCRIPTORS[domain])} ({number})"
        queries.append(Query(id=str(number), dataset=domain, domain=domain, prompt=text))
    return Workload(name="synthetic", seed=seed, arrivals_s=tuple(arrivals), queries=tuple(queries))


if __name__ == "__main__":
    main()
