"""The simulated house and one trial in it: the composition root of replay, as wiring.py is of service.

`run_trial` builds the loop that `calm serve` builds, over the simulated machine, sends the workload at its
times, rates the answers, and returns what happened. Everything is a function of its arguments.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from msgspec.structs import replace

from calm.analyze.analyzer import Analyzer
from calm.clock import ManualClock
from calm.errors import CalmError
from calm.execute.dispatch import Dispatcher
from calm.execute.events import Limits
from calm.execute.eviction import EvictionPolicy
from calm.execute.executor import Executor
from calm.loop import Orchestrator, Parts, Steering
from calm.meters.ledger import EnergyLedger
from calm.monitor.window import Workload as Window
from calm.plan import goals as goal_book
from calm.plan.engines import families
from calm.plan.floor import tuning_for
from calm.plan.policies import make_policy
from calm.ports import Embedder, Policy
from calm.profile import Profile
from calm.records import Ask, Decision, Feedback, ModelCard, Outcome, Residency
from calm.replay.adapters import (
    METER,
    Forgetful,
    SimulatedBackend,
    SimulatedMeter,
    SimulatedSensors,
    SimulatedUpstream,
)
from calm.replay.cards import fleet_for, no_weights
from calm.replay.embedding import static_embedder
from calm.replay.hindsight import BeladyEviction, belady_count, foresight, oracle
from calm.replay.machine import SimulatedMachine
from calm.replay.outcomes import Outcomes
from calm.replay.simtime import run_simulated
from calm.report.records import Move, Row, Sample, Setup, Trial
from calm.workloads.records import Query, Workload
from calm.workloads.workload import rated

ADAPT_S = 1.0
NO_DEADLINE_S = 1e9
ENDLESS_QUEUE = 1 << 30
FIRST_PASS_CACHE = "lru"
"""Eviction while a trial's choices are recorded for `belady`."""


@dataclass(frozen=True, kw_only=True)
class House:
    """What stays the same over the trials of a study."""

    fleet: Mapping[str, ModelCard]
    profile: Profile
    budget_bytes: int
    feedback: float = 1.0
    """Share of the answers that are rated."""
    max_tokens: int | None = None
    deadline_s: float = NO_DEADLINE_S
    max_queue: int = ENDLESS_QUEUE
    embed: bool = True
    """With the static embedder, as in service by default."""
    minilm: Callable[[], Embedder] | None = None
    """Makes the embedder of the paper's policy; None: that policy cannot be had."""


def run_trial(
    house: House,
    workload: Workload,
    setup: Setup,
    warm: Workload | None = None,
    watch: Callable[[Orchestrator], None] = lambda loop: None,
) -> Trial:
    """One setup on one seed's workload, in simulated time; `warm` is served and rated before it, not counted.

    `watch` is shown the loop before it runs, to time it. Raises BadInput where the trial cannot be run.
    """
    order: tuple[str, ...] = ()
    if setup.cache.partition(":")[0] == "belady":
        count = belady_count(setup.cache)
        first = FIRST_PASS_CACHE if count is None else f"{FIRST_PASS_CACHE}:{count}"
        hosts = {name: card.host for name, card in house.fleet.items()}
        order = choices(_simulate(house, workload, replace(setup, cache=first), (), warm), hosts)
    return replace(_simulate(house, workload, setup, order, warm, watch), setup=setup)


def choices(trial: Trial, hosts: Mapping[str, str]) -> tuple[str, ...]:
    """Whose engine served, in the order of arrival; a request that was turned away or given up is no use of it."""
    served = (row.model for row in trial.rows if row.model is not None and row.status == "ok")
    return tuple(hosts.get(model, model) for model in served)


def _simulate(
    house: House,
    workload: Workload,
    setup: Setup,
    order: tuple[str, ...],
    warm: Workload | None,
    watch: Callable[[Orchestrator], None] = lambda loop: None,
) -> Trial:
    clock = ManualClock()
    trial = _Trial(house, workload, setup, order, clock)
    watch(trial.loop)
    return run_simulated(trial.run(warm), clock)


@dataclass
class _Log:
    """What happened so far."""

    rows: dict[str, Row] = field(default_factory=dict)
    moves: list[Move] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    peak_bytes: int = 0


