"""Specialists in the whole house: they compete with their base, share its engine, and learn for themselves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass

import msgspec
import pytest

from calm.analyze.analyzer import Analyzer
from calm.backends.fake import FakeBackend, Script
from calm.backends.upstream import HttpUpstream
from calm.clock import SystemClock
from calm.errors import LoadFailed
from calm.execute.dispatch import Dispatcher
from calm.execute.events import Limits
from calm.execute.executor import Executor
from calm.gateway.relay import encode_for
from calm.loop import Orchestrator, Parts, Steering
from calm.meters.ledger import EnergyLedger
from calm.monitor.features import extract
from calm.monitor.resources import Resources
from calm.monitor.window import Workload
from calm.plan.policies import make_policy
from calm.ports import Meter
from calm.records import Ask, Decision, EngineSpec, MeterKind, ModelCard, Outcome, PriorSpec, SourceSpec
from calm.registry.adapters import join
from calm.replay.adapters import Forgetful

CLOCK = SystemClock()
BASE = ModelCard(
    name="base",
    description="general things",
    memory_hint_bytes=1000,
    engine=EngineSpec(threads=1, slots=4),
    priors=PriorSpec(quality={"default": 0.4}, decode_tps=50, prefill_tps=500, load_s=2.0),
)


def specialist(name: str, quality: float) -> ModelCard:
    return ModelCard(
        name=name,
        description=f"{name} things",
        adapter_of="base",
        source=SourceSpec(parts=("file:/x",), sha256="a" * 64, bytes=10),
        priors=PriorSpec(quality={"default": quality}),
    )


FLEET = {card.name: card for card in join([BASE, specialist("finance", 0.9), specialist("medical", 0.1)])[0]}


class Joules:
    """A meter whose every reading of a group is a joule more, whoever asks."""

    name = "made up"
    kind: MeterKind = "measured"

    def __init__(self) -> None:
        self.total = 0.0
        self.groups: set[str] = set()

    def read(self, groups: Mapping[str, Sequence[int]]) -> Mapping[str, float]:
        self.total += 1.0
        self.groups |= groups.keys()
        return dict.fromkeys(groups, self.total)


class Choice(msgspec.Struct):
    message: dict[str, object]


class Said(msgspec.Struct):
    choices: list[Choice]


@dataclass
class House:
    loop: Orchestrator
    backend: FakeBackend
    meter: Joules
    outcomes: list[Outcome]

    async def answer(self, model: str | None = None, request_id: str = "r1") -> object:
        """What was said: each model of these tests says its name."""
        async with self.loop.serve(ask(model, request_id)) as reply:
            said = msgspec.json.decode(await reply.body(), type=Said)
        await asyncio.sleep(0)  # learning happens right after the answer
        return said.choices[0].message["content"]


def ask(model: str | None = None, request_id: str = "r1", **fields: object) -> Ask:
    return Ask(
        request_id=request_id,
        kind="chat",
        query="What is what?",
        prompt_chars=13,
        body={"messages": [{"role": "user", "content": "What is what?"}]},
        requires=frozenset({"chat"}),
        arrived_s=CLOCK.now(),
        model=model,
        **fields,  # type: ignore[arg-type]
    )


@pytest.fixture
async def open_house() -> AsyncIterator[Callable[..., House]]:
    closing: list[Callable[[], object]] = []

    def make(**scripts: Script) -> House:
        spoken = {name: Script(answer=(name,), pids=(1,)) for name in FLEET} | scripts
        backend, meter, outcomes = FakeBackend(spoken), Joules(), []

        async def no_weights(_: ModelCard) -> None:
            return None

        executor = Executor(
            {}, {"llamacpp": backend}, no_weights, CLOCK, Limits(cores=4, budget_bytes=1 << 40)
        )
        upstream = HttpUpstream()
        ledger = EnergyLedger(checked(meter), CLOCK)

        def ended(_: Ask, __: Decision, outcome: Outcome) -> None:
            outcomes.append(outcome)

        parts = Parts(
            clock=CLOCK,
            executor=executor,
            dispatcher=Dispatcher(
                executor=executor,
                upstream=upstream,
                ledger=ledger,
                clock=CLOCK,
                encode=encode_for,
                attempts=3,
            ),
            analyzer=Analyzer(None),
            workload=Workload(),
            resources=Resources(),
            ledger=ledger,
            store=Forgetful(),
            embedder=None,
            language=lambda _: "und",
            deadline_s=30.0,
            on_outcome=ended,
        )
        loop = Orchestrator(parts, Steering(policy=make_policy("calm"), goal="quality"))
        executor.subscribe(lambda model, old, new, at_s, detail: loop.moved(model, old, new))
        loop.use_fleet(FLEET)
        closing.extend((upstream.close, lambda: executor.close(0.1)))
        return House(loop, backend, meter, outcomes)

    yield make
    for close in reversed(closing):
        await close()  # type: ignore[misc]


def checked(meter: Meter) -> Meter:
    return meter


def decide(house: House, **fields: object) -> Decision:
    request = ask(**fields)  # type: ignore[arg-type]
    return house.loop.decide(request, extract(request, None, lambda _: "und"))


async def test_the_best_specialist_is_chosen_and_only_it_speaks(open_house: Callable[..., House]) -> None:
    house = open_house()
    assert await house.answer() == "finance"
    assert await house.answer("medical", "r2") == "medical"
    assert await house.answer("base", "r3") == "base"
    assert house.backend.started == [("base", 1)]


async def test_specialists_at_the_same_time_do_not_leak_into_one_another(
    open_house: Callable[..., House],
) -> None:
    house = open_house()
    names = ["finance", "medical", "base"] * 4
    said = await asyncio.gather(*(house.answer(name, f"r{i}") for i, name in enumerate(names)))
    assert said == names


async def test_a_specialist_of_a_resident_base_is_predicted_without_a_load(
    open_house: Callable[..., House],
) -> None:
    house = open_house()
    before = decide(house).estimates
    assert all(estimate.load_s.mean > 1.0 for estimate in before.values())
    await house.answer("base")
    after = decide(house).estimates
    assert {name: estimate.load_s.mean for name, estimate in after.items()} == dict.fromkeys(FLEET, 0.0)


async def test_joules_are_the_engines_and_lessons_the_specialists(open_house: Callable[..., House]) -> None:
    house = open_house()
    await house.answer("finance", "r1")
    await house.answer("medical", "r2")
    assert house.meter.groups == {"base"}
    assert list(house.loop.parts.ledger.totals()) == ["base"]
    assert [outcome.model for outcome in house.outcomes] == ["finance", "medical"]
    assert all(outcome.energy is not None for outcome in house.outcomes)
    assert set(house.loop.parts.workload.histories()) == {"finance", "medical"}


async def test_a_misfit_falls_to_the_next_candidate_and_a_pinned_one_is_told(
    open_house: Callable[..., House],
) -> None:
    house = open_house(finance=Script(refuse="its tensors are of another shape"))
    assert await house.answer() in ("base", "medical")
    assert "finance" in {refusal.model for refusal in decide(house).refused}
    with pytest.raises(LoadFailed, match="another shape"):
        await house.answer("finance", "r2")


async def test_one_plan_for_the_family(open_house: Callable[..., House]) -> None:
    house = open_house()
    await house.loop.adapt()
    await house.loop.parts.executor.load("finance")
    assert house.backend.started == [("base", 1)]
    snapshot = house.loop.snapshot()
    assert snapshot.used_bytes == sum(s.footprint_bytes for n, s in snapshot.models.items() if s.model == n)
