"""Trials, interleaved: every seed's workload goes to every setup in turn, in an order drawn for that seed.

A machine is slower at some times than at others. With all trials of one candidate in a row that would be its
luck; in randomised blocks (one block per seed) it hits all candidates alike, and differences within a block
are paired. A trial that fails is noted and the campaign goes on; what was finished is kept as it ends.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random

import psutil

from calm.bench.client import Answer, Clients, Judge, Totals, offer
from calm.bench.progress import Board, in_short
from calm.bench.server import KEEP_ALL, ServerFailed, TrialServer, settings_for, trial_directory
from calm.bench.trials import (
    Ledger,
    duration_s,
    loads,
    read_ledger,
    rows_of,
    sample_of,
    timeline,
    with_adapters,
)
from calm.errors import CalmError
from calm.records import ModelCard, Snapshot
from calm.report.records import Sample, Setup, Trial
from calm.settings import Settings
from calm.workloads.records import Workload
from calm.workloads.workload import rated, warm_up

SAMPLE_S = 1.0


@dataclass(frozen=True)
class Job:
    """One trial to run."""

    setup: Setup
    seed: int

    @property
    def title(self) -> str:
        return f"{self.setup.label}, seed {self.seed}"


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What is the same for all trials of a campaign."""

    base: Settings
    fleet: Path
    cards: Mapping[str, ModelCard]
    budget_bytes: int
    deadline_s: float
    max_tokens: int | None
    feedback: float
    """Share of the answers that are rated, 0..1."""
    warm_start: int = 0
    """Rated requests before the workload that are not counted."""

    def settings(self, job: Job) -> Settings:
        return settings_for(
            self.base,
            job.setup,
            seed=job.seed,
            fleet=self.fleet,
            budget_bytes=self.budget_bytes,
            deadline_s=self.deadline_s,
        )

    @property
    def remote(self) -> frozenset[str]:
        return frozenset(name for name, card in self.cards.items() if card.remote)

    @property
    def local(self) -> tuple[str, ...]:
        """Models with an engine of their own on this machine."""
        return tuple(name for name, card in self.cards.items() if not card.remote and card.host == name)

    @property
    def hosts(self) -> Mapping[str, str]:
        """Whose engine serves each model."""
        return {name: card.host for name, card in self.cards.items()}


# --- what to run ------------------------------------------------------------------------------------


def interleaved(setups: Sequence[Setup], seeds: Sequence[int]) -> tuple[Job, ...]:
    """All setups of the first seed in an order drawn for it, then those of the next."""
    return tuple(Job(setup, seed) for seed in seeds for setup in _shuffled(setups, seed))


def _shuffled(setups: Sequence[Setup], seed: int) -> list[Setup]:
    return Random(f"order {seed}").sample(list(setups), len(setups))


def still_missing(jobs: Iterable[Job], done: Iterable[Trial]) -> tuple[Job, ...]:
    """Jobs without a finished trial, in their order."""
    finished = {(trial.setup, trial.seed) for trial in done}
    return tuple(job for job in jobs if (job.setup, job.seed) not in finished)


@dataclass(frozen=True)
class Load:
    """What one seed's trials are asked."""

    counted: Workload
    warm: Workload | None = None
    """Asked before it, rated, not counted."""

    @property
    def planned_s(self) -> float:
        return self.counted.duration_s + (self.warm.duration_s if self.warm else 0.0)


# --- one trial --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """A trial from outside: what its clients and its watcher noted."""

    answers: tuple[Answer, ...]
    samples: tuple[Sample, ...]
    origin_wall_s: float
    """Unix time of the workload's second 0."""
    end_wall_s: float
    energy_j: float | None
    meter: str | None


@dataclass(frozen=True)
class Finished:
    """A trial, and what its record has no place for."""

    trial: Trial
    answers: tuple[Answer, ...]

    @property
    def late_s(self) -> float:
        """How late the latest request was sent."""
        return max((answer.late_s for answer in self.answers), default=0.0)

    @property
    def errors(self) -> str | None:
        """How many requests went wrong, and what was said most often; deadlines that passed are no errors."""
        said = Counter(answer.error or "no reason" for answer in self.answers if answer.status == "error")
        if not said:
            return None
        return (
            f"{said.total()} of {len(self.answers)} requests failed, most often: {said.most_common(1)[0][0]}"
        )

    def all_failed(self) -> bool:
        return bool(self.answers) and all(answer.status == "error" for answer in self.answers)


async def run_trial(
    terms: Terms,
    job: Job,
    load: Load,
    judge: Judge,
    on_end: Callable[[], None] = lambda: None,
) -> Finished:
    """Start a server, offer the workload, end the server, read what it kept.

    Raises ServerFailed, KnowledgeError, BadInput.
    """
    async with trial_directory() as root:
        async with TrialServer(root, terms.settings(job)) as server:
            seen = await server.while_alive(observe(server.url, terms, job, load, judge, on_end))
        ledger = read_ledger(server.database)
    return Finished(trial_of(job, load.counted, seen, ledger, terms), seen.answers)