class _Trial:
    """One trial's house while it runs; owner of its log."""

    def __init__(
        self, house: House, workload: Workload, setup: Setup, order: tuple[str, ...], clock: ManualClock
    ) -> None:
        self.house, self.workload, self.setup, self.clock = house, workload, setup, clock
        self.log = _Log()
        self.fleet = fleet_for(house.fleet, house.profile)
        self.families = families(self.fleet)
        longest = {name: card.chat.longest(house.max_tokens) for name, card in self.fleet.items()}
        self.outcomes = Outcomes(house.profile, workload.seed, longest)
        self.rated: set[str] = set()
        """Requests whose answers are rated, if they are answered."""
        self.started_s = 0.0
        self.machine = SimulatedMachine(house.profile.machine, clock)
        self.upstream = SimulatedUpstream(
            self.machine, self.outcomes, {name: card.host for name, card in self.fleet.items()}
        )
        self.executor = self._executor(order)
        self.loop = self._loop()

    def _executor(self, order: tuple[str, ...]) -> Executor:
        house, backend = self.house, SimulatedBackend(self.machine, self.house.profile, self.workload.seed)
        everything = self.setup.cache == "none"
        executor = Executor(
            {},
            dict.fromkeys(("llamacpp", "command", "openai"), backend),
            no_weights,
            self.clock,
            Limits(
                cores=house.profile.machine.cores,
                budget_bytes=whole_fleet_bytes(house) if everything else house.budget_bytes,
                max_queue=house.max_queue,
            ),
            queue="stcf" if self.setup.queue == "stcf" else "fifo",
            eviction=self._eviction(order),
        )
        executor.subscribe(self._moved)
        return executor

    def _eviction(self, order: tuple[str, ...]) -> str | EvictionPolicy:
        cache = self.setup.cache
        if cache.partition(":")[0] == "belady":
            return BeladyEviction(order, self.upstream.sent, belady_count(cache))
        return "calm" if cache == "none" else cache

    def _loop(self) -> Orchestrator:
        house = self.house
        embedder = static_embedder() if house.embed else None
        ledger = EnergyLedger(SimulatedMeter(self.machine), self.clock)
        parts = Parts(
            clock=self.clock,
            executor=self.executor,
            dispatcher=Dispatcher(
                executor=self.executor,
                upstream=self.upstream,
                ledger=ledger,
                clock=self.clock,
                encode=lambda ask, card, endpoint: ask.request_id.encode(),
                attempts=2,
            ),
            analyzer=Analyzer(embedder),
            workload=Window(),
            resources=SimulatedSensors(house.profile.machine.cores, house.budget_bytes),
            ledger=ledger,
            store=Forgetful(),
            embedder=embedder,
            language=lambda text: "en",
            deadline_s=house.deadline_s,
            on_outcome=self._ended,
        )
        aim = goal_book.read_aim(self.setup.goal)
        steering = Steering(
            policy=self._policy(),
            goal=aim.goal,
            weights=aim.weights,
            preload=self._preloads,
            floor=aim.keeper(),
        )
        return Orchestrator(parts, steering)

    @property
    def _preloads(self) -> bool:
        """Warming ahead of demand belongs to our cache; the others load what is asked for."""
        return self.setup.cache.strip().lower().partition(":")[0] == "calm"

    def _policy(self) -> Policy:
        match self.setup.policy:
            case "oracle":
                return oracle(self.outcomes)
            case "oracle:calm":
                return foresight(self.outcomes)
            case "hindsight":  # a point of the grid of static weights: our policy with them
                return make_policy("calm")
            case spec:
                return make_policy(
                    spec,
                    embedder=self.house.minilm,
                    seed=self.workload.seed,
                    models=list(self.fleet),
                    tuning=tuning_for(goal_book.read_aim(self.setup.goal).quality_floor),
                )

    # --- running ---

    async def run(self, warm: Workload | None) -> Trial:
        self.loop.use_fleet(self.fleet)
        if self.setup.cache == "none":
            local = (host for host in self.families if not self.fleet[host].remote)
            await asyncio.gather(*map(self.executor.load, local))
        adapting = asyncio.create_task(self._adapt())
        if warm is not None:
            await self._offer(warm, (True,) * len(warm.queries))
        self.started_s, loaded_j = self.clock.now(), self.machine.joules
        self.upstream.sent.clear()
        self.log = _Log(peak_bytes=self.executor.used_bytes, moves=self._standing())
        ratings = rated(self.workload.seed, len(self.workload.queries), self.house.feedback)
        ids = await self._offer(self.workload, ratings)
        if adapting.done():
            adapting.result()  # it ends of itself only by an error, which must not pass for a figure
        trial = self._trial(ids, self.machine.joules - loaded_j)
        adapting.cancel()
        await self.executor.close(grace_s=0.0)
        return trial

    def _standing(self) -> list[Move]:
        """Who is in memory now, each as one move at this moment: where a timeline begins."""
        states = self.executor.snapshot_models()
        return [
            Move(at_s=self.started_s, model=model, old="cold", new="ready")
            for model in sorted(states)
            if states[model].residency == "ready"
        ]

    async def _offer(self, workload: Workload, ratings: Sequence[bool]) -> list[str]:
        """Ask everything at its time and wait for the last answer. Gives the requests' ids."""
        began_s = self.clock.now()
        asks = [ask_of(workload, i, self.house.max_tokens) for i in range(len(workload.queries))]
        self.outcomes.know({ask.request_id: q for ask, q in zip(asks, workload.queries, strict=True)})
        self.rated |= {ask.request_id for ask, wanted in zip(asks, ratings, strict=True) if wanted}
        clients = []
        for ask, at_s in zip(asks, workload.arrivals_s, strict=True):
            await asyncio.sleep(began_s + at_s - self.clock.now())
            clients.append(asyncio.create_task(self._client(ask)))
        await asyncio.gather(*clients)
        return [ask.request_id for ask in asks]

    async def _client(self, ask: Ask) -> None:
        """Asks once and reads to the end. What goes wrong is in the outcome."""
        with suppress(CalmError):
            async with self.loop.serve(replace(ask, arrived_s=self.clock.now())) as serving:
                async for _ in serving.events():
                    pass

    async def _adapt(self) -> None:
        while True:
            await self.loop.adapt()
            self._sample()
            await asyncio.sleep(ADAPT_S)

    # --- what happened ---

    def _moved(self, model: str, old: Residency, new: Residency, at_s: float, detail: str | None) -> None:
        """A base moves with its adapters: each has its lane, the load is one."""
        self.loop.moved(model, old, new)
        self.log.moves += [
            Move(at_s=at_s, model=card.name, old=old, new=new) for card in self.families.get(model, ())
        ]
        self.log.peak_bytes = max(self.log.peak_bytes, self.executor.used_bytes)

    def _sample(self) -> None:
        executor = self.executor
        self.log.samples.append(
            Sample(
                at_s=self.clock.now() - self.started_s,
                used_bytes=executor.used_bytes,
                queue_length=executor.queue_length,
                in_flight=executor.in_flight,
            )
        )

    def _ended(self, ask: Ask, decision: Decision, outcome: Outcome) -> None:
        query = self.outcomes.query(ask.request_id)
        quality = None
        if outcome.status == "ok" and outcome.model is not None:
            quality = self.outcomes.of(ask.request_id, outcome.model).quality
            if ask.request_id in self.rated:
                self._rate(ask, outcome.model, quality)
        self.log.rows[ask.request_id] = row_of(
            query, ask, decision, outcome, quality, ask.arrived_s - self.started_s
        )

    def _rate(self, ask: Ask, model: str, quality: float) -> None:
        rating = Feedback(
            request_id=ask.request_id, rating=1.0 + 4.0 * quality, source="judge", wall_s=self.clock.wall()
        )
        self.loop.rate(rating, self.loop.recent[ask.request_id].features, model)

    def _trial(self, ids: list[str], energy_j: float) -> Trial:
        """As of now."""
        log = self.log
        moves = tuple(replace(move, at_s=move.at_s - self.started_s) for move in log.moves)
        return Trial(
            setup=self.setup,
            seed=self.workload.seed,
            workload=self.workload.name,
            engine="simulated",
            rows=tuple(log.rows[request_id] for request_id in ids),
            moves=moves,
            samples=tuple(log.samples),
            duration_s=self.clock.now() - self.started_s,
            budget_bytes=self.executor.budget_bytes,
            peak_bytes=log.peak_bytes,
            loads=sum(move.new == "loading" and move.model in self.families for move in moves),
            energy_j=energy_j,
            meter=METER,
        )


