"""A study's directory: every trial as it ends, so that an interrupted study goes on where it stopped.

    DIR/trials/calm_lru-3_20-min_seed0.json     one trial, with the fingerprint of the settings it ran under
    DIR/results.json                            written at the end: summaries, provenance, what was run
    DIR/*.png, DIR/*.svg                        plots.py

Trials are written to a temporary file that is then renamed: a trial's file is whole, or it is not there. A
fingerprint stands for whatever makes trials comparable beside setup and seed (workload, fleet, profile, budget,
feedback): a directory never mixes two of them.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TypeVar

import msgspec
import numpy as np

from calm import __version__
from calm.errors import BadInput
from calm.records import Record
from calm.report.figures import Figures, figures_of
from calm.report.records import Provenance, Setup, Study, Trial
from calm.report.tables import Summary, summarise

PARTS_OF_A_CANDIDATE = frozenset({"hindsight"})
"""Policies whose every trial is kept and whose best alone is shown."""
TRIALS = "trials"
RESULTS = "results.json"
CPUINFO = Path("/proc/cpuinfo")
LIBRARIES = ("xllamacpp", "numpy")
T = TypeVar("T")
_ABSOLUTE = re.compile(r"(?<![\w./])/(?:[^\s/'\"]+/)*([^\s/'\"]+)")
"""An absolute path within a word of a command line, also in `--data=/path` and `csv:/path`."""


class Kept(Record, frozen=True, kw_only=True):
    """A trial's file."""

    fingerprint: str
    trial: Trial


class _Key(Record, frozen=True, kw_only=True):
    setup: Setup
    seed: int


class _KeptHead(Record, frozen=True, kw_only=True):
    """As much of a trial's file as says whose it is; the rows are skipped."""

    fingerprint: str
    trial: _Key


class TrialEntry(Record, frozen=True, kw_only=True):
    """A trial in results.json; its rows stay in its file."""

    file: str
    setup: Setup
    seed: int
    engine: str
    workload: str
    budget_bytes: int
    figures: Figures


class Results(Record, frozen=True, kw_only=True):
    """results.json."""

    title: str
    provenance: Provenance
    settings: object
    """What the fingerprint says."""
    slo_s: float
    notes: tuple[str, ...]
    summaries: tuple[Summary, ...]
    trials: tuple[TrialEntry, ...]


class _ResultsHead(Record, frozen=True, kw_only=True):
    title: str
    provenance: Provenance
    slo_s: float
    notes: tuple[str, ...] = ()
    trials: tuple[_Key, ...]