async def observe(
    url: str,
    terms: Terms,
    job: Job,
    load: Load,
    judge: Judge,
    on_end: Callable[[], None],
) -> Seen:
    """Everything between the server's start and its end."""
    async with Clients(url, deadline_s=terms.deadline_s, max_tokens=terms.max_tokens) as clients:
        if job.setup.cache == KEEP_ALL:
            for model in terms.local:
                await clients.pin(model)
        if load.warm is not None:
            everyone = (True,) * len(load.warm.queries)
            await offer(clients, load.warm, origin_s=time.perf_counter(), rate=everyone, judge=judge)
        rates = rated(job.seed, len(load.counted.queries), terms.feedback)
        before = await clients.totals()
        origin_s, origin_wall_s = time.perf_counter(), time.time()
        samples: list[Sample] = []
        watching = asyncio.create_task(watch(clients.snapshot, origin_s, samples))
        try:
            answers = await offer(
                clients, load.counted, origin_s=origin_s, rate=rates, judge=judge, on_end=on_end
            )
        finally:
            watching.cancel()
            await asyncio.wait((watching,))
        after = await clients.totals()
        end_wall_s = time.time()
    return Seen(answers, tuple(samples), origin_wall_s, end_wall_s, spent_j(before, after), after.meter)


async def watch(look: Callable[[], Awaitable[Snapshot]], origin_s: float, samples: list[Sample]) -> None:
    """One sample a second until cancelled; a look that fails is left out."""
    while True:
        with suppress(ServerFailed):
            samples.append(sample_of(await look(), time.perf_counter() - origin_s))
        await asyncio.sleep(SAMPLE_S)


def spent_j(before: Totals, after: Totals) -> float | None:
    """None where nothing is metered."""
    return None if after.joules is None else after.joules - (before.joules or 0.0)


def trial_of(job: Job, workload: Workload, seen: Seen, ledger: Ledger, terms: Terms) -> Trial:
    """An adapter's lane is its base's: it moves with it, and their load is one."""
    moves = timeline(ledger.moves, seen.origin_wall_s, seen.end_wall_s)
    return Trial(
        setup=job.setup,
        seed=job.seed,
        workload=workload.name,
        engine="real",
        rows=rows_of(workload, seen.answers, ledger, terms.remote, terms.hosts),
        moves=with_adapters(moves, terms.hosts),
        samples=seen.samples,
        duration_s=duration_s(workload, seen.answers),
        budget_bytes=terms.budget_bytes,
        peak_bytes=max((sample.used_bytes for sample in seen.samples), default=0),
        loads=loads(moves),
        energy_j=seen.energy_j,
        meter=seen.meter,
    )


# --- all of them ------------------------------------------------------------------------------------


LATE_S = 0.1
"""A request sent later than this is worth a note: the clients, not the server, were short of time."""


BUSY = 0.2
"""Others on the processors beyond this share are worth a note: figures are then of a smaller machine."""
LOOK_S = 0.5


def share_of_others() -> float:
    """Busy share of all processors, 0..1, over the next LOOK_S seconds."""
    return float(psutil.cpu_percent(LOOK_S)) / 100


class Campaign:
    """Runs jobs one after the other; `keep` gets each trial as it ends, `notes` what a reader must know."""

    def __init__(
        self,
        terms: Terms,
        workload_of: Callable[[int], Workload],
        judge: Judge,
        keep: Callable[[Trial], None],
        *,
        busy: Callable[[], float] = share_of_others,
    ) -> None:
        """`busy` tells, while none of our servers runs, which share of the processors others use."""
        self.notes: list[str] = []
        self._busy = busy
        self._terms = terms
        self._workload_of = workload_of
        self._judge = judge
        self._keep = keep

    async def run(self, jobs: Sequence[Job]) -> None:
        """Returns when every job was tried. Cancelled, it ends the current server first.

        Raises BadInput before anything starts when there are too few queries to warm up with.
        """
        loads = {seed: self._load(seed) for seed in {job.seed: None for job in jobs}}
        with Board([loads[job.seed].planned_s for job in jobs]) as board:
            for job in jobs:
                await self._try(job, loads[job.seed], board)

    async def _try(self, job: Job, load: Load, board: Board) -> None:
        board.begin(job.title, len(load.counted.queries))
        busy = await asyncio.to_thread(self._busy)
        try:
            finished = await run_trial(self._terms, job, load, self._judge, board.request_ended)
        except CalmError as error:
            self._missing(job, error.message, board)
            return
        if finished.all_failed():
            self._missing(job, finished.errors or "", board)
            return
        self._keep(finished.trial)
        self._note(job, finished, busy)
        said = in_short(finished.trial)
        board.end(job.title, f"{said}; {finished.errors}" if finished.errors else said)

    def _missing(self, job: Job, reason: str, board: Board) -> None:
        self.notes.append(f"{job.title} is missing: {reason}")
        board.end(job.title, f"failed: {reason}")

    def _note(self, job: Job, finished: Finished, busy: float) -> None:
        if busy > BUSY:
            self.notes.append(f"{job.title}: other work took {busy * 100:.0f} % of the processors before it")
        if finished.errors:
            self.notes.append(f"{job.title}: {finished.errors}")
        if finished.late_s > LATE_S:
            self.notes.append(f"{job.title}: a request was sent {finished.late_s:.2f} s late")

    def _load(self, seed: int) -> Load:
        counted, extra = self._workload_of(seed), self._terms.warm_start
        return Load(counted, warm_up(self._workload_of, counted, extra) if extra else None)
