"""The wait read off a snapshot: slots, core tokens, room."""

from __future__ import annotations

import msgspec
import pytest

from calm.analyze.queueing import (
    Outlook,
    Stances,
    drain_s,
    evictable_bytes,
    slot_wait_s,
    thread_wait_s,
    thread_waits,
)
from calm.records import EngineSpec, ModelCard, ModelState, Residency, Snapshot

SERVICE_S = {"a": 4.0, "b": 4.0}


def state(
    model: str,
    residency: Residency = "ready",
    in_flight: int = 0,
    waiting: int = 0,
    work_s: float = 0.0,
    threads: int = 1,
    footprint: int = 100,
) -> ModelState:
    return ModelState(
        model=model,
        residency=residency,
        pinned=False,
        in_flight=in_flight,
        waiting=waiting,
        slots=2,
        threads=threads,
        footprint_bytes=footprint,
        footprint_measured=True,
        load_s=None,
        last_used_s=None,
        failures=0,
        waiting_work_s=work_s,
    )


def snapshot(*states: ModelState, cores: int = 2, budget: int = 1000) -> Snapshot:
    return Snapshot(
        revision=1,
        at_s=0.0,
        models={s.model: s for s in states},
        budget_bytes=budget,
        used_bytes=sum(s.footprint_bytes for s in states if s.residency == "ready"),
        cores=cores,
        threads_in_use=sum(s.threads for s in states if s.in_flight),
        queue_length=0,
        in_flight=sum(s.in_flight for s in states),
    )


def card(name: str, kind: str = "llamacpp") -> ModelCard:
    engine = EngineSpec(kind="openai", slots=2) if kind == "openai" else EngineSpec(slots=2)
    return ModelCard(name=name, description="", engine=engine)


def wait(system: Snapshot, name: str, kind: str = "llamacpp") -> tuple[float, float, float, float]:
    return Outlook(system, SERVICE_S).of(system.models.get(name), card(name, kind))


def test_an_idle_resident_model_on_an_idle_machine_is_free() -> None:
    assert wait(snapshot(state("a")), "a") == (0.0, 0.0, 1, 1)


def test_a_free_slot_of_a_busy_engine_needs_no_threads() -> None:
    system = snapshot(state("a", in_flight=1, threads=2))
    assert wait(system, "a") == (0.0, 0.0, 2, 2)


def test_full_slots_wait_for_the_next_release_and_the_work_ahead() -> None:
    full = state("a", in_flight=2, waiting=1, work_s=6.0)
    assert wait(snapshot(full), "a")[0] == pytest.approx(4.0 / 3 + 6.0 / 2)
    assert slot_wait_s(state("a", in_flight=2, waiting=2), 2, 4.0) == pytest.approx(4.0 / 3 + 4.0)


def test_core_tokens_held_by_another_engine_are_waited_for() -> None:
    system = snapshot(state("a", in_flight=1, threads=2), state("b", threads=1))
    assert wait(system, "b")[0] == pytest.approx(drain_s(system.models["a"], 4.0))
    assert wait(snapshot(state("a", in_flight=1, threads=1), state("b", threads=1)), "b")[0] == 0.0


def test_threads_that_never_come_free_cost_the_last_drain() -> None:
    assert thread_wait_s([(0.0, 1), (3.0, 2)], 8) == 3.0


def test_remote_models_need_neither_threads_nor_a_load() -> None:
    system = snapshot(state("a", in_flight=1, threads=2), state("b", "remote", threads=0))
    assert wait(system, "b", "openai") == (0.0, 0.0, 1, 1)


@pytest.mark.parametrize(
    ("residency", "cold"), [("cold", 1.0), ("failed", 1.0), ("loading", 0.5), ("draining", 1.0)]
)
def test_what_is_left_of_the_load(residency: Residency, cold: float) -> None:
    assert wait(snapshot(state("a", residency)), "a")[1] == cold


def test_a_cold_model_that_needs_a_busy_one_s_room_waits_for_it() -> None:
    busy = state("a", in_flight=1, footprint=800)
    system = snapshot(busy, state("b", "cold", footprint=500), cores=4)
    assert wait(system, "b")[0] == pytest.approx(drain_s(busy, 4.0))
    idle = snapshot(state("a", footprint=800), state("b", "cold", footprint=500), cores=4)
    assert wait(idle, "b")[0] == 0.0


def test_an_unknown_model_is_cold() -> None:
    assert Outlook(snapshot(), {}).of(None, card("x"))[:2] == (0.0, 1.0)


def over(stances: Stances, system: Snapshot, cards: dict[str, ModelCard]) -> list[tuple[float, ...]]:
    found = stances.over(range(len(cards)), cards, system.models)
    wait = Outlook(system, SERVICE_S).over(found, cards)
    return list(zip(*(column.tolist() for column in wait), strict=True))


def one_by_one(system: Snapshot, cards: dict[str, ModelCard]) -> list[tuple[float, ...]]:
    outlook = Outlook(system, SERVICE_S)
    return [tuple(map(float, outlook.of(system.models.get(name), card))) for name, card in cards.items()]


def test_columns_follow_every_change_of_a_state_or_a_card() -> None:
    cards = {name: card(name) for name in "abcde"} | {"far": card("far", "openai")}
    stances = Stances()
    for row in range(len(cards)):
        stances.forget(row)
    quiet = [state(name, "cold") for name in "bc"]
    far = state("far", "remote", threads=0)
    systems = [
        snapshot(state("a"), *quiet, far),
        snapshot(state("a", in_flight=1, threads=2), *quiet, far),
        snapshot(state("a", in_flight=2, waiting=1, work_s=6.0, footprint=950), *quiet, far, cores=1),
        snapshot(state("a", "loading"), state("d", "failed", footprint=5000), *quiet, far),
        snapshot(),
    ]
    for system in [*systems, *reversed(systems)]:
        assert over(stances, system, cards) == one_by_one(system, cards)
    cards["e"] = ModelCard(name="e", description="", engine=EngineSpec(threads=3))
    stances.forget(4)
    assert over(stances, systems[0], cards) == one_by_one(systems[0], cards)


def test_specialists_of_a_base_are_one_engine() -> None:
    busy = state("base", in_flight=2, waiting=1, work_s=4.0, threads=2)
    alone = snapshot(busy)
    shared = msgspec.structs.replace(alone, models={"base": busy, "x": busy, "y": busy})
    times = {"base": 2.0}
    assert thread_waits(shared, times) == thread_waits(alone, times)
    assert evictable_bytes(shared) == evictable_bytes(alone)
    card = ModelCard(name="x", description="x", adapter_of="base")
    base = ModelCard(name="base", description="x")
    assert Outlook(shared, times).of(busy, card) == Outlook(alone, times).of(busy, base)
