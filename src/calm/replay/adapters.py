"""The ports over the simulated machine: to the loop it looks like engines, HTTP, a meter and sensors.

A request's body is its id; the upstream looks up what the model would answer to it (`Outcomes`) and puts the
work into the engine. It answers what llama.cpp streams, shortened to two events: the first token, and the
end with usage and timings.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random

import msgspec
from msgspec.structs import replace

from calm.errors import LoadFailed, NotReached
from calm.monitor.resources import Sample
from calm.ports import UpstreamReply
from calm.profile import ModelProfile, Profile
from calm.records import (
    AdapterFile,
    Ask,
    Decision,
    Endpoint,
    Features,
    Feedback,
    MeterKind,
    ModelCard,
    Outcome,
)
from calm.replay.machine import SimulatedEngine, SimulatedMachine, Work
from calm.replay.outcomes import Outcomes

FIRST = b'data: {"choices":[{"delta":{"content":"."}}]}\n\n'
METER = "simulated"


class RunningSimulation:
    """A RunningEngine of the simulated machine."""

    def __init__(
        self,
        backend: SimulatedBackend,
        engine: SimulatedEngine,
        card: ModelCard,
        adapters: Sequence[str] = (),
    ) -> None:
        self._backend = backend
        self._adapters = adapters
        self.engine = engine
        self.card = card

    @property
    def endpoint(self) -> Endpoint:
        return self._endpoint(self.card.name)

    def adapters(self) -> Mapping[str, Endpoint]:
        return {name: self._endpoint(name) for name in self._adapters}

    def refused(self) -> Mapping[str, str]:
        return {}

    def _endpoint(self, model: str) -> Endpoint:
        return Endpoint(base_url=str(self.engine.number), model=model)

    def pids(self) -> tuple[int, ...]:
        """Its number on the machine: what the meter knows it by."""
        return (self.engine.number,)

    def footprint_bytes(self) -> int | None:
        return None if self.card.remote else self.engine.profile.memory_bytes

    async def died(self) -> str:
        crashed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        return await crashed  # simulated engines do not

    async def stop(self) -> None:
        if self.engine.number in self._backend.machine.engines:
            await asyncio.sleep(self.engine.profile.unload_s)
            self._backend.machine.remove(self.engine)


class SimulatedBackend:
    """An EngineBackend whose loads take the profile's time and whose engines live on the machine."""

    def __init__(self, machine: SimulatedMachine, profile: Profile, seed: int) -> None:
        self.machine = machine
        self._profile = profile
        self._seed = seed
        self._begun: Counter[str] = Counter()

    async def start(
        self, card: ModelCard, weights: Path | None, threads: int, adapters: Sequence[AdapterFile] = ()
    ) -> RunningSimulation:
        carried = [adapter.card.name for adapter in adapters]
        profile = self._with_adapters(card.name, carried)
        takes_s = profile.load_s * math.exp(profile.load_jitter * self._draw(card.name))
        if card.remote:  # it runs somewhere else: to reach it costs this machine nothing
            await asyncio.sleep(takes_s)
        else:
            with self.machine.loading(profile.load_j, takes_s):
                await asyncio.sleep(takes_s)
        return RunningSimulation(self, self.machine.make(profile, apart=card.remote), card, carried)

    def _with_adapters(self, base: str, adapters: Sequence[str]) -> ModelProfile:
        """What one engine costs: its base, and what each adapter adds. Raises LoadFailed for a stranger."""
        for name in (base, *adapters):
            if name not in self._profile.models:
                raise LoadFailed(f"{name}: the profile does not know this model")
        found = self._profile.models[base]
        more = [self._profile.models[name] for name in adapters]
        return replace(
            found,
            memory_bytes=found.memory_bytes + sum(model.memory_bytes for model in more),
            load_s=found.load_s + sum(model.load_s for model in more),
            load_j=found.load_j + sum(model.load_j for model in more),
        )

    def _draw(self, model: str) -> float:
        """Standard normal, for the n-th load of a model the same whatever else is loaded."""
        self._begun[model] += 1
        return Random(f"{self._seed}|load {self._begun[model]}|{model}").gauss(0, 1)


