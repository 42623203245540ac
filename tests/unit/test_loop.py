"""The loop over scripted engines: decide, serve, learn, remember, adapt, restart."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from calm.analyze.analyzer import Analyzer
from calm.backends.fake import FakeBackend, Script
from calm.backends.upstream import HttpUpstream
from calm.clock import SystemClock
from calm.errors import BadInput, LoadFailed, NoCandidate, Unavailable, UnknownModel
from calm.execute.dispatch import Dispatcher
from calm.execute.events import Limits
from calm.execute.executor import Executor
from calm.gateway.relay import encode_for
from calm.loop import RECORDED, Orchestrator, Parts, Steering
from calm.meters.absent import AbsentMeter
from calm.meters.ledger import EnergyLedger
from calm.monitor.features import extract
from calm.monitor.resources import Resources
from calm.monitor.window import Workload
from calm.plan.floor import LEAST_SEEN, QualityFloor
from calm.plan.policies import make_policy
from calm.records import Ask, EngineSpec, Features, Feedback, ModelCard, PriorSpec, Weights, Wishes
from calm.stores.sqlite import SqliteStore

CLOCK = SystemClock()


def card(name: str, **fields: object) -> ModelCard:
    return ModelCard(
        name=name,
        description=f"{name} things",
        memory_hint_bytes=1000,
        engine=EngineSpec(threads=1),
        **fields,  # type: ignore[arg-type]
    )


FLEET = {
    "good": card("good", priors=PriorSpec(quality={"default": 0.9}, decode_tps=10)),
    "fast": card("fast", priors=PriorSpec(quality={"default": 0.3}, decode_tps=500)),
}


def ask(request_id: str = "r1", **fields: object) -> Ask:
    return Ask(
        request_id=request_id,
        kind="chat",
        query="What is what?",
        prompt_chars=13,
        body={"messages": [{"role": "user", "content": "What is what?"}]},
        requires=frozenset({"chat"}),
        arrived_s=CLOCK.now(),
        **fields,  # type: ignore[arg-type]
    )


@dataclass
class House:
    loop: Orchestrator
    backend: FakeBackend
    store: SqliteStore
    path: Path

    async def answer(self, request: Ask) -> str | None:
        async with self.loop.serve(request) as reply:
            await reply.body()
        await asyncio.sleep(0)  # learning happens right after the answer
        return reply.model


async def open_house(path: Path, closing: list[object], **scripts: Script) -> House:
    backend = FakeBackend(scripts)

    async def no_weights(_: ModelCard) -> None:
        return None

    executor = Executor(
        {}, {"llamacpp": backend}, no_weights, CLOCK, Limits(cores=4, budget_bytes=1 << 40, backoff_s=60.0)
    )
    upstream = HttpUpstream()
    ledger = EnergyLedger(AbsentMeter(), CLOCK)
    store = SqliteStore(path, retention_days=None, max_requests=None, clock=CLOCK)
    dispatcher = Dispatcher(
        executor=executor, upstream=upstream, ledger=ledger, clock=CLOCK, encode=encode_for, attempts=2
    )
    parts = Parts(
        clock=CLOCK,
        executor=executor,
        dispatcher=dispatcher,
        analyzer=Analyzer(None),
        workload=Workload(),
        resources=Resources(),
        ledger=ledger,
        store=store,
        embedder=None,
        language=lambda _: "und",
        deadline_s=30.0,
    )
    loop = Orchestrator(parts, Steering(policy=make_policy("calm")))
    loop.use_fleet(FLEET)
    closing += [lambda: executor.close(0.1), upstream.close, lambda: asyncio.to_thread(store.close)]
    return House(loop, backend, store, path)


@pytest.fixture
async def closing() -> AsyncIterator[list[object]]:
    things: list[object] = []
    yield things
    for close in things:
        await close()  # type: ignore[operator]


@pytest.fixture
async def house(tmp_path: Path, closing: list[object]) -> House:
    return await open_house(tmp_path / "knowledge.sqlite3", closing)


async def test_a_decision_keeps_every_term_and_is_recorded_beside_its_outcome(house: House) -> None:
    model = await house.answer(ask())
    stored = house.store.decision("r1")
    assert stored is not None
    assert {candidate.model for candidate in stored.decision.ranked} == {"good", "fast"}
    assert stored.decision.ranked[0].model == model
    assert {term.name for term in stored.decision.ranked[0].terms} >= {"latency", "quality"}
    assert stored.outcome is not None
    assert (stored.outcome.status, stored.outcome.model) == ("ok", model)
    assert stored.outcome.total_s > 0
    assert stored.decision.estimates[str(model)].total_s.mean > 0


@pytest.mark.parametrize(
    ("wishes", "chosen"),
    [
        (Wishes(goal="quality"), "good"),
        (Wishes(goal="latency"), "fast"),
        (Wishes(weights=Weights(latency=0, energy=0, quality=1)), "good"),
    ],
)
async def test_the_callers_goal_decides(house: House, wishes: Wishes, chosen: str) -> None:
    decision = house.loop.decide(ask(wishes=wishes), features_of(ask()))
    assert decision.ranked[0].model == chosen
    assert decision.goal == wishes.goal


async def test_a_floor_sets_the_weight_of_quality(house: House) -> None:
    """Of 0.9 and 0.3: the mean that was promised, whatever the goal's own weight of quality."""
    house.loop.steering.floor = QualityFloor(0.6)
    house.loop.steering.weights = Weights(latency=1, energy=0, quality=0)
    decisions = [house.loop.decide(ask(f"r{number}"), features_of(ask())) for number in range(240)]
    late = [one.estimates[one.ranked[0].model].quality.mean for one in decisions[40:]]
    assert sum(late) / len(late) == pytest.approx(0.6, abs=0.02)
    assert {one.weights.latency for one in decisions} == {1.0}
    assert decisions[-1].weights.quality > 0.0, "what was decided by is what is recorded"


