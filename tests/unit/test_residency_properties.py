"""Random histories against the residency machine: invariants I1 to I8 of decision 0001."""

from __future__ import annotations

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from calm.execute.entry import HOLDS_MEMORY
from calm.execute.events import (
    AdminLoad,
    AdminUnload,
    Cancel,
    CancelLoad,
    Close,
    Command,
    Died,
    Done,
    Event,
    FleetChanged,
    Grant,
    Limits,
    Loaded,
    LoadFailed,
    Measured,
    Moved,
    Pin,
    Prefer,
    Refuse,
    Release,
    SetBudget,
    SetPolicy,
    Sized,
    StartLoad,
    StartUnload,
    Tick,
    Unloaded,
    Unpin,
    Want,
)
from calm.execute.eviction import parse_eviction
from calm.execute.residency import Machine
from calm.execute.sizing import size_fleet
from calm.records import EngineSpec, ModelCard, PlacementPlan, SourceSpec

HOSTS = ("a", "b", "c", "d", "r")
ADAPTERS = ("a1", "a2", "r1")
"""Each on the engine of its first letter."""
NAMES = (*HOSTS, *ADAPTERS)
EVICTIONS = ("calm", "lru", "lfu", "fifo", "lru:1", "lfu:2", "calm:3")
CORES = 2
BYPASS_S = 2.0


