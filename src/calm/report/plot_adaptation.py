"""How a policy changes while it runs: who is asked, how good the answers are, how long they take, by window."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from calm.report.figures import percentile, quality_of
from calm.report.plot_style import (
    LIGHT,
    PAGE_IN,
    Group,
    Look,
    TimeUnit,
    first_few,
    model_colours,
    new_figure,
    plain_log,
    scale_of,
    time_unit,
    titled,
)
from calm.report.records import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROWS_PER_WINDOW = 40
MOST_WINDOWS = 24
COLUMNS = 4
NAMED = 7
REST = "other models"
TITLE_LETTERS = 22
"""As many fit over a column in full size."""


class Window(NamedTuple):
    """The requests that arrived in one stretch of time, of all seeds."""

    shares: dict[str, float]
    quality: float | None
    p50_s: float | None
    p95_s: float | None


class Course(NamedTuple):
    """One setup over time."""

    look: Look
    windows: list[Window]


def draw_adaptation(
    groups: Sequence[Group], looks: Sequence[Look], models: Sequence[str], scenario: str
) -> Figure | None:
    """A column per setup, four to a row; None where there are too few requests for two windows.

    Beyond twelve setups the first twelve are drawn, and the title says so.

    `models` in the order of their colours: what comes after the seventh is drawn as the rest.
    """
    groups, title = first_few(groups, "Adaptation over time")
    edges = window_edges(groups)
    if edges is None:
        return None
    pooled = [[row for trial in trials for row in trial.rows] for trials in groups]
    courses = [Course(look, windows(rows, edges)) for rows, look in zip(pooled, looks, strict=False)]
    blocks = math.ceil(len(courses) / COLUMNS)
    columns = min(COLUMNS, len(courses))
    figure = new_figure(PAGE_IN if columns > 1 else PAGE_IN / 2 + 0.8, 0.6 + 3.5 * blocks)
    grid = figure.subplots(
        3 * blocks, columns, squeeze=False, sharex=True, sharey=False, height_ratios=(1.5, 1, 1) * blocks
    )
    unit = time_unit(edges[-1])
    for number, course in enumerate(courses):
        block, column = divmod(number, columns)
        _course(
            [grid[3 * block + row][column] for row in range(3)],
            course,
            models,
            np.array(edges) / unit.seconds,
        )
    _tidy(grid, courses, unit)
    _legend(figure, models)
    figure.suptitle(titled(scenario, title), x=0.01, ha="left", fontsize=8.5, weight="bold")
    return figure


def window_edges(groups: Sequence[Group]) -> list[float] | None:
    """Equal windows, wide enough to hold some 40 requests each, up to the last arrival of the shortest trial.

    What came later is left out: there only some of the seeds would speak.
    """
    lasts_s = [
        max(row.arrived_s for row in trial.rows) for trials in groups for trial in trials if trial.rows
    ]
    fewest = min((sum(len(trial.rows) for trial in trials) for trials in groups), default=0)
    count = min(MOST_WINDOWS, fewest // ROWS_PER_WINDOW)
    if count < 2 or min(lasts_s) <= 0:
        return None
    return [float(edge) for edge in np.linspace(0, min(lasts_s), count + 1)]


def windows(rows: Sequence[Row], edges: Sequence[float]) -> list[Window]:
    """The last window includes its end; what arrived after it is in none."""
    held: list[list[Row]] = [[] for _ in edges[1:]]
    for row in rows:
        if edges[0] <= row.arrived_s <= edges[-1]:
            held[min(bisect_right(edges, row.arrived_s), len(held)) - 1].append(row)
    return [_window(some) for some in held]


def _window(rows: Sequence[Row]) -> Window:
    counts = Counter(row.model for row in rows if row.model is not None)
    total_s = [row.total_s for row in rows if row.status == "ok"]
    return Window(
        shares={model: count / len(rows) for model, count in counts.items()},
        quality=quality_of(rows),
        p50_s=percentile(total_s, 50),
        p95_s=percentile(total_s, 95),
    )


def ranked_models(groups: Sequence[Group]) -> list[str]:
    """By requests over the whole study, so that a colour means the same model in every figure of it."""
    counts = Counter(
        row.model for trials in groups for trial in trials for row in trial.rows if row.model is not None
    )
    return [model for model, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]


def _course(axes: Sequence[Axes], course: Course, models: Sequence[str], edges: np.ndarray) -> None:
    shares, quality, latency = axes
    _areas(shares, course.windows, models, edges)
    shares.set_title(course.look.name, fontsize=min(8.0, 8.0 * TITLE_LETTERS / len(course.look.name)))
    middles = (edges[:-1] + edges[1:]) / 2
    colour = course.look.colour
    quality.plot(middles, _line([window.quality for window in course.windows]), color=colour)
    latency.plot(middles, _line([window.p50_s for window in course.windows]), color=colour)
    latency.plot(
        middles,
        _line([window.p95_s for window in course.windows]),
        color=colour,
        linewidth=0.8,
        dashes=(3, 1.2),
    )


def _areas(axes: Axes, found: Sequence[Window], models: Sequence[str], edges: np.ndarray) -> None:
    colours = model_colours(models[:NAMED])
    layers = [[window.shares.get(model, 0.0) for window in found] for model in colours]
    if len(models) > NAMED:
        layers.append([sum(window.shares.get(model, 0.0) for model in models[NAMED:]) for window in found])
    base = np.zeros(len(found))
    for layer, colour in zip(layers, [*colours.values(), LIGHT], strict=False):
        top = base + layer
        axes.stairs(top, edges, baseline=base, fill=True, color=colour, linewidth=0)
        base = top
    axes.set_ylim(0, 1)
    axes.grid(visible=False)


def _line(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]


def _tidy(grid: np.ndarray, courses: Sequence[Course], unit: TimeUnit) -> None:
    """Equal scales along each kind of panel, labels on the outer axes only."""
    columns = grid.shape[1]
    p95s = [
        value
        for course in courses
        for window in course.windows
        for value in (window.p50_s, window.p95_s)
        if value
    ]
    for row, panels in enumerate(grid):
        for column, axes in enumerate(panels):
            number = row // 3 * columns + column
            if number >= len(courses):
                axes.set_axis_off()
                continue
            axes.set_xlim(left=0)
            _scale(axes, row % 3, p95s)
            if column:
                axes.tick_params(labelleft=False)
            below = number + columns >= len(courses)
            if row % 3 == 2:
                axes.tick_params(labelbottom=True)
                if below:
                    axes.set_xlabel(f"time ({unit.name})")
    for row in range(grid.shape[0]):
        grid[row][0].set_ylabel(("share of\nrequests", "quality", "p50, p95\nlatency (s)")[row % 3])


def _scale(axes: Axes, kind: int, latencies: Sequence[float]) -> None:
    if kind == 1:
        axes.set_ylim(0, 1)
    if kind == 2 and latencies:
        log = scale_of(latencies, ratio=20) == "log"
        axes.set_yscale("log" if log else "linear")
        axes.set_ylim(min(latencies) * 0.8 if log else 0, max(latencies) * (1.25 if log else 1.05))
        if log:
            plain_log(axes, "y")


def _legend(figure: Figure, models: Sequence[str]) -> None:
    from matplotlib.patches import Patch

    shown = model_colours(models[:NAMED]) | ({REST: LIGHT} if len(models) > NAMED else {})
    figure.legend(
        [Patch(color=colour) for colour in shown.values()], list(shown), loc="outside lower center",
        ncols=min(4, len(shown)), handlelength=1.2, columnspacing=1.4,
    )  # fmt: skip
