"""The MAPE-K loop in two sentences: `serve` one request, `adapt` the house once.

    serve:  monitor reads features and the system, analyze predicts every model, plan ranks them, execute
            serves on the best, knowledge keeps what was predicted beside what happened, analyze learns.
    adapt:  monitor samples the machine, plan forecasts demand and proposes what should be resident, the
            executor disposes, learned state is saved.

Monitor, Analyze and Plan never call one another; the values pass through here. `Orchestrator` owns the
steering (policy, goal, weights) and the memory of recent requests; every other state has its own owner.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from calm.analyze.analyzer import Analyzer
from calm.errors import Unavailable
from calm.execute.dispatch import Dispatcher, Serving
from calm.execute.endings import describe, status_of
from calm.execute.executor import Executor
from calm.meters.ledger import EnergyLedger
from calm.monitor.features import extract
from calm.monitor.resources import Sensors
from calm.monitor.window import Workload
from calm.plan import goals as goal_book
from calm.plan.feasible import feasible, within_limits
from calm.plan.floor import QualityFloor
from calm.plan.placement import forecast, one_at_a_time, propose
from calm.plan.shortlist import finalists
from calm.ports import Clock, Embedder, KnowledgeStore, Policy
from calm.records import (
    Ask,
    Decision,
    Features,
    Feedback,
    Forecast,
    ModelCard,
    Outcome,
    Residency,
    Snapshot,
    Weights,
)

log = logging.getLogger(__name__)

RECENT = 2048
"""Requests whose features stay in memory for a rating; older ones are read from the store."""
LESSONS_PER_S = 200.0
"""Outcomes learned from per second at most: beyond it they teach nothing new and cost what serving needs."""


RECORDED = 32
"""Candidates and refusals kept in a Decision, best first: a fleet of a thousand would write a megabyte each."""

ANALYZER, WORKLOAD = "analyzer", "workload"
"""Names of the saved states."""


@dataclass
class Steering:
    """What the operator may change while running."""

    policy: Policy
    goal: str | None = "balanced"
    weights: Weights | None = None
    goals: dict[str, Weights] = field(default_factory=lambda: dict(goal_book.GOALS))
    preload: bool = True
    floor: QualityFloor | None = None
    """Mean quality to hold at the least latency and energy; None: the weights alone decide."""


class Served(NamedTuple):
    """What a rating needs of a recent request."""

    features: Features
    model: str | None
    tenant: str | None


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The rooms the loop passes values between; built in wiring, replaced by fakes in tests."""

    clock: Clock
    executor: Executor
    dispatcher: Dispatcher
    analyzer: Analyzer
    workload: Workload
    resources: Sensors
    ledger: EnergyLedger
    store: KnowledgeStore
    embedder: Embedder | None
    language: Callable[[str], str]
    deadline_s: float
    on_outcome: Callable[[Ask, Decision, Outcome], None] = lambda *_: None


