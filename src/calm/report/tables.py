"""The table people read: a row per setup, every figure the mean over its seeds, with its interval when asked.

A percentile over seeds is the mean of the seeds' percentiles, not the percentile of all rows poured together:
only so has it an interval over seeds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

from calm.errors import BadInput
from calm.records import Record
from calm.report.figures import Figures, figures_of
from calm.report.intervals import Interval, coverage, difference, interval, ratio
from calm.report.records import Setup, Study, Trial
from calm.report.units import joules, seconds, size

UNKNOWN = "-"
Engine = Literal["simulated", "real"]
Format = Callable[[float], str]


class Summary(Record, frozen=True, kw_only=True):
    """One setup on one engine, over its seeds."""

    setup: Setup
    engine: Engine
    label: str
    """What tables and plots call it within its scenario; names the engine where the study has both."""
    seeds: tuple[int, ...]
    requests: int
    """Of all seeds together."""
    meter: str | None
    figures: Mapping[str, Interval]
    """By the name of the field of Figures; what no seed has is absent."""
    model_shares: Mapping[str, float]
    """Mean over seeds, largest first."""


class Comparison(Record, frozen=True, kw_only=True):
    """A setup against the baseline of its scenario, paired by seed."""

    setup: Setup
    engine: Engine
    label: str
    baseline: str
    ratios: Mapping[str, Interval]
    """Candidate over baseline, of what is seconds, joules, bytes or a count: below 1 is less."""
    differences: Mapping[str, Interval]
    """Candidate minus baseline, of what is a share of 1."""


class Table(NamedTuple):
    """For calm.cli.output.print_table or `to_markdown`."""

    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    right: tuple[int, ...]
    """Columns of figures."""


# --- from trials to summaries -------------------------------------------------------------------


def summarise(study: Study) -> list[Summary]:
    """One per setup and engine, in the order the study ran them. Raises BadInput without scipy."""
    groups = grouped(study)
    return [_summary(trials, study.slo_s, _label(trials[0], groups)) for trials in groups]


def grouped(study: Study) -> list[tuple[Trial, ...]]:
    """Trials of equal setup and engine together, by seed; setups in the order of their first trial."""
    groups: dict[tuple[Setup, Engine], list[Trial]] = defaultdict(list)
    for trial in study.trials:
        groups[trial.setup, trial.engine].append(trial)
    return [tuple(sorted(trials, key=lambda trial: trial.seed)) for trials in groups.values()]


def _summary(trials: Sequence[Trial], slo_s: float, label: str) -> Summary:
    figures = [figures_of(trial, slo_s) for trial in trials]
    return Summary(
        setup=trials[0].setup,
        engine=trials[0].engine,
        label=label,
        seeds=tuple(trial.seed for trial in trials),
        requests=sum(figure.requests for figure in figures),
        meter=next((trial.meter for trial in trials if trial.meter), None),
        figures={
            name: found
            for name in FIGURES
            if (found := interval(getattr(figure, name) for figure in figures)) is not None
        },
        model_shares=_mean_shares(figures),
    )


def _mean_shares(figures: Sequence[Figures]) -> dict[str, float]:
    sums: dict[str, float] = defaultdict(float)
    for figure in figures:
        for model, share in figure.model_shares.items():
            sums[model] += share / len(figures)
    return dict(sorted(sums.items(), key=lambda item: (-item[1], item[0])))


def _label(trial: Trial, groups: Iterable[tuple[Trial, ...]]) -> str:
    mixed = len({trials[0].engine for trials in groups}) > 1
    return f"{trial.setup.label} ({trial.engine})" if mixed else trial.setup.label


# --- against a baseline -------------------------------------------------------------------------


def comparison(study: Study, baseline_setup: Setup) -> list[Comparison]:
    """Every other setup against the baseline of its own scenario and engine, paired by seed.

    The baseline's own scenario is ignored, so one setup serves all. A scenario in which it did not run has no
    comparisons. Trials of unequal workloads are paired all the same where their seeds are equal.
    """
    groups = grouped(study)
    bases = {
        (trials[0].setup.scenario, trials[0].engine): trials
        for trials in groups
        if trials[0].setup.label == baseline_setup.label
    }
    found = []
    for trials in groups:
        base = bases.get((trials[0].setup.scenario, trials[0].engine))
        if base is not None and base is not trials:
            found.append(_compared(trials, base, study.slo_s, _label(trials[0], groups)))
    return found


def setup_called(study: Study, label: str) -> Setup:
    """The setup that tables call `label`, as in "paper / lru". Raises BadInput (field `baseline`)."""
    setups = {trial.setup.label: trial.setup for trial in study.trials}
    if label not in setups:
        there = ", ".join(f'"{known}"' for known in setups) or "none"
        raise BadInput(f'no setup is called "{label}"; there are {there}', field="baseline")
    return setups[label]


def _compared(trials: Sequence[Trial], base: Sequence[Trial], slo_s: float, label: str) -> Comparison:
    ours = {trial.seed: figures_of(trial, slo_s) for trial in trials}
    theirs = {trial.seed: figures_of(trial, slo_s) for trial in base}

    def paired(
        how: Callable[[Mapping[int, float | None], Mapping[int, float | None]], Interval | None],
        names: Iterable[str],
    ) -> dict[str, Interval]:
        found = {name: how(_by_seed(ours, name), _by_seed(theirs, name)) for name in names}
        return {name: value for name, value in found.items() if value is not None}

    return Comparison(
        setup=trials[0].setup,
        engine=trials[0].engine,
        label=label,
        baseline=base[0].setup.label,
        ratios=paired(ratio, (name for name in FIGURES if name not in SHARES)),
        differences=paired(difference, (name for name in FIGURES if name in SHARES)),
    )


def _by_seed(figures: Mapping[int, Figures], name: str) -> dict[int, float | None]:
    return {seed: getattr(figure, name) for seed, figure in figures.items()}


# --- figures as text ----------------------------------------------------------------------------


def percent(value: float) -> str:
    return f"{value * 100:.1f} %"


def score(value: float) -> str:
    """Quality, 0..1."""
    return f"{value:.3f}"


def number(value: float) -> str:
    return f"{value:.0f}" if value == round(value) or value >= 100 else f"{value:.1f}"


def rate(value: float) -> str:
    return f"{value:.3g}/s"


class Kind(NamedTuple):
    """How a figure is headed and written."""

    header: str
    format: Format


FIGURES: Mapping[str, Kind] = {
    "completed": Kind("done", percent),
    "mean_s": Kind("mean", seconds),
    "p50_s": Kind("p50", seconds),
    "p90_s": Kind("p90", seconds),
    "p95_s": Kind("p95", seconds),
    "p99_s": Kind("p99", seconds),
    "ttft_mean_s": Kind("TTFT", seconds),
    "ttft_p50_s": Kind("TTFT p50", seconds),
    "ttft_p95_s": Kind("TTFT p95", seconds),
    "queue_mean_s": Kind("queued", seconds),
    "load_mean_s": Kind("waited for loads", seconds),
    "total_j_per_request": Kind("J/request", joules),
    "energy_j_per_request": Kind("attributed J/request", joules),
    "quality": Kind("quality", score),
    "judged_quality": Kind("quality of answers", score),
    "hit_rate": Kind("hit rate", percent),
    "loads": Kind("loads", number),
    "peak_bytes": Kind("peak memory", size),
    "slo_attainment": Kind("SLO", percent),
    "throughput_rps": Kind("throughput", rate),
    "decision_p50_s": Kind("decision p50", seconds),
    "decision_p99_s": Kind("decision p99", seconds),
}
COMPACT = (
    "mean_s", "p50_s", "p90_s", "p95_s", "p99_s", "ttft_mean_s", "total_j_per_request", "quality", "hit_rate",
    "loads", "peak_bytes", "slo_attainment",
)  # fmt: skip
COMPARED = ("mean_s", "p99_s", "ttft_mean_s", "total_j_per_request", "loads")
COMPARED_SHARES = ("quality", "hit_rate", "slo_attainment")
SHARES = frozenset({"completed", "quality", "judged_quality", "hit_rate", "slo_attainment"})
"""Parts of 1, which are compared by their difference; all else by its ratio."""


# --- tables -------------------------------------------------------------------------------------


def to_table(summaries: Sequence[Summary], *, wide: bool = False) -> Table:
    """The compact table, or with `wide` every figure that anybody has, each with its interval.

    The share of completed requests is shown when it is not everywhere 100 %; the column of joules is what the
    ledger attributed where no meter counted the whole; columns that nobody has stay in the compact table,
    so that it looks the same everywhere.
    """
    names = _wide_columns(summaries) if wide else _compact_columns(summaries)
    heads, leading = _leading(summaries)
    rows = tuple(
        (
            *lead,
            *(_cell(summary.figures.get(name), FIGURES[name].format, wide) for name in names),
            _n(summary),
        )
        for lead, summary in zip(leading, summaries, strict=True)
    )
    headers = (*heads, *(FIGURES[name].header for name in names), "n")
    return Table(headers, rows, tuple(range(len(heads), len(headers))))


def comparison_table(comparisons: Sequence[Comparison]) -> Table:
    """Ratios as 0.58 and differences as +0.021 or -1.8 pp (percentage points), each with its interval."""
    kinds = [name for name in COMPARED if any(name in found.ratios for found in comparisons)]
    shares = [name for name in COMPARED_SHARES if any(name in found.differences for found in comparisons)]
    heads, leading = _leading(comparisons)
    rows = tuple(
        (
            *lead,
            *(_cell(found.ratios.get(name), times, True) for name in kinds),
            *(_cell(found.differences.get(name), _change(name), True) for name in shares),
        )
        for lead, found in zip(leading, comparisons, strict=True)
    )
    headers = (*heads, *(FIGURES[name].header for name in (*kinds, *shares)))
    return Table(headers, rows, tuple(range(len(heads), len(headers))))


def to_markdown(table: Table) -> str:
    """A GitHub table, figures to the right."""
    rules = ["---:" if index in table.right else "---" for index in range(len(table.headers))]
    lines = [table.headers, tuple(rules), *table.rows]
    return (
        "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        + "\n"
    )


def remarks(study: Study, summaries: Sequence[Summary]) -> list[str]:
    """What a reader of the table must know, the study's own notes last."""
    return [*_failures(summaries), *_spread(summaries), *_meters(summaries), *_slo(study), *study.notes]


