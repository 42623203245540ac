"""One engine under the stopwatch: loads, prompts, decoding, idling, and the joules of each."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

import psutil

from calm.bench.fitting import aggregate_rate
from calm.bench.measure_plan import Effort, decode_plan, load_s, prompt_plan, request_s
from calm.bench.measure_probe import Answered, send
from calm.bench.measure_texts import QUESTIONS, TINY, story, words
from calm.errors import LoadFailed
from calm.execute.engine_room import read_footprint
from calm.meters.processes import choose_source
from calm.ports import EngineBackend, Meter, RunningEngine, Upstream
from calm.records import AdapterFile, Endpoint, ModelCard

T = TypeVar("T")


class Watch(Protocol):
    """Hears how the measuring goes on."""

    def stage(self, name: str, what: str) -> None:
        """`what` begins on the model (or models) `name`."""
        ...

    def advance(self, expected_s: float) -> None:
        """Something is done that was expected to take so long."""
        ...


class Unwatched:
    """A Watch that looks away."""

    def stage(self, name: str, what: str) -> None:
        pass

    def advance(self, expected_s: float) -> None:
        pass


@dataclass(frozen=True)
class Laboratory:
    """All that measuring needs of the machine."""

    backends: Mapping[str, EngineBackend]
    upstream: Upstream
    meter: Meter
    weights: Callable[[ModelCard], Path | None]
    threads: Mapping[str, int]
    """By model with an engine of its own, as the executor would give them."""
    cores: int
    effort: Effort
    watch: Watch
    bases: Mapping[str, ModelCard] = field(default_factory=dict)
    """Cards of the models on whose engines adapters are measured."""


@dataclass(frozen=True)
class Loads:
    load_s: tuple[float, ...]
    unload_s: tuple[float, ...]
    load_j: tuple[float, ...]


@dataclass(frozen=True)
class Timings:
    """Everything observed on one model alone."""

    loads: Loads
    tiny: tuple[Answered, ...]
    """Prompts of one token."""
    prompts: tuple[Answered, ...]
    """Prompts of many lengths, answers of one token."""
    decoding: tuple[tuple[int, float], ...]
    """(sequences at once, tokens per second of all)."""
    answers: tuple[Answered, ...]
    """To the plain questions, one at a time."""
    footprint_bytes: int | None
    active_w: float | None
    idle_w: float | None
    others: float
    """Share of the cores that other processes used meanwhile, 0..1."""

    @property
    def singles(self) -> tuple[Answered, ...]:
        """Requests that had the engine to themselves."""
        return (*self.prompts, *self.answers)


async def started(lab: Laboratory, card: ModelCard) -> RunningEngine:
    """The engine that serves a model: for an adapter its base's, with this adapter alone. Raises LoadFailed."""
    backend = lab.backends.get(card.engine.kind)
    if backend is None:
        raise LoadFailed(f"{card.name}: no backend runs engines of kind {card.engine.kind}")
    host = card if card.adapter_of is None else lab.bases[card.adapter_of]
    files = () if host is card else (AdapterFile(card=card, weights=lab.weights(card)),)
    return await backend.start(host, lab.weights(host), lab.threads[host.name], files)


def endpoint_of(engine: RunningEngine, card: ModelCard) -> Endpoint:
    """Where a model on an engine is asked. Raises LoadFailed for an adapter that the engine could not take."""
    if card.adapter_of is None:
        return engine.endpoint
    found = engine.adapters().get(card.name)
    if found is None:
        reason = engine.refused().get(card.name, "its engine did not take it")
        raise LoadFailed(f"{card.name} cannot run on {card.adapter_of}: {reason}")
    return found


@asynccontextmanager
async def running(lab: Laboratory, card: ModelCard) -> AsyncIterator[RunningEngine]:
    """An engine that has answered once; stopped afterwards, whatever happens."""
    engine = await started(lab, card)
    try:
        await send(lab.upstream, endpoint_of(engine, card), card, "Hello", 2)
        lab.watch.advance(load_s(card))
        yield engine
    finally:
        await engine.stop()


async def time_model(lab: Laboratory, card: ModelCard) -> Timings:
    """Measure one model alone on the machine. Raises CalmError when its engine fails."""
    lab.watch.stage(card.name, "load")
    loads = await time_loads(lab, card)
    async with running(lab, card) as engine:
        begun_s, begun_j = time.perf_counter(), joules(lab, card, engine)
        busy = Busy(engine.pids(), lab.cores)
        tiny = [await send(lab.upstream, endpoint_of(engine, card), card, word, 1) for word in TINY]
        lab.watch.stage(card.name, "prompts")
        prompts = await read_prompts(lab, card, engine)
        lab.watch.stage(card.name, "decode")
        decoding = await decode(lab, card, engine)
        lab.watch.stage(card.name, "questions")
        answers = await put_questions(lab, card, engine)
        active_w = watts(begun_s, begun_j, time.perf_counter(), joules(lab, card, engine))
        others = busy.others()
        idle_w = await idle(lab, card, engine)
        footprint_bytes = await asyncio.to_thread(read_footprint, engine)
    return Timings(
        loads=loads,
        tiny=tuple(tiny),
        prompts=tuple(prompts),
        decoding=tuple(decoding),
        answers=tuple(answers),
        footprint_bytes=footprint_bytes,
        active_w=active_w,
        idle_w=idle_w,
        others=others,
    )


