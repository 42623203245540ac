"""What `calm replay` and `calm bench` do alike: what they need, which trials they keep, and how they end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from calm.cli.output import count, note, warn
from calm.cli.study_options import StudyPlan
from calm.errors import BadInput

if TYPE_CHECKING:
    from calm.records import ModelCard
    from calm.report.files import StudyDirectory
    from calm.report.records import Provenance, Setup, Study, Trial
    from calm.settings import Settings
    from calm.workloads.records import WorkloadSpec

EXTRA = ("tomli_w", "scipy", "sqlglot", "matplotlib")


def check_extra() -> None:
    """Raises BadInput: the last trial would be a bad moment to find out."""
    from importlib.util import find_spec

    absent = [name for name in EXTRA if find_spec(name) is None]
    if absent:
        raise BadInput(
            f"a bench needs {', '.join(absent)}: pip install 'calm-orchestrator[bench]'", field="bench"
        )


def cards_of(settings: Settings) -> tuple[Mapping[str, ModelCard], Path]:
    """The fleet and its directory. Raises BadInput when no card is good."""
    from calm.cli.serve import no_fleet
    from calm.registry import load_fleet
    from calm.settings import fleet_dir

    directory = fleet_dir(settings).resolve()
    load = load_fleet(directory)
    for problem in load.problems:
        warn(str(problem))
    if not load.fleet:
        raise BadInput(no_fleet(directory, load), field="fleet")
    return load.fleet, directory


def digest(card: ModelCard) -> str:
    """Short, equal for equal cards."""
    import hashlib

    import msgspec

    return hashlib.sha256(msgspec.json.encode(card, order="deterministic")).hexdigest()[:12]


def workload_conditions(spec: WorkloadSpec) -> dict[str, object]:
    """What a spec says of all trials of a directory: files by name and content, no path of this machine."""
    import msgspec

    plain = {n: v for n, v in msgspec.structs.asdict(spec).items() if n not in ("data", "answers")}
    answers = {} if spec.answers is None else {"answers": named(f"answers:{spec.answers}")}
    return {**plain, "arrivals": named(spec.arrivals), "queries": named(spec.queries), **answers}


def named(spec: str) -> str:
    """A spec as it is; of one that names a file (`csv:/srv/mine.csv`) its last part and what is in it."""
    kind, _, rest = spec.partition(":")
    file, colon, more = rest.partition(":") if kind == "table" else (rest, "", "")
    if not file or not Path(file).is_file():
        return spec
    return f"{kind}:{Path(file).name}{colon}{more} ({short_digest(Path(file).read_bytes())})"


def short_digest(data: bytes) -> str:
    import hashlib

    return hashlib.sha256(data).hexdigest()[:12]


class Keeper:
    """The finished trials of a study: those of earlier runs and those of this one."""

    def __init__(self, plan: StudyPlan, directory: StudyDirectory | None) -> None:
        self._plan = plan
        self._directory = directory
        wanted = [(setup, seed) for setup in plan.setups for seed in plan.seeds]
        self._trials: dict[tuple[Setup, int], Trial] = {
            key: found
            for key in wanted
            if directory is not None and (found := directory.find(*key)) is not None
        }
        self._order = {key: place for place, key in enumerate(wanted)}

    @property
    def trials(self) -> tuple[Trial, ...]:
        """In the order in which setups and seeds were asked for, whatever the order they ran in."""
        return tuple(self._trials[key] for key in sorted(self._trials, key=self._order.__getitem__))

    def keep(self, trial: Trial) -> None:
        """Raises BadInput when the directory cannot be written."""
        if self._directory is not None:
            self._directory.keep(trial)
        self._trials[trial.setup, trial.seed] = trial

    def study(self, title: str, came_from: Provenance, notes: Sequence[str]) -> Study:
        from calm.report.records import Study

        damaged = self._directory.damaged if self._directory else ()
        return Study(
            title=title,
            provenance=came_from,
            slo_s=self._plan.slo_s,
            trials=self.trials,
            notes=(*notes, *damaged),
        )


def interrupted(plan: StudyPlan, finished: int, wanted: int) -> None:
    """What is kept and how to go on."""
    click.echo(err=True)
    if plan.out is None:
        note(f"interrupted after {finished} of {count(wanted, 'trial')}; give --out DIR to be able to resume")
    else:
        note(
            f"interrupted: {finished} of {count(wanted, 'trial')} are kept in {plan.out}; "
            "the same command again runs the others"
        )


def show_study(study: Study, out: Path | None, as_json: bool) -> None:
    from calm.cli.report import show

    show(study, out, as_json)
