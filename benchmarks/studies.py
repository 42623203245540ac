"""What the experiments share: run the trials of many setups with progress, kept and resumed, and compare them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from rich.progress import track

from calm.ports import Embedder
from calm.records import Vector
from calm.replay.house import House
from calm.replay.study import jobs_of, run_jobs
from calm.report.figures import Figures, figures_of
from calm.report.files import StudyDirectory, provenance
from calm.report.intervals import Interval, difference, interval, ratio
from calm.report.records import Setup, Study
from calm.workloads.records import WorkloadSpec
from calm.workloads.workload import open_source

SLO_S = 60.0


class EmbeddedOnce:
    """An embedder whose answers for some texts are known already, so that no process has to find them again.

    Picklable: `make` builds the real one where a text turns up that is not known.
    """

    def __init__(self, make: Callable[[], Embedder], known: Mapping[str, Vector]) -> None:
        self._make = make
        self._known = dict(known)
        self._inner: Embedder | None = None
        self.name, self.dimensions = "minilm", len(next(iter(known.values())))

    def embed(self, text: str) -> Vector:
        found = self._known.get(text)
        if found is None:
            self._inner = self._inner or self._make()
            found = self._known[text] = self._inner.embed(text)
        return found


def embedded_once(make: Callable[[], Embedder], texts: Iterable[str], keep: Path) -> Callable[[], Embedder]:
    """Embeds the texts that `keep` (.npz) lacks, with progress, and gives what makes the embedder."""
    known: dict[str, Vector] = {}
    if keep.exists():
        with np.load(keep) as stored:
            known = dict(zip(stored["texts"].tolist(), stored["vectors"], strict=True))
    missing = [text for text in dict.fromkeys(texts) if text not in known]
    if missing:
        inner = make()
        for text in track(missing, description="embedding the questions", transient=True):
            known[text] = inner.embed(text)
        keep.parent.mkdir(parents=True, exist_ok=True)
        np.savez(keep, texts=np.array(list(known)), vectors=np.array(list(known.values())))
    return partial(EmbeddedOnce, make, known)


def replayed(
    title: str,
    setups: Sequence[Setup],
    seeds: int,
    house: House,
    spec: WorkloadSpec,
    out: Path,
    settings: str,
    warm_start: int = 0,
) -> Study:
    """All setups on all seeds of one workload, from `out` where they are there already.

    `warm_start`: rated requests of other seeds before each trial that are not counted.
    """
    directory = StudyDirectory(out, settings)
    jobs = jobs_of(setups, range(seeds))
    todo = [job for job in jobs if directory.find(*job) is None]
    source = open_source(spec, list(house.fleet))
    done = run_jobs(todo, house, source.workload, os.cpu_count() or 1, warm_start)
    for trial in track(done, description=title, total=len(todo), transient=True):
        directory.keep(trial)
    trials = [found for job in jobs if (found := directory.find(*job)) is not None]
    study = Study(
        title=title, provenance=provenance(title), slo_s=SLO_S, trials=tuple(trials), notes=source.notes
    )
    directory.finish(study)
    return study


def by_setup(study: Study) -> dict[Setup, dict[int, Figures]]:
    """Figures of each seed, by setup in the study's order."""
    found: dict[Setup, dict[int, Figures]] = {}
    for trial in study.trials:
        found.setdefault(trial.setup, {})[trial.seed] = figures_of(trial, study.slo_s)
    return found


def values(figures: Mapping[int, Figures], name: str) -> dict[int, float | None]:
    return {seed: getattr(figure, name) for seed, figure in figures.items()}


def mean_of(figures: Mapping[int, Figures], name: str) -> Interval | None:
    return interval(values(figures, name).values())


def times(candidate: Mapping[int, Figures], baseline: Mapping[int, Figures], name: str) -> Interval | None:
    return ratio(values(candidate, name), values(baseline, name))


def more(candidate: Mapping[int, Figures], baseline: Mapping[int, Figures], name: str) -> Interval | None:
    return difference(values(candidate, name), values(baseline, name))


def shown(found: Interval | None, digits: int = 2, *, bounds: bool = True) -> str:
    """0.61 (0.58-0.64)"""
    if found is None:
        return "-"
    text = f"{found.value:.{digits}f}"
    if not bounds or found.low is None or found.high is None:
        return text
    return f"{text} ({found.low:.{digits}f} to {found.high:.{digits}f})"


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