class Busy:
    """CPU time of everything but ourselves and one engine, since this object was made."""

    def __init__(self, pids: Sequence[int], cores: int) -> None:
        self._pids = (*pids, os.getpid())
        self._cores = cores
        self._source = choose_source()
        self._begun = (time.perf_counter(), *self._read())

    def others(self) -> float:
        """Share of the cores, 0..1."""
        begun_s, all_s, ours_s = self._begun
        passed_s = max(time.perf_counter() - begun_s, 1e-9)
        all_now_s, ours_now_s = self._read()
        share = ((all_now_s - all_s) - (ours_now_s - ours_s)) / (passed_s * self._cores)
        return min(1.0, max(0.0, share))

    def _read(self) -> tuple[float, float]:
        times = psutil.cpu_times()
        idle_s = times.idle + getattr(times, "iowait", 0.0)
        guests_s = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)  # contained in user time
        ours_s = sum(self._source.seconds(pid) or 0.0 for pid in self._pids)
        return float(sum(times) - idle_s - guests_s), ours_s


# --- loads ------------------------------------------------------------------------------------------


async def time_loads(lab: Laboratory, card: ModelCard) -> Loads:
    """Load and unload; the first time does not count: it fills the page cache and makes the model known to the
    meter, which counts a process from its start only within a group that it has seen before."""
    found = [await _load_once(lab, card) for _ in range(lab.effort.loads + 1)][1:]
    return Loads(
        load_s=tuple(load_s for load_s, _, _ in found),
        unload_s=tuple(unload_s for _, unload_s, _ in found),
        load_j=tuple(load_j for _, _, load_j in found if load_j is not None),
    )


async def _load_once(lab: Laboratory, card: ModelCard) -> tuple[float, float, float | None]:
    """Seconds of a load and of the unload, joules of the load."""
    before_j = lab.meter.read({card.name: ()}).get(card.name)
    begun_s = time.perf_counter()
    engine = await started(lab, card)
    ready_s = time.perf_counter()
    try:
        after_j = joules(lab, card, engine)
    finally:
        leaving_s = time.perf_counter()
        await engine.stop()
    gone_s = time.perf_counter()
    lab.watch.advance(load_s(card))
    spent_j = None if before_j is None or after_j is None else after_j - before_j
    return ready_s - begun_s, gone_s - leaving_s, spent_j


# --- rates ------------------------------------------------------------------------------------------


async def read_prompts(lab: Laboratory, card: ModelCard, engine: RunningEngine) -> list[Answered]:
    """Unrelated prompts one after the other, one token of answer each."""
    found = []
    for length, number in prompt_plan(card, lab.effort):
        found.append(await send(lab.upstream, endpoint_of(engine, card), card, words(length, number), 1))
        lab.watch.advance(request_s(card, length, 1))
    return found


async def decode(lab: Laboratory, card: ModelCard, engine: RunningEngine) -> list[tuple[int, float]]:
    found = []
    for run, count in enumerate(decode_plan(card, lab.effort)):
        rate = await decode_together(lab, card, engine, range(run * count, (run + 1) * count))
        lab.watch.advance(request_s(card, 30 * count, lab.effort.decode_tokens))
        if rate is not None:
            found.append((count, rate))
    return found


async def decode_together(
    lab: Laboratory, card: ModelCard, engine: RunningEngine, numbers: Sequence[int]
) -> float | None:
    """Tokens per second of these stories together; None when they were never told at the same time."""
    tokens, endpoint = lab.effort.decode_tokens, endpoint_of(engine, card)
    answers = await together(
        [send(lab.upstream, endpoint, card, story(n), tokens, endless=True) for n in numbers]
    )
    return aggregate_rate([answer.tokens_s for answer in answers])


async def together(work: Iterable[Coroutine[None, None, T]]) -> list[T]:
    """All at once. The first failure ends the others and is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(part) for part in work]
    except* Exception as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]


async def put_questions(lab: Laboratory, card: ModelCard, engine: RunningEngine) -> list[Answered]:
    found, endpoint = [], endpoint_of(engine, card)
    for question in QUESTIONS[: lab.effort.questions]:
        found.append(await send(lab.upstream, endpoint, card, question, lab.effort.max_tokens))
        lab.watch.advance(request_s(card, 30, lab.effort.max_tokens / 2))
    return found


# --- energy -----------------------------------------------------------------------------------------


def joules(lab: Laboratory, card: ModelCard, engine: RunningEngine) -> float | None:
    """What the meter has counted for this model's processes; None where it cannot see them."""
    pids = engine.pids()
    return lab.meter.read({card.name: pids}).get(card.name) if pids else None


def watts(begun_s: float, begun_j: float | None, ended_s: float, ended_j: float | None) -> float | None:
    if begun_j is None or ended_j is None or ended_s <= begun_s:
        return None
    return max(0.0, ended_j - begun_j) / (ended_s - begun_s)


async def idle(lab: Laboratory, card: ModelCard, engine: RunningEngine) -> float | None:
    begun_s, begun_j = time.perf_counter(), joules(lab, card, engine)
    await asyncio.sleep(lab.effort.idle_s)
    lab.watch.advance(lab.effort.idle_s)
    return watts(begun_s, begun_j, time.perf_counter(), joules(lab, card, engine))