@pytest.mark.parametrize(
    "own",
    [
        {"wishes": Wishes(goal="latency")},
        {"wishes": Wishes(weights=Weights(latency=1, energy=0, quality=1))},
        {"model": "fast"},
    ],
)
async def test_a_request_that_says_what_matters_is_none_of_the_floors_business(
    house: House, own: dict[str, object]
) -> None:
    floor = QualityFloor(0.6)
    house.loop.steering.floor = floor
    for number in range(LEAST_SEEN - 1):
        house.loop.decide(ask(f"r{number}"), features_of(ask()))
    account, without = (floor.debt, floor.price), Steering(policy=make_policy("calm"))
    for number in range(3 * LEAST_SEEN):
        kept = house.loop.decide(ask(f"o{number}", **own), features_of(ask()))
    assert (floor.debt, floor.price) == account
    house.loop.steering = without
    free = house.loop.decide(ask(kept.request_id, **own), features_of(ask()))
    assert (kept.weights, kept.ranked) == (free.weights, free.ranked)


class Everybody:
    """The calm policy, ranking all it is given: it offers no shortlist."""

    name = "calm"

    def __init__(self) -> None:
        self.rank = make_policy("calm").rank


@pytest.mark.parametrize(
    "wishes",
    [
        Wishes(),
        Wishes(goal="quality"),
        Wishes(goal="energy", deadline_s=8.0),
        Wishes(max_energy_j=40.0, privacy="local"),
        Wishes(deadline_s=0.3),
        Wishes(weights=Weights(latency=0, energy=0, quality=0, cost=1)),
    ],
)
async def test_a_large_fleet_is_decided_as_if_everybody_was_ranked(house: House, wishes: Wishes) -> None:
    draw = random.Random(4)
    cards = [
        card(f"m{number}", priors=some_priors(draw), context=draw.choice((20, 2048))) for number in range(150)
    ]
    house.loop.use_fleet({one.name: one for one in cards})
    await house.loop.parts.executor.load("m7")
    found = []
    for policy in (make_policy("calm"), Everybody()):
        house.loop.steering.policy = policy
        found.append(house.loop.decide(ask(wishes=wishes, max_tokens=20), features_of(ask())))
    short, whole = found
    assert short.ranked == whole.ranked
    assert short.estimates == whole.estimates
    assert [(r.model, r.constraint) for r in short.refused] == [
        (r.model, r.constraint) for r in whole.refused
    ]
    assert len(short.refused) == RECORDED


def some_priors(draw: random.Random) -> PriorSpec:
    return PriorSpec(
        quality={"default": draw.choice((0.4, 0.6, draw.random()))},
        decode_tps=draw.choice((20.0, draw.uniform(5, 200))),
        energy_j_per_token=draw.choice((None, 1.0, draw.uniform(0.1, 3))),
    )


async def test_an_unknown_goal_is_the_callers_mistake(house: House) -> None:
    with pytest.raises(BadInput) as caught:
        await house.answer(ask(wishes=Wishes(goal="fun")))
    assert caught.value.field == "calm.goal"


