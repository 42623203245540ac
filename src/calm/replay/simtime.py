"""An asyncio event loop for simulated time: instead of sleeping, its clock jumps to the next timer.

Everything that waits through asyncio (sleeps, timeouts, futures) takes its simulated time and no other. Work
for threads runs inline, so nothing depends on the operating system's scheduling: the same coroutines give the
same history every time. (The idea is trio's MockClock with autojump.)
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Executor
from typing import TYPE_CHECKING, TypeVar, TypeVarTuple

from calm.clock import ManualClock

if TYPE_CHECKING:
    from _typeshed import FileDescriptorLike

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class Stuck(RuntimeError):
    """Every task waits for something that no timer will bring about: a bug in the simulation."""


class JumpingSelector(selectors.BaseSelector):
    """Polls without waiting; where a real loop would sleep, it moves the clock."""

    def __init__(self, clock: ManualClock) -> None:
        self._clock = clock
        self._inner = selectors.DefaultSelector()

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        events = self._inner.select(0)
        if events or (timeout is not None and timeout <= 0):
            return events
        if timeout is None:
            raise Stuck("nothing is scheduled and nothing is ready")
        self._clock.advance(timeout)
        return events

    def register(
        self, fileobj: FileDescriptorLike, events: int, data: object = None
    ) -> selectors.SelectorKey:
        return self._inner.register(fileobj, events, data)

    def unregister(self, fileobj: FileDescriptorLike) -> selectors.SelectorKey:
        return self._inner.unregister(fileobj)

    def get_map(self) -> Mapping[FileDescriptorLike, selectors.SelectorKey]:
        return self._inner.get_map()

    def close(self) -> None:
        self._inner.close()


class SimulatedLoop(asyncio.SelectorEventLoop):
    """Reads the time off a ManualClock and moves it when nothing is left to do now."""

    def __init__(self, clock: ManualClock) -> None:
        super().__init__(JumpingSelector(clock))
        self._simulated = clock

    def time(self) -> float:
        return self._simulated.now()

    def run_in_executor(
        self, executor: Executor | None, func: Callable[[*Ts], T], *args: *Ts
    ) -> asyncio.Future[T]:
        future: asyncio.Future[T] = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:
            future.set_exception(error)
        return future


def run_simulated(main: Coroutine[object, object, T], clock: ManualClock) -> T:
    """Like asyncio.run, in simulated time. Raises Stuck when the simulation deadlocks."""
    with asyncio.Runner(loop_factory=lambda: SimulatedLoop(clock)) as runner:
        return runner.run(main)
