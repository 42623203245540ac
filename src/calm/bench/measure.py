"""`calm profile`: every model of a fleet on the real engine of this machine, one result at a time.

    1. each model alone      loads, prompts, decoding, questions, power     -> its entry    (measure_engine.py)
    2. several at once       what each loses by the others                  -> contention   (measure_company.py)
    3. queries of a workload answered and judged, where they are given      -> lengths, quality, answers file

After every step the profile so far is handed to `keep`, so that an interruption loses one model at most. A model
that fails is named and left out; the others go on.
"""

from __future__ import annotations

import asyncio
import platform
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from msgspec.structs import replace

from calm import settings as configuration
from calm.backends.command import CommandBackend
from calm.backends.llamacpp import LlamaCppBackend
from calm.backends.onnx import OnnxBackend
from calm.backends.remote import RemoteBackend
from calm.backends.upstream import HttpUpstream
from calm.bench.measure_answers import AnswerBook, Asking, ask_model, with_answers
from calm.bench.measure_company import factors, ratios_of
from calm.bench.measure_engine import Laboratory, Watch, time_model, together
from calm.bench.measure_figures import figures
from calm.bench.measure_plan import Effort, answers_s, company_plan, company_s, lanes, timing_s
from calm.errors import BadInput, CalmError
from calm.execute.hosting import adapter_bytes
from calm.execute.sizing import estimate_bytes, size_fleet
from calm.meters.choose import MeterSettings, probe
from calm.meters.processes import PROC
from calm.meters.tdp import processor_name
from calm.monitor.resources import Resources
from calm.profile import MachineProfile, ModelProfile, Profile, problems
from calm.records import ModelCard
from calm.settings import Settings
from calm.sources.fetch import cached_path
from calm.wiring import runtime_directory, with_threads

Keep = Callable[[Profile], None]
BUSY = 0.15
"""Share of the cores in use by others from which on a profile says so."""


@dataclass(frozen=True)
class Surveyed:
    """What came out, and what did not, by model."""

    profile: Profile
    problems: Mapping[str, str]


class Survey:
    """One run of `calm profile` over the chosen cards."""

    def __init__(
        self,
        lab: Laboratory,
        cards: Mapping[str, ModelCard],
        machine: MachineProfile,
        *,
        before: Profile | None = None,
        asking: Asking | None = None,
        book: AnswerBook | None = None,
        keep: Keep = lambda profile: None,
    ) -> None:
        self._lab = lab
        self._cards = cards
        self._machine = machine
        self._before = before
        self._models: dict[str, ModelProfile] = dict(before.models) if before else {}
        self._new = [card for name, card in cards.items() if name not in self._models]
        self._asking = asking
        self._book = book or AnswerBook()
        self._keep = keep
        self._unanswered: dict[str, int] = {}
        self._crowded: dict[str, float] = {}
        self.problems: dict[str, str] = {}

    def expected_s(self) -> float:
        """About how long it takes: the length of the progress bar."""
        effort = self._lab.effort
        alone = sum(timing_s(card, effort) for card in self._new)
        company = sum(company_s(group, self._cards, effort) for group in self._groups())
        return alone + company + sum(self._asking_s(card) for card in self._cards.values())

    async def run(self) -> Surveyed:
        """Raises BadInput when not one model could be measured."""
        for card in self._new:
            await self._alone(card)
        if not self._models:
            told = "; ".join(f"{name}: {reason}" for name, reason in self.problems.items())
            raise BadInput(f"no model could be measured: {told}", field="models")
        await self._company()
        await self._answers()
        return Surveyed(self._profile(), self.problems)

    # --- the three steps ---

    async def _alone(self, card: ModelCard) -> None:
        try:
            seen = await time_model(self._lab, card)
            self._models[card.name] = self._checked(card.name, as_member(card, figures(card, seen)))
        except CalmError as error:
            self.problems[card.name] = error.message
        except ValueError as error:
            self.problems[card.name] = str(error)
        else:
            if seen.others >= BUSY:
                self._crowded[card.name] = seen.others
            self._save()

    def _checked(self, name: str, found: ModelProfile) -> ModelProfile:
        """Raises ValueError where the figures could not be read back."""
        for problem in problems(Profile(machine=self._machine, models={name: found})):
            raise ValueError(f"measured what cannot be: {problem}")
        return found

    async def _company(self) -> None:
        ratios: dict[int, list[float]] = defaultdict(list)
        for group in self._groups():
            if not set(group) <= self._models.keys():
                continue
            self._lab.watch.stage(" + ".join(group), "at once")
            try:
                ratios[len(group)] += await ratios_of(self._lab, [self._cards[name] for name in group])
            except CalmError as error:
                self.problems[" + ".join(group)] = error.message
        if ratios:
            self._machine = replace(self._machine, contention=tuple(round(f, 3) for f in factors(ratios)))
            self._save()

    async def _answers(self) -> None:
        if self._asking is None:
            return
        cards = [card for name, card in self._cards.items() if name in self._models]
        cards.sort(key=self._asking_s, reverse=True)  # the longest first, so that it does not end alone
        room = asyncio.Semaphore(self._lanes(cards))
        await together(self._ask(card, self._asking, room) for card in cards)

    async def _ask(self, card: ModelCard, asking: Asking, room: asyncio.Semaphore) -> None:
        async with room:
            if self._book.todo(card.name, asking.queries):
                self._lab.watch.stage(card.name, "queries")
                try:
                    self._unanswered[card.name] = await ask_model(self._lab, card, asking, self._book)
                except CalmError as error:
                    self.problems[card.name] = error.message
        rows = list(self._book.of(card.name, asking.queries))
        self._models[card.name] = with_answers(self._models[card.name], rows)
        self._save()

    # --- what they need ---

    def _groups(self) -> tuple[tuple[str, ...], ...]:
        """None where nothing is new: the contention of the profile before stands."""
        if not self._new and len(self._machine.contention) > 1:
            return ()
        return company_plan(self._cards, self._lab.threads, self._lab.cores, self._lab.effort)

    def _asking_s(self, card: ModelCard) -> float:
        if self._asking is None:
            return 0.0
        left = self._book.todo(card.name, self._asking.queries)
        return answers_s(card, [len(query.prompt) for query in left], self._asking.max_tokens)

    def _lanes(self, cards: list[ModelCard]) -> int:
        names = [card.name for card in cards if not card.remote]
        needs = [self._needs_bytes(self._cards[name]) for name in names]
        available = Resources().sample().memory_available_bytes
        threads = [self._lab.threads[self._cards[name].host] for name in names]
        return lanes(threads, needs, self._lab.cores, available)

    def _needs_bytes(self, card: ModelCard) -> int:
        """Memory of the engine that serves a model; an adapter's own figure is what it adds to its base."""
        own, base = self._models[card.name].memory_bytes, self._models.get(card.host)
        if card.adapter_of is None:
            return own
        return own + (base.memory_bytes if base else estimate_bytes(self._lab.bases[card.host]))

    def _save(self) -> None:
        self._keep(self._profile())

    def _profile(self) -> Profile:
        models = {name: self._models[name] for name in sorted(self._models)}
        notes = (*self._machine.notes, *self._notes())
        return Profile(machine=replace(self._machine, notes=notes), models=models)

    def _notes(self) -> list[str]:
        """What a reader of the figures must know."""
        notes = [f"{name}: {reason.splitlines()[0]}" for name, reason in self.problems.items()]
        missing = [name for name in self._cards if name not in self._models and name not in self.problems]
        notes += [f"not measured: {', '.join(missing)}"] if missing else []
        if self._before is not None:
            kept = [name for name in self._before.models if name in self._models]
            notes += [f"from {self._before.machine.measured_at}: {', '.join(kept)}"] if kept else []
        notes += [
            f"{name}: other processes used {share:.0%} of the cores meanwhile"
            for name, share in self._crowded.items()
        ]
        notes += ["no energy meter: joules and watts are 0"] if self._machine.meter == "absent" else []
        remote = [name for name, card in self._cards.items() if card.remote and name in self._models]
        notes += (
            [f"no memory, no joules, for they are not of this machine: {', '.join(remote)}"] if remote else []
        )
        notes += [f"{name}: {n} queries without a judged answer" for name, n in self._unanswered.items() if n]
        return notes


