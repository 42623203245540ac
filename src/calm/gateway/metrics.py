"""Prometheus figures. Exists apart because they have rules of their own: labels stay bounded whatever
callers send, scraping never loads a model, and a request pays microseconds.

Counters and histograms are fed as requests end; residency is a view on the newest `Snapshot`, made when
scraped, so that a model that left the fleet leaves no stale series behind.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from calm.records import Belief, Decision, Estimate, Outcome, OutcomeStatus, Snapshot

OTHER = "other"
"""The label of every model that is not in the fleet."""
NONE = "none"
"""The label where no model was chosen."""
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_DECISION = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1)
_RATIO = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 2.0, 5.0)
_TOKENS = ("prompt", "cached", "completion")
_HOLDS_MEMORY = ("loading", "ready", "draining", "unloading")
_STATES = ("cold", "loading", "ready", "draining", "unloading", "failed", "remote")


class _PerModel:
    """The children of one model's labels, looked up once: `labels()` takes a lock and a dict each time."""

    def __init__(self, figures: Metrics, model: str) -> None:
        self.ttft = figures.ttft.labels(model)
        self.latency = figures.latency.labels(model)
        self.queued = figures.queued.labels(model)
        self.tokens = {
            kind: figures.tokens.labels(model, kind) for kind in ("prompt", "cached", "completion")
        }
        self.error = {name: figures.error.labels(model, name) for name in ("ttft", "latency", "energy")}
        self.requests: dict[OutcomeStatus, Counter] = {}
        self.joules: dict[tuple[str, str], Counter] = {}


class Metrics:
    """All figures of one server, in a registry of its own. Safe to call from the event loop only."""

    def __init__(self, in_fleet: Callable[[str], bool]) -> None:
        """`in_fleet` tells which names may become labels; it is asked for every request."""
        self.registry = CollectorRegistry(auto_describe=True)
        self._in_fleet = in_fleet
        self._children: dict[str, _PerModel] = {}
        self._answers: dict[tuple[str, int], Counter] = {}
        self._residency = _Residency()
        self.registry.register(self._residency)
        counter, histogram = self._counter, self._histogram
        self.requests = counter("requests", "Requests that ended, by how", "model", "status")
        self.answers = counter("http_responses", "HTTP responses, by route and status code", "route", "code")
        self.ttft = histogram("ttft_seconds", "Arrival to first token", _SECONDS, "model")
        self.latency = histogram("request_seconds", "Arrival to last byte", _SECONDS, "model")
        self.queued = histogram("queue_seconds", "Wait for a lease, loading included", _SECONDS, "model")
        self.tokens = counter("tokens", "Tokens, as the engines count them", "model", "kind")
        self.joules = counter("energy_joules", "Energy of requests", "model", "meter", "kind")
        self.decision = histogram("decision_seconds", "Time to choose a model", _DECISION)
        self.error = histogram(
            "prediction_error_ratio", "|predicted - observed| / observed", _RATIO, "model", "quantity"
        )
        self.loads = counter("model_loads", "Loads, by result", "model", "result")
        self.load_s = histogram("model_load_seconds", "Time of successful loads", _SECONDS, "model")
        self.evictions = counter("model_evictions", "Models that gave up their memory", "model")
        self.dropped = counter("records_dropped", "Records the knowledge writer had no room for")

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"calm_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"calm_{name}", text, labels, buckets=buckets, registry=self.registry)

    # --- fed as things happen ---------------------------------------------------------------------

    def observe(self, outcome: Outcome, decision: Decision | None = None) -> None:
        """One request that ended, and the decision that began it."""
        label = self._label(outcome.model)
        child = self._children.get(label) or self._children.setdefault(label, _PerModel(self, label))
        count = child.requests.get(outcome.status)
        if count is None:
            count = child.requests[outcome.status] = self.requests.labels(label, outcome.status)
        count.inc()
        child.queued.observe(outcome.queue_s)
        if outcome.ttft_s is not None:
            child.ttft.observe(outcome.ttft_s)
        if outcome.status == "ok":
            child.latency.observe(outcome.total_s)
        self._tokens(child, outcome)
        self._energy(child, label, outcome)
        if decision is not None:
            self.decision.observe(decision.decision_s)
            estimate = decision.estimates.get(outcome.model or "")
            if estimate is not None and outcome.status == "ok":
                self._errors(child, estimate, outcome)

    def response(self, route: str, code: int) -> None:
        """One HTTP response; `route` is a route of the table, never a path a caller sent."""
        child = self._answers.get((route, code))
        if child is None:
            child = self._answers[route, code] = self.answers.labels(route, str(code))
        child.inc()

    def loaded(self, model: str, load_s: float | None) -> None:
        """A load that ended; `load_s` is None when it failed."""
        label = self._label(model)
        self.loads.labels(label, "failed" if load_s is None else "ok").inc()
        if load_s is not None:
            self.load_s.labels(label).observe(load_s)

    def evicted(self, model: str) -> None:
        self.evictions.labels(self._label(model)).inc()

    def drop(self, records: int = 1) -> None:
        """Records the knowledge writer refused."""
        self.dropped.inc(records)

    def residency(self, snapshot: Snapshot) -> None:
        """The system as it is now: what the next scrape shows."""
        self._residency.snapshot = snapshot

    # --- read --------------------------------------------------------------------------------------

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """(text, content type) in the exposition format that the scraper's Accept header prefers."""
        encoder, content_type = choose_encoder(accept)
        return encoder(self.registry), content_type

    def _label(self, model: str | None) -> str:
        if model is None:
            return NONE
        return model if self._in_fleet(model) else OTHER

    def _tokens(self, child: _PerModel, outcome: Outcome) -> None:
        counts = (outcome.prompt_tokens, outcome.cached_tokens, outcome.completion_tokens)
        for kind, count in zip(_TOKENS, counts, strict=True):
            if count:
                child.tokens[kind].inc(count)

    def _energy(self, child: _PerModel, label: str, outcome: Outcome) -> None:
        reading = outcome.energy
        if reading is None or not reading.joules >= 0:
            return
        count = child.joules.get((reading.meter, reading.kind))
        if count is None:
            count = self.joules.labels(label, reading.meter, reading.kind)
            child.joules[reading.meter, reading.kind] = count
        count.inc(reading.joules)

    def _errors(self, child: _PerModel, estimate: Estimate, outcome: Outcome) -> None:
        energy = outcome.energy.joules if outcome.energy else None
        for name, belief, seen in (
            ("ttft", estimate.ttft_s, outcome.ttft_s),
            ("latency", estimate.total_s, outcome.total_s),
            ("energy", estimate.energy_j, energy),
        ):
            ratio = error_ratio(belief, seen)
            if ratio is not None:
                child.error[name].observe(ratio)