class StudyDirectory:
    """Trials by setup and seed, kept as they end.

    `settings_fingerprint` is any text that is equal for equal settings; that of `fingerprint` lets a refusal
    say what differs. Raises BadInput (field `out`) for a directory that holds trials of other settings.
    `damaged` names the trial files that could not be read: their trials are not found, so they run again and
    replace the file.
    """

    def __init__(self, path: Path, settings_fingerprint: str) -> None:
        self.path = path
        self.fingerprint = settings_fingerprint
        self.damaged: tuple[str, ...] = ()
        self._files: dict[tuple[Setup, int], Path] = {}
        if path.exists() and not path.is_dir():
            raise _wrong(f"{path} is no directory; give --out another name")
        for file in sorted((path / TRIALS).glob("*.json")):
            self._take_in(file)

    @classmethod
    def reopen(cls, path: Path) -> StudyDirectory:
        """With the fingerprint of the trials that are in it; with an empty one where none are."""
        heads = (_decoded(file, _KeptHead) for file in sorted((path / TRIALS).glob("*.json")))
        return cls(path, next((head.fingerprint for head in heads if not isinstance(head, str)), ""))

    def find(self, setup: Setup, seed: int) -> Trial | None:
        """None where the trial has not been run, or its file is damaged."""
        file = self._files.get((setup, seed))
        if file is None:
            return None
        kept = _decoded(file, Kept)
        if not isinstance(kept, str):
            return kept.trial
        self._leave_out(file, kept)
        del self._files[setup, seed]
        return None

    def keep(self, trial: Trial) -> Path:
        """Writes the trial, in place of an earlier one of the same setup and seed; gives its file."""
        file = self._files.get((trial.setup, trial.seed)) or self._free_name(trial)
        _write(file, _encoded(Kept(fingerprint=self.fingerprint, trial=trial)))
        self._files[trial.setup, trial.seed] = file
        return file

    def finish(self, study: Study) -> Path:
        """Writes results.json, and any trial of the study that has no file yet. Raises BadInput without scipy.

        It may be called again when there are more trials, and for a study that was interrupted.
        """
        for trial in study.trials:
            if (trial.setup, trial.seed) not in self._files:
                self.keep(trial)
        file = self.path / RESULTS
        _write(file, msgspec.json.format(_encoded(self.results(study)), indent=1) + b"\n")
        return file

    def results(self, study: Study) -> Results:
        """What `finish` writes; the study's trials must have been kept."""
        return Results(
            title=study.title,
            provenance=study.provenance,
            settings=_settings(self.fingerprint),
            slo_s=study.slo_s,
            notes=study.notes,
            summaries=tuple(summarise(study)),
            trials=tuple(self._entry(trial, study.slo_s) for trial in study.trials),
        )

    def kept(self) -> tuple[tuple[Setup, int], ...]:
        """Setup and seed of every trial that is there."""
        return tuple(self._files)

    def _entry(self, trial: Trial, slo_s: float) -> TrialEntry:
        return TrialEntry(
            file=f"{TRIALS}/{self._files[trial.setup, trial.seed].name}",
            setup=trial.setup,
            seed=trial.seed,
            engine=trial.engine,
            workload=trial.workload,
            budget_bytes=trial.budget_bytes,
            figures=figures_of(trial, slo_s),
        )

    def _take_in(self, file: Path) -> None:
        head = _decoded(file, _KeptHead)
        if isinstance(head, str):
            self._leave_out(file, head)
        elif head.fingerprint != self.fingerprint:
            raise _wrong(
                f"{self.path} holds trials of other settings{differences(head.fingerprint, self.fingerprint)}; "
                "give --out another directory, or the settings of before to resume"
            )
        else:
            self._files[head.trial.setup, head.trial.seed] = file

    def _leave_out(self, file: Path, reason: str) -> None:
        self.damaged += (f"{TRIALS}/{file.name} is damaged and left out ({reason})",)

    def _free_name(self, trial: Trial) -> Path:
        """A second setup whose readable name is the same gets a number."""
        taken = set(self._files.values())
        stem, folder = readable_name(trial.setup), self.path / TRIALS
        names = (
            f"{stem}{suffix}_seed{trial.seed}.json" for suffix in ("", *(f"-{n}" for n in range(2, 1000)))
        )
        return next(folder / name for name in names if folder / name not in taken)


def load_study(path: Path) -> Study:
    """The study in a directory that was finished. Raises BadInput (field `out`) where there is none.

    Trials come in the order they were finished in; those kept since, by a run that was interrupted, come after
    them. A damaged trial is left out and named in the notes.
    """
    head = _decoded(path / RESULTS, _ResultsHead)
    if isinstance(head, str):
        raise _wrong(f"{path / RESULTS}: {head}; run the study's own command to its end, it resumes")
    directory = StudyDirectory.reopen(path)
    listed = [(key.setup, key.seed) for key in head.trials]
    later = [key for key in directory.kept() if key[0].policy not in PARTS_OF_A_CANDIDATE]
    found = {key: directory.find(*key) for key in dict.fromkeys((*listed, *later))}
    missing = [
        f"no file of {setup.label}, seed {seed}" for (setup, seed), trial in found.items() if not trial
    ]
    return Study(
        title=head.title,
        provenance=head.provenance,
        slo_s=head.slo_s,
        trials=tuple(trial for trial in found.values() if trial),
        notes=tuple(dict.fromkeys((*head.notes, *directory.damaged, *missing))),
    )


