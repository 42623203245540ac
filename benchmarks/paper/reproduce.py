"""The paper's tables 2, 4 and 5 in replay: its policy, its Set 2, its cache and queue, beside what it published.

    python -m benchmarks.paper.reproduce --data DIR [--seeds 10] [--out DIR]

World Cup arrivals, 500 requests in 20 and 40 minutes, three domains, 256 tokens, every answer rated. Absolute seconds
of another machine, fleet and traffic mean little, so what is compared are ratios between candidates.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from benchmarks.studies import by_setup, embedded_once, mean_of, replayed, shown, table, times, values
from calm.ports import Embedder
from calm.profile import read_profile
from calm.registry import load_fleet
from calm.replay.house import House
from calm.report.figures import Figures
from calm.report.intervals import Interval, interval
from calm.report.records import Setup, Study
from calm.settings import cache_dir
from calm.wiring import load_minilm
from calm.workloads.records import WorkloadSpec
from calm.workloads.workload import open_source

HERE = Path(__file__).parent
DOMAINS = "domains:pubmedqa,headlines_finance,banking77"
REQUESTS, TOKENS = 500, 256
EVERYTHING_BYTES = 48_000_000_000
MINUTES = (20, 40)
TRACE = "worldcup:whole"

PUBLISHED_4 = {  # Table 4: latency s, confidence, kJ per query; no cache, then cache = 3
    "paper": ((766.5, 3.892, 0.866), (1400.7, 3.908, 1.043)),
    "paper:latency:0.3": ((430.9, 3.248, 0.547), (550.2, 3.186, 0.525)),
    "paper:confidence:0.3": ((932.3, 4.228, 0.970), (992.9, 4.268, 1.184)),
    "paper:energy:0.2": ((476.5, 3.536, 0.556), (529.2, 3.738, 0.567)),
}
PUBLISHED_5 = {  # Table 5: hit %, latency s, confidence, kJ; cache = 3
    "paper": (57.6, 1400.7, 3.908, 1.043),
    "paper:cache:0.02": (68.0, 1285.8, 3.95, 0.869),
    "paper:cache:0.03": (71.6, 1136.7, 3.876, 0.838),
    "paper:cache:0.05": (83.8, 1120.5, 3.97, 0.894),
}
PUBLISHED_2 = {  # Table 2 (Set 1, 256 tokens): latency s in 40 and 20 minutes
    ("none", "fifo"): (761, 976),
    ("none", "stcf"): (686, 1011),
    ("lru:1", "fifo"): (1704, 2314),
    ("lru:3", "fifo"): (1359, 1863),
    ("lru:3", "stcf"): (982, 1171),
}
LAMBDAS = {
    "latency": (0.1, 0.2, 0.3),
    "energy": (0.1, 0.15, 0.2),
    "confidence": (0.1, 0.2, 0.3),
    "cache": (0.02, 0.03, 0.05),
}


def main() -> None:
    options = arguments(__doc__ or "")
    house = paper_house(EVERYTHING_BYTES, questions_of(options))
    for minutes in MINUTES:
        study = run(options, house, minutes)
        found = by_setup(study)
        print(f"\n## {minutes} minutes, {options.seeds} seeds\n")
        print(modes(found, minutes))
        print(cache_bias(found, minutes))
        print(queues(found, minutes))


def arguments(
    text: str, more: Callable[[argparse.ArgumentParser], None] = lambda parser: None
) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=text.split("\n")[0])
    parser.add_argument("--data", required=True, help="directory with traces/ and domain/")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument(
        "--out", type=Path, default=Path("results/paper"), help="trials are kept and resumed here"
    )
    more(parser)
    return parser.parse_args()


def paper_house(budget_bytes: int, minilm: Callable[[], Embedder]) -> House:
    return House(
        fleet=load_fleet(HERE / "set2").fleet,
        profile=read_profile(HERE / "set2.profile.toml"),
        budget_bytes=budget_bytes,
        max_tokens=TOKENS,
        minilm=minilm,
    )


def questions_of(options: argparse.Namespace) -> Callable[[], Embedder]:
    """MiniLM, which takes 2 to 20 ms a question, asked once for all trials."""
    source = open_source(workload(options.data, MINUTES[0]), list(load_fleet(HERE / "set2").fleet))
    texts = (query.prompt for query in source.queries)
    return embedded_once(partial(load_minilm, cache_dir()), texts, options.out / "minilm.npz")


def workload(data: str, minutes: int) -> WorkloadSpec:
    return WorkloadSpec(
        arrivals=TRACE,
        queries=DOMAINS,
        data=data,
        requests=REQUESTS,
        duration_s=60.0 * minutes,
        max_tokens=TOKENS,
    )


def setups(minutes: int) -> list[Setup]:
    scenario = f"{minutes} min"
    tuned = [f"paper:{mode}:{value}" for mode, found in LAMBDAS.items() for value in found]
    modes = [
        Setup(policy=p, cache=c, scenario=scenario) for p in ("paper", *tuned) for c in ("none", "lru:3")
    ]
    queued = [
        Setup(policy="paper", cache=c, queue=q, scenario=scenario)
        for c, q in (("none", "stcf"), ("lru:1", "fifo"), ("lru:3", "stcf"))
    ]
    return [
        setup
        for setup in (*modes, *queued)
        if not (setup.policy.startswith("paper:cache") and setup.cache == "none")
    ]


def run(options: argparse.Namespace, house: House, minutes: int) -> Study:
    out = options.out / f"reproduce-{minutes}"
    return replayed(
        f"paper {minutes} min",
        setups(minutes),
        options.seeds,
        house,
        workload(options.data, minutes),
        out,
        "set2",
    )


Found = dict[Setup, dict[int, Figures]]


def one(found: Found, policy: str, cache: str, queue: str = "fifo") -> dict[int, Figures]:
    return next(f for s, f in found.items() if (s.policy, s.cache, s.queue) == (policy, cache, queue))


def rating(figures: dict[int, Figures]) -> str:
    """1 to 5."""
    return shown(interval(1 + 4 * (q or 0.0) for q in values(figures, "quality").values()))


def without_load(figures: dict[int, Figures]) -> str:
    """Share of requests that started no load: what the paper counts as hits."""
    return shown(interval(100 * (1 - f.loads / f.requests) for f in figures.values()), 1)


def modes(found: Found, minutes: int) -> str:
    """Table 4, and every other lambda of the paper."""
    rows = []
    for cache, place in (("none", 0), ("lru:3", 1)):
        base = one(found, "paper", cache)
        for policy in dict.fromkeys(s.policy for s in found if s.cache == cache and s.queue == "fifo"):
            if policy.startswith("paper:cache"):
                continue
            got, said = one(found, policy, cache), PUBLISHED_4.get(policy)
            rows.append(
                [
                    f"{policy} / {cache}",
                    shown(mean_of(got, "mean_s"), 0),
                    rating(got),
                    shown(scaled(got, "total_j_per_request", 1e-3), 2, bounds=False),
                    shown(times(got, base, "mean_s")),
                    published(said, place, 0),
                    shown(times(got, base, "total_j_per_request")),
                    published(said, place, 2),
                    "-" if said is None else f"{said[place][1]:.2f}",
                ]
            )
    headers = [
        "policy / cache",
        "mean s",
        "rating",
        "kJ",
        "latency to lambda 0",
        "published",
        "energy to lambda 0",
    ]
    return "Table 4\n\n" + table([*headers, "published", "published rating"], rows) + "\n"


def scaled(figures: dict[int, Figures], name: str, factor: float) -> Interval | None:
    return interval(None if v is None else v * factor for v in values(figures, name).values())


def published(said: Sequence[Sequence[float]] | None, place: int, column: int) -> str:
    """Ratio to the published lambda 0 of the same cache."""
    if said is None:
        return "-"
    return f"{said[place][column] / PUBLISHED_4['paper'][place][column]:.2f}"


def cache_bias(found: Found, minutes: int) -> str:
    """Table 5."""
    base, rows = one(found, "paper", "lru:3"), []
    for policy, (hits, latency_s, _, kilojoules) in PUBLISHED_5.items():
        got, zero = one(found, policy, "lru:3"), PUBLISHED_5["paper"]
        rows.append(
            [
                policy,
                without_load(got),
                f"{hits:.1f}",
                shown(times(got, base, "mean_s")),
                f"{latency_s / zero[1]:.2f}",
                shown(times(got, base, "total_j_per_request")),
                f"{kilojoules / zero[3]:.2f}",
                rating(got),
            ]
        )
    headers = [
        "policy / lru:3",
        "hit %",
        "published",
        "latency to lambda 0",
        "published",
        "energy to lambda 0",
    ]
    return "Table 5\n\n" + table([*headers, "published", "rating"], rows) + "\n"


def queues(found: Found, minutes: int) -> str:
    """Table 2's candidates: cache and queue."""
    base, place, rows = one(found, "paper", "none"), 0 if minutes == 40 else 1, []
    for (cache, queue), said in PUBLISHED_2.items():
        got = one(found, "paper", cache, queue)
        rows.append(
            [
                f"{cache}, {queue}",
                shown(mean_of(got, "mean_s"), 0),
                shown(times(got, base, "mean_s")),
                f"{said[place] / PUBLISHED_2['none', 'fifo'][place]:.2f}",
            ]
        )
    return (
        "Table 2\n\n"
        + table(["cache, queue", "mean s", "to no cache, FIFO", "published (Set 1)"], rows)
        + "\n"
    )


if __name__ == "__main__":
    main()
