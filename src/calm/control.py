"""What the door may ask of CALM: the gateway's `Service`, over the loop, the intake and the store.

Nothing is decided here; it names the owner of each thing and passes the question on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager

import msgspec

from calm.errors import BadInput, UnknownRequest
from calm.execute.executor import Executor
from calm.gateway.service import Document, Readiness, Reply, Steering
from calm.intake import Intake
from calm.journal import Entry, Journal
from calm.loop import Orchestrator, Served
from calm.plan import goals as goal_book
from calm.plan.floor import keeper, tuning_for
from calm.plan.policies import policy_choices
from calm.ports import EventLog, Policy, Recall
from calm.records import Ask, Feedback, ModelCard, Snapshot, StoredRequest, Weights
from calm.registry import CardProblem


class Control:
    """Implements calm.gateway.service.Service."""

    def __init__(
        self,
        *,
        loop: Orchestrator,
        executor: Executor,
        intake: Intake,
        journal: Journal,
        recall: Recall,
        events: EventLog,
        make_policy: Callable[[str, float | None], Policy],
        spec: str,
    ) -> None:
        """`make_policy` builds a spec for a floor under quality or none; `spec` is that of the policy in force."""
        self._loop = loop
        self._executor = executor
        self._intake = intake
        self._journal = journal
        self._recall = recall
        self._events = events
        self._make_policy = make_policy
        self._spec = spec

    # --- requests -----------------------------------------------------------------------------------

    def serve(self, ask: Ask) -> AbstractAsyncContextManager[Reply]:
        return self._loop.serve(ask)

    async def explain(self, request_id: str) -> StoredRequest | None:
        """A recent request from memory, an older one from the store."""
        await asyncio.to_thread(self._loop.parts.store.flush)
        return await asyncio.to_thread(self._recall.decision, request_id)

    async def recent(
        self, limit: int, *, model: str | None = None, status: str | None = None
    ) -> Sequence[StoredRequest]:
        await asyncio.to_thread(self._loop.parts.store.flush)
        return await asyncio.to_thread(self._recall.recent, limit, model=model, status=status)

    async def feedback(self, feedback: Feedback, *, tenant: str | None = None) -> None:
        served = self._loop.recent.get(feedback.request_id)
        if served is None:
            served = await asyncio.to_thread(self._stored, feedback.request_id)
        if served is None or (tenant is not None and served.tenant != tenant):
            raise UnknownRequest(f'no request "{feedback.request_id[:128]}" is stored', field="request_id")
        if served.model is None:
            raise BadInput("this request has no answer that could be rated", field="request_id")
        self._loop.rate(feedback, served.features, served.model)

    def _stored(self, request_id: str) -> Served | None:
        stored, features = self._recall.decision(request_id), self._recall.features_of(request_id)
        if stored is None or features is None:
            return None
        return Served(features, stored.outcome.model if stored.outcome else None, stored.tenant)

    # --- the fleet ------------------------------------------------------------------------------------

    def readiness(self) -> Readiness:
        if self._loop.fleet:
            return Readiness(ready=True)
        waiting = "; ".join(f"{name}: {why}" for name, why in self._loop.unavailable.items())
        return Readiness(ready=False, reason=waiting or "the fleet has no model that can serve")

    def cards(self) -> Mapping[str, ModelCard]:
        return self._intake.cards

    def bad_cards(self) -> Sequence[CardProblem]:
        return self._intake.problems

    def snapshot(self) -> Snapshot:
        return self._loop.snapshot()

    async def load(self, model: str) -> None:
        await self._executor.load(model)

    async def unload(self, model: str) -> None:
        await self._executor.unload(model)

    async def pin(self, model: str, pinned: bool) -> None:
        if pinned:
            await self._executor.load(model)
            self._executor.pin(model)
        else:
            self._executor.unpin(model)
        self._events.record_event("pin" if pinned else "unpin", model=model)

    # --- knowledge ------------------------------------------------------------------------------------

    async def knowledge(self) -> Document:
        stored = await asyncio.to_thread(self._recall.summary)
        return {
            "stored": stored,
            "calibration": self._loop.parts.analyzer.calibration(),
            "energy": self._loop.parts.ledger.totals(),
            "meter": {"name": self._loop.parts.ledger.meter.name, "kind": self._loop.parts.ledger.meter.kind},
        }

    async def events(self, since: int, limit: int) -> Sequence[Entry]:
        return self._journal.since(since, limit)

    # --- steering -------------------------------------------------------------------------------------

    def goals(self) -> Mapping[str, Weights]:
        return self._loop.steering.goals

    async def set_goals(self, goals: Mapping[str, Weights]) -> None:
        checked = {name: goal_book.checked(weights, field=f"goals.{name}") for name, weights in goals.items()}
        self._loop.steering.goals.update(checked)
        self._events.record_event("goals", detail=dict(checked))

    def policy(self) -> Document:
        steering = self._loop.steering
        weights = steering.weights or (steering.goals[steering.goal] if steering.goal else Weights())
        return {
            "policy": steering.policy.name,
            "goal": None if steering.weights else steering.goal,
            "weights": weights,
            "quality_floor": steering.floor.promised if steering.floor else None,
            "quality_price": steering.floor.in_force if steering.floor else None,
            "available": policy_choices(),
        }

    async def steer(self, change: Steering) -> None:
        """All of the change or none of it. Raises BadInput for an unknown policy or goal, or a floor out of range.

        A floor that stays begins a fresh account: what it has seen was weighed otherwise.
        """
        steering = self._loop.steering
        policy, spec = steering.policy, self._spec if change.policy is None else change.policy
        before = steering.floor.promised if steering.floor else None
        promised = before if change.quality_floor is msgspec.UNSET else change.quality_floor
        floor = keeper(promised)
        if change.goal is not None:
            goal_book.named(change.goal, goals=steering.goals)
        if change.weights is not None:
            goal_book.checked(change.weights)
        if change.policy is not None or tuning_for(promised) != tuning_for(before):
            policy = await asyncio.to_thread(self._make_policy, spec, promised)
        steering.policy, self._spec, steering.floor = policy, spec, floor
        if change.goal is not None:
            steering.goal, steering.weights = change.goal, None
        if change.weights is not None:
            steering.weights = change.weights
        self._events.record_event("steer", detail=dict(self.policy()))