async def test_a_pinned_name_pins_and_an_unknown_one_is_said(house: House) -> None:
    assert await house.answer(ask("r1", model="good")) == "good"
    with pytest.raises(UnknownModel):
        await house.answer(ask("r2", model="none"))


async def test_what_nobody_may_serve_is_recorded_too(house: House) -> None:
    with pytest.raises(NoCandidate):
        await house.answer(ask(wishes=Wishes(allowed_models=("other",))))
    stored = house.store.decision("r1")
    assert stored is not None
    assert stored.outcome is not None
    assert (stored.outcome.status, stored.outcome.model) == ("rejected", None)


async def test_a_model_whose_weights_are_on_their_way_says_so(house: House) -> None:
    house.loop.use_fleet(FLEET, {"new": "its weights are being fetched"})
    with pytest.raises(Unavailable, match="being fetched"):
        await house.answer(ask(model="new"))


async def test_a_failed_engine_is_avoided_next_time(tmp_path: Path, closing: list[object]) -> None:
    house = await open_house(tmp_path / "k.sqlite3", closing, good=Script(refuse="broken"))
    assert await house.answer(ask("r1", wishes=Wishes(goal="quality"))) == "fast"
    decision = house.loop.decide(ask("r2"), house.loop.recent["r1"].features)
    assert [candidate.model for candidate in decision.ranked] == ["fast"]
    assert [(refusal.model, refusal.constraint) for refusal in decision.refused] == [("good", "health")]
    with pytest.raises((LoadFailed, Unavailable)):
        await house.answer(ask("r3", model="good"))


async def test_latency_is_learned(house: House) -> None:
    house.backend.scripts["fast"] = Script(tpot_s=0.03, ttft_s=0.05)
    before = house.loop.decide(ask("x"), features_of(ask())).estimates["fast"].total_s.mean
    for number in range(8):
        await house.answer(ask(f"r{number}", model="fast"))
    after = house.loop.decide(ask("y"), features_of(ask())).estimates["fast"].total_s.mean
    seen = house.store.decision("r7")
    assert seen is not None
    assert seen.outcome is not None
    assert abs(after - seen.outcome.total_s) < abs(before - seen.outcome.total_s)


async def test_ratings_move_quality(house: House) -> None:
    for number in range(6):
        await house.answer(ask(f"r{number}", model="fast"))
        remembered = house.loop.recent[f"r{number}"]
        rating = Feedback(request_id=f"r{number}", rating=5.0, source="test", wall_s=0.0)
        before = house.loop.decide(ask("x"), remembered.features).estimates["fast"].quality.mean
        house.loop.rate(rating, remembered.features, "fast")
        after = house.loop.decide(ask("y"), remembered.features).estimates["fast"].quality.mean
        assert after > before
    stored = house.store.decision("r0")
    assert stored is not None
    assert [item.rating for item in stored.feedback] == [5.0]


async def test_adapt_preloads_what_fits(house: House) -> None:
    while any(state.residency != "ready" for state in house.loop.snapshot().models.values()):
        await house.loop.adapt()
        await asyncio.sleep(0.01)
    assert sorted(house.backend.running) == ["fast", "good"]


async def test_no_preloading_when_the_operator_says_no(house: House) -> None:
    house.loop.steering.preload = False
    await house.loop.adapt()
    assert house.backend.started == []


async def test_what_was_learned_survives_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "k.sqlite3"
    first: list[object] = []
    house = await open_house(path, first, fast=Script(tpot_s=0.02))
    for number in range(5):
        await house.answer(ask(f"r{number}", model="fast"))
    features = features_of(ask())
    learned = house.loop.decide(ask("x"), features).estimates["fast"]
    house.loop.checkpoint()
    for close in first:
        await close()  # type: ignore[operator]
    second: list[object] = []
    house = await open_house(path, second)
    fresh = house.loop.decide(ask("y"), features).estimates["fast"]
    house.loop.recall()
    again = house.loop.decide(ask("z"), features).estimates["fast"]
    assert again.decode_s.mean == pytest.approx(learned.decode_s.mean)
    assert again.decode_s.mean != pytest.approx(fresh.decode_s.mean)
    for close in second:
        await close()  # type: ignore[operator]


async def test_a_damaged_checkpoint_starts_from_the_priors(house: House) -> None:
    features = features_of(ask())
    before = house.loop.decide(ask("x"), features).estimates["fast"]
    house.store.checkpoint("analyzer", b"not a state")
    house.store.flush()
    house.loop.recall()
    assert house.loop.decide(ask("y"), features).estimates["fast"].total_s == before.total_s


def features_of(request: Ask) -> Features:
    return extract(request, None, lambda _: "und")
