"""The service model against what can be worked out by hand, and its laws."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from itertools import accumulate
from typing import Any, TypeVar

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calm.clock import ManualClock
from calm.profile import Length, MachineProfile, ModelProfile
from calm.replay.machine import SimulatedEngine, SimulatedMachine, Work, interpolated, rates
from calm.replay.simtime import run_simulated

T = TypeVar("T")
MODEL = ModelProfile(
    memory_bytes=1000,
    load_s=2.0,
    prefill_tps=100.0,
    decode_tps={"1": 10.0, "2": 16.0, "4": 20.0},
    active_w=50.0,
    idle_w=5.0,
    load_j=30.0,
    output_tokens={"default": Length(mean=10)},
)


def model(**fields: Any) -> ModelProfile:
    return msgspec.structs.replace(MODEL, **fields)


def machine(*contention: float, start_s: float = 0.0, **fields: Any) -> tuple[SimulatedMachine, ManualClock]:
    clock = ManualClock(start_s)
    profile = MachineProfile(name="m", cores=4, contention=contention or (1.0,), **fields)
    return SimulatedMachine(profile, clock), clock


async def served(
    engine: SimulatedEngine,
    clock: ManualClock,
    *,
    at_s: float = 0.0,
    prefill_s: float = 0.0,
    tokens: int = 1,
    stretch: float = 1.0,
) -> tuple[float, float]:
    """When the first and the last token came."""
    await asyncio.sleep(at_s - clock.now())
    work = Work(prefill_s, tokens, stretch)
    engine.admit(work)
    await work.read
    first_s = clock.now()
    await work.done
    return first_s, clock.now()


def together(clock: ManualClock, *requests: Coroutine[Any, Any, T]) -> list[T]:
    async def main() -> list[T]:
        return await asyncio.gather(*requests)

    return run_simulated(main(), clock)


# --- one engine -------------------------------------------------------------------------------------


def test_one_request_takes_its_prompt_and_then_its_tokens() -> None:
    house, clock = machine()
    [(first_s, last_s)] = together(clock, served(house.make(MODEL), clock, prefill_s=0.7, tokens=21))
    assert first_s == pytest.approx(0.7)
    assert last_s == pytest.approx(0.7 + 20 / 10)


def test_an_answer_of_one_token_ends_with_its_prompt() -> None:
    house, clock = machine()
    [(first_s, last_s)] = together(clock, served(house.make(MODEL), clock, prefill_s=0.7, tokens=1))
    assert first_s == last_s == pytest.approx(0.7)


def test_the_stretch_of_a_request_slows_its_own_tokens() -> None:
    house, clock = machine()
    [(_, last_s)] = together(clock, served(house.make(MODEL), clock, tokens=11, stretch=3.0))
    assert last_s == pytest.approx(3 * 10 / 10)


def test_two_sequences_share_the_aggregate_rate() -> None:
    house, clock = machine()
    engine = house.make(MODEL)
    ends = together(clock, *(served(engine, clock, tokens=17) for _ in range(2)))
    assert [last_s for _, last_s in ends] == pytest.approx([16 / (16 / 2)] * 2)


def test_who_stays_gets_the_rate_of_one_again() -> None:
    house, clock = machine()
    engine = house.make(MODEL)
    ends = together(clock, served(engine, clock, tokens=9), served(engine, clock, tokens=29))
    assert ends[0][1] == pytest.approx(8 / 8)
    assert ends[1][1] == pytest.approx(1.0 + (28 - 8) / 10)


def test_a_prompt_stalls_who_decodes() -> None:
    house, clock = machine()
    engine = house.make(MODEL)
    ends = together(
        clock, served(engine, clock, tokens=31), served(engine, clock, at_s=1.0, prefill_s=0.5, tokens=1)
    )
    assert ends[1][1] == pytest.approx(1.5)
    assert ends[0][1] == pytest.approx(3.0 + 0.5)


def test_prompts_are_read_one_after_the_other_in_the_order_they_came() -> None:
    house, clock = machine()
    engine = house.make(MODEL)
    ends = together(
        clock, served(engine, clock, prefill_s=1.0), served(engine, clock, at_s=0.2, prefill_s=0.3)
    )
    assert [first_s for first_s, _ in ends] == pytest.approx([1.0, 1.3])


def test_rates_between_two_counts_are_interpolated_and_constant_beyond() -> None:
    counts, values = rates(MODEL)
    assert (counts, values) == ([1, 2, 4], [10.0, 16.0, 20.0])
    found = [interpolated(counts, values, count) for count in (1, 2, 3, 4, 9)]
    assert found == pytest.approx([10.0, 16.0, 18.0, 20.0, 20.0])


def test_a_cancelled_request_leaves_the_others_its_share() -> None:
    house, clock = machine()
    engine = house.make(MODEL)

    async def leaves() -> None:
        work = Work(0.0, 1000, 1.0)
        engine.admit(work)
        await asyncio.sleep(1.0)
        engine.cancel(work)
        engine.cancel(work)  # safe to repeat
        assert not work.done.done()

    async def both() -> float:
        left = asyncio.create_task(leaves())
        _, last_s = await served(engine, clock, tokens=29)
        await left
        return last_s

    assert run_simulated(both(), clock) == pytest.approx(1.0 + (28 - 8) / 10)
    assert not engine.active


def test_a_prompt_that_is_cancelled_makes_way() -> None:
    house, clock = machine()
    engine = house.make(MODEL)

    async def both() -> float:
        first = Work(100.0, 1, 1.0)
        engine.admit(first)
        second = Work(0.5, 1, 1.0)
        engine.admit(second)
        await asyncio.sleep(1.0)
        engine.cancel(first)
        await second.done
        assert second.reads_since_s == pytest.approx(1.0)
        return clock.now()

    assert run_simulated(both(), clock) == pytest.approx(1.5)


# --- several engines ----------------------------------------------------------------------------------


def test_two_active_engines_slow_each_other_while_both_are() -> None:
    house, clock = machine(1.0, 1.25)
    ends = together(
        clock,
        served(house.make(MODEL), clock, prefill_s=1.0),
        served(house.make(MODEL), clock, prefill_s=2.0),
    )
    assert ends[0][1] == pytest.approx(1.25)
    assert ends[1][1] == pytest.approx(1.25 + (2.0 - 1.0))


def test_beyond_the_last_factor_contention_is_constant() -> None:
    house, clock = machine(1.0, 2.0)
    ends = together(clock, *(served(house.make(MODEL), clock, prefill_s=1.0) for _ in range(3)))
    assert [last_s for _, last_s in ends] == pytest.approx([2.0] * 3)


def test_an_engine_of_another_machine_shares_nothing_with_ours() -> None:
    house, clock = machine(1.0, 2.0, loads_block=True)
    away, ours = house.make(MODEL, apart=True), house.make(MODEL)

    async def load() -> None:
        with house.loading(10.0, 0.5):
            await asyncio.sleep(0.5)

    ends = together(clock, served(away, clock, prefill_s=1.0), served(ours, clock, prefill_s=1.0), load())
    assert ends[0] == pytest.approx((1.0, 1.0))
    assert ends[1] == pytest.approx((1.5, 1.5))


@pytest.mark.parametrize(("blocks", "end_s"), [(True, 3.0), (False, 1.0)])
def test_a_load_stops_the_others_where_it_blocks(blocks: bool, end_s: float) -> None:
    house, clock = machine(loads_block=blocks)
    engine = house.make(model(load_j=0.0))

    async def load() -> None:
        await asyncio.sleep(0.5)
        with house.loading(0.0, 2.0):
            await asyncio.sleep(2.0)

    ends = together(clock, served(engine, clock, prefill_s=1.0), load())
    assert ends[0] == pytest.approx((end_s, end_s))
    stalled_s = end_s - 1.0
    passed_s = clock.now() - end_s
    assert house.joules == pytest.approx(1.0 * 50 + (stalled_s + passed_s) * 5)


# --- joules -------------------------------------------------------------------------------------------


def test_joules_are_active_and_idle_watts_over_their_times_and_the_load() -> None:
    house, clock = machine()
    engine = house.make(MODEL)

    async def main() -> None:
        await served(engine, clock, at_s=2.0, prefill_s=1.0, tokens=11)
        await asyncio.sleep(4.0)

    run_simulated(main(), clock)
    assert house.joules == pytest.approx(30 + 2 * 5 + (1 + 1) * 50 + 4 * 5)
    house.remove(engine)
    clock.advance(100.0)
    assert house.joules == pytest.approx(30 + 2 * 5 + (1 + 1) * 50 + 4 * 5), "gone engines draw nothing"


def test_two_sequences_on_one_engine_draw_its_watts_once() -> None:
    house, clock = machine()
    engine = house.make(model(load_j=0.0))
    together(clock, *(served(engine, clock, tokens=17) for _ in range(2)))
    assert house.joules == pytest.approx(2.0 * 50)


def test_a_load_that_is_broken_off_has_used_its_share() -> None:
    house, clock = machine()

    async def breaks_off() -> None:
        with house.loading(40.0, 4.0):
            await asyncio.sleep(1.0)
            assert house.joules == pytest.approx(10.0), "one under way counts too"
            raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        run_simulated(breaks_off(), clock)
    assert house.joules == pytest.approx(10.0)


def test_a_finished_load_is_charged_once() -> None:
    house, clock = machine()

    async def loads() -> None:
        with house.loading(30.0, 2.0):
            await asyncio.sleep(2.0)
        house.make(MODEL)

    run_simulated(loads(), clock)
    assert house.joules == pytest.approx(30.0)


# --- laws -----------------------------------------------------------------------------------------------

REQUESTS = st.lists(
    st.tuples(
        st.floats(0.001, 2.0), st.floats(0.0, 2.0), st.integers(1, 60), st.floats(0.3, 3.0), st.integers(0, 1)
    ),
    min_size=1,
    max_size=10,
)
"""Gap to the arrival before, prompt seconds, tokens, stretch, engine."""


@settings(max_examples=40)
@given(REQUESTS)
def test_nobody_is_lost_or_too_fast_and_work_costs_its_watts(
    requests: list[tuple[float, float, int, float, int]],
) -> None:
    house, clock = machine(1.0, 1.5)
    engines = [house.make(MODEL), house.make(MODEL)]
    arrivals_s = list(accumulate(gap_s for gap_s, *_ in requests))
    ends = together(
        clock,
        *(
            served(engines[e], clock, at_s=a, prefill_s=p, tokens=n, stretch=s)
            for a, (_, p, n, s, e) in zip(arrivals_s, requests, strict=True)
        ),
    )
    for arrived_s, (_, prefill_s, tokens, stretch, _), (first_s, last_s) in zip(
        arrivals_s, requests, ends, strict=True
    ):
        assert first_s >= arrived_s + prefill_s - 1e-6
        assert last_s >= first_s + (tokens - 1) * stretch / 10.0 - 1e-6, "alone it is fastest"
    for number, engine in enumerate(engines):
        mine = [(r, end) for r, end in zip(requests, ends, strict=True) if r[4] == number]
        least_s = sum(r[1] + (r[2] - 1) * r[3] / 20.0 for r, _ in mine)
        assert engine.joules >= 30 + 50 * least_s - 1e-5, "at best all of it at the best batch's rate"
        firsts = [first_s for _, (first_s, _) in mine]
        assert firsts == sorted(firsts), "prompts are read in the order they came"


@settings(max_examples=40)
@given(st.lists(st.tuples(st.floats(0.001, 2.0), st.floats(0.01, 2.0)), min_size=1, max_size=10))
def test_a_serial_engine_conserves_work(requests: list[tuple[float, float]]) -> None:
    """Lindley: each begins when it has come and the one before has ended."""
    house, clock = machine()
    engine = house.make(model(load_j=0.0, idle_w=0.0))
    arrivals_s = list(accumulate(gap_s for gap_s, _ in requests))
    ends = together(
        clock,
        *(served(engine, clock, at_s=a, prefill_s=s) for a, (_, s) in zip(arrivals_s, requests, strict=True)),
    )
    free_s = 0.0
    for arrived_s, (_, service_s), (_, last_s) in zip(arrivals_s, requests, ends, strict=True):
        free_s = max(free_s, arrived_s) + service_s
        assert last_s == pytest.approx(free_s, abs=1e-6)
    assert house.joules == pytest.approx(50 * sum(service_s for _, service_s in requests), abs=1e-5)


@pytest.mark.parametrize("start_s", [1e5, 1e7])
def test_events_still_end_when_clocks_have_run_for_long(start_s: float) -> None:
    """A float second is coarse then: what is left of work can be less than the clock can tell."""
    house, clock = machine(1.0, 1.37, start_s=start_s)
    engines = [house.make(model(decode_tps={"1": 5000.0, "8": 15000.0})) for _ in range(2)]
    ends = together(
        clock,
        *(
            served(
                engines[i % 2],
                clock,
                at_s=start_s + i * 0.0137,
                prefill_s=0.01 * (i % 3),
                tokens=1 + 37 * i % 300,
                stretch=0.5 + 0.37 * (i % 4),
            )
            for i in range(100)
        ),
    )
    assert len(ends) == 100
