"""Is the simulator true? The same workload on the real engine and in replay, at three loads.

    python -m benchmarks.simulator_truth --profile FILE --answers FILE --data DIR [--out DIR]

`calm profile` makes the profile and the answers on this machine, just before. Then, for each rate, `calm bench` asks
the default fleet the recorded questions through a real server, and `calm replay` simulates the very same trials:
same arrivals, questions, budget, policies, ratings and deadline. What is compared are mean and p95 latency, joules
attributed to a request and hit rate. Trials that are there already are not run again.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.studies import table
from calm.report.figures import Figures, figures_of
from calm.report.files import load_study
from calm.report.records import Setup

FIGURES = (("mean_s", "mean s"), ("p95_s", "p95 s"), ("energy_j_per_request", "J"), ("hit_rate", "hit rate"))
GOAL = 0.15
SLO_S = 30.0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--profile", required=True)
    parser.add_argument("--answers", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--queries", default="domains:pubmedqa,headlines_finance,commonsenseqa")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.2, 0.4, 0.8])
    parser.add_argument("--policies", nargs="+", default=["calm", "random", "fixed:tinyllama-1.1b"])
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--budget", default="1000MB")
    parser.add_argument("--out", type=Path, default=Path("results/truth"))
    options = parser.parse_args()
    rows: list[list[str]] = []
    for rate in options.rates:
        real = run("bench", options, rate, [])
        simulated = run("replay", options, rate, ["--profile", options.profile, "--overload"])
        rows += compared(rate, figures(real), figures(simulated))
    print(
        table(["rate", "policy", *(f"{name}: real, simulated, error" for _, name in FIGURES), "done"], rows)
    )


def run(command: str, options: argparse.Namespace, rate: float, more: Sequence[str]) -> Path:
    """One study by the command line, kept and resumed in its directory."""
    out: Path = options.out / f"{command}-{rate:g}"
    words = [sys.executable, "-m", "calm", command, "--out", str(out), "--rate", f"{rate:g}"]
    for flag in ("data", "queries", "answers", "requests", "seeds", "budget"):
        words += [f"--{flag}", str(getattr(options, flag))]
    for policy in options.policies:
        words += ["--policy", policy]
    words += ["--max-tokens", "64", "--deadline", "120", "--slo", f"{SLO_S:g}", *more]
    subprocess.run(words, check=True, stdout=sys.stderr)
    return out


def figures(path: Path) -> dict[Setup, list[Figures]]:
    found: dict[Setup, list[Figures]] = {}
    for trial in load_study(path).trials:
        found.setdefault(trial.setup, []).append(figures_of(trial, SLO_S))
    return found


def compared(
    rate: float, real: dict[Setup, list[Figures]], simulated: dict[Setup, list[Figures]]
) -> list[list[str]]:
    rows = []
    for setup, found in real.items():
        cells = [cell(mean(found, name), mean(simulated[setup], name)) for name, _ in FIGURES]
        done = f"{100 * (mean(found, 'completed') or 0):.0f} %, {100 * (mean(simulated[setup], 'completed') or 0):.0f} %"
        rows.append([f"{rate:g}", setup.policy, *cells, done])
    return rows


def mean(found: Sequence[Figures], name: str) -> float | None:
    values = [value for figure in found if (value := getattr(figure, name)) is not None]
    return sum(values) / len(values) if values else None


def cell(real: float | None, simulated: float | None) -> str:
    """Both, and how far the simulator is off."""
    if real is None or simulated is None or real == 0:
        return "-"
    error = simulated / real - 1
    mark = "" if abs(error) <= GOAL else " (missed)"
    return f"{real:.3g}, {simulated:.3g}, {100 * error:+.0f} %{mark}"


if __name__ == "__main__":
    main()
