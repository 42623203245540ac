"""Engines that are not ours to start: nothing to load, but on first use somebody has to be there."""

from __future__ import annotations

import asyncio

from calm.errors import EngineLost, LoadFailed
from calm.execute import events
from calm.execute.engine_room import EngineRoom, Report, Up, describe, stop_engine
from calm.execute.hosting import Crew
from calm.ports import Clock, RunningEngine
from calm.records import Endpoint, ModelCard


class Remotes:
    """Reaches each remote engine once, when it is first wanted, and reports whether it could."""

    def __init__(self, room: EngineRoom, clock: Clock, report: Report) -> None:
        self._room = room
        self._clock = clock
        self._report = report
        self._reaching: dict[str, asyncio.Task[Up]] = {}
        self._farewells: set[asyncio.Task[str | None]] = set()

    async def endpoint(self, model: str, host: str, card: ModelCard | None, crew: Crew = ()) -> Endpoint:
        """Of a model on a remote engine: `host`, whose card is given, or an adapter that it carries.

        Without a task switch once the engine was reached. Raises LoadFailed when it cannot be, or does not
        serve the adapter.
        """
        task = self._reach(host, card, crew)
        if not task.done():
            await asyncio.wait({task})
        if task.cancelled():
            raise LoadFailed(f"{model}: its card changed while it was being reached")
        if (error := task.exception()) is not None:
            raise LoadFailed(f"{model} cannot be reached: {describe(error)}") from error
        up = task.result()
        if (endpoint := up.endpoints.get(model)) is None:
            raise LoadFailed(
                f"{model} cannot run on {host}: {up.refused.get(model, 'it was never given it')}"
            )
        return endpoint

    def engine(self, model: str) -> RunningEngine | None:
        task = self._reaching.get(model)
        return task.result().engine if task is not None and _succeeded(task) else None

    def _reach(self, model: str, card: ModelCard | None, crew: Crew) -> asyncio.Task[Up]:
        task = self._reaching.get(model)
        if task is None:
            if card is None or not card.remote:
                raise EngineLost(f"{model}: its engine went away while the request waited")
            task = asyncio.create_task(self._room.start(card, 0, crew), name=f"reach {model}")
            task.add_done_callback(lambda done: self._reached(model, done))
            self._reaching[model] = task
        return task

    def _reached(self, model: str, task: asyncio.Task[Up]) -> None:
        if self._reaching.get(model) is not task:
            if _succeeded(task):
                self._part(model, task.result())
            return
        now_s = self._clock.now()
        if _succeeded(task):
            up = task.result()
            self._report(events.Loaded(now_s, model, None, now_s - up.started_s, up.refused))
            return
        del self._reaching[model]
        reason = "interrupted" if task.cancelled() else describe(task.exception())
        self._report(events.LoadFailed(now_s, model, reason))

    def leave(self, model: str) -> None:
        """The card changed or went, or the server closes: reach it anew when it is wanted again."""
        task = self._reaching.pop(model, None)
        if task is None:
            return
        if _succeeded(task):
            self._part(model, task.result())
        else:
            task.cancel()

    def _part(self, model: str, up: Up) -> None:
        farewell = asyncio.create_task(stop_engine(model, up.engine), name=f"leave {model}")
        self._farewells.add(farewell)
        farewell.add_done_callback(self._farewells.discard)

    async def leave_all(self) -> None:
        pending = [task for task in self._reaching.values() if not task.done()]
        for model in list(self._reaching):
            self.leave(model)
        if pending:
            await asyncio.wait(pending)
        await asyncio.sleep(0)  # their callbacks may have parted with an engine that came up meanwhile
        if self._farewells:
            await asyncio.wait(self._farewells)


def _succeeded(task: asyncio.Task[Up]) -> bool:
    return task.done() and not task.cancelled() and task.exception() is None
