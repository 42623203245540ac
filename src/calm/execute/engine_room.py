"""The engines that run: started, watched and stopped in tasks whose every end becomes one event.

Whatever a backend does (return, raise, be cancelled, before its first step or after its last), exactly one of
Loaded, LoadFailed and Unloaded is reported for a load, and exactly one Unloaded for a stop. So the residency
machine can rely on an answer to every command, and no engine is left that nobody knows of.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

from calm.errors import CalmError
from calm.errors import LoadFailed as LoadFailedError
from calm.execute.events import Died, Event, Loaded, LoadFailed, Sized, Unloaded
from calm.execute.hosting import Crew, adapter_bytes
from calm.execute.sizing import bytes_for_weights
from calm.ports import Clock, EngineBackend, RunningEngine
from calm.records import AdapterFile, Endpoint, ModelCard

log = logging.getLogger("calm.execute")
Weights = Callable[[ModelCard], Awaitable[Path | None]]
Report = Callable[[Event], None]


class Up:
    """An engine that answers, and when it was loaded."""

    __slots__ = ("card", "endpoints", "engine", "footprint_bytes", "ready_s", "refused", "started_s", "watch")

    def __init__(
        self,
        card: ModelCard,
        engine: RunningEngine,
        started_s: float,
        footprint_bytes: int | None,
        refused: Mapping[str, str],
    ) -> None:
        self.card = card
        self.engine = engine
        self.endpoints: Mapping[str, Endpoint] = {**engine.adapters(), card.name: engine.endpoint}
        """Where each model it serves is asked."""
        self.refused = refused
        """Adapters it does not serve, with the reason."""
        self.started_s = started_s
        self.ready_s = started_s
        self.footprint_bytes = footprint_bytes
        self.watch: asyncio.Task[str] | None = None


class _Loading:
    """A load that runs. `cancelled` is the order, which may come when the task is already done."""

    __slots__ = ("cancelled", "task")

    def __init__(self, task: asyncio.Task[Up]) -> None:
        self.task = task
        self.cancelled = False


class EngineRoom:
    """Starts and stops engines on command and reports what became of it."""

    def __init__(
        self, backends: Mapping[str, EngineBackend], weights: Weights, clock: Clock, report: Report
    ) -> None:
        self._backends = backends
        self._weights = weights
        self._clock = clock
        self._report = report
        self._loading: dict[str, _Loading] = {}
        self._tasks: set[asyncio.Task[Up] | asyncio.Task[str | None]] = set()
        self.up: dict[str, Up] = {}

    # --- loading ---

    def load(self, card: ModelCard, threads: int, crew: Crew = ()) -> None:
        task = asyncio.create_task(self.start(card, threads, crew), name=f"load {card.name}")
        self._loading[card.name] = _Loading(task)
        self._tasks.add(task)
        task.add_done_callback(lambda done: self._load_ended(card, done))

    def cancel_load(self, model: str) -> None:
        loading = self._loading[model]
        loading.cancelled = True
        loading.task.cancel()

    async def start(self, card: ModelCard, threads: int, crew: Crew = ()) -> Up:
        """Fetch weights, start the engine with its adapters, measure it. On failure or cancellation nothing is
        left behind; an adapter that cannot be had or does not fit is left out."""
        started_s = self._clock.now()
        backend = self._backends.get(card.engine.kind)
        if backend is None:
            known = ", ".join(sorted(self._backends)) or "none"
            raise LoadFailedError(
                f"{card.name}: no backend runs engines of kind {card.engine.kind} (there are: {known})"
            )
        path = None if card.remote else await self._weights(card)
        if (sized := _sized(self._clock.now(), card, path, crew)) is not None:
            self._report(sized)
        files, refused = await self._adapter_files(crew)
        engine = await backend.start(card, path, threads, files)
        try:
            footprint_bytes = await asyncio.to_thread(read_footprint, engine)
            up = Up(card, engine, started_s, footprint_bytes, refused | left_out(engine, files))
        except BaseException:
            await stop_engine(card.name, engine)
            raise
        for name, why in up.refused.items():
            log.warning("%s cannot run on %s: %s", name, card.name, why)
        return up

    async def _adapter_files(self, crew: Crew) -> tuple[list[AdapterFile], dict[str, str]]:
        """The adapters with their files, and those whose file cannot be had, with the reason."""
        files: list[AdapterFile] = []
        refused: dict[str, str] = {}
        for adapter in crew:
            try:
                files.append(AdapterFile(card=adapter, weights=await self._weights(adapter)))
            except Exception as error:
                refused[adapter.name] = f"its weights could not be had: {describe(error)}"
        return files, refused

    def _load_ended(self, card: ModelCard, task: asyncio.Task[Up]) -> None:
        self._tasks.discard(task)
        cancelled = self._loading.pop(card.name).cancelled
        now_s = self._clock.now()
        if not task.cancelled() and task.exception() is None:
            if cancelled:
                self._stop(card.name, task.result().engine)
            else:
                self._loaded(card.name, task.result(), now_s)
            return
        reason = "interrupted" if task.cancelled() else describe(task.exception())
        self._report(
            Unloaded(now_s, card.name) if cancelled else LoadFailed(now_s, card.name, reason),
        )

    def _loaded(self, model: str, up: Up, now_s: float) -> None:
        up.ready_s = now_s
        up.watch = asyncio.create_task(up.engine.died(), name=f"watch {model}")
        up.watch.add_done_callback(lambda done: self._died(model, up, done))
        self.up[model] = up
        self._report(Loaded(now_s, model, up.footprint_bytes, now_s - up.started_s, up.refused))

    def _died(self, model: str, up: Up, task: asyncio.Task[str]) -> None:
        if task.cancelled():
            return
        error = task.exception()
        if self.up.get(model) is up:
            self._report(Died(self._clock.now(), model, describe(error) if error else task.result()))

    # --- unloading ---

    def unload(self, model: str) -> None:
        up = self.up.pop(model)
        if up.watch is not None:
            up.watch.cancel()
        self._stop(model, up.engine)

    def _stop(self, model: str, engine: RunningEngine) -> None:
        task: asyncio.Task[str | None] = asyncio.create_task(stop_engine(model, engine), name=f"stop {model}")
        self._tasks.add(task)
        task.add_done_callback(lambda done: self._stopped(model, done))

    def _stopped(self, model: str, task: asyncio.Task[str | None]) -> None:
        self._tasks.discard(task)
        reason = "interrupted while stopping" if task.cancelled() else task.result()
        self._report(Unloaded(self._clock.now(), model, reason))

    async def settled(self) -> None:
        """Return when no load and no stop is under way."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def measure(self) -> list[tuple[str, int]]:
        """Model and bytes of each engine whose footprint changed by more than a hundredth."""
        ups = dict(self.up)
        sizes = await asyncio.to_thread(lambda: {n: read_footprint(up.engine) for n, up in ups.items()})
        changed = []
        for model, size in sizes.items():
            up = ups[model]
            if size is None or self.up.get(model) is not up:
                continue
            if up.footprint_bytes is None or abs(size - up.footprint_bytes) > up.footprint_bytes // 100:
                up.footprint_bytes = size
                changed.append((model, size))
        return changed


