"""The house at one moment as the Monitor sees it, and what is to be resident next."""

from __future__ import annotations

from collections.abc import Mapping

from calm.records.base import Record, Residency


class ModelState(Record, frozen=True, kw_only=True):
    """One model at one moment, as the Executor owns it."""

    model: str
    """Whose engine this is the state of: an adapter shares its base's record. Sums over a snapshot take those
    whose key it is."""
    residency: Residency
    pinned: bool
    in_flight: int
    waiting: int
    slots: int
    threads: int
    footprint_bytes: int
    """Measured after load; before that the estimate."""
    footprint_measured: bool
    load_s: float | None
    """Duration of the last load."""
    last_used_s: float | None
    failures: int
    retry_at_s: float | None = None
    reason: str | None = None
    waiting_work_s: float = 0.0
    """Sum of the predicted service times of the waiting requests."""


class GpuState(Record, frozen=True, kw_only=True):
    name: str
    memory_total_bytes: int
    memory_used_bytes: int
    utilisation: float


class Snapshot(Record, frozen=True, kw_only=True):
    """The system at one moment. `revision` grows with every residency change: stale plans are told by it."""

    revision: int
    at_s: float
    models: Mapping[str, ModelState]
    budget_bytes: int
    used_bytes: int
    cores: int
    threads_in_use: int
    queue_length: int
    in_flight: int
    arrival_rate_rps: float = 0.0
    cpu_load: float = 0.0
    """0..1 of all cores."""
    memory_available_bytes: int = 0
    gpus: tuple[GpuState, ...] = ()


class Forecast(Record, frozen=True, kw_only=True):
    """Expected requests per second for each model over the next horizon."""

    horizon_s: float
    rate_rps: Mapping[str, float]


class PlacementPlan(Record, frozen=True, kw_only=True):
    """Models worth having in memory, best first, and how much each is worth keeping (higher: keep)."""

    revision: int
    preload: tuple[str, ...]
    value: Mapping[str, float]