# --- parts ----------------------------------------------------------------------------------------


def whole_fleet_bytes(house: House) -> int:
    """Room for every model at once, hints and real sizes; an adapter's is what it adds to its base."""
    models = house.profile.models
    return sum(
        max(models[name].memory_bytes, card.memory_hint_bytes or 0)
        for name, card in house.fleet.items()
        if name in models and not card.remote
    )


def ask_of(workload: Workload, index: int, max_tokens: int | None) -> Ask:
    """Request `index` of a workload, as the gateway would read it off a one-turn chat."""
    prompt = workload.queries[index].prompt
    return Ask(
        request_id=f"{workload.seed}-{index}",
        kind="chat",
        query=prompt,
        prompt_chars=len(prompt),
        body={},
        requires=frozenset({"chat"}),
        stream=True,
        max_tokens=max_tokens,
    )


def row_of(
    query: Query, ask: Ask, decision: Decision, outcome: Outcome, quality: float | None, arrived_s: float
) -> Row:
    first = decision.ranked[0].model if decision.ranked else None
    predicted = decision.estimates.get(first) if first is not None else None
    return Row(
        query_id=query.id,
        domain=query.domain,
        arrived_s=arrived_s,
        model=outcome.model,
        status=outcome.status,
        total_s=outcome.total_s,
        ttft_s=outcome.ttft_s,
        queue_s=outcome.queue_s,
        load_s=outcome.load_s,
        hit=None if predicted is None else predicted.load_s.mean <= 0.0,
        prompt_tokens=outcome.prompt_tokens,
        completion_tokens=outcome.completion_tokens,
        energy_j=None if outcome.energy is None else outcome.energy.joules,
        quality=quality,
    )
