"""The records that replay and bench write and that tables and plots are made of.

Seconds (`_s`) count from the start of the trial's workload. Unknown is None, never 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from calm.records import OutcomeStatus, Record, Residency


class Row(Record, frozen=True, kw_only=True):
    """One request of a trial."""

    query_id: str
    domain: str
    arrived_s: float
    model: str | None
    """Who served it, or was to; None when nobody could be chosen."""
    status: OutcomeStatus
    total_s: float
    """Arrival to last byte, or to the failure."""
    ttft_s: float | None = None
    queue_s: float = 0.0
    load_s: float = 0.0
    """Time it waited for a load."""
    hit: bool | None = None
    """The chosen model was in memory at the moment of the decision; None where no choice was made."""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    energy_j: float | None = None
    """Attributed to this request by the ledger."""
    quality: float | None = None
    """0..1; None when it was not answered or could not be judged."""
    decision_s: float | None = None
    """Measured time of the decision; None on simulated time, where it stands still."""


class Move(Record, frozen=True, kw_only=True):
    """A residency change."""

    at_s: float
    model: str
    old: Residency
    new: Residency


class Sample(Record, frozen=True, kw_only=True):
    """The house at one adaptation tick."""

    at_s: float
    used_bytes: int
    queue_length: int
    in_flight: int


class Setup(Record, frozen=True, kw_only=True):
    """What distinguishes a trial from its neighbours; trials with equal setups are pooled over seeds."""

    policy: str
    """A policy spec: calm, paper:latency:0.3, fixed:NAME, oracle, ..."""
    cache: str
    """none (everything stays in memory), or an eviction spec: calm, lru, lru:3, lfu:2, belady, ..."""
    queue: str = "fifo"
    scenario: str = ""
    """The load: `20 min`, `2 rps`; free text that groups the rows of a table."""
    goal: str | None = None
    """A goal's name or `latency=1,quality=2`; None: the default."""

    @property
    def label(self) -> str:
        """What a table calls it within its scenario."""
        extras = [part for part in (self.goal, self.queue if self.queue != "fifo" else None) if part]
        return f"{self.policy} / {self.cache}" + (f" ({', '.join(extras)})" if extras else "")


class Trial(Record, frozen=True, kw_only=True):
    """One setup on one seed's workload."""

    setup: Setup
    seed: int
    workload: str
    engine: Literal["simulated", "real"]
    rows: tuple[Row, ...]
    moves: tuple[Move, ...] = ()
    samples: tuple[Sample, ...] = ()
    duration_s: float
    """First arrival to last byte."""
    budget_bytes: int
    peak_bytes: int
    loads: int
    """Loads started while the workload ran; what was warmed before it does not count."""
    energy_j: float | None = None
    """All joules of all engines over the trial: requests, loads and idling."""
    meter: str | None = None


class Provenance(Record, frozen=True, kw_only=True):
    """Where figures come from, so that they can be produced again."""

    command: str
    """The command line, without paths of the machine."""
    started_at: str
    """ISO 8601, UTC."""
    commit: str | None
    machine: str
    """Processor, cores, memory."""
    versions: Mapping[str, str]
    """calm, python, the engine, numpy."""


class Study(Record, frozen=True, kw_only=True):
    """Everything one command ran."""

    title: str
    provenance: Provenance
    slo_s: float
    """Total latency that counts as in time."""
    trials: tuple[Trial, ...]
    notes: tuple[str, ...] = ()
    """What a reader must know: rows skipped, trials missing, assumptions."""