def as_member(card: ModelCard, found: ModelProfile) -> ModelProfile:
    """The entry of an adapter: what it adds to its base, whose engine was measured with it."""
    if card.adapter_of is None:
        return found
    return replace(
        found, memory_bytes=max(1, adapter_bytes(card)), load_s=0.0, unload_s=0.0, load_jitter=0.0, load_j=0.0
    )


# --- the machine ------------------------------------------------------------------------------------


@asynccontextmanager
async def laboratory(
    settings: Settings, fleet: Mapping[str, ModelCard], directory: Path, effort: Effort, watch: Watch
) -> AsyncIterator[Laboratory]:
    """Engines, HTTP and meter of this machine. `fleet` is the whole one: it decides each engine's threads."""
    cores = settings.scheduling.cores or Resources().cores()
    cards = {name: with_threads(card, settings.scheduling.threads) for name, card in fleet.items()}
    energy = MeterSettings(meter=settings.energy.meter, watts_per_core=settings.energy.watts_per_core)
    with runtime_directory() as run_dir:
        async with HttpUpstream(configuration.secret) as upstream:
            yield Laboratory(
                backends={
                    "llamacpp": LlamaCppBackend(run_dir),
                    "onnx": OnnxBackend(run_dir),
                    "command": CommandBackend(run_dir),
                    "openai": RemoteBackend(configuration.secret),
                },
                upstream=upstream,
                meter=probe(energy).chosen,
                weights=lambda card: weights_of(card, directory),
                threads=size_fleet(cards, cores).threads,
                cores=cores,
                effort=effort,
                watch=watch,
                bases={name: card for name, card in cards.items() if card.host == name},
            )


def weights_of(card: ModelCard, directory: Path) -> Path | None:
    """The cached file; None for a card without a source, or whose weights are not here."""
    return cached_path(card.source, configuration.cache_dir(), directory) if card.source else None


def this_machine(cores: int, meter: str | None, notes: tuple[str, ...] = ()) -> MachineProfile:
    """Where the figures are from. `meter` is the energy meter's name."""
    sample = Resources().sample()
    memory = f"{sample.memory_total_bytes / 2**30:.1f} GiB"
    name = f"{processor_name(PROC) or platform.machine()}, {cores} cores, {memory}"
    return MachineProfile(
        name=name,
        cores=cores,
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=versions(),
        meter=meter,
        notes=notes,
    )


def versions() -> dict[str, str]:
    """Of everything that moves the figures."""
    found = {"python": platform.python_version(), "system": platform.platform()}
    for package in ("calm-orchestrator", "xllamacpp"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def other_load(seconds: float = 1.0) -> float:
    """Share of all cores, 0..1, in use now, before anything of ours runs."""
    import psutil

    return float(psutil.cpu_percent(interval=seconds)) / 100
