"""One host as the residency machine sees it, its adapters included: the only mutable record of its state."""

from __future__ import annotations

from calm.execute.events import Limits
from calm.execute.eviction import Standing
from calm.execute.hosting import Crew
from calm.records import ModelCard, ModelState, Residency

HOLDS_MEMORY: frozenset[Residency] = frozenset({"loading", "ready", "draining", "unloading"})


class Entry:
    """State of one model that has an engine of its own. Changed only by `State`'s primitives."""

    __slots__ = (
        "adapters",
        "applied",
        "asked",
        "card",
        "charge",
        "dormant",
        "estimate_bytes",
        "failures",
        "last_used_s",
        "leases",
        "leaving",
        "load_s",
        "measured_bytes",
        "misfits",
        "name",
        "next_threads",
        "pinned",
        "preloading",
        "ready_at_s",
        "reason",
        "removed",
        "residency",
        "retry_at_s",
        "successor",
        "threads",
        "uses",
    )

    def __init__(self, card: ModelCard, estimate_bytes: int, threads: int, adapters: Crew = ()) -> None:
        self.name = card.name
        self.card = card
        self.adapters = adapters
        """What its engine carries, or will when it is loaded."""
        self.misfits: dict[str, str] = {}
        """Adapters that its last engine could not take, with the reason; until a card changes."""
        self.residency: Residency = "remote" if card.remote else "cold"
        self.estimate_bytes = estimate_bytes
        self.measured_bytes: int | None = None
        """Last footprint seen; outlives eviction."""
        self.charge = 0
        """Bytes counted against the budget now."""
        self.next_threads = threads
        """Threads the next load gets; `threads` are the running engine's."""
        self.threads = threads
        self.leases: set[int] = set()
        self.applied: str | None = None
        """The model whose requests the engine works on; None when it is idle."""
        self.pinned = False
        self.asked = False
        """The operator asked for the load that runs."""
        self.preloading = False
        """The planner asked for the load that runs."""
        self.dormant = False
        """Unloaded by the operator or for idleness: stays cold until someone asks, whatever is forecast."""
        self.leaving = False
        """No more grants: unload as soon as the last lease is back."""
        self.removed = False
        self.successor: tuple[ModelCard, Crew, int] | None = None
        """The card (with adapters and estimate) that replaces this one once its engine is gone."""
        self.ready_at_s = 0.0
        self.last_used_s: float | None = None
        self.uses = 0
        self.load_s: float | None = None
        self.failures = 0
        self.retry_at_s: float | None = None
        self.reason: str | None = None

    @property
    def size_bytes(self) -> int:
        """What loading it is expected to take: the last measurement, else the estimate."""
        return self.estimate_bytes if self.measured_bytes is None else self.measured_bytes

    @property
    def serving(self) -> bool:
        """An engine is up and may take more."""
        return self.residency in ("ready", "draining", "remote") and not self.leaving

    @property
    def up(self) -> bool:
        return self.residency in ("ready", "draining")

    @property
    def idle(self) -> bool:
        return not self.leases

    @property
    def cap(self) -> int:
        return self.card.concurrency

    def closed_to(self, model: str) -> bool:
        """True while the engine works for another model that it cannot serve beside this one.

        llama.cpp applies one adapter, or none, to a batch: a request of another one gets no token before the
        running ones have ended, and none at all while more of them keep coming (measured). Waiting here instead
        keeps the order of the queue. Servers of other kinds mix adapters in a batch.
        """
        return bool(self.leases) and self.card.engine.kind == "llamacpp" and self.applied not in (None, model)

    def resting(self, at_s: float) -> bool:
        """True while the model waits out a failure."""
        return self.retry_at_s is not None and at_s < self.retry_at_s

    def stays_until_s(self, limits: Limits) -> float:
        """End of the minimum residence time."""
        least = limits.min_residence_s
        if least is None:
            least = min(2.0 * (self.load_s or 0.0), limits.max_residence_s)
        return self.ready_at_s + least

    def standing(self, value: float | None) -> Standing:
        last = self.ready_at_s if self.last_used_s is None else max(self.last_used_s, self.ready_at_s)
        return Standing(
            model=self.name,
            footprint_bytes=self.charge,
            loaded_at_s=self.ready_at_s,
            last_used_s=last,
            uses=self.uses,
            load_s=self.load_s,
            value=value,
        )

    def state(self, waiting: int, waiting_work_s: float) -> ModelState:
        return ModelState(
            model=self.name,
            residency=self.residency,
            pinned=self.pinned,
            in_flight=len(self.leases),
            waiting=waiting,
            slots=self.cap,
            threads=self.threads if self.residency in HOLDS_MEMORY else self.next_threads,
            footprint_bytes=self.size_bytes,
            footprint_measured=self.measured_bytes is not None,
            load_s=self.load_s,
            last_used_s=self.last_used_s,
            failures=self.failures,
            retry_at_s=self.retry_at_s,
            reason=self.reason,
            waiting_work_s=waiting_work_s,
        )

    def misfit(self, adapter: str) -> ModelState:
        """An adapter that the engine could not take: failed for good, and without a share in anything."""
        return ModelState(
            model=adapter,
            residency="failed",
            pinned=False,
            in_flight=0,
            waiting=0,
            slots=self.cap,
            threads=0,
            footprint_bytes=0,
            footprint_measured=False,
            load_s=None,
            last_used_s=None,
            failures=1,
            reason=self.misfits[adapter],
        )