def times(value: float) -> str:
    return f"{value:.2f}"


def signed(value: float) -> str:
    return f"{value:+.3f}"


def points(value: float) -> str:
    return f"{value * 100:+.1f} pp"


def _change(name: str) -> Format:
    """Points of a score, percentage points of a share."""
    return signed if FIGURES[name].format is score else points


def _compact_columns(summaries: Sequence[Summary]) -> list[str]:
    names = list(COMPACT)
    if not _any_has(summaries, "total_j_per_request") and _any_has(summaries, "energy_j_per_request"):
        names[names.index("total_j_per_request")] = "energy_j_per_request"
    lost = any(found.value < 1 for summary in summaries if (found := summary.figures.get("completed")))
    return ["completed", *names] if lost else names


def _wide_columns(summaries: Sequence[Summary]) -> list[str]:
    return [name for name in FIGURES if _any_has(summaries, name)]


def _any_has(summaries: Sequence[Summary], name: str) -> bool:
    return any(name in summary.figures for summary in summaries)


def _leading(
    found: Sequence[Summary] | Sequence[Comparison],
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The scenario stands before the label where there is more than one."""
    if len({one.setup.scenario for one in found}) > 1:
        return ("scenario", "policy / cache"), [(one.setup.scenario, one.label) for one in found]
    return ("policy / cache",), [(one.label,) for one in found]


def _cell(found: Interval | None, written: Format, with_bounds: bool) -> str:
    if found is None:
        return UNKNOWN
    if not with_bounds or found.low is None or found.high is None:
        return written(found.value)
    low, high = _without_unit(written(found.value), written(found.low), written(found.high))
    return f"{written(found.value)} [{low}, {high}]"


def _without_unit(value: str, *bounds: str) -> list[str]:
    """`4.59 s [4.01, 4.86]`: the unit stands once, where it is the same."""
    unit = value[value.index(" ") :] if value.count(" ") == 1 else ""
    same = all(bound.count(" ") == 1 and bound.endswith(unit) for bound in bounds)
    return [bound.removesuffix(unit) if unit and same else bound for bound in bounds]


def _n(summary: Summary) -> str:
    """Requests, and over how many seeds."""
    return f"{summary.requests} / {len(summary.seeds)}"


def _failures(summaries: Sequence[Summary]) -> list[str]:
    lost = [
        f"{summary.label}{_in_scenario(summary)} {percent(1 - found.value)}"
        for summary in summaries
        if (found := summary.figures.get("completed")) and found.value < 1
    ]
    if not lost:
        return []
    return [f"not completed: {', '.join(lost)}; latencies are of the others, quality counts them as 0"]


def _in_scenario(summary: Summary) -> str:
    return f" ({summary.setup.scenario})" if summary.setup.scenario else ""


def _spread(summaries: Sequence[Summary]) -> list[str]:
    fewest = min((len(summary.seeds) for summary in summaries), default=0)
    share = coverage(fewest)
    if fewest and share is None:
        return ["one seed: no intervals; give --seeds 5 or more"]
    if share is None:
        return []
    return [
        f"n: requests / seeds; intervals: 95 % bootstrap over seeds, which with {fewest} seeds hold the true "
        f"mean in about {share * 100:.0f} % of studies"
    ]


def _meters(summaries: Sequence[Summary]) -> list[str]:
    meters = dict.fromkeys(summary.meter for summary in summaries if summary.meter)
    return [f"energy: {', '.join(meters)}"] if meters else ["energy: nothing measured it"]


def _slo(study: Study) -> list[str]:
    return [f"SLO: completed within {seconds(study.slo_s)}"]
