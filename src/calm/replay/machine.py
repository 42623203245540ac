"""Engines as a service model: prompts, then tokens, in continuous batches or one at a time; and their power.

    reading     one prompt after the other, in the order they came; while one is read nobody decodes
    decoding    all that are read share the engine's aggregate rate for their number
    speed       1 / contention for the number of engines active on the machine; 0 while a load blocks it

Fluid between events: an arrival, the end of a prompt, the end of an answer, a change of speed. Each engine has
one timer, for its own next event. (llama.cpp puts a whole prompt into the batch of the sequences that decode,
so they get one token in that time; Orca, Yu et al. OSDI 2022, for iteration-level batching in general.)
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections import deque
from collections.abc import Callable

from calm.ports import Clock
from calm.profile import MachineProfile, ModelProfile

NEARLY = 1e-9
"""Work below this is done: what is left of it is rounding."""


class Work:
    """One request in an engine. `read` and `done` are set by the engine."""

    __slots__ = ("done", "first_at_s", "prefill_left_s", "read", "reads_since_s", "stretch", "tokens_left")

    def __init__(self, prefill_s: float, output_tokens: int, stretch: float) -> None:
        loop = asyncio.get_running_loop()
        self.prefill_left_s = prefill_s
        self.tokens_left = float(max(0, output_tokens - 1))
        """After the first token, which the end of the prompt brings."""
        self.stretch = stretch
        """This request's times are so many times the profile's."""
        self.read: asyncio.Future[None] = loop.create_future()
        self.done: asyncio.Future[None] = loop.create_future()
        self.reads_since_s: float | None = None
        self.first_at_s: float | None = None


class SimulatedEngine:
    """One resident engine of the machine."""

    def __init__(self, machine: SimulatedMachine, number: int, profile: ModelProfile) -> None:
        self.number = number
        self.profile = profile
        self.joules = 0.0
        self.served = 0
        self._machine = machine
        self._counts, self._rates = rates(profile)
        self._reading: deque[Work] = deque()
        self._decoding: dict[Work, None] = {}
        self._speed = machine.speed
        self._settled_s = machine.clock.now()
        self._timer: asyncio.TimerHandle | None = None

    @property
    def active(self) -> bool:
        return bool(self._reading or self._decoding)

    def admit(self, work: Work) -> None:
        """Queue a prompt; its futures tell how it goes on."""
        self.settle()
        was_active = self.active
        self._reading.append(work)
        self._begin_reading()
        self.served += 1
        if was_active:
            self._schedule()
        else:
            self._machine.woke(self)

    def cancel(self, work: Work) -> None:
        """The client left; safe when the work is already done."""
        self.settle()
        if work in self._decoding:
            del self._decoding[work]
        elif work in self._reading:
            self._reading.remove(work)
            self._begin_reading()
        else:
            return
        self._after_change()

    def settle(self) -> None:
        """Account for the time since the last event: progress and joules."""
        now_s = self._machine.clock.now()
        passed_s, self._settled_s = now_s - self._settled_s, now_s
        if passed_s <= 0:
            return
        self.joules += passed_s * (
            self.profile.active_w if self.active and self._speed > 0 else self.profile.idle_w
        )
        if self._reading:
            self._reading[0].prefill_left_s -= passed_s * self._speed
        elif self._decoding:
            tokens = passed_s * self._speed * self._rate() / len(self._decoding)
            for work in self._decoding:
                work.tokens_left -= tokens / work.stretch

    def change_speed(self, speed: float) -> None:
        self.settle()
        self._speed = speed
        self._schedule()

    def close(self) -> None:
        """Stop: whatever is under way never ends."""
        self.settle()
        self._reading.clear()
        self._decoding.clear()
        if self._timer is not None:
            self._timer.cancel()

    # --- events ---

    def _event(self) -> None:
        self._timer = None
        self.settle()
        if self._reading and self._reading[0].prefill_left_s <= NEARLY:
            self._finish_reading(self._reading.popleft())
        for work in [w for w in self._decoding if w.tokens_left <= NEARLY]:
            del self._decoding[work]
            resolve(work.done)
        self._after_change()

    def _finish_reading(self, work: Work) -> None:
        work.first_at_s = self._machine.clock.now()
        resolve(work.read)
        self._decoding[work] = None
        self._begin_reading()

    def _begin_reading(self) -> None:
        if self._reading and self._reading[0].reads_since_s is None:
            self._reading[0].reads_since_s = self._machine.clock.now()

    def _after_change(self) -> None:
        if self.active:
            self._schedule()
        else:
            self._unschedule()
            self._machine.slept(self)

    def _schedule(self) -> None:
        self._unschedule()
        left_s = self._next_s()
        if left_s is not None:
            self._timer = asyncio.get_running_loop().call_later(left_s, self._event)

    def _unschedule(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _next_s(self) -> float | None:
        """Seconds to this engine's next event at its present speed."""
        if not self.active or self._speed <= 0:
            return None
        if self._reading:
            return max(0.0, self._reading[0].prefill_left_s / self._speed)
        each = self._rate() / len(self._decoding)
        return max(0.0, min(w.tokens_left * w.stretch for w in self._decoding) / (each * self._speed))

    def _rate(self) -> float:
        return interpolated(self._counts, self._rates, len(self._decoding))


