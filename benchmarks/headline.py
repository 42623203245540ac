"""The headline: a fleet of small specialists against its largest model alone, on the real engine, at three loads.

    python -m benchmarks.headline --data DIR [--seeds 3] [--requests 24] [--rates 0.25 0.5 1] [--out results/headline]

Questions of all domains of the shipped specialists, of rows no specialist has learned; arrivals of the 1998 World Cup,
thinned to each rate; a budget that holds half of the bases. Each trial is a CALM server of its own with an empty
knowledge base, asked over HTTP (`calm bench`); trials of all policies are interleaved. The same command goes on where it
stopped. At the end the table, and latency, joules and quality by load as PNG and SVG.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.studies import mean_of, shown, table, times
from calm.report.figures import Figures, figures_of
from calm.report.files import load_study
from calm.report.intervals import Interval
from calm.report.plot_style import LINES, MARKERS, PAGE_IN, new_figure, plain_log, save, styled

QUERIES = "domains:headlines_finance,pubmedqa,medqa,banking77,spider_dev,gsm8k,svamp,squad_dev"
POLICIES = ("calm", "paper", "random", "fixed:tinyllama-1.1b")
LARGEST = POLICIES[-1]
NAMES = {"calm": "CALM", "paper": "the paper's policy", "random": "random", LARGEST: "TinyLlama-1.1B alone"}
FIGURES = (
    ("mean_s", "mean latency, s", 2),
    ("total_j_per_request", "energy, J per request", 2),
    ("quality", "quality, 0 to 1", 3),
)
MORE = (("p95_s", 1), ("slo_attainment", 2), ("completed", 2))
SLO_S = 10.0

BySeed = dict[int, Figures]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.25, 0.5, 1.0])
    parser.add_argument("--policies", nargs="+", default=list(POLICIES))
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--budget", required=True, help="e.g. 700MB: half of what all bases take")
    parser.add_argument("--fleet")
    parser.add_argument("--out", type=Path, default=Path("results/headline"))
    options = parser.parse_args()
    found: dict[float, dict[str, BySeed]] = {}
    for seeds in range(
        1, options.seeds + 1
    ):  # all loads of a seed before the next: an early end is still a study
        for rate in options.rates:
            found[rate] = by_policy(run(options, rate, seeds))
    rows = [row for rate, policies in found.items() for row in rows_of(rate, policies)]
    print(
        table(
            ["requests/s", "policy", *(label for _, label, _ in FIGURES), "p95 s", "in 10 s", "answered",
             "latency to the largest", "joules to it"],
            rows,
        )
    )  # fmt: skip
    print(f"\n{options.requests} requests a trial, {options.seeds} seeds, budget {options.budget}")
    for path in drawn(found, options.out):
        print(path, file=sys.stderr)
    (options.out / "headline.json").write_text(json.dumps(as_json(found), indent=1))


def run(options: argparse.Namespace, rate: float, seeds: int) -> Path:
    """One load's study by the command line, kept and resumed in its directory."""
    out: Path = options.out / f"{rate:g}"
    words = [sys.executable, "-m", "calm", "bench", "--out", str(out), "--rate", f"{rate:g}"]
    words += ["--data", options.data, "--queries", QUERIES, "--split", "held-out", "--arrivals", "worldcup"]
    words += ["--requests", str(options.requests), "--seeds", str(seeds), "--budget", options.budget]
    words += ["--fleet", options.fleet] if options.fleet else []
    for policy in options.policies:
        words += ["--policy", policy]
    words += ["--max-tokens", "128", "--deadline", "120", "--slo", f"{SLO_S:g}"]
    subprocess.run(words, check=True, stdout=sys.stderr)
    return out


def by_policy(path: Path) -> dict[str, BySeed]:
    found: dict[str, BySeed] = {}
    for trial in load_study(path).trials:
        found.setdefault(trial.setup.policy, {})[trial.seed] = figures_of(trial, SLO_S)
    return found


def rows_of(rate: float, policies: Mapping[str, BySeed]) -> list[list[str]]:
    rows = []
    for name, seeds in policies.items():
        cells = [shown(mean_of(seeds, figure), digits) for figure, _, digits in FIGURES]
        cells += [shown(mean_of(seeds, figure), digits, bounds=False) for figure, digits in MORE]
        largest = policies.get(LARGEST)
        cells += [
            shown(times(seeds, largest, figure)) if largest and name != LARGEST else "-"
            for figure in ("mean_s", "total_j_per_request")
        ]
        rows.append([f"{rate:g}", NAMES.get(name, name), *cells])
    return rows


def as_json(found: Mapping[float, Mapping[str, BySeed]]) -> dict[str, object]:
    """Value, low and high of each figure, by rate and policy."""
    return {
        f"{rate:g}": {
            policy: {figure: bounds(mean_of(seeds, figure)) for figure, _, _ in FIGURES}
            for policy, seeds in policies.items()
        }
        for rate, policies in found.items()
    }


def bounds(of: Interval | None) -> list[float | None]:
    return [None, None, None] if of is None else [of.value, of.low, of.high]


def drawn(found: Mapping[float, Mapping[str, BySeed]], out: Path) -> Sequence[Path]:
    """Three panels over the load: latency and joules on log scales, quality on its own from 0."""
    rates = list(found)
    policies = list(dict.fromkeys(name for by in found.values() for name in by))
    with styled():
        figure = new_figure(PAGE_IN, 2.5)
        panels = figure.subplots(1, len(FIGURES))
        for panel, (name, label, _) in zip(panels, FIGURES, strict=True):
            for place, policy in enumerate(policies):
                points = [mean_of(found[rate].get(policy, {}), name) for rate in rates]
                seen = [(rate, point) for rate, point in zip(rates, points, strict=True) if point]
                values = [point.value for _, point in seen]
                panel.plot(
                    [rate for rate, _ in seen], values, color=LINES[place], marker=MARKERS[place],
                    markersize=4, label=NAMES.get(policy, policy), linewidth=2.2 if policy == "calm" else 1.2,
                )  # fmt: skip
                for rate, point in seen:
                    if point.low is not None and point.high is not None:
                        panel.plot([rate, rate], [point.low, point.high], color=LINES[place], linewidth=0.8)
            panel.set_title(label)
            panel.set_xscale("log")
            panel.set_xticks(rates, [f"{rate:g}" for rate in rates])
            panel.minorticks_off()
            panel.set_xlabel("requests per second")
            if name == "quality":
                panel.set_ylim(bottom=0)
            else:
                panel.set_yscale("log")
                plain_log(panel, "y")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(policies))
        return save(figure, out, "headline")


if __name__ == "__main__":
    main()
