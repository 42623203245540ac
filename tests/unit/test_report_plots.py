"""Plots: drawn for whatever a study has, without a warning, the same again, and with text that stays text."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.report_study import make_study, make_trial, study_of

from calm.report.figures import quality_of
from calm.report.plot_adaptation import draw_adaptation, ranked_models, window_edges, windows
from calm.report.plot_latency import answered_within, draw_latency
from calm.report.plot_pareto import draw_pareto, pareto_optimal
from calm.report.plot_residency import draw_residency, residency_spans
from calm.report.plot_style import Box, label_points, looks, names, new_figure, styled, time_unit, tint
from calm.report.plots import draw_all
from calm.report.records import Move, Setup, Study
from calm.report.tables import grouped, summarise

POINTS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=12)


@pytest.fixture
def style() -> Iterator[None]:
    with styled():
        yield


def test_a_study_is_drawn_as_png_and_svg_and_the_same_again(tmp_path: Path) -> None:
    study = make_study(policies=("calm", "round-robin"), scenarios=("20 min",), seeds=2, requests=60)
    first = draw_all(study, tmp_path / "one")
    names_ = [path.name for path in first]
    assert names_ == [
        f"{kind}_20-min.{ending}"
        for kind in ("pareto", "latency", "adaptation", "residency")
        for ending in ("png", "svg")
    ]
    second = draw_all(study, tmp_path / "two")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    picture = (tmp_path / "one" / "pareto_20-min.svg").read_text()
    assert ">round-robin</text>" in picture
    assert "mean latency (s)" in picture
    assert "<dc:date>" not in picture


def test_drawing_leaves_matplotlibs_settings_as_they_were(style: None) -> None:
    import matplotlib as mpl

    with styled():
        assert mpl.rcParams["svg.fonttype"] == "none"
        mpl.rcParams["font.size"] = 40
    assert mpl.rcParams["font.size"] == 8


STUDIES: dict[str, partial[Study]] = {
    "one setup": partial(make_study, policies=("calm",), seeds=1, requests=60, energy=False),
    "a single request": partial(make_study, policies=("calm",), seeds=1, requests=1),
    "few rows, no quality": partial(make_study, seeds=2, requests=6, quality=False, failures=0.4),
    "no samples": partial(make_study, policies=("calm",), seeds=2, requests=60, samples=False),
    "twelve setups": partial(
        make_study,
        policies=("calm", "random", "oracle", "paper:latency:0.3"), caches=("lru:2", "none", "calm"), requests=50
    ),
    "forty setups": partial(make_study, policies=[f"paper:energy:{i / 40:.3f}" for i in range(40)], seeds=1, requests=4),
    "forty models": partial(
        make_study,
        policies=("calm", "round-robin"), models=[f"expert-{i}" for i in range(40)], seeds=1, requests=90
    ),
    "everything failed": partial(make_study, policies=("calm", "random"), seeds=2, requests=90, failures=1.1),
    "no request": partial(make_study, policies=("calm",), seeds=1, requests=0),
}  # fmt: skip


@pytest.mark.parametrize("name", STUDIES)
def test_every_figure_bears_every_study(name: str, style: None) -> None:
    """Layout with warnings as errors; what has no data is not drawn."""
    study = STUDIES[name]()
    groups = grouped(study)
    seen = looks(groups)
    figures = [
        draw_pareto(summarise(study), seen, "20 min"),
        draw_latency(groups, seen, study.slo_s, "20 min"),
        draw_adaptation(groups, seen, ranked_models(groups), "20 min"),
        *(draw_residency(trials[0], "it") for trials in groups[:1]),
    ]
    for figure in figures:
        if figure is not None:
            figure.draw_without_rendering()
    drawn = [figure is not None for figure in figures]
    assert drawn[1] == any(row.status == "ok" for trial in study.trials for row in trial.rows)
    assert drawn[3] == (name != "no request")


def test_a_study_without_trials_has_no_pictures(tmp_path: Path) -> None:
    assert draw_all(study_of([]), tmp_path) == []


# --- who is who -----------------------------------------------------------------------------------


def test_a_policy_keeps_its_colour_over_caches_and_scenarios() -> None:
    study = make_study(caches=("lru", "none"), scenarios=("a", "b"), seeds=1, requests=2)
    groups = grouped(study)
    seen = looks(groups)
    by_policy = {trials[0].setup.policy: look.colour for trials, look in zip(groups, seen, strict=True)}
    assert all(by_policy[t[0].setup.policy] == look.colour for t, look in zip(groups, seen, strict=True))
    assert len(set(by_policy.values())) == 4
    within = [look for trials, look in zip(groups, seen, strict=True) if trials[0].setup.scenario == "a"]
    assert len({(look.colour, look.marker, look.dashes) for look in within}) == 8


def test_ours_has_the_same_colour_wherever_it_stands() -> None:
    orders = (("calm", "random"), ("random", "calm"))
    colours = [
        {look.name: look.colour for look in looks(grouped(make_study(policies=order, seeds=1, requests=1)))}
        for order in orders
    ]
    assert colours[0]["calm"] == colours[1]["calm"]


def test_names_leave_out_what_all_share() -> None:
    setups = [Setup(policy="calm", cache="lru"), Setup(policy="random", cache="lru")]
    trials = [make_trial(setup, 0, requests=1) for setup in setups]
    assert names(trials) == ["calm", "random"]
    other = make_trial(Setup(policy="calm", cache="none", goal="energy"), 0, requests=1)
    assert names([trials[0], other]) == ["lru", "none (energy)"]
    assert names([*trials, other]) == ["calm / lru", "random / lru", "calm / none (energy)"]


def test_a_tint_is_between_the_colour_and_white() -> None:
    assert tint("#000000", 0.0) == "#000000"
    assert tint("#0072b2", 1.0) == "#ffffff"


@pytest.mark.parametrize(("longest_s", "unit"), [(60, "s"), (600, "min"), (86400, "h")])
def test_time_is_in_a_readable_unit(longest_s: float, unit: str) -> None:
    assert time_unit(longest_s).name == unit


def test_labels_of_neighbours_do_not_cover_one_another(style: None) -> None:
    figure = new_figure(3.5, 2.5)
    axes = figure.subplots()
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    points = [(0.5, 0.5), (0.52, 0.5), (0.5, 0.53), (0.95, 0.95)]
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    notes = label_points(axes, points, ["one setup", "another setup", "a third", "in the corner"], [])
    boxes = [Box(*note.get_window_extent().extents) for note in notes]
    frame = Box(*axes.get_window_extent().extents)
    assert all(a.overlap(b) < 1 for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(box.overlap(frame) > 0.99 * box.area for box in boxes)


# --- what is computed for a picture ----------------------------------------------------------------


@given(POINTS)
def test_nothing_on_the_front_is_beaten_and_all_else_is(points: list[tuple[int, int]]) -> None:
    front = pareto_optimal([(float(x), float(y)) for x, y in points], higher_y=True)

    def beaten(one: tuple[int, int]) -> bool:
        return any(x <= one[0] and y >= one[1] and (x, y) != one for x, y in points)

    assert front
    assert {i for i in range(len(points)) if not beaten(points[i])} == set(front)
    assert [points[i] for i in front] == sorted(points[i] for i in front)


def test_a_curve_ends_at_the_share_that_was_answered() -> None:
    rows = make_trial(Setup(policy="calm", cache="lru"), 0, requests=2000, failures=0.25).rows
    curve = answered_within(rows)
    assert curve is not None
    x, y = curve
    assert len(x) == len(y) <= 401
    assert y[0] == 0
    assert y[-1] == sum(row.status == "ok" for row in rows) / len(rows)
    assert list(y) == sorted(y)


def test_residency_follows_the_moves() -> None:
    moves = (
        Move(at_s=2, model="a", old="ready", new="draining"),
        Move(at_s=3, model="a", old="draining", new="cold"),
        Move(at_s=4, model="b", old="cold", new="loading"),
        Move(at_s=6, model="b", old="loading", new="ready"),
    )
    trial = make_trial(Setup(policy="fixed:smollm2-135m", cache="lru"), 0, requests=3)
    spans = residency_spans(msgspec.structs.replace(trial, moves=moves), 10)
    assert [tuple(span) for span in spans["a"]] == [(0.0, 2, "ready"), (2, 3, "draining")]
    assert [tuple(span) for span in spans["b"]] == [(4, 6, "loading"), (6, 10, "ready")]
    assert [tuple(span) for span in spans["smollm2-135m"]] == [(0.0, 10, "ready")]
    assert next(iter(spans)) == "smollm2-135m"


def test_windows_hold_every_request_up_to_the_shortest_trials_end() -> None:
    study = make_study(policies=("calm",), seeds=3, requests=100)
    groups = grouped(study)
    edges = window_edges(groups)
    assert edges is not None
    assert edges[-1] == min(trial.rows[-1].arrived_s for trial in study.trials)
    rows = [row for trial in study.trials for row in trial.rows if row.arrived_s <= edges[-1]]
    whole = windows(rows, [edges[0], edges[-1]])[0]
    assert whole.quality == quality_of(rows)
    assert sum(whole.shares.values()) == pytest.approx(1)
    assert len(windows(rows, edges)) == len(edges) - 1
