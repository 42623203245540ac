"""A small made-up fleet, its profile and workloads, for the tests of replay."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

import msgspec

from calm.profile import Length, MachineProfile, ModelProfile, Profile
from calm.records import EngineSpec, ModelCard
from calm.replay.house import House
from calm.workloads.records import Query, Workload

MB = 1_000_000
TOKENS = 20
"""Of every answer, so that times can be worked out."""
SERVICE_S = 0.1 + 40 / 200 + (TOKENS - 1) / 20
"""Of one request on an engine that has nothing else to do: overhead, prompt, tokens."""


def model(**fields: Any) -> ModelProfile:
    base = ModelProfile(
        memory_bytes=100 * MB,
        load_s=1.0,
        unload_s=0.0,
        batching="serial",
        prefill_tps=200.0,
        overhead_s=0.1,
        decode_tps={"1": 20.0},
        tokens_per_char=1.0,
        active_w=50.0,
        idle_w=5.0,
        load_j=30.0,
        output_tokens={"default": Length(mean=TOKENS)},
        quality={"default": 0.5},
        quality_sd=0.2,
    )
    return msgspec.structs.replace(base, **fields)


def card(name: str, **fields: Any) -> ModelCard:
    return ModelCard(name=name, description=f"{name} things", engine=EngineSpec(slots=4), **fields)


def house(
    models: dict[str, ModelProfile] | None = None,
    *,
    cores: int = 8,
    machine: dict[str, Any] | None = None,
    cards: dict[str, ModelCard] | None = None,
    **fields: Any,
) -> House:
    """Three equal serial models with room for two, unless said otherwise. No embedder: routing is not the subject."""
    models = models or {name: model() for name in ("a", "b", "c")}
    profile = Profile(machine=MachineProfile(name="made up", cores=cores, **(machine or {})), models=models)
    base: dict[str, Any] = {"budget_bytes": 200 * MB, "embed": False}
    return House(fleet=cards or {name: card(name) for name in models}, profile=profile, **{**base, **fields})


def workload(arrivals_s: Sequence[float], seed: int = 0, **fields: Any) -> Workload:
    """Different queries of 40 characters."""
    queries = tuple(
        Query(id=f"q{i}", dataset="d", domain="math", prompt=f"{i:<40}", **fields)
        for i in range(len(arrivals_s))
    )
    return Workload(name="made up", seed=seed, arrivals_s=tuple(arrivals_s), queries=queries)


def every(gap_s: float, count: int, seed: int = 0) -> Workload:
    return workload([i * gap_s for i in range(count)], seed)


def poisson(rate_rps: float, count: int, seed: int = 0) -> Workload:
    random, at_s, arrivals_s = Random(seed), 0.0, []
    for _ in range(count):
        arrivals_s.append(at_s)
        at_s += random.expovariate(rate_rps)
    return workload(arrivals_s, seed)
