"""Simulated time: the loop jumps to the next timer, and equal programs have equal histories."""

from __future__ import annotations

import asyncio
import threading
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calm.clock import ManualClock
from calm.replay.simtime import Stuck, run_simulated


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


def test_a_sleep_takes_its_simulated_time_and_no_other(clock: ManualClock) -> None:
    async def a_day() -> float:
        await asyncio.sleep(86_400.0)
        return asyncio.get_running_loop().time()

    assert run_simulated(a_day(), clock) == pytest.approx(86_400.0)
    assert clock.now() == pytest.approx(86_400.0)


def test_more_than_a_day_passes_in_one_sleep(clock: ManualClock) -> None:
    """A selector's longest wait is a day: the loop has to take several."""
    run_simulated(asyncio.sleep(1e6), clock)
    assert clock.now() == pytest.approx(1e6)


def test_a_timeout_rings_at_its_time(clock: ManualClock) -> None:
    async def wait_in_vain() -> None:
        await asyncio.wait_for(asyncio.get_running_loop().create_future(), 5.0)

    with pytest.raises(TimeoutError):
        run_simulated(wait_in_vain(), clock)
    assert clock.now() == pytest.approx(5.0)


def test_time_stands_still_while_there_is_something_to_do(clock: ManualClock) -> None:
    async def busy() -> None:
        asyncio.get_running_loop().call_later(1.0, lambda: None)
        for _ in range(1000):
            await asyncio.sleep(0)

    run_simulated(busy(), clock)
    assert clock.now() == 0.0


@settings(max_examples=30)
@given(st.lists(st.floats(0.0, 1e4), min_size=1, max_size=20))
def test_sleepers_wake_in_order_each_at_its_own_time(delays_s: list[float]) -> None:
    clock = ManualClock()
    woke: list[tuple[float, float]] = []

    async def sleeper(delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        woke.append((clock.now(), delay_s))

    async def main() -> None:
        await asyncio.gather(*map(sleeper, delays_s))

    run_simulated(main(), clock)
    assert [at_s for at_s, _ in woke] == sorted(at_s for at_s, _ in woke)
    assert all(at_s == pytest.approx(delay_s, abs=1e-8) for at_s, delay_s in woke)


def test_work_for_threads_runs_inline(clock: ManualClock) -> None:
    assert run_simulated(asyncio.to_thread(threading.get_ident), clock) == threading.get_ident()


def test_an_error_in_a_thread_reaches_who_awaits_it(clock: ManualClock) -> None:
    def fails() -> None:
        raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        run_simulated(asyncio.to_thread(fails), clock)


def test_a_deadlock_is_an_error_not_a_hang(clock: ManualClock) -> None:
    async def forever() -> None:
        await asyncio.get_running_loop().create_future()

    with pytest.raises(Stuck, match="nothing is scheduled"):
        run_simulated(forever(), clock)


def test_equal_programs_have_equal_histories() -> None:
    def history() -> list[tuple[float, int]]:
        clock, random = ManualClock(), Random(1)
        seen: list[tuple[float, int]] = []

        async def worker(number: int, lock: asyncio.Lock) -> None:
            for _ in range(5):
                await asyncio.sleep(random.choice((0.0, 0.5, 1.0)))
                async with lock:
                    await asyncio.to_thread(seen.append, (clock.now(), number))

        async def main() -> None:
            lock = asyncio.Lock()
            await asyncio.gather(*(worker(number, lock) for number in range(10)))

        run_simulated(main(), clock)
        return seen

    assert history() == history()
