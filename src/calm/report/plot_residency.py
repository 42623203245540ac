"""Which model was in memory when, in one trial: a lane per model, over it the load and the memory in use."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from calm.records import Residency
from calm.report.plot_style import (
    BLACK,
    BLUE,
    FAINT,
    GREY,
    LIGHT,
    ORANGE,
    PAGE_IN,
    PURPLE,
    SKY,
    VERMILLION,
    TimeUnit,
    new_figure,
    time_unit,
    titled,
)
from calm.report.records import Move, Row, Trial

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS: Mapping[str, str] = {
    "loading": ORANGE, "ready": SKY, "draining": PURPLE, "unloading": PURPLE, "failed": VERMILLION,
}  # fmt: skip
SERVING = "serving"
LANE_IN = 0.21
FEW_LANES = 14
GB = 1e9


class Span(NamedTuple):
    """A stretch of time in one state."""

    begin_s: float
    end_s: float
    state: str


def draw_residency(trial: Trial, name: str) -> Figure | None:
    """None where nothing is known: no request and no move."""
    from matplotlib.ticker import MaxNLocator

    end_s = max([trial.duration_s, *(move.at_s for move in trial.moves)])
    lanes = residency_spans(trial, end_s)
    if not lanes or end_s <= 0:
        return None
    figure = new_figure(PAGE_IN, _height_in(len(lanes)) + (2.1 if trial.samples else 1.3))
    above = 2 if trial.samples else 1
    *panels, chart = figure.subplots(
        above + 1, 1, sharex=True, height_ratios=[0.8] * above + [_height_in(len(lanes))]
    )
    unit = time_unit(end_s)
    _load_panel(panels[0], trial, end_s, unit)
    if trial.samples:
        _memory_panel(panels[1], trial, unit)
    _lanes_panel(chart, lanes, _busy(trial.rows), unit)
    chart.set_xlim(0, end_s / unit.seconds)
    chart.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10]))
    chart.set_xlabel(f"time since the first arrival ({unit.name})")
    panels[0].yaxis.set_major_locator(MaxNLocator(nbins=2, steps=[1, 2, 5, 10], integer=bool(trial.samples)))
    panels[0].set_title(titled(trial.setup.scenario, f"Residency, {name}, seed {trial.seed}"))
    figure.align_ylabels(panels)
    return figure


def _height_in(lanes: int) -> float:
    return 0.45 + lanes * (LANE_IN if lanes <= FEW_LANES else 0.15)


def residency_spans(trial: Trial, end_s: float) -> dict[str, list[Span]]:
    """States by model, those with most requests first; cold time has no span.

    A model that served without ever moving was in memory throughout, or remote.
    """
    moves: dict[str, list[Move]] = defaultdict(list)
    for move in sorted(trial.moves, key=lambda move: move.at_s):
        moves[move.model].append(move)
    served: dict[str, int] = defaultdict(int)
    for row in trial.rows:
        if row.model is not None:
            served[row.model] += 1
    ranked = sorted(moves.keys() | served.keys(), key=lambda model: (-served[model], model))
    spans = {model: _spans(moves[model], end_s) for model in ranked}
    return {model: found for model, found in spans.items() if found}


def _spans(moves: Sequence[Move], end_s: float) -> list[Span]:
    state: Residency = moves[0].old if moves else "ready"
    spans, since_s = [], 0.0
    for move in moves:
        spans.append(Span(since_s, max(since_s, move.at_s), state))
        state, since_s = move.new, max(since_s, move.at_s)
    spans.append(Span(since_s, end_s, state))
    return [span for span in spans if span.state in COLOURS and span.end_s > span.begin_s]


def _busy(rows: Sequence[Row]) -> dict[str, list[tuple[float, float]]]:
    """When each model worked on at least one request: overlapping answers as one."""
    answers: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: row.arrived_s + row.queue_s + row.load_s):
        if row.model is not None and row.status == "ok":
            begin_s, end_s = row.arrived_s + row.queue_s + row.load_s, row.arrived_s + row.total_s
            spans = answers[row.model]
            if spans and begin_s <= spans[-1][1]:
                spans[-1] = (spans[-1][0], max(end_s, spans[-1][1]))
            else:
                spans.append((begin_s, end_s))
    return answers


def _load_panel(axes: Axes, trial: Trial, end_s: float, unit: TimeUnit) -> None:
    """Queue length at the ticks; where no tick was recorded, arrivals."""
    if trial.samples:
        x = [sample.at_s / unit.seconds for sample in trial.samples]
        waiting = [sample.queue_length for sample in trial.samples]
        axes.fill_between(x, waiting, step="post", color=LIGHT, linewidth=0)
        axes.step(x, waiting, where="post", color=GREY, linewidth=0.8)
        axes.set_ylabel("requests\nwaiting")
    else:
        counts, edges = np.histogram([row.arrived_s for row in trial.rows], bins=60, range=(0, end_s))
        axes.stairs(counts / np.diff(edges), edges / unit.seconds, fill=True, color=LIGHT)
        axes.set_ylabel("arrivals\nper s")
    axes.set_ylim(bottom=0)


def _memory_panel(axes: Axes, trial: Trial, unit: TimeUnit) -> None:
    x = [sample.at_s / unit.seconds for sample in trial.samples]
    used = [sample.used_bytes / GB for sample in trial.samples]
    budget, peak = trial.budget_bytes / GB, trial.peak_bytes / GB
    axes.fill_between(x, used, step="post", color=FAINT, linewidth=0)
    axes.step(x, used, where="post", color=BLACK, linewidth=0.8)
    if budget <= 3 * peak or not peak:
        axes.axhline(budget, color=VERMILLION, linewidth=0.9, dashes=(4, 2))
        words = f"budget {budget:.3g} GB"
    else:
        words = f"budget {budget:.3g} GB, far above"
    axes.annotate(
        words, (1, 1), xycoords="axes fraction", xytext=(0, 1), textcoords="offset points", ha="right", va="bottom",
        fontsize=7, color=VERMILLION,
    )  # fmt: skip
    axes.set_ylim(0, 1.12 * (max(budget, peak) if budget <= 3 * peak or not peak else peak))
    axes.set_ylabel("memory\n(GB)")


def _lanes_panel(
    axes: Axes,
    lanes: Mapping[str, Sequence[Span]],
    busy: Mapping[str, Sequence[tuple[float, float]]],
    unit: TimeUnit,
) -> None:
    for lane, (model, spans) in enumerate(lanes.items()):
        for state in dict.fromkeys(span.state for span in spans):
            bars = [_bar(span.begin_s, span.end_s, unit) for span in spans if span.state == state]
            axes.broken_barh(bars, (lane - 0.38, 0.76), facecolors=COLOURS[state], linewidth=0)
        work = [_bar(begin_s, end_s, unit) for begin_s, end_s in busy.get(model, ())]
        axes.broken_barh(work, (lane - 0.16, 0.32), facecolors=BLUE, linewidth=0)
    axes.set_yticks(range(len(lanes)), list(lanes), fontsize=7 if len(lanes) <= FEW_LANES else 6)
    axes.set_ylim(len(lanes) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    _legend(axes, {span.state for spans in lanes.values() for span in spans})


def _bar(begin_s: float, end_s: float, unit: TimeUnit) -> tuple[float, float]:
    return begin_s / unit.seconds, (end_s - begin_s) / unit.seconds


def _legend(axes: Axes, states: set[str]) -> None:
    from matplotlib.patches import Patch

    words = {
        "loading": "loading",
        "ready": "ready",
        "draining": "leaving",
        "unloading": "leaving",
        "failed": "failed",
    }
    shown = {words[state]: COLOURS[state] for state in COLOURS if state in states} | {SERVING: BLUE}
    axes.legend(
        [Patch(color=colour) for colour in shown.values()], list(shown), loc="lower left", ncols=len(shown),
        bbox_to_anchor=(0, 1.0), borderaxespad=0.2, handlelength=1.2, columnspacing=1.4, borderpad=0.1,
    )  # fmt: skip