def fingerprint(settings: Mapping[str, object]) -> str:
    """Canonical JSON, equal for equal settings whatever their order. A file is best named by its digest."""
    return msgspec.json.encode(settings, order="sorted").decode()


def differences(before: str, now: str) -> str:
    """` (rate_rps was 2, is 4)`; nothing where the fingerprints are no settings of `fingerprint`."""
    old, new = _settings(before), _settings(now)
    if not isinstance(old, dict) or not isinstance(new, dict):
        return ""
    changed = [
        f"{name} was {_value(old.get(name))}, is {_value(new.get(name))}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]
    return f" ({'; '.join(changed)})"


def readable_name(setup: Setup) -> str:
    """`calm_lru-3_20-min`: what a file of this setup is called."""
    extras = (setup.goal, setup.queue if setup.queue != "fifo" else None)
    parts = (setup.policy, setup.cache, setup.scenario, *extras)
    slugs = (re.sub(r"[^A-Za-z0-9.]+", "-", part).strip("-.") for part in parts if part)
    return "_".join(slug for slug in slugs if slug)[:150] or "trial"


# --- where figures come from --------------------------------------------------------------------


def provenance(command: str) -> Provenance:
    """Now, here, with this code. `command` is the command line; absolute paths in it lose their directories."""
    return Provenance(
        command=without_paths(command),
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
        commit=commit(),
        machine=machine(),
        versions=versions(),
    )


def without_paths(command: str) -> str:
    """`--data=/srv/sets --out /tmp/a` becomes `--data=sets --out a`."""
    return _ABSOLUTE.sub(r"\1", command)


def commit(package: Path = Path(__file__).parent) -> str | None:
    """The commit of the checkout the code runs from, `-dirty` where tracked files differ; None elsewhere.

    A package that is installed into somebody else's checkout is no part of it, so the file must be tracked.
    """
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    return _git(package, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def machine() -> str:
    """Processor, usable cores and memory in one line, without the host's name."""
    import psutil

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory_gb = psutil.virtual_memory().total / 1e9
    return f"{processor()}, {cores} cores, {memory_gb:.1f} GB, {platform.system()} {platform.machine()}"


def processor(cpuinfo: Path = CPUINFO) -> str:
    """The model name; the architecture where the machine does not say."""
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    named = re.search(r"^model name\s*:\s*(\S.*)$", text, re.MULTILINE)
    name = named.group(1).strip() if named else platform.processor()
    return name if name and name != "unknown" else f"unnamed {platform.machine()} processor"


def versions() -> dict[str, str]:
    """calm, python, the engine and numpy; a library that is not installed is left out."""
    found = {"calm": __version__, "python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return found


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


# --- files --------------------------------------------------------------------------------------


def _decoded(file: Path, kind: type[T]) -> T | str:
    """The record, or why there is none."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=kind)
    except OSError as error:
        return error.strerror or str(error)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        return str(error)


def _encoded(record: Record) -> bytes:
    return msgspec.json.encode(record, enc_hook=_plain)


def _plain(value: object) -> object:
    """numpy's scalars, which come out of statistics, are numbers too."""
    if isinstance(value, np.generic):
        return value.item()
    raise NotImplementedError(f"{type(value).__name__} has no JSON")


def _write(file: Path, data: bytes) -> None:
    """Whole or not at all: a temporary file beside it is renamed. Raises BadInput where it cannot be written."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, prefix=".", suffix=".part", delete=False) as part:
            try:
                part.write(data)
                part.flush()
                os.fsync(part.fileno())
                Path(part.name).chmod(0o644)
                Path(part.name).replace(file)
            except BaseException:
                Path(part.name).unlink(missing_ok=True)
                raise
    except OSError as error:
        raise _wrong(
            f"{file}: {error.strerror or error}; give --out a directory that can be written"
        ) from None


def _settings(text: str) -> object:
    """The settings of a fingerprint, or its text."""
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return text


def _value(value: object) -> str:
    return "not given" if value is None else str(value)


def _wrong(message: str) -> BadInput:
    return BadInput(message, field="out")