def error_ratio(belief: Belief | None, seen: float | None) -> float | None:
    """|predicted - observed| / observed; None where either is unknown or the observation is no measure."""
    if belief is None or seen is None or not seen > 0 or not math.isfinite(belief.mean):
        return None
    return abs(belief.mean - seen) / seen


class _Residency(Collector):
    """Gauges made from the newest snapshot at scrape time."""

    def __init__(self) -> None:
        self.snapshot: Snapshot | None = None

    def describe(self) -> list[GaugeMetricFamily]:
        return []

    def collect(self) -> Iterator[GaugeMetricFamily]:
        now = self.snapshot
        if now is None:
            return
        for name, text, value in (
            ("memory_budget_bytes", "Bytes that models may take", now.budget_bytes),
            ("memory_used_bytes", "Bytes that models take", now.used_bytes),
            ("memory_available_bytes", "Memory the system has free", now.memory_available_bytes),
            ("queue_length", "Requests that wait", now.queue_length),
            ("in_flight", "Requests at an engine", now.in_flight),
            ("arrival_rate_rps", "Requests per second, recent", now.arrival_rate_rps),
            ("cores", "Cores that engines may use", now.cores),
            ("threads_in_use", "Threads of engines that generate", now.threads_in_use),
            ("cpu_load", "Busy share of all cores", now.cpu_load),
        ):
            yield GaugeMetricFamily(f"calm_{name}", text, value=value)
        yield from _per_model(now)


def _per_model(now: Snapshot) -> Iterator[GaugeMetricFamily]:
    states = GaugeMetricFamily("calm_model_state", "1 for the state a model is in", labels=["model", "state"])
    for name, model in now.models.items():
        for state in _STATES:
            states.add_metric([name, state], float(model.residency == state))
    yield states
    figures: Mapping[str, tuple[str, str]] = {
        "footprint_bytes": ("model_bytes", "Memory of a model (0 when it holds none)"),
        "in_flight": ("model_in_flight", "Requests at a model's engine"),
        "waiting": ("model_waiting", "Requests that wait for a model"),
        "pinned": ("model_pinned", "1 for a model that is kept resident"),
        "failures": ("model_failures", "Consecutive failures of a model's engine"),
    }
    for field, (metric, text) in figures.items():
        family = GaugeMetricFamily(f"calm_{metric}", text, labels=["model"])
        for name, model in now.models.items():
            if model.model != name:
                continue  # an adapter: its engine's figures stand under its base, and sums count them once
            holds = field != "footprint_bytes" or model.residency in (
                "ready",
                "draining",
                "loading",
                "unloading",
            )
            family.add_metric([name], float(getattr(model, field)) if holds else 0.0)
        yield family