class Orchestrator:
    """Serves requests and adapts; see the module's docstring."""

    def __init__(self, parts: Parts, steering: Steering) -> None:
        self.parts = parts
        self.steering = steering
        self.fleet: Mapping[str, ModelCard] = {}
        self.unavailable: dict[str, str] = {}
        self.recent: OrderedDict[str, Served] = OrderedDict()
        self._lessons = LESSONS_PER_S
        self._taught_at_s = parts.clock.now()
        self._forecast: Forecast | None = None
        self._adapted_at_s: float | None = None
        self._machine = parts.resources.sample()

    # --- one request ------------------------------------------------------------------------------

    @asynccontextmanager
    async def serve(self, ask: Ask) -> AsyncIterator[Serving]:
        """Decide, dispatch, record. Raises CalmError on entry; leaving early cancels the work."""
        parts = self.parts
        parts.workload.arrived(parts.clock.now())
        features = extract(ask, parts.embedder, parts.language)
        try:
            decision = self.decide(ask, features)
        except Exception as error:  # also one that nobody foresaw: its record is needed most
            self._reject(ask, features, error)
            raise
        parts.store.record_decision(ask, features, decision)
        parts.workload.chosen(decision.ranked[0].model, parts.clock.now())
        serving = parts.dispatcher.serve(ask, decision, self.fleet, self._deadline_at_s(ask))
        try:
            async with serving:
                yield serving
        finally:
            if serving.outcome is not None:
                self._conclude(ask, features, decision, serving.outcome)

    def decide(self, ask: Ask, features: Features) -> Decision:
        """Who should serve: hard constraints, then predictions, then limits, then the policy's ranking.

        Only the first RECORDED of the ranking are kept; of a large fleet only who may be among them is ranked.

        Raises UnknownModel, NoCandidate, DeadlineExceeded or BadInput (an unknown goal).
        """
        parts, steering = self.parts, self.steering
        started_s = parts.clock.now()
        if ask.model in self.unavailable:
            raise Unavailable(f"{ask.model} cannot serve yet: {self.unavailable[ask.model]}", field="model")
        snapshot = self.snapshot()
        goal, weights = goal_book.resolve(
            ask.wishes, goal=steering.goal, weights=steering.weights, goals=steering.goals
        )
        floor = self._floor(ask)
        weights = floor.weights(weights) if floor else weights
        kept, refused = feasible(ask, features, snapshot, self.fleet)
        estimates = parts.analyzer.estimate_all(ask, features, snapshot, kept)
        within, refused = within_limits(estimates, kept, ask, started_s, refused)
        able = kept if within is estimates else {name: kept[name] for name in within}
        cards, within = finalists(steering.policy, ask, snapshot, able, within, weights, RECORDED)
        histories = parts.workload.histories()
        ranked = steering.policy.rank(ask, features, snapshot, cards, within, histories, weights)
        if floor:
            floor.decided(ranked[:RECORDED], within, weights)
        return Decision(
            request_id=ask.request_id,
            policy=steering.policy.name,
            goal=goal,
            weights=weights,
            ranked=ranked[:RECORDED],
            refused=refused[:RECORDED],
            estimates={best.model: within[best.model] for best in ranked[:RECORDED]},
            snapshot_revision=snapshot.revision,
            decision_s=parts.clock.now() - started_s,
            wall_s=parts.clock.wall(),
        )

    def _floor(self, ask: Ask) -> QualityFloor | None:
        """The operator's floor, for a request that says nothing of its own about what matters."""
        wishes = ask.wishes
        own = ask.model is not None or wishes.goal is not None or wishes.weights is not None
        return None if own else self.steering.floor

    def snapshot(self) -> Snapshot:
        """The system now: what the executor owns, with the Monitor's last readings. Loads nothing."""
        parts, executor = self.parts, self.parts.executor
        machine = self._machine
        return Snapshot(
            revision=executor.revision,
            at_s=parts.clock.now(),
            models=executor.snapshot_models(),
            budget_bytes=executor.budget_bytes,
            used_bytes=executor.used_bytes,
            cores=executor.cores,
            threads_in_use=executor.threads_in_use,
            queue_length=executor.queue_length,
            in_flight=executor.in_flight,
            arrival_rate_rps=parts.workload.rate_rps(parts.clock.now()),
            cpu_load=machine.cpu_load,
            memory_available_bytes=machine.memory_available_bytes,
            gpus=machine.gpus,
        )

    def _deadline_at_s(self, ask: Ask) -> float:
        wanted_s = ask.wishes.deadline_s
        return ask.arrived_s + min(wanted_s or self.parts.deadline_s, self.parts.deadline_s)

    def _reject(self, ask: Ask, features: Features, error: Exception) -> None:
        """A request nobody may serve is remembered too: no record is lost."""
        parts = self.parts
        outcome = Outcome(
            request_id=ask.request_id,
            model=None,
            status=status_of(error),
            wall_s=parts.clock.wall(),
            total_s=parts.clock.now() - ask.arrived_s,
            error=describe(error),
        )
        decision = self._undecided(ask)
        parts.store.record_decision(ask, features, decision)
        self._remember(ask.request_id, Served(features, None, ask.tenant))
        parts.store.record_outcome(outcome)
        parts.on_outcome(ask, decision, outcome)

    def _undecided(self, ask: Ask) -> Decision:
        return Decision(
            request_id=ask.request_id,
            policy=self.steering.policy.name,
            goal=ask.wishes.goal,
            weights=ask.wishes.weights or Weights(),
            ranked=(),
            refused=(),
            estimates={},
            snapshot_revision=self.parts.executor.revision,
            decision_s=0.0,
            wall_s=self.parts.clock.wall(),
        )

    def _conclude(self, ask: Ask, features: Features, decision: Decision, outcome: Outcome) -> None:
        """Keep prediction beside outcome, then learn once the caller has its answer."""
        state = self.parts.executor.snapshot_models().get(outcome.model or "")
        if state is not None and state.residency != "remote":
            outcome = msgspec.structs.replace(outcome, memory_bytes=state.footprint_bytes)
        self._remember(ask.request_id, Served(features, outcome.model, ask.tenant))
        self.parts.store.record_outcome(outcome)
        asyncio.get_running_loop().call_soon(self._learn, ask, features, decision, outcome)

    def _learn(self, ask: Ask, features: Features, decision: Decision, outcome: Outcome) -> None:
        parts = self.parts
        parts.workload.observed(outcome)
        card = self.fleet.get(outcome.model) if outcome.model else None
        if card is not None and self._may_learn():
            state = parts.executor.snapshot_models().get(card.name)
            threads = state.threads if state else 1
            parts.analyzer.learn(ask, features, decision.estimates.get(card.name), outcome, threads)
        parts.on_outcome(ask, decision, outcome)

    def _may_learn(self) -> bool:
        """A token bucket of LESSONS_PER_S: every outcome at the rates a box of SLMs sees, a sample beyond."""
        now_s = self.parts.clock.now()
        self._lessons = min(LESSONS_PER_S, self._lessons + (now_s - self._taught_at_s) * LESSONS_PER_S)
        self._taught_at_s = now_s
        if self._lessons < 1.0:
            return False
        self._lessons -= 1.0
        return True

    def _remember(self, request_id: str, served: Served) -> None:
        self.recent[request_id] = served
        if len(self.recent) > RECENT:
            self.recent.popitem(last=False)

    # --- feedback ----------------------------------------------------------------------------------

    def rate(self, feedback: Feedback, features: Features, model: str) -> None:
        """Learn from a rating of one answer and keep it."""
        parts = self.parts
        parts.store.record_feedback(feedback)
        parts.workload.rated(model, feedback.rating)
        if model in self.fleet:
            parts.analyzer.rate(features, model, feedback.rating)

    # --- one adaptation ------------------------------------------------------------------------------

    async def adapt(self) -> None:
        """Sample, forecast, propose, tick: once a second, and never two at a time."""
        parts, now_s = self.parts, self.parts.clock.now()
        self._machine = parts.resources.sample()
        parts.ledger.step(parts.executor.pids())
        await parts.executor.tick()
        self._forecast = forecast(
            self._forecast, parts.workload.per_model_rate(now_s), self._elapsed_s(now_s)
        )
        if self.steering.preload:
            snapshot = self.snapshot()
            plan = propose(self.fleet, snapshot, self._forecast.rate_rps)
            parts.executor.prefer(one_at_a_time(plan, snapshot))

    def _elapsed_s(self, now_s: float) -> float:
        before, self._adapted_at_s = self._adapted_at_s, now_s
        return now_s - before if before is not None else 0.0

    def moved(self, model: str, old: Residency, new: Residency) -> None:
        """A residency change, told by the executor: a finished load is a lesson."""
        if old == "loading" and new == "ready":
            state = self.parts.executor.snapshot_models().get(model)
            if state is not None and state.load_s is not None:
                self.parts.analyzer.loaded(model, state.load_s)

    def checkpoint(self) -> None:
        """Save what was learned; restored at the next start."""
        parts = self.parts
        parts.store.checkpoint(ANALYZER, parts.analyzer.dump())
        parts.store.checkpoint(WORKLOAD, parts.workload.dump(parts.clock.now()))

    def recall(self) -> None:
        """Restore what earlier runs learned; what does not fit is left out and said."""
        parts = self.parts
        analyzer, workload = parts.store.restore(ANALYZER), parts.store.restore(WORKLOAD)
        if analyzer is not None and not parts.analyzer.load(analyzer):
            log.warning("the saved predictions do not fit this version: starting from the cards' priors")
        if workload is not None and not parts.workload.load(workload, parts.clock.now()):
            log.warning("the saved load history does not fit this version: starting afresh")

    def use_fleet(self, fleet: Mapping[str, ModelCard], unavailable: Mapping[str, str] | None = None) -> None:
        """Serve this fleet from now on; running answers finish on the cards they began with.

        `unavailable` are valid cards that cannot serve yet, with the reason for whoever pins one.
        """
        for name in self.fleet:
            if name not in fleet:
                self.parts.workload.removed(name)
        self.fleet, self.unavailable = fleet, dict(unavailable or {})
        self.parts.analyzer.sync(fleet)
        self.parts.executor.update_fleet(fleet)
