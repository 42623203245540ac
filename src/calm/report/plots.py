"""The pictures of a study, as PNG and SVG: what they show stands in the modules beside this one.

plot_pareto.py       latency, energy and quality against one another
plot_latency.py      share of requests answered within x seconds
plot_residency.py    which model was in memory when, in one trial
plot_adaptation.py   models asked, quality and latency over time
plot_style.py        colours, type, units, labels, files
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from calm.report.plot_adaptation import draw_adaptation, ranked_models
from calm.report.plot_latency import draw_latency
from calm.report.plot_pareto import draw_pareto
from calm.report.plot_residency import draw_residency
from calm.report.plot_style import OURS, Group, Look, looks, save, scenarios, styled
from calm.report.records import Study, Trial
from calm.report.tables import Summary, grouped, summarise

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_all(study: Study, directory: Path) -> list[Path]:
    """Draws every figure that the study has data for, one of each kind per scenario; gives the files.

    Equal studies give equal files. Raises BadInput where matplotlib or scipy is not installed.
    """
    groups, summaries = grouped(study), summarise(study)
    seen, models = looks(groups), ranked_models(groups)
    paths: list[Path] = []
    with styled():
        for scenario in scenarios(groups):
            chosen = [i for i, trials in enumerate(groups) if trials[0].setup.scenario == scenario]
            figures = _figures(
                [groups[i] for i in chosen],
                [seen[i] for i in chosen],
                [summaries[i] for i in chosen],
                models,
                study.slo_s,
            )
            for name, figure in figures:
                if figure is not None:
                    paths += save(figure, directory, _file_name(name, scenario))
    return paths


def _figures(
    groups: Sequence[Group],
    seen: Sequence[Look],
    summaries: Sequence[Summary],
    models: Sequence[str],
    slo_s: float,
) -> Iterator[tuple[str, Figure | None]]:
    scenario = groups[0][0].setup.scenario
    yield "pareto", draw_pareto(summaries, seen, scenario)
    yield "latency", draw_latency(groups, seen, slo_s, scenario)
    yield "adaptation", draw_adaptation(groups, seen, models, scenario)
    trial = _shown(groups)
    yield "residency", draw_residency(trial, trial.setup.label)


def _shown(groups: Sequence[Group]) -> Trial:
    """Our policy's first trial in which models moved; else any policy's; else the first trial."""
    firsts = [trials[0] for trials in groups]
    return min(firsts, key=lambda trial: (not trial.moves, trial.setup.policy != OURS))


def _file_name(kind: str, scenario: str) -> str:
    slug = re.sub(r"[^A-Za-z0-9.]+", "-", scenario).strip("-.")
    return f"{kind}_{slug}" if slug else kind
