"""The executor with a scripted backend: no process, no socket, no waiting for real time."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from msgspec.structs import replace

from calm.clock import ManualClock, SystemClock
from calm.errors import (
    BadInput,
    CalmError,
    DeadlineExceeded,
    LoadFailed,
    NeverFits,
    QueueFull,
    ShuttingDown,
    SourceError,
    UnknownModel,
)
from calm.execute.events import Limits, Measured, Want
from calm.execute.executor import Executor
from calm.records import AdapterFile, Endpoint, EngineSpec, LeaseRequest, ModelCard, PlacementPlan, SourceSpec

MIB = 2**20


class Engine:
    def __init__(self, backend: Backend, card: ModelCard, adapters: Sequence[AdapterFile]) -> None:
        self.backend, self.card = backend, card
        self.given = [adapter.card.name for adapter in adapters]
        self.death: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.stops = 0

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint(
            base_url=self.card.engine.url or f"http://{self.card.name}.test", model=self.card.name
        )

    def adapters(self) -> dict[str, Endpoint]:
        left_out = {*self.backend.misfits, *self.backend.forgets}
        taken = [name for name in self.given if name not in left_out]
        return {name: replace(self.endpoint, adapter=number) for number, name in enumerate(taken)}

    def refused(self) -> dict[str, str]:
        return {name: why for name, why in self.backend.misfits.items() if name in self.given}

    def pids(self) -> tuple[int, ...]:
        return (4711,)

    def footprint_bytes(self) -> int | None:
        return self.backend.footprints.get(self.card.name)

    async def died(self) -> str:
        return await asyncio.shield(self.death)

    async def stop(self) -> None:
        self.stops += 1
        await self.backend.stop_gate.wait()
        if self.backend.stop_errors:
            raise self.backend.stop_errors.pop()
        self.backend.running.discard(self)


class Backend:
    """Engines that start when `gate` is open, fail when told, and are counted."""

    def __init__(self, clock: ManualClock) -> None:
        self.clock = clock
        self.gate, self.stop_gate = asyncio.Event(), asyncio.Event()
        self.gate.set()
        self.stop_gate.set()
        self.footprints: dict[str, int] = {}
        self.errors: dict[str, Exception] = {}
        self.misfits: dict[str, str] = {}
        self.forgets: set[str] = set()
        self.carried: list[list[str]] = []
        self.stop_errors: list[Exception] = []
        self.started: list[tuple[str, int]] = []
        self.running: set[Engine] = set()
        self.cancelled = 0

    async def start(
        self, card: ModelCard, weights: Path | None, threads: int, adapters: Sequence[AdapterFile] = ()
    ) -> Engine:
        self.started.append((card.name, threads))
        self.carried.append([adapter.card.name for adapter in adapters])
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if card.name in self.errors:
            raise self.errors[card.name]
        self.clock.advance(0.5)
        engine = Engine(self, card, adapters)
        self.running.add(engine)
        return engine


def card(name: str, mib: int = 100, **engine: object) -> ModelCard:
    return ModelCard(
        name=name, description=name, memory_hint_bytes=mib * MIB, engine=EngineSpec(**{"slots": 2} | engine)
    )


def remote(name: str, url: str = "http://far.test") -> ModelCard:
    return ModelCard(name=name, description=name, engine=EngineSpec(kind="openai", url=url), max_in_flight=1)


async def no_weights(card: ModelCard) -> Path | None:
    return None


class Bench:
    def __init__(self, executor: Executor, backend: Backend, clock: ManualClock) -> None:
        self.executor, self.backend, self.clock = executor, backend, clock

    async def acquire(self, model: str, deadline_s: float | None = None):
        at_s = None if deadline_s is None else self.clock.now() + deadline_s
        return await self.executor.acquire(
            LeaseRequest(request_id=f"req-{model}", model=model, expected_s=1.0, deadline_at_s=at_s)
        )

    def ask(self, model: str, deadline_s: float | None = None) -> asyncio.Task:
        return asyncio.create_task(self.acquire(model, deadline_s))

    async def settle(self) -> None:
        """Let every task go as far as it can, threads included."""
        for _ in range(20):
            await asyncio.sleep(0)
        await asyncio.to_thread(int)
        for _ in range(20):
            await asyncio.sleep(0)

    def residency(self, model: str) -> str:
        return self.executor.snapshot_models()[model].residency


@asynccontextmanager
async def bench(*cards: ModelCard, weights=no_weights, **limits: object) -> AsyncIterator[Bench]:
    clock = ManualClock(100.0)
    backend = Backend(clock)
    given = {"cores": 2, "budget_bytes": 250 * MIB} | limits
    backends = {"llamacpp": backend, "openai": backend}
    executor = Executor({c.name: c for c in cards}, backends, weights, clock, Limits(**given))
    yield Bench(executor, backend, clock)
    backend.gate.set()
    backend.stop_gate.set()
    await executor.close(grace_s=0.0)
    assert not {e for e in backend.running if not e.card.remote}, "an engine was left behind"
    assert executor.used_bytes == 0


async def test_a_cold_model_is_loaded_once_for_all_who_ask() -> None:
    async with bench(card("a")) as b:
        first, second = await asyncio.gather(b.acquire("a"), b.acquire("a"))
        assert b.backend.started == [("a", 2)]
        assert first.endpoint.base_url == "http://a.test"
        assert first.load_s == pytest.approx(0.5)
        assert first.queued_s == 0.0
        assert b.executor.in_flight == b.executor.load_of("a") == 2
        assert b.executor.threads_in_use == 2
        assert b.executor.pids() == {"a": (4711,)}
        b.executor.release(first)
        b.executor.release(first)
        b.executor.release(second)
        assert b.executor.in_flight == b.executor.threads_in_use == 0


async def test_a_resident_model_is_granted_without_a_task_switch() -> None:
    async with bench(card("a")) as b:
        b.executor.release(await b.acquire("a"))
        coroutine = b.acquire("a")
        with pytest.raises(StopIteration) as returned:
            coroutine.send(None)
        assert returned.value.value.load_s == 0.0


async def test_threads_are_shared_out_among_local_models() -> None:
    async with bench(card("a"), card("b"), card("c", threads=8), budget_bytes=400 * MIB) as b:
        await b.executor.load("a")
        await b.executor.load("b")
        await b.executor.load("c")
        assert b.backend.started == [("a", 1), ("b", 1), ("c", 2)]


async def test_a_caller_who_leaves_while_the_model_loads_cancels_the_load() -> None:
    async with bench(card("a")) as b:
        b.backend.gate.clear()
        ask = b.ask("a")
        await b.settle()
        ask.cancel()
        await b.settle()
        assert ask.cancelled()
        assert b.backend.cancelled == 1
        assert b.residency("a") == "cold"
        assert b.executor.queue_length == 0


async def test_a_load_cancelled_before_its_task_first_ran_is_reported_too() -> None:
    async with bench(card("a")) as b:
        coroutine = b.acquire("a")
        coroutine.send(None)  # the load task exists, but the loop did not get to it yet
        coroutine.close()
        assert b.executor.queue_length == 0
        await b.settle()
        assert b.residency("a") == "cold"
        assert b.backend.started == []


async def test_a_grant_that_races_with_a_cancel_is_given_back() -> None:
    async with bench(card("a", slots=1)) as b:
        held = await b.acquire("a")
        ask = b.ask("a")
        await b.settle()
        b.executor.release(held)  # grants the waiting ask, whose task has not run yet
        ask.cancel()
        await b.settle()
        assert ask.cancelled()
        assert b.executor.in_flight == 0


async def test_a_failed_load_refuses_all_waiters_and_backs_off() -> None:
    async with bench(card("a")) as b:
        b.backend.errors["a"] = LoadFailed("no such architecture")
        results = await asyncio.gather(b.acquire("a"), b.acquire("a"), return_exceptions=True)
        assert [type(r) for r in results] == [LoadFailed, LoadFailed]
        assert "no such architecture" in str(results[0])
        with pytest.raises(LoadFailed, match=r"tried again in 1\.0 s"):
            await b.acquire("a")
        assert b.executor.snapshot_models()["a"].retry_at_s == pytest.approx(101.0)
        del b.backend.errors["a"]
        b.clock.advance(1.0)
        b.executor.release(await b.acquire("a"))


async def test_weights_that_cannot_be_had_are_a_failed_load() -> None:
    async def weights(card: ModelCard) -> Path | None:
        raise SourceError("checksum does not match")

    async with bench(card("a"), weights=weights) as b:
        with pytest.raises(LoadFailed, match="checksum does not match"):
            await b.acquire("a")


async def test_a_backend_that_is_missing_is_named() -> None:
    async with bench(card("a", kind="command")) as b:
        with pytest.raises(LoadFailed, match="no backend runs engines of kind command"):
            await b.acquire("a")


async def test_weights_on_disk_correct_an_estimate_the_card_could_not_give(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"")
    with file.open("r+b") as sparse:
        sparse.truncate(500 * MIB)

    async def weights(card: ModelCard) -> Path | None:
        return file

    unknown = ModelCard(
        name="a", description="", source=SourceSpec(parts=("file:x",), sha256="0" * 64), engine=EngineSpec()
    )
    async with bench(unknown, weights=weights) as b:
        with pytest.raises(NeverFits, match="is expected to take 664 MiB, the memory budget is 250 MiB"):
            await b.acquire("a")
        await b.settle()
        assert b.residency("a") == "cold"


async def test_a_measured_footprint_above_the_budget_unloads_and_refuses() -> None:
    async with bench(card("a")) as b:
        b.backend.footprints["a"] = 300 * MIB
        with pytest.raises(NeverFits, match="takes 300 MiB"):
            await b.acquire("a")
        await b.settle()
        assert b.residency("a") == "cold"
        with pytest.raises(NeverFits):
            await b.acquire("a")
        assert len(b.backend.started) == 1


async def test_the_least_needed_model_leaves_and_its_memory_is_back_before_the_next_loads() -> None:
    async with bench(card("a"), card("b"), card("c")) as b:
        for model in ("a", "b"):
            b.executor.release(await b.acquire(model))
        b.clock.advance(30.0)
        b.executor.release(await b.acquire("b"))
        b.backend.stop_gate.clear()
        ask = b.ask("c")
        await b.settle()
        assert b.residency("a") == "unloading"
        assert b.residency("c") == "cold"
        assert b.executor.used_bytes == 200 * MIB
        b.backend.stop_gate.set()
        b.executor.release(await ask)
        assert b.residency("b") == "ready"


async def test_a_dead_engine_is_cleaned_up_and_loaded_again_on_demand() -> None:
    async with bench(card("a")) as b:
        lease = await b.acquire("a")
        engine = b.executor.engine("a")
        engine.death.set_result("signal 9")
        await b.settle()
        assert engine.stops == 1
        assert b.residency("a") == "cold"
        assert "signal 9" in b.executor.snapshot_models()["a"].reason
        b.executor.release(lease)
        assert b.executor.in_flight == 0
        again = await b.acquire("a")
        assert b.executor.engine("a") is not engine
        b.executor.engine("a").death.set_result("signal 9")
        await b.settle()
        assert b.residency("a") == "failed"
        with pytest.raises(LoadFailed, match="2 times in a row"):
            await b.acquire("a")
        b.executor.release(again)


async def test_a_stop_that_fails_is_tried_again_and_told() -> None:
    async with bench(card("a")) as b:
        await b.executor.load("a")
        engine = b.executor.engine("a")
        b.backend.stop_errors = [OSError("busy"), OSError("busy")]
        await b.executor.unload("a")
        assert engine.stops == 2
        assert b.executor.snapshot_models()["a"].reason == "could not be stopped: busy"
        b.backend.running.clear()


async def test_deadlines_pass_while_waiting() -> None:
    async with bench(card("a")) as b:
        b.backend.gate.clear()
        ask = b.ask("a", deadline_s=1.5)
        await b.settle()
        b.clock.advance(2.0)
        await b.executor.tick()
        with pytest.raises(DeadlineExceeded, match=r"2\.0 s in the queue"):
            await ask
        await b.settle()
        assert b.residency("a") == "cold"


async def test_a_deadline_needs_no_tick() -> None:
    backend = Backend(ManualClock())
    backend.gate.clear()
    clock, limits = SystemClock(), Limits(cores=2, budget_bytes=250 * MIB)
    executor = Executor({"a": card("a")}, {"llamacpp": backend}, no_weights, clock, limits)
    with pytest.raises(DeadlineExceeded):
        await executor.acquire(
            LeaseRequest(request_id="r", model="a", expected_s=1.0, deadline_at_s=clock.now() + 0.02)
        )
    await executor.close()
    assert executor.used_bytes == 0


async def test_the_queue_has_a_limit_with_a_time_to_come_back() -> None:
    async with bench(card("a", slots=1), max_queue=2) as b:
        held = await b.acquire("a")
        asks = [b.ask("a"), b.ask("a")]
        await b.settle()
        with pytest.raises(QueueFull) as full:
            await b.acquire("a")
        assert full.value.retry_after_s == pytest.approx(2.0)
        b.executor.release(held)
        for ask in asks:
            b.executor.release(await ask)


async def test_unknown_models_and_policies_are_refused() -> None:
    async with bench(card("a")) as b:
        with pytest.raises(UnknownModel):
            await b.acquire("nobody")
        with pytest.raises(UnknownModel):
            b.executor.pin("nobody")
        with pytest.raises(UnknownModel):
            await b.executor.unload("nobody")
        with pytest.raises(BadInput, match="eviction"):
            b.executor.set_eviction("mru")


async def test_unload_waits_for_leases_unless_forced() -> None:
    async with bench(card("a")) as b:
        lease = await b.acquire("a")
        unload = asyncio.create_task(b.executor.unload("a"))
        await b.settle()
        assert b.residency("a") == "draining"
        b.executor.release(lease)
        await unload
        assert b.residency("a") == "cold"
        lease = await b.acquire("a")
        b.executor.pin("a")
        with pytest.raises(BadInput, match="pinned"):
            await b.executor.unload("a")
        await b.executor.unload("a", force=True)
        assert b.residency("a") == "cold"
        b.executor.release(lease)


async def test_a_preferred_model_is_loaded_ahead_of_demand() -> None:
    async with bench(card("a"), card("b")) as b:
        plan = PlacementPlan(revision=b.executor.revision, preload=("b",), value={"b": 1.0})
        b.executor.prefer(plan)
        await b.settle()
        assert b.residency("b") == "ready"
        b.executor.prefer(PlacementPlan(revision=0, preload=("a",), value={}))
        await b.settle()
        assert b.residency("a") == "cold"


async def test_tick_measures_what_is_resident() -> None:
    async with bench(card("a")) as b:
        await b.executor.load("a")
        b.backend.footprints["a"] = 150 * MIB
        await b.executor.tick()
        await b.executor.tick()
        assert b.executor.used_bytes == 150 * MIB
        assert b.executor.snapshot_models()["a"].footprint_measured
        assert sum(isinstance(event, Measured) for _, event, _ in b.executor.events) == 1


async def test_snapshots_share_what_did_not_change() -> None:
    async with bench(card("a"), card("b")) as b:
        before = b.executor.snapshot_models()
        assert b.executor.snapshot_models() is before
        await b.executor.load("a")
        after = b.executor.snapshot_models()
        assert before["a"].residency == "cold"
        assert after["a"].residency == "ready"
        assert after["b"] is before["b"]


async def test_transitions_are_told_and_a_failing_listener_harms_nobody() -> None:
    seen: list[tuple[str, str, str]] = []
    async with bench(card("a")) as b:
        b.executor.subscribe(lambda *_: 1 / 0)
        b.executor.subscribe(lambda model, old, new, at_s, detail: seen.append((model, old, new)))
        await b.executor.load("a")
    assert seen[:2] == [("a", "cold", "loading"), ("a", "loading", "ready")]
    assert seen[-1] == ("a", "unloading", "cold")


async def test_a_card_changes_while_its_model_serves() -> None:
    async with bench(card("a"), card("b")) as b:
        lease = await b.acquire("a")
        b.executor.update_fleet({"a": card("a", slots=3), "b": card("b")})
        assert b.residency("a") == "draining"
        ask = b.ask("a")
        await b.settle()
        b.executor.release(lease)
        b.executor.release(await ask)
        assert b.executor.snapshot_models()["a"].slots == 3
        assert [name for name, _ in b.backend.started] == ["a", "a"]
        b.executor.update_fleet({"b": card("b")})
        with pytest.raises(UnknownModel):
            await b.acquire("a")
        await b.settle()
        assert "a" not in b.executor.snapshot_models()


async def test_a_remote_engine_is_reached_on_first_use_and_its_cap_held() -> None:
    async with bench(remote("far")) as b:
        lease = await b.acquire("far")
        assert lease.endpoint.base_url == "http://far.test"
        waiting = b.ask("far")
        await b.settle()
        assert not waiting.done()
        assert b.executor.threads_in_use == b.executor.used_bytes == 0
        b.executor.release(lease)
        b.executor.release(await waiting)
        b.executor.update_fleet({"far": remote("far", "http://other.test")})
        lease = await b.acquire("far")
        assert lease.endpoint.base_url == "http://other.test"
        b.executor.release(lease)


async def test_a_remote_engine_that_cannot_be_reached_rests() -> None:
    async with bench(remote("far")) as b:
        b.backend.errors["far"] = LoadFailed("connection refused")
        with pytest.raises(LoadFailed, match="connection refused"):
            await b.acquire("far")
        await b.settle()
        with pytest.raises(LoadFailed, match="tried again"):
            await b.acquire("far")
        assert b.executor.in_flight == 0
        del b.backend.errors["far"]
        b.clock.advance(1.0)
        b.executor.release(await b.acquire("far"))
        assert b.executor.snapshot_models()["far"].failures == 0


async def test_close_refuses_waiters_ends_loads_and_stops_every_engine() -> None:
    async with bench(card("a", slots=1), card("b")) as b:
        lease = await b.acquire("a")
        b.backend.gate.clear()
        asks = [b.ask("a"), b.ask("b")]
        await b.settle()
        closing = asyncio.create_task(b.executor.close(grace_s=60.0))
        await b.settle()
        for ask in asks:
            with pytest.raises(ShuttingDown):
                await ask
        assert not closing.done()
        with pytest.raises(ShuttingDown):
            await b.acquire("a")
        b.executor.release(lease)
        await closing
        assert not b.backend.running
        assert b.backend.cancelled == 1


async def test_every_event_is_logged_with_its_commands() -> None:
    async with bench(card("a")) as b:
        b.executor.release(await b.acquire("a"))
        at_s, event, commands = next(e for e in b.executor.events if isinstance(e[1], Want))
        assert (at_s, event.model) == (100.0, "a")
        assert [type(c).__name__ for c in commands] == ["Moved", "StartLoad"]


@pytest.mark.parametrize("seed", range(12))
async def test_a_storm_leaks_no_lease_no_engine_and_no_answer(seed: int) -> None:
    """Callers come, leave and hold; engines fail, die and are slow to go; the fleet changes under them."""
    dice = random.Random(seed)
    names = ("a", "b", "c", "far")
    cards = {n: remote(n) if n == "far" else card(n, 100, slots=2) for n in names}
    async with bench(*cards.values(), max_queue=16) as b:
        outcomes: list[str] = []

        async def caller() -> None:
            try:
                lease = await b.acquire(dice.choice(names), dice.choice((None, 5.0)))
            except CalmError as error:
                outcomes.append(type(error).__name__)
                return
            try:
                for _ in range(dice.randrange(6)):
                    await asyncio.sleep(0)
            finally:
                b.executor.release(lease)
                outcomes.append("served")

        def disturb() -> None:
            match dice.randrange(8):
                case 0 if engine := b.executor.engine(dice.choice(names)):
                    if not engine.death.done():
                        engine.death.set_result("signal 9")
                case 1:
                    b.backend.errors = {dice.choice(names): LoadFailed("bad file")}
                case 2:
                    b.backend.errors = {}
                case 3:
                    (b.backend.gate.clear if dice.random() < 0.5 else b.backend.gate.set)()
                case 4:
                    (b.backend.stop_gate.clear if dice.random() < 0.5 else b.backend.stop_gate.set)()
                case 5:
                    name = dice.choice(names)
                    changed = card(name, 100, slots=dice.choice((1, 2))) if name != "far" else remote(name)
                    b.executor.update_fleet(cards | {name: changed})
                case 6:
                    b.executor.update_fleet({n: c for n, c in cards.items() if n != dice.choice(names)})
                case _:
                    b.backend.footprints[dice.choice("abc")] = dice.choice((50, 100, 140, 300)) * MIB

        tasks = []
        for _ in range(150):
            tasks.append(asyncio.create_task(caller()))
            disturb()
            if dice.random() < 0.2:
                dice.choice(tasks).cancel()
            for _ in range(dice.randrange(4)):
                await asyncio.sleep(0)
            b.clock.advance(dice.random())
            if dice.random() < 0.2:
                await b.executor.tick()
        b.backend.gate.set()
        b.backend.stop_gate.set()
        b.backend.errors = {}
        for _ in range(200):
            if all(task.done() for task in tasks):
                break
            b.clock.advance(1.0)
            await b.executor.tick()
            await b.settle()
        assert all(task.done() for task in tasks), "someone still waits"
        assert b.executor.in_flight == b.executor.queue_length == b.executor.threads_in_use == 0
        assert outcomes.count("served") > 10


# --- adapters -------------------------------------------------------------------------------------


def adapter(name: str, of: str = "base", **fields: object) -> ModelCard:
    source = SourceSpec(parts=(f"file:/{name}.gguf",), sha256="a" * 64)
    engine = EngineSpec(**{"slots": 2} | fields)
    return ModelCard(
        name=name, description=name, adapter_of=of, source=source, memory_hint_bytes=2 * MIB, engine=engine
    )


FAMILY = (card("base"), adapter("finance"), adapter("medical"))


async def test_specialists_lease_their_base_under_their_own_adapter() -> None:
    async with bench(*FAMILY) as b:
        finance = await b.acquire("finance")
        again = await b.acquire("finance")
        assert b.backend.started == [("base", 2)]
        assert b.backend.carried == [["finance", "medical"]]
        assert [lease.endpoint.adapter for lease in (finance, again)] == [0, 0]
        assert b.executor.engine("finance") is b.executor.engine("base")
        assert b.executor.load_of("finance") == 2
        assert list(b.executor.pids()) == ["base"]
        b.executor.release(finance)
        b.executor.release(again)
        medical = await b.acquire("medical")
        assert medical.endpoint.adapter == 1
        b.executor.release(medical)
        assert (await b.acquire("base")).endpoint.adapter not in (0, 1)


async def test_a_misfit_is_refused_with_the_reason_and_the_rest_serves() -> None:
    async with bench(*FAMILY) as b:
        b.backend.misfits = {"finance": "its rank is odd"}
        with pytest.raises(LoadFailed, match="finance cannot run on base: its rank is odd"):
            await b.acquire("finance")
        await b.acquire("medical")
        assert b.residency("finance") == "failed"
        assert b.residency("medical") == "ready"


async def test_an_adapter_whose_file_cannot_be_had_fails_alone() -> None:
    async def weights(wanted: ModelCard) -> Path | None:
        if wanted.name == "finance":
            raise SourceError("the index does not answer")
        return None

    async with bench(*FAMILY, weights=weights) as b:
        with pytest.raises(LoadFailed, match=r"could not be had: the index does not answer"):
            await b.acquire("finance")
        await b.acquire("medical")
        assert b.backend.carried == [["medical"]]


async def test_an_adapter_that_an_engine_forgets_is_failed_not_lost() -> None:
    async with bench(*FAMILY) as b:
        b.backend.forgets = {"finance"}
        with pytest.raises(LoadFailed, match="its engine did not take it"):
            await b.acquire("finance")


async def test_a_new_specialist_joins_after_the_last_lease() -> None:
    async with bench(*FAMILY[:2]) as b:
        lease = await b.acquire("finance")
        b.executor.update_fleet({c.name: c for c in FAMILY})
        joining = b.ask("medical")
        await b.settle()
        assert b.backend.carried == [["finance"]]
        b.executor.release(lease)
        assert (await joining).endpoint.adapter == 1
        assert b.backend.carried == [["finance"], ["finance", "medical"]]


async def test_remote_specialists_are_asked_by_name_and_join_without_a_restart() -> None:
    far = remote("base")
    finance = replace(adapter("finance"), engine=far.engine, max_in_flight=1)
    medical = replace(adapter("medical"), engine=far.engine, max_in_flight=1)
    async with bench(far, finance) as b:
        lease = await b.acquire("finance")
        b.executor.release(lease)
        b.executor.update_fleet({c.name: c for c in (far, finance, medical)})
        b.executor.release(await b.acquire("medical"))
        assert b.backend.carried == [["finance"], ["finance", "medical"]]
        b.backend.misfits = {"medical": "unknown there"}
        b.executor.update_fleet({c.name: c for c in (far, medical)})
        with pytest.raises(LoadFailed, match="medical cannot run on base: unknown there"):
            await b.acquire("medical")
        assert b.residency("medical") == "failed"
        assert b.residency("base") == "remote"


async def test_unloading_a_specialist_says_what_to_unload() -> None:
    async with bench(*FAMILY) as b:
        await b.executor.load("finance")
        with pytest.raises(BadInput, match="unload base"):
            await b.executor.unload("finance")
        await b.executor.unload("base")
        assert b.residency("finance") == "cold"