def left_out(engine: RunningEngine, files: Sequence[AdapterFile]) -> dict[str, str]:
    """What an engine was given and does not serve, with its reason where it told one."""
    served, told = engine.adapters(), engine.refused()
    missing = [file.card.name for file in files if file.card.name not in served]
    return {name: told.get(name, "its engine did not take it") for name in missing}


def _sized(now_s: float, card: ModelCard, path: Path | None, crew: Crew = ()) -> Sized | None:
    """A better estimate than the card could give, now that its weights are here."""
    stated = card.memory_hint_bytes or (card.source.bytes if card.source else None)
    if path is None or stated is not None:
        return None
    try:
        weights = bytes_for_weights(path.stat().st_size)
        return Sized(now_s, card.name, weights + sum(map(adapter_bytes, crew)))
    except OSError:
        return None


def read_footprint(engine: RunningEngine) -> int | None:
    """None when it cannot be read: an engine that just died must not fail its own measurement."""
    try:
        return engine.footprint_bytes()
    except Exception:
        return None


async def stop_engine(model: str, engine: RunningEngine) -> str | None:
    """Stop, and try once more if that failed. Returns what went wrong, None when it is gone."""
    for attempt in (1, 2):
        try:
            await engine.stop()
            return None
        except Exception as error:
            log.exception("stopping %s failed (attempt %d)", model, attempt)
            reason = f"could not be stopped: {describe(error)}"
    return reason


def describe(error: BaseException | None) -> str:
    """What a user should read of an exception."""
    if isinstance(error, CalmError):
        return error.message
    return str(error) or type(error).__name__