class SimulatedUpstream:
    """An Upstream into the engines of the machine."""

    def __init__(
        self, machine: SimulatedMachine, outcomes: Outcomes, hosts: Mapping[str, str] | None = None
    ) -> None:
        """`hosts`: whose engine serves each model, where that is another's."""
        self._machine = machine
        self._outcomes = outcomes
        self._hosts = hosts or {}
        self.sent: Counter[str] = Counter()
        """Requests that reached an engine, by the model whose engine it is."""

    @asynccontextmanager
    async def post(self, endpoint: Endpoint, path: str, body: bytes) -> AsyncIterator[UpstreamReply]:
        engine = self._machine.engines.get(int(endpoint.base_url))
        if engine is None:
            raise NotReached(f"{endpoint.model} is no longer in memory")
        self.sent[self._hosts.get(endpoint.model, endpoint.model)] += 1
        reply = SimulatedReply(self._outcomes, engine, body.decode(), endpoint.model)
        engine.admit(reply.work)
        engine.read.add(endpoint.model)
        try:
            yield reply
        finally:
            engine.cancel(reply.work)


class SimulatedReply:
    """An UpstreamReply: two events of a llama.cpp stream.

    An adapter reads and writes at its own rates, next to others at theirs; it shares nothing they have cached.
    """

    status = 200
    content_type = "text/event-stream"

    def __init__(self, outcomes: Outcomes, engine: SimulatedEngine, request_id: str, model: str) -> None:
        profile = outcomes.profile(model)
        self._answer = outcomes.of(request_id, model)
        held = profile.cached_tokens if model in engine.read else 0.0
        self._cached = int(min(held, self._answer.prompt_tokens - 1))
        uncached = self._answer.prompt_tokens - self._cached
        prefill_s = profile.overhead_s + uncached / profile.prefill_tps
        stretch = self._answer.stretch
        slower = engine.profile.decode_tps["1"] / profile.decode_tps["1"]
        self.work = Work(prefill_s * stretch, self._answer.output_tokens, stretch * slower)

    async def read(self) -> bytes:
        return b"".join([chunk async for chunk in self.chunks()])

    async def chunks(self) -> AsyncIterator[bytes]:
        await self.work.read
        yield FIRST
        await self.work.done
        yield b"data: " + msgspec.json.encode(self._end()) + b"\n\ndata: [DONE]\n\n"

    def _end(self) -> Mapping[str, object]:
        answer, work = self._answer, self.work
        read_s = (work.first_at_s or 0.0) - (work.reads_since_s or 0.0)
        return {
            "choices": [{"delta": {}, "finish_reason": "stop"}],
            "usage": {
                "prompt_tokens": answer.prompt_tokens,
                "completion_tokens": answer.output_tokens,
                "prompt_tokens_details": {"cached_tokens": self._cached},
            },
            "timings": {"prompt_ms": 1000 * read_s, "cache_n": self._cached},
        }


class SimulatedMeter:
    """A Meter: joules of the machine's engines by their numbers."""

    name = METER
    kind: MeterKind = "modelled"

    def __init__(self, machine: SimulatedMachine) -> None:
        self._machine = machine

    def read(self, groups: Mapping[str, Sequence[int]]) -> Mapping[str, float]:
        return {name: joules for name, pids in groups.items() if (joules := self._joules(pids)) is not None}

    def _joules(self, numbers: Sequence[int]) -> float | None:
        engine = self._machine.engines.get(numbers[0]) if numbers else None
        if engine is None:
            return None
        engine.settle()
        return engine.joules


class SimulatedSensors:
    """What `Resources` samples in service: here the machine never changes."""

    def __init__(self, cores: int, memory_bytes: int) -> None:
        self._sample = Sample(
            cores=cores,
            cpu_load=0.0,
            memory_total_bytes=memory_bytes,
            memory_available_bytes=memory_bytes,
            gpus=(),
        )

    def sample(self) -> Sample:
        return self._sample


class Forgetful:
    """A KnowledgeStore that keeps nothing: a trial's rows are taken as they end."""

    def record_decision(self, ask: Ask, features: Features, decision: Decision) -> None: ...

    def record_outcome(self, outcome: Outcome) -> None: ...

    def record_feedback(self, feedback: Feedback) -> None: ...

    def checkpoint(self, name: str, state: bytes) -> None: ...

    def restore(self, name: str) -> bytes | None:
        return None

    def flush(self) -> None: ...

    def close(self) -> None: ...