class SimulatedMachine:
    """All engines of the house: shares the machine's speed among the active ones and adds up their joules."""

    def __init__(self, profile: MachineProfile, clock: Clock) -> None:
        self.clock = clock
        self.engines: dict[int, SimulatedEngine] = {}
        self._contention = profile.contention
        self._loads_block = profile.loads_block
        self._loading = 0
        self._active: set[SimulatedEngine] = set()
        self._made = 0
        self._gone_j = 0.0

    @property
    def speed(self) -> float:
        """Of each active engine, relative to one that has the machine to itself."""
        if self._loading and self._loads_block:
            return 0.0
        place = min(max(len(self._active), 1), len(self._contention)) - 1
        return 1.0 / self._contention[place]

    @property
    def joules(self) -> float:
        """Everything spent so far, by engines that are and engines that were."""
        for engine in self.engines.values():
            engine.settle()
        return self._gone_j + sum(engine.joules for engine in self.engines.values())

    def make(self, profile: ModelProfile) -> SimulatedEngine:
        """An engine that is in memory now; what its load cost is on its meter."""
        self._made += 1
        engine = self.engines[self._made] = SimulatedEngine(self, self._made, profile)
        engine.joules += profile.load_j
        return engine

    def remove(self, engine: SimulatedEngine) -> None:
        if self.engines.pop(engine.number, None) is not None:
            engine.close()
            self._gone_j += engine.joules
            self.slept(engine)

    def woke(self, engine: SimulatedEngine) -> None:
        self._change(lambda: self._active.add(engine))
        engine.change_speed(self.speed)

    def slept(self, engine: SimulatedEngine) -> None:
        self._change(lambda: self._active.discard(engine))

    def load_began(self) -> None:
        self._change(lambda: setattr(self, "_loading", self._loading + 1))

    def load_ended(self) -> None:
        self._change(lambda: setattr(self, "_loading", self._loading - 1))

    def _change(self, change: Callable[[], None]) -> None:
        before = self.speed
        change()
        if self.speed != before:
            for engine in self._active:
                engine.change_speed(self.speed)


def rates(profile: ModelProfile) -> tuple[list[int], list[float]]:
    """Sequences and aggregate tokens per second, ascending."""
    known = sorted((int(count), rate) for count, rate in profile.decode_tps.items())
    return [count for count, _ in known], [rate for _, rate in known]


def interpolated(counts: list[int], values: list[float], count: int) -> float:
    """Linear between two stated counts, constant beyond the outer ones."""
    place = bisect_left(counts, count)
    if place == len(counts):
        return values[-1]
    if counts[place] == count or place == 0:
        return values[place]
    low, high = counts[place - 1], counts[place]
    share = (count - low) / (high - low)
    return values[place - 1] + share * (values[place] - values[place - 1])


def resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
