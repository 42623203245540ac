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
import math
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from calm.ports import Clock
from calm.profile import MachineProfile, ModelProfile

EARLY_S = 2e-9
"""An event loop's timers ring up to a nanosecond before their time: work that takes no longer is done."""


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

    def __init__(
        self, machine: SimulatedMachine, number: int, profile: ModelProfile, *, apart: bool = False
    ) -> None:
        self.number = number
        self.profile = profile
        self.apart = apart
        """On another machine: neither slows the engines of this one nor is slowed by them."""
        self.joules = 0.0
        self.read: set[str] = set()
        """Models, the base or its adapters, for which it has begun to read a prompt."""
        self._machine = machine
        self._counts, self._rates = rates(profile)
        self._reading: deque[Work] = deque()
        self._decoding: dict[Work, None] = {}
        self._speed = machine.speed_of(self)
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
            tokens = passed_s * self._each_tps()
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
        if self._reading and self._reading_s() <= self._rounding_s:
            self._finish_reading(self._reading.popleft())
        tokens = self._each_tps() * self._rounding_s
        for work in [w for w in self._decoding if w.tokens_left * w.stretch <= tokens]:
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
            return max(0.0, self._reading_s())
        return max(0.0, min(w.tokens_left * w.stretch for w in self._decoding) / self._each_tps())

    def _reading_s(self) -> float:
        """Seconds to the end of the prompt that is read."""
        return self._reading[0].prefill_left_s / self._speed

    def _each_tps(self) -> float:
        """Tokens per second of each sequence, while nothing is read."""
        return self._speed * self._rate() / max(1, len(self._decoding))

    @property
    def _rounding_s(self) -> float:
        """What is left of work because clocks are floats, coarser the longer they have run."""
        return EARLY_S + 4 * math.ulp(self._machine.clock.now())

    def _rate(self) -> float:
        return interpolated(self._counts, self._rates, len(self._decoding))


class Load:
    """A model on its way into memory; its joules are used evenly over its time."""

    __slots__ = ("_began_s", "_joules", "_takes_s")

    def __init__(self, joules: float, takes_s: float, began_s: float) -> None:
        self._joules = joules
        self._takes_s = takes_s
        self._began_s = began_s

    def spent_j(self, now_s: float) -> float:
        if self._takes_s <= 0:
            return 0.0
        return self._joules * min(1.0, (now_s - self._began_s) / self._takes_s)


class SimulatedMachine:
    """All engines of the house: shares the machine's speed among the active ones and adds up their joules."""

    def __init__(self, profile: MachineProfile, clock: Clock) -> None:
        self.clock = clock
        self.engines: dict[int, SimulatedEngine] = {}
        self._contention = profile.contention
        self._loads_block = profile.loads_block
        self._loading = 0
        self._loads: dict[Load, None] = {}
        self._active: dict[SimulatedEngine, None] = {}
        """In the order they woke: a set's order differs between processes."""
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
        """Everything spent so far, by engines that are, that were and that load."""
        for engine in self.engines.values():
            engine.settle()
        loads_j = sum(load.spent_j(self.clock.now()) for load in self._loads)
        return self._gone_j + loads_j + sum(engine.joules for engine in self.engines.values())

    def speed_of(self, engine: SimulatedEngine) -> float:
        return 1.0 if engine.apart else self.speed

    @contextmanager
    def loading(self, joules: float, takes_s: float) -> Iterator[None]:
        """A load under way. One that is broken off has used its share of the joules; `make` charges a whole one."""
        load = Load(joules, takes_s, self.clock.now())
        self._loads[load] = None
        self.load_began()
        try:
            yield
        except BaseException:
            self._gone_j += load.spent_j(self.clock.now())
            raise
        finally:
            del self._loads[load]
            self.load_ended()

    def make(self, profile: ModelProfile, *, apart: bool = False) -> SimulatedEngine:
        """An engine that is in memory now; what its load cost is on its meter."""
        self._made += 1
        engine = self.engines[self._made] = SimulatedEngine(self, self._made, profile, apart=apart)
        engine.joules += profile.load_j
        return engine

    def remove(self, engine: SimulatedEngine) -> None:
        if self.engines.pop(engine.number, None) is not None:
            engine.close()
            self._gone_j += engine.joules
            self.slept(engine)

    def woke(self, engine: SimulatedEngine) -> None:
        if not engine.apart:
            self._change(lambda: self._active.setdefault(engine))
        engine.change_speed(self.speed_of(engine))

    def slept(self, engine: SimulatedEngine) -> None:
        self._change(lambda: self._active.pop(engine, None))

    def load_began(self) -> None:
        self._change(lambda: setattr(self, "_loading", self._loading + 1))

    def load_ended(self) -> None:
        self._change(lambda: setattr(self, "_loading", self._loading - 1))

    def _change(self, change: Callable[[], object]) -> None:
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
