"""How latency is distributed: the share of all requests that were answered within x seconds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from calm.report.plot_style import GREY, PAGE_IN, Group, Look, first_few, new_figure, plain_log, titled
from calm.report.records import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STEPS = 400
"""A curve of more points than this looks the same and makes a large file."""
LEAST_S = 1e-3
Curve = tuple[NDArray[np.float64], NDArray[np.float64]]


def draw_latency(
    groups: Sequence[Group], looks: Sequence[Look], slo_s: float, scenario: str
) -> Figure | None:
    """Rows of all seeds together. A request that failed is never answered: its curve ends below 1."""
    groups, title = first_few(groups, "Total latency")
    curves = [
        (look, curve)
        for trials, look in zip(groups, looks, strict=False)
        if (curve := answered_within([row for trial in trials for row in trial.rows])) is not None
    ]
    if not curves:
        return None
    figure = new_figure(PAGE_IN * 0.75, 2.7)
    axes = figure.subplots()
    for look, (x, y) in curves:
        axes.step(x, y, where="post", color=look.colour, dashes=look.dashes or (None, None), label=look.name)
    _frame(axes, slo_s, titled(scenario, title))
    for look, (x, y) in curves:
        if y[-1] < 1:  # never more than this: the line goes on to the edge
            axes.hlines(y[-1], x[-1], axes.get_xlim()[1], color=look.colour, linewidth=0.7)
    if len(curves) > 1:
        _legend(figure, axes, [curve for _, curve in curves])
    return figure


def _legend(figure: Figure, axes: Axes, curves: Sequence[Curve]) -> None:
    lines = axes.get_lines()[: len(curves)]
    order = sorted(range(len(curves)), key=lambda i: _median(curves[i]))
    figure.legend(
        [lines[i] for i in order], [str(lines[i].get_label()) for i in order], title="by median, fastest first",
        loc="outside right center", handlelength=2.4, borderpad=0.8, alignment="left", title_fontsize=7.5,
    )  # fmt: skip


def answered_within(rows: Sequence[Row]) -> Curve | None:
    """Seconds, and the share of all rows answered by then; None where none was answered."""
    total_s = np.sort([max(row.total_s, LEAST_S) for row in rows if row.status == "ok"])
    if not total_s.size:
        return None
    ranks = np.unique(np.linspace(0, total_s.size - 1, min(STEPS, total_s.size)).round().astype(int))
    shares = (ranks + 1) / len(rows)
    return np.concatenate(([total_s[0]], total_s[ranks])), np.concatenate(([0.0], shares))


def _median(curve: Curve) -> float:
    x, y = curve
    return float(x[np.searchsorted(y, 0.5)]) if y[-1] >= 0.5 else float("inf")


def _frame(axes: Axes, slo_s: float, title: str) -> None:
    axes.set_xscale("log")
    axes.axvline(slo_s, color=GREY, linewidth=0.8, dashes=(2, 2), zorder=1)
    axes.set_ylim(0, 1.02)
    low_s, high_s = axes.get_xlim()
    axes.set_xlim(min(low_s, slo_s / 2), max(high_s, 2.2 * slo_s))
    axes.text(slo_s, 0.03, f" SLO {slo_s:g} s", color=GREY, fontsize=7, ha="left", va="bottom")
    plain_log(axes, "x")
    axes.set_xlabel("total latency (s)")
    axes.set_ylabel("share of requests answered")
    axes.set_title(title)
