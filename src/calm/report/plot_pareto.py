"""Latency, energy and quality against one another: who is beaten in both, and who is not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from calm.report.intervals import Interval
from calm.report.plot_style import (
    GREY,
    LIGHT,
    PAGE_IN,
    Box,
    Look,
    label_points,
    new_figure,
    plain_log,
    scale_of,
    titled,
)
from calm.report.tables import Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


FRONT = "front"
"""Id of the line through the best, in the SVG too."""


FRONT_BOXES = 25
NAMED = 6
FRONT_NAMED = 8
KEY_COLUMNS = 4
KEY_CHARACTERS = 118
"""Of type and markers that fit side by side under the panels."""


class Measure(NamedTuple):
    """An axis."""

    figure: str
    label: str
    higher_is_better: bool = False


LATENCY = Measure("mean_s", "mean latency (s)")
ENERGY = Measure("total_j_per_request", "energy (J per request)")
ATTRIBUTED = Measure("energy_j_per_request", "attributed energy (J per request)")
QUALITY = Measure("quality", "quality (0 to 1)", higher_is_better=True)


class Point(NamedTuple):
    look: Look
    x: Interval
    y: Interval


def draw_pareto(summaries: Sequence[Summary], looks: Sequence[Look], scenario: str) -> Figure | None:
    """Up to three panels, those whose figures somebody has; None where there is none.

    Up to six setups are named where they stand; of more, those that no other beats (where these are eight or
    fewer), and a key names all. Bars are 95 % intervals over seeds. A grey line joins the setups that no other
    beats in both figures.
    """
    panels = [
        (across, up, points)
        for across, up in _pairs(summaries)
        if (points := _points(summaries, looks, across, up))
    ]
    if not panels:
        return None
    key_rows = math.ceil(len(looks) / _key_columns(looks)) if len(looks) > NAMED else 0
    figure = new_figure(PAGE_IN if len(panels) > 1 else PAGE_IN / 2, 2.75 + 0.17 * key_rows)
    figure.suptitle(
        titled(scenario, "Latency, energy and quality"), x=0.01, ha="left", fontsize=8.5, weight="bold"
    )
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for one, (across, up, points) in zip(axes, panels, strict=True):
        _panel(one, across, up, points)
    if key_rows:
        _key(figure, looks)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for one, (across, up, points) in zip(axes, panels, strict=True):
        named = _best(across, up, points) if key_rows else list(range(len(points)))
        _name_points(one, points, named if len(named) <= FRONT_NAMED else [])
    return figure


def pareto_optimal(
    points: Sequence[tuple[float, float]], *, higher_x: bool = False, higher_y: bool = False
) -> list[int]:
    """Indices of the points that no other point beats or equals in both with one better, by x."""
    signed = [(-x if higher_x else x, -y if higher_y else y) for x, y in points]
    best = [i for i, one in enumerate(signed) if not any(_beats(other, one) for other in signed)]
    return sorted(best, key=lambda i: points[i])


def _beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one[0] <= other[0] and one[1] <= other[1] and one != other


def _pairs(summaries: Sequence[Summary]) -> list[tuple[Measure, Measure]]:
    total = any(ENERGY.figure in summary.figures for summary in summaries)
    energy = ENERGY if total else ATTRIBUTED
    return [(LATENCY, QUALITY), (energy, QUALITY), (LATENCY, energy)]


def _points(summaries: Sequence[Summary], looks: Sequence[Look], across: Measure, up: Measure) -> list[Point]:
    return [
        Point(look, summary.figures[across.figure], summary.figures[up.figure])
        for summary, look in zip(summaries, looks, strict=True)
        if across.figure in summary.figures and up.figure in summary.figures
    ]


def _panel(axes: Axes, across: Measure, up: Measure, points: Sequence[Point]) -> None:
    axes.set_xscale(scale_of([point.x.value for point in points]))
    axes.set_yscale(scale_of([point.y.value for point in points]))
    _front(axes, across, up, points)
    for point in points:
        axes.errorbar(
            point.x.value, point.y.value, xerr=_bar(point.x), yerr=_bar(point.y), fmt=point.look.marker,
            color=point.look.colour, markersize=5, markeredgecolor="white", markeredgewidth=0.5, elinewidth=0.9,
            capsize=0, zorder=3,
        )  # fmt: skip
    axes.margins(0.16)
    axes.autoscale_view()
    for axis, scale in (("x", axes.get_xscale()), ("y", axes.get_yscale())):
        if scale == "log":
            plain_log(axes, axis)  # type: ignore[arg-type]
    axes.set_xlabel(across.label)
    axes.set_ylabel(up.label)
    corner = (0.02, 0.98, "left", "top") if up.higher_is_better else (0.02, 0.02, "left", "bottom")
    arrow = "↖ better" if up.higher_is_better else "↙ better"
    axes.text(
        corner[0],
        corner[1],
        arrow,
        ha=corner[2],
        va=corner[3],
        transform=axes.transAxes,
        fontsize=7,
        color=GREY,
    )


def _front(axes: Axes, across: Measure, up: Measure, points: Sequence[Point]) -> None:
    best = [points[i] for i in _best(across, up, points)]
    if len(best) > 1:
        x, y = [point.x.value for point in best], [point.y.value for point in best]
        axes.plot(x, y, color=LIGHT, linewidth=1, zorder=1, gid=FRONT)


def _best(across: Measure, up: Measure, points: Sequence[Point]) -> list[int]:
    values = [(point.x.value, point.y.value) for point in points]
    return pareto_optimal(values, higher_x=across.higher_is_better, higher_y=up.higher_is_better)


def _bar(found: Interval) -> list[list[float]] | None:
    if found.low is None or found.high is None:
        return None
    return [[max(0.0, found.value - found.low)], [max(0.0, found.high - found.value)]]


def _name_points(axes: Axes, points: Sequence[Point], chosen: Sequence[int]) -> None:
    named = [points[i] for i in chosen]
    obstacles = [box for point in points for box in _boxes(axes, point)]
    label_points(
        axes,
        [(point.x.value, point.y.value) for point in named],
        [point.look.name for point in named],
        [*obstacles, *_words(axes), *_front_boxes(axes)],
    )


def _key_columns(looks: Sequence[Look]) -> int:
    longest = max(len(look.name) for look in looks) + 6
    return max(1, min(KEY_COLUMNS, KEY_CHARACTERS // longest))


def _key(figure: Figure, looks: Sequence[Look]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D(
            [], [], color=look.colour, marker=look.marker, linestyle="", markersize=5, markeredgecolor="white"
        )
        for look in looks
    ]
    figure.legend(
        handles, [look.name for look in looks], loc="outside lower center", ncols=_key_columns(looks), handletextpad=0.2,
        columnspacing=1.2,
    )  # fmt: skip


def _boxes(axes: Axes, point: Point) -> list[Box]:
    """The marker and the two bars."""
    x, y = axes.transData.transform((point.x.value, point.y.value))
    half = 3.2 * axes.figure.dpi / 72
    boxes = [Box(x - half, y - half, x + half, y + half)]
    if point.x.low is not None and point.x.high is not None:
        left, right = (
            axes.transData.transform((end, point.y.value))[0] for end in (point.x.low, point.x.high)
        )
        boxes.append(Box(left, y - 1.5, right, y + 1.5))
    if point.y.low is not None and point.y.high is not None:
        low, high = (axes.transData.transform((point.x.value, end))[1] for end in (point.y.low, point.y.high))
        boxes.append(Box(x - 1.5, low, x + 1.5, high))
    return boxes


def _front_boxes(axes: Axes) -> list[Box]:
    """The line through the best as a row of small boxes."""
    boxes = []
    for line in axes.get_lines():
        if line.get_gid() == FRONT:
            pixels = axes.transData.transform(line.get_xydata())
            for (x0, y0), (x1, y1) in pairwise(pixels):
                for part in np.linspace(0, 1, FRONT_BOXES):
                    x, y = x0 + part * (x1 - x0), y0 + part * (y1 - y0)
                    boxes.append(Box(x - 3, y - 3, x + 3, y + 3))
    return boxes


def _words(axes: Axes) -> list[Box]:
    return [Box(*text.get_window_extent().extents) for text in axes.texts]
