"""Made-up studies for the tests of calm.report: a small queueing model, so that the figures hang together.

Every model serves one request at a time, two or so fit into memory, the least recently used one leaves. A policy
is a preference over models; `calm` learns over the first half of a trial which one suits a domain.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from calm.report.records import Move, Provenance, Row, Sample, Setup, Study, Trial

DOMAINS = ("medical", "legal", "math")
POLICIES = ("calm", "paper:latency:0.3", "round-robin", "fixed:tinyllama-1.1b")
MODELS = ("smollm2-135m", "gemma-3-270m", "tinyllama-1.1b")
GB = 1_000_000_000
Choice = Callable[[int, int], int]


@dataclass(frozen=True)
class Model:
    name: str
    service_s: float
    load_s: float
    size_bytes: int
    watts: float
    quality: tuple[float, ...]


def fleet(names: Sequence[str], seed: int = 7) -> tuple[Model, ...]:
    """The larger, the slower and the better; each is best at one domain."""
    rng = np.random.default_rng(seed)
    grades = np.linspace(0, 1, len(names)).tolist()
    return tuple(
        Model(
            name=name,
            service_s=0.6 + 2.6 * grade,
            load_s=0.8 + 1.5 * grade,
            size_bytes=int((0.3 + 0.9 * grade) * GB),
            watts=18 + 14 * grade,
            quality=tuple(
                float(np.clip(0.3 + 0.3 * grade + 0.25 * (number % 3 == domain) + rng.normal(0, 0.03), 0, 1))
                for domain in range(3)
            ),
        )
        for number, (name, grade) in enumerate(zip(names, grades, strict=True))
    )


def make_trial(
    setup: Setup,
    seed: int,
    *,
    models: Sequence[str] = MODELS,
    requests: int = 200,
    rate_rps: float = 0.25,
    energy: bool = True,
    failures: float = 0.0,
    quality: bool = True,
    samples: bool = True,
) -> Trial:
    rng = np.random.default_rng((seed, 11))
    arrivals = np.cumsum(rng.exponential(1 / rate_rps, requests)).tolist()
    domains = rng.integers(0, 3, requests)
    noise = rng.lognormal(0, 0.35, requests).tolist()
    judged = rng.random(requests)
    lost = rng.random(requests) < failures
    house = House(fleet(models), _budget(setup, len(models)))
    choice = _choice(setup.policy, models, np.random.default_rng((seed, 5)))
    rows: list[Row] = []
    for i in range(requests):
        model = house.models[choice(i, int(domains[i]))]
        start_s, load_s, hit = house.serve(model, arrivals[i], model.service_s * noise[i])
        service_s = model.service_s * noise[i]
        right = float(judged[i] < model.quality[domains[i]])
        rows.append(
            Row(
                query_id=f"q{i}",
                domain=DOMAINS[domains[i]],
                arrived_s=arrivals[i],
                model=model.name,
                status="timeout" if lost[i] else "ok",
                total_s=start_s + service_s - arrivals[i],
                ttft_s=None if lost[i] else start_s + 0.2 * service_s - arrivals[i],
                queue_s=max(0.0, start_s - arrivals[i] - load_s),
                load_s=load_s,
                hit=hit,
                prompt_tokens=60,
                completion_tokens=90,
                energy_j=model.watts * service_s if energy else None,
                quality=right if quality and not lost[i] else None,
                decision_s=float(rng.lognormal(-8, 0.3)),
            )
        )
    end_s = max(row.arrived_s + row.total_s for row in rows) if rows else 0.0
    return Trial(
        setup=setup,
        seed=seed,
        workload="poisson x domains:medqa,gsm8k",
        engine="simulated",
        rows=tuple(rows),
        moves=tuple(sorted(house.moves, key=lambda move: move.at_s)),
        samples=house.samples(rows, end_s) if samples else (),
        duration_s=end_s,
        budget_bytes=house.budget_bytes,
        peak_bytes=house.peak_bytes,
        loads=house.loads,
        energy_j=sum(row.energy_j or 0 for row in rows) + 4.0 * end_s if energy else None,
        meter="simulated" if energy else None,
    )


def make_study(
    *,
    policies: Sequence[str] = POLICIES,
    caches: Sequence[str] = ("lru",),
    scenarios: Sequence[str] = ("",),
    seeds: int = 5,
    models: Sequence[str] = MODELS,
    requests: int = 200,
    rate_rps: float = 0.25,
    energy: bool = True,
    failures: float = 0.0,
    quality: bool = True,
    samples: bool = True,
) -> Study:
    setups = [
        (Setup(policy=policy, cache=cache, scenario=scenario), 1 + 0.6 * number)
        for number, scenario in enumerate(scenarios)
        for policy in policies
        for cache in caches
    ]
    return study_of(
        make_trial(
            setup, seed, models=models, requests=requests, rate_rps=rate_rps * load, energy=energy,
            failures=failures, quality=quality, samples=samples,
        )
        for setup, load in setups
        for seed in range(seeds)
    )  # fmt: skip


def study_of(trials: object, **changes: object) -> Study:
    fields: dict[str, object] = {
        "title": "a made-up study",
        "provenance": Provenance(
            command="calm replay",
            started_at="2026-02-03T00:00:00+00:00",
            commit=None,
            machine="none",
            versions={},
        ),
        "slo_s": 10.0,
        "trials": tuple(trials),  # type: ignore[call-overload]
    }
    return Study(**(fields | changes))  # type: ignore[arg-type]


class House:
    """Models that come and go under a budget."""

    def __init__(self, models: tuple[Model, ...], budget_bytes: int) -> None:
        self.models = models
        self.budget_bytes = budget_bytes
        self.moves: list[Move] = []
        self.loads = 0
        self.used = models[0].size_bytes
        self.peak_bytes = self.used
        self.resident = {models[0].name: 0.0}
        self.free_at_s = {model.name: 0.0 for model in models}
        self.memory: list[tuple[float, int]] = [(0.0, self.used)]
        self.sizes = {model.name: model.size_bytes for model in models}

    def serve(self, model: Model, at_s: float, service_s: float) -> tuple[float, float, bool]:
        """When the answer begins, how long it waited for a load, and whether it was a hit."""
        hit = model.name in self.resident
        begin_s = max(at_s, self.free_at_s[model.name])
        load_s = 0.0 if hit else model.load_s
        if not hit:
            begin_s = self._load(model, begin_s)
        self.resident[model.name] = self.free_at_s[model.name] = begin_s + service_s
        return begin_s, load_s, hit

    def _load(self, model: Model, at_s: float) -> float:
        while self.used + model.size_bytes > self.budget_bytes and self.resident:
            victim = min(self.resident, key=self.resident.__getitem__)
            gone_s = max(at_s, self.resident.pop(victim))
            self._move(victim, "ready", "draining", at_s)
            self._move(victim, "draining", "unloading", gone_s)
            self._move(victim, "unloading", "cold", gone_s + 0.1)
            self.used -= self.sizes[victim]
            at_s = gone_s + 0.1
            self.memory.append((at_s, self.used))
        self._move(model.name, "cold", "loading", at_s)
        self._move(model.name, "loading", "ready", at_s + model.load_s)
        self.used += model.size_bytes
        self.loads += 1
        self.peak_bytes = max(self.peak_bytes, self.used)
        self.memory.append((at_s, self.used))
        return at_s + model.load_s

    def _move(self, model: str, old: str, new: str, at_s: float) -> None:
        self.moves.append(Move(at_s=at_s, model=model, old=old, new=new))  # type: ignore[arg-type]

    def samples(self, rows: Sequence[Row], end_s: float) -> tuple[Sample, ...]:
        at = np.arange(0.0, end_s, 1.0)
        arrived = np.array([row.arrived_s for row in rows])
        waited = np.array([row.arrived_s + row.queue_s + row.load_s for row in rows])
        ended = np.array([row.arrived_s + row.total_s for row in rows])
        memory = sorted(self.memory)
        when, used = [m[0] for m in memory], [m[1] for m in memory]
        return tuple(
            Sample(
                at_s=float(now),
                used_bytes=used[max(0, int(np.searchsorted(when, now, side="right")) - 1)],
                queue_length=int(np.sum((arrived <= now) & (waited > now))),
                in_flight=int(np.sum((waited <= now) & (ended > now))),
            )
            for now in at
        )


def _budget(setup: Setup, models: int) -> int:
    if setup.cache == "none":
        return 100 * GB
    room = 1.6 if setup.cache == "lru:2" else 2.0
    return int(room * GB) if models <= 5 else int(0.4 * GB * models)


def _choice(policy: str, models: Sequence[str], rng: np.random.Generator) -> Choice:
    count, kind = len(models), policy.partition(":")[0]
    if kind == "fixed":
        name = policy.partition(":")[2]
        return lambda i, domain: list(models).index(name) if name in models else count - 1
    if kind == "round-robin":
        return lambda i, domain: i % count
    if kind == "calm":
        return lambda i, domain: (
            domain % count if rng.random() < min(0.9, i / 100) else int(rng.integers(count))
        )
    share = 0.35 + 0.05 * (
        sum(policy.encode()) % 11
    )  # every other policy likes the small ones in its own way
    return lambda i, domain: int(min(rng.geometric(share) - 1, count - 1))