def make_card(name: str, variant: int = 0) -> ModelCard:
    if name in ADAPTERS:
        return ModelCard(
            name=name,
            description=f"variant {variant}",
            adapter_of=name[0],
            memory_hint_bytes=3,
            source=SourceSpec(parts=("file:/x",), sha256=("0" if variant < 2 else "1") * 64),
            engine=make_card(name[0]).engine,
        )
    if name == "r":
        return ModelCard(name=name, description="", engine=EngineSpec(kind="openai", slots=2))
    hint = {"a": 20, "b": 40, "c": 60, "d": 90}[name]
    return ModelCard(
        name=name,
        description=f"variant {variant}",
        memory_hint_bytes=hint,
        context=2048 if variant < 2 else 4096,
        engine=EngineSpec(slots=2, threads=1 + len(name + "x" * (hint > 50)) // 2 * (hint > 50)),
    )


class World:
    """Does what the machine orders, late and in any order, and checks that it orders nothing it must not."""

    def __init__(self, queue: str, eviction: str) -> None:
        self.limits = Limits(
            cores=CORES, budget_bytes=100, max_queue=12, bypass_s=BYPASS_S, backoff_s=1.0, idle_unload_s=20.0
        )
        self.machine = Machine(self.limits, parse_eviction(eviction), queue)  # type: ignore[arg-type]
        self.at_s = 0.0
        self.budget = 100
        self.cards: dict[str, ModelCard] = {}
        self.engines: dict[str, str] = {}  # host -> loading | cancelling | up | stopping
        self.given: dict[str, set[str]] = {}  # host -> what its engine was started with
        self.misfits: set[str] = set()
        self.threads: dict[str, int] = {}
        self.bytes: dict[str, int] = {}
        self.believed: dict[str, int] = {}
        self.wanted_since: dict[str, set[str]] = {}
        self.waiting: dict[int, tuple[str, float]] = {}
        self.orders: set[int] = set()
        self.leases: dict[int, str] = {}
        self.answers: dict[int, str] = {}
        self.plan: tuple[str, ...] = ()
        self.excess_known = False
        self.may_end_leases = False
        self.next_ticket = 1
        self.fleet({name: make_card(name) for name in NAMES})

    # --- events ---

    def fleet(self, cards: dict[str, ModelCard]) -> None:
        self.cards = cards
        if "r" not in cards:  # requests at a remote engine outlive its card
            self.leases = {t: "r, removed" if m[0] == "r" else m for t, m in self.leases.items()}
        self.feed(FleetChanged(self.at_s, size_fleet(cards, CORES)))

    def ticket(self) -> int:
        self.next_ticket += 1
        return self.next_ticket

    def want(self, model: str, expected_s: float, deadline_s: float | None) -> None:
        ticket = self.ticket()
        self.waiting[ticket] = (model, self.at_s)
        deadline = None if deadline_s is None else self.at_s + deadline_s
        self.feed(Want(self.at_s, ticket, f"req-{ticket}", model, expected_s, deadline))
        state = self.machine.models().get(model)
        if state is not None and state.footprint_bytes > self.budget and state.residency == "cold":
            assert self.answers.get(ticket) == "refused", "I8: it never fits and was not refused at once"

    def order(self, model: str, *, load: bool, force: bool = False) -> None:
        ticket = self.ticket()
        self.orders.add(ticket)
        if load:
            self.wanted_since.setdefault(model[0], set()).add("asked")
            self.feed(AdminLoad(self.at_s, ticket, model))
        else:
            self.may_end_leases = force
            self.feed(AdminUnload(self.at_s, ticket, model, force))

    def feed(self, event: Event) -> list[Command]:
        before_bytes = self.machine.used_bytes
        if isinstance(event, Died | Close | FleetChanged):
            self.may_end_leases = True
        commands = self.machine.step(event)
        for command in commands:
            self.obey(command)
        self.may_end_leases = False
        self.check(event, before_bytes, commands)
        return commands

    # --- commands ---

    def obey(self, command: Command) -> None:
        match command:
            case StartLoad(model, threads):
                assert model not in self.engines, "I3: one engine per model at a time"
                assert model in self.cards
                assert model in HOSTS, "an engine for an adapter"
                self.engines[model] = "loading"
                self.given[model] = {n for n, card in self.cards.items() if card.host == model}
                self.threads[model] = threads
                self.bytes[model] = self.machine.models()[model].footprint_bytes
                self.wanted_since.setdefault(model, set())
            case CancelLoad(model):
                assert self.engines[model] == "loading"
                self.engines[model] = "cancelling"
            case StartUnload(model):
                assert self.engines[model] == "up"
                held = [t for t, m in self.leases.items() if m[0] == model]
                assert not held or self.may_end_leases, "I2: evicted under a lease"
                for ticket in held:
                    del self.leases[ticket]
                self.engines[model] = "stopping"
            case Grant(ticket):
                self.granted(ticket)
            case Refuse(ticket, _):
                self.answer(ticket, "refused")
            case Done(ticket):
                assert ticket in self.orders
                self.answer(ticket, "done")
            case Moved():
                assert command.old != command.new

    def answer(self, ticket: int, answer: str) -> None:
        assert ticket not in self.answers, "I4: answered twice"
        assert ticket in self.waiting or ticket in self.orders
        self.answers[ticket] = answer
        self.waiting.pop(ticket, None)

    def granted(self, ticket: int) -> None:
        model, _ = self.waiting[ticket]
        self.answer(ticket, "granted")
        host = self.cards[self.cards[model].host]
        if not host.remote:
            assert self.engines.get(host.name) == "up", "granted without an engine"
            assert model in self.given[host.name], "granted on an engine that does not carry it"
            assert model not in self.misfits, "granted on an engine that could not take it"
        self.leases[ticket] = model
        held = [m for m in self.leases.values() if m[0] == host.name and m != "r, removed"]
        assert len(held) <= host.concurrency, "a base and its adapters share its places"

    # --- invariants ---

    def check(self, event: Event, before_bytes: int, commands: list[Command]) -> None:
        machine = self.machine
        assert machine.used_bytes == sum(self.bytes.values()), "bytes are counted wrong"
        if machine.used_bytes > self.budget:
            grew = isinstance(event, Loaded | Measured | Sized | SetBudget)
            assert self.excess_known or grew, "I1: over budget without a surprise"
            assert not any(isinstance(c, StartLoad) for c in commands), "I1: loaded while over budget"
            self.excess_known = True
        else:
            self.excess_known = False
        active = {m[0] for m in self.leases.values() if not m.startswith("r")}
        assert sum(self.threads[m] for m in active) <= CORES, "I5: more threads than cores"
        assert machine.cores_in_use == sum(self.threads[m] for m in active)
        assert machine.in_flight == len(self.leases)
        assert machine.queue_length <= self.limits.max_queue + len(self.orders)
        self.check_states()
        self.check_abandoned()
        self.check_one_adapter_at_a_time()
        self.check_overtaking(commands)

    def check_states(self) -> None:
        states = self.machine.models()
        holding = [s for n, s in states.items() if s.model == n and s.residency in HOLDS_MEMORY]
        assert {state.model for state in holding} <= self.bytes.keys(), "an adapter holds memory of its own"
        for name, state in states.items():
            if state.model != name:
                assert state is states[state.model], "an adapter's state is its host's"
                continue
            if name in ADAPTERS:
                assert (state.residency, state.footprint_bytes) == ("failed", 0)
                assert state.reason
                continue
            engine = self.engines.get(name)
            expected = {
                "loading": {"loading"},
                "up": {"ready", "draining"},
                "cancelling": {"unloading"},
                "stopping": {"unloading"},
                None: {"cold", "failed", "remote"},
            }[engine]
            assert state.residency in expected
            assert state.in_flight == sum(m[0] == name and m != "r, removed" for m in self.leases.values())
            assert state.waiting >= sum(m[0] == name for m, _ in self.waiting.values())

    def check_one_adapter_at_a_time(self) -> None:
        for host in HOSTS[:-1]:
            at_work = {model for model in self.leases.values() if model[0] == host}
            assert len(at_work) <= 1, "an engine that applies one adapter at a time works for two"

    def check_abandoned(self) -> None:
        planned = {name[0] for name in self.plan}
        for state in self.machine.models().values():
            if state.residency == "loading" and state.waiting == 0:
                name = state.model
                assert state.pinned or name in planned or self.wanted_since[name], "I7: loads for nobody"

    def check_overtaking(self, commands: list[Command]) -> None:
        """I6: nobody wakes an idle engine while an ask past bypass_s, before it in line, lacks cores only."""
        if self.machine.policies[0] != "fifo":
            return
        granted = [c.ticket for c in commands if isinstance(c, Grant)]
        for ticket in granted:
            model = self.leases.get(ticket)
            if model is None or model.startswith("r"):
                continue
            if sum(m[0] == model[0] for m in self.leases.values()) > 1:
                continue
            for older, (wanted, arrived_s) in self.waiting.items():
                if older < ticket and self.at_s >= arrived_s + BYPASS_S and wanted in self.cards:
                    state = self.machine.models()[wanted]
                    others = {m for m in self.leases.values() if m[0] == wanted[0]} - {wanted}
                    free = state.residency == "ready" and state.in_flight < state.slots and not others
                    assert not free, "I6: overtaken past bypass_s"

    # --- what happens to engines ---

    def finish_load(self, model: str, ok: bool, extra: int, misfits: tuple[str, ...] = ()) -> None:
        if self.engines.get(model) == "cancelling":
            self.gone(model)
            self.feed(Unloaded(self.at_s, model))
        elif self.engines.get(model) == "loading" and ok:
            self.engines[model] = "up"
            self.bytes[model] = max(1, self.bytes[model] + extra)
            self.wanted_since.pop(model, None)
            refused = {name: "of another shape" for name in sorted(self.given[model]) if name in misfits}
            self.misfits = {name for name in self.misfits if name[0] != model} | refused.keys()
            self.feed(Loaded(self.at_s, model, self.bytes[model], 0.5, refused))
        elif self.engines.get(model) == "loading":
            self.gone(model)
            self.feed(LoadFailed(self.at_s, model, "no such file"))

    def finish_stop(self, model: str) -> None:
        if self.engines.get(model) in ("stopping", "cancelling"):
            self.gone(model)
            self.feed(Unloaded(self.at_s, model))

    def gone(self, model: str) -> None:
        del self.engines[model], self.bytes[model], self.threads[model]
        self.wanted_since.pop(model, None)

    def die(self, model: str) -> None:
        if self.engines.get(model) == "up":
            self.feed(Died(self.at_s, model, "killed"))

    def measure(self, model: str, size: int) -> None:
        if self.engines.get(model) == "up":
            self.bytes[model] = size
            self.feed(Measured(self.at_s, model, size))

    def size(self, model: str, size: int) -> None:
        state = self.machine.models().get(model)
        if self.engines.get(model) == "loading" and state is not None and not state.footprint_measured:
            self.bytes[model] = size
            self.feed(Sized(self.at_s, model, size))

    def release(self, index: int) -> None:
        if self.leases:
            ticket = sorted(self.leases)[index % len(self.leases)]
            del self.leases[ticket]
            self.feed(Release(self.at_s, ticket))
            self.feed(Release(self.at_s, ticket))

    def cancel(self, index: int) -> None:
        if self.waiting:
            ticket = sorted(self.waiting)[index % len(self.waiting)]
            self.answer(ticket, "cancelled")
            self.feed(Cancel(self.at_s, ticket))

    def prefer(self, names: tuple[str, ...], stale: bool) -> None:
        for name in names:
            self.wanted_since.setdefault(name[0], set()).add("preferred")
        revision = self.machine.revision - (1 if stale else 0)
        self.plan = self.plan if stale else names
        values = {name: 1.0 + i for i, name in enumerate(reversed(names))}
        self.feed(Prefer(self.at_s, PlacementPlan(revision=revision, preload=names, value=values)))

    # --- the end ---

    def come_to_rest(self) -> None:
        """Every engine answers, every lease ends: then every ask has its answer."""
        for _ in range(400):
            if not self.waiting and not (self.orders - self.answers.keys()):
                return
            self.at_s += 1.0
            for model in list(self.engines):
                self.finish_load(model, True, 0)
                self.finish_stop(model)
            if self.leases:
                self.release(0)
            self.feed(Tick(self.at_s))
        raise AssertionError(f"I4, I6: never answered: {self.waiting}, {self.machine.models()}")


def perform(world: World, op: str, model: str, number: int) -> None:
    world.at_s += (number % 7) * 0.1
    match op:
        case "want":
            world.want(model, 0.1 + number % 5, None if number % 4 else 3.0)
        case "cancel":
            world.cancel(number)
        case "release":
            world.release(number)
        case "loaded":
            misfits = ADAPTERS[: number % 3] if number % 4 == 0 else ()
            world.finish_load(model[0], True, 0 if number % 3 else number % 60 - 20, misfits)
        case "load_failed":
            world.finish_load(model[0], False, 0)
        case "unloaded":
            world.finish_stop(model[0])
        case "died":
            world.die(model[0])
        case "measured":
            world.measure(model[0], 1 + number % 120)
        case "sized":
            world.size(model[0], 1 + number % 120)
        case "pin":
            world.feed(Pin(world.at_s, model) if number % 2 else Unpin(world.at_s, model))
        case "prefer":
            world.prefer(("a", "b", "a1", "c", "d", "a2")[number % 6 : number % 6 + 2], number % 5 == 0)
        case "load":
            world.order(model, load=True)
        case "unload":
            world.order(model, load=False, force=number % 3 == 0)
        case _:
            reconfigure(world, op, model, number)


def reconfigure(world: World, op: str, model: str, number: int) -> None:
    match op:
        case "budget":
            world.budget = 30 + number % 120
            world.feed(SetBudget(world.at_s, world.budget))
        case "policy":
            eviction = parse_eviction(EVICTIONS[number % len(EVICTIONS)])
            world.feed(SetPolicy(world.at_s, queue=("fifo", "stcf")[number % 2], eviction=eviction))
        case "fleet":
            cards = dict(world.cards)
            if number % 3 == 0:
                cards.pop(model, None)
            else:
                cards[model] = make_card(model, number % 4)
            world.fleet(cards)
        case "tick":
            world.at_s += (number % 5) * 0.7
            world.feed(Tick(world.at_s))


OFTEN = ["want"] * 6 + ["release"] * 4 + ["loaded"] * 4 + ["unloaded"] * 3 + ["tick"] * 2 + ["cancel"] * 2
RARELY = [
    "load_failed",
    "died",
    "measured",
    "sized",
    "pin",
    "prefer",
    "load",
    "unload",
    "budget",
    "policy",
    "fleet",
]
STEPS = st.tuples(st.sampled_from(OFTEN + RARELY), st.sampled_from(NAMES), st.integers(0, 999))
QUICK = settings(
    max_examples=250,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
)


@QUICK
@given(
    st.sampled_from(("fifo", "stcf")), st.sampled_from(EVICTIONS), st.lists(STEPS, min_size=40, max_size=160)
)
def test_no_history_breaks_an_invariant(queue: str, eviction: str, steps: list[tuple[str, str, int]]) -> None:
    world = World(queue, eviction)
    for op, model, number in steps:
        perform(world, op, model, number)
    world.come_to_rest()
    assert not world.waiting
    assert world.orders <= world.answers.keys()


@QUICK
@given(st.sampled_from(EVICTIONS), st.lists(STEPS, max_size=60))
@example("calm", [("want", "a", 1), ("loaded", "a", 1), ("want", "b", 1)])
def test_close_leaves_nothing_behind(eviction: str, steps: list[tuple[str, str, int]]) -> None:
    world = World("fifo", eviction)
    for op, model, number in steps:
        perform(world, op, model, number)
    world.feed(Close(world.at_s))
    assert not world.waiting
    world.feed(Close(world.at_s, force=True))
    for model in list(world.engines):
        world.finish_stop(model)
    assert not world.engines
    assert world.machine.used_bytes == 0
    assert world.orders <= world.answers.keys()


@QUICK
@given(st.lists(STEPS, max_size=80))
def test_a_history_replays_to_the_same_commands(steps: list[tuple[str, str, int]]) -> None:
    def run() -> tuple[dict[int, str], object]:
        world = World("stcf", "calm")
        for op, model, number in steps:
            perform(world, op, model, number)
        return world.answers, world.machine.models()

    assert run() == run()
