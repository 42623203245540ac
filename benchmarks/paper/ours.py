"""Ours against the paper's policy: same models, serial engine, memory, arrivals and questions, in replay.

    python -m benchmarks.paper.ours --data DIR [--seeds 10] [--out DIR]

At 20 and 40 minutes, with one, two and three models resident, and with the bytes of one, two and three of the largest.
The paper's policy runs with its LRU and FIFO and with each of its four modes; ours with one configuration for all
rows: policy and cache `calm`, and a floor under quality at what the paper's similarity alone delivers. Both have
served and been rated 500 requests before (the paper's means are warm too); with --cold nobody has.

Beside each row stands the bound of a linear program (bounds.py): the least mean latency and energy that any mix of
the models can have at that quality, every mean known, all models resident, in order of arrival.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from itertools import product
from statistics import fmean

from benchmarks.paper.bounds import latency_s, least_service
from benchmarks.paper.reproduce import (
    EVERYTHING_BYTES,
    MINUTES,
    REQUESTS,
    TOKENS,
    arguments,
    paper_house,
    questions_of,
    workload,
)
from benchmarks.studies import by_setup, mean_of, more, replayed, shown, table, times
from calm.replay.house import House
from calm.report.figures import Figures
from calm.report.records import Setup, Study
from calm.workloads.workload import open_source

FLOOR = 0.735
"""What the paper's similarity delivers on this fleet and these questions (3.94 of 5), on 10 seeds."""
LARGEST_BYTES = 8_000_000_000
MODES = ("paper", "paper:latency:0.3", "paper:cache:0.05")
GOALS = (("mean_s", 0.6), ("p99_s", 0.6), ("total_j_per_request", 0.7))


def main() -> None:
    options = arguments(__doc__ or "", more=own_arguments)
    cold, aim = options.cold, f"quality>={options.floor:g}"
    studies, minilm = [], questions_of(options)
    for minutes, (most, budget) in product(
        MINUTES, [(k, None) for k in (1, 2, 3)] + [(k, k * LARGEST_BYTES) for k in (1, 2, 3)]
    ):
        house = paper_house(budget or EVERYTHING_BYTES, minilm)
        name = f"{minutes} min, " + (f"{most} resident" if budget is None else f"{budget / 1e9:.0f} GB")
        cap = "" if budget else f":{most}"
        setups = [Setup(policy=p, cache=f"lru{cap}", scenario=name) for p in MODES]
        setups.append(Setup(policy="calm", cache=f"calm{cap}", scenario=name, goal=aim))
        out = options.out / f"ours{'-cold' if cold else ''}-{minutes}-{most}-{'bytes' if budget else 'count'}"
        spec = workload(options.data, minutes)
        study = replayed(
            name, setups, options.seeds, house, spec, out, f"ours {cold}", warm_start=0 if cold else REQUESTS
        )
        studies.append((study, house, minutes))
        print(table(HEADERS, rows(study, house, options.data, minutes)[-1:]), flush=True)
    print(f"\n## Ours against the paper's policy, {options.seeds} seeds\n")
    print(
        table(
            HEADERS,
            [row for study, house, minutes in studies for row in rows(study, house, options.data, minutes)],
        )
    )


def own_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cold", action="store_true", help="nobody has served before")
    parser.add_argument("--floor", type=float, default=FLOOR, help="quality that ours promises, 0..1")


HEADERS = (
    "load, memory",
    "against",
    "mean latency",
    "p99",
    "energy",
    "quality, points",
    "ours: mean s, J, rating, loads",
    "theirs",
    "bound: mean latency, energy",
)


def rows(study: Study, house: House, data: str, minutes: int) -> list[list[str]]:
    """Ours over each of the paper's modes."""
    found = by_setup(study)
    ours = next(f for s, f in found.items() if s.policy == "calm")
    name = next(iter(found)).scenario
    lines = []
    for setup, theirs in found.items():
        if setup.policy == "calm":
            continue
        mean_s, joules = bound(house, data, minutes, len(ours), shown_quality(theirs))
        base_s, base_j = mean_of(theirs, "mean_s"), mean_of(theirs, "total_j_per_request")
        lines.append(
            [
                name,
                setup.policy,
                *(shown(times(ours, theirs, figure)) for figure, _ in GOALS),
                shown(more(ours, theirs, "quality"), 3),
                in_short(ours),
                in_short(theirs),
                "none"
                if mean_s is None or joules is None or base_s is None or base_j is None
                else f"{mean_s / base_s.value:.2f}, {joules / base_j.value:.2f}",
            ]
        )
    return lines


def in_short(figures: Mapping[int, Figures]) -> str:
    quality = mean_of(figures, "quality")
    parts = [
        shown(mean_of(figures, "mean_s"), 0, bounds=False),
        shown(mean_of(figures, "total_j_per_request"), 0, bounds=False),
        "-" if quality is None else f"{1 + 4 * quality.value:.2f}",
        shown(mean_of(figures, "loads"), 0, bounds=False),
    ]
    return ", ".join(parts)


def shown_quality(figures: Mapping[int, Figures]) -> float:
    found = mean_of(figures, "quality")
    return 0.0 if found is None else found.value


def bound(
    house: House, data: str, minutes: int, seeds: int, quality: float
) -> tuple[float | None, float | None]:
    """Mean latency and joules of the best stationary mix at the quality of the row's baseline."""
    source = open_source(workload(data, minutes), list(house.fleet))
    loads = [source.workload(seed) for seed in range(seeds)]
    chars = fmean(len(query.prompt) for load in loads for query in load.queries)
    shares = dict.fromkeys(("medical", "finance", "banking"), 1 / 3)
    best = least_service(house.profile, shares, quality, len(house.fleet), chars, TOKENS)
    if best is None:
        return None, None
    return fmean(fmean(latency_s(load.arrivals_s, best.service_s)) for load in loads), best.energy_j


if __name__ == "__main__":
    main()
