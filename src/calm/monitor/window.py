"""What has been happening lately: arrival rates, and each model's means over its last k observations.

The paper's dynamic terms dyn_l are means over the last k = 100 observations of latency, energy, memory and
rating (CALM paper, arXiv 2602.03632). Every call here is O(1); nothing grows with traffic.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import msgspec

from calm.records import History, Outcome

WINDOW = 100
HALF_LIFE_S = 60.0
RATE_WINDOW_S = 60
_MODELS = 4096
_VERSION = 1
_QUANTILES = (0.5, 0.9, 0.99)


class Ring:
    """The last `size` numbers with their running mean; summed afresh once a lap, so no drift builds up."""

    def __init__(self, size: int = WINDOW) -> None:
        self._values: list[float] = []
        self._size = size
        self._next = 0
        self._sum = 0.0

    def __len__(self) -> int:
        return len(self._values)

    def add(self, value: float) -> None:
        """Ignores what is not finite."""
        if not math.isfinite(value):
            return
        if len(self._values) < self._size:
            self._values.append(value)
            self._sum += value
            return
        self._sum += value - self._values[self._next]
        self._values[self._next] = value
        self._next = (self._next + 1) % self._size
        if self._next == 0:
            self._sum = math.fsum(self._values)

    @property
    def mean(self) -> float | None:
        return self._sum / len(self._values) if self._values else None

    def quantile(self, share: float) -> float | None:
        """Nearest-rank quantile of what the window holds. O(k log k): for reports, not for requests."""
        if not self._values:
            return None
        ordered = sorted(self._values)
        return ordered[min(len(ordered) - 1, max(0, math.ceil(share * len(ordered)) - 1))]

    def values(self) -> list[float]:
        """Oldest first."""
        return self._values[self._next :] + self._values[: self._next]


class Rate:
    """Events per second by exponential forgetting, corrected for the time before the first event.

    The estimate after t seconds at a steady rate is that rate for every t (the bias of a young EWMA is
    divided out), and it halves every `half_life_s` once events stop.
    """

    def __init__(self, half_life_s: float = HALF_LIFE_S) -> None:
        self._decay = math.log(2.0) / half_life_s
        self._weight = 0.0
        self._since: float | None = None
        self._last = 0.0

    def event(self, at_s: float) -> None:
        self._weight = self._decayed(at_s) + 1.0
        self._since = at_s if self._since is None else self._since
        self._last = max(at_s, self._last)

    def rps(self, at_s: float) -> float:
        if self._since is None:
            return 0.0
        # A second at least: one event at age zero is no rate at all.
        age = max(at_s - self._since, 1.0)
        seen = 1.0 - math.exp(-self._decay * age)
        return self._decayed(at_s) * self._decay / seen

    def resume(self, rps: float, at_s: float) -> None:
        """Takes up a rate measured before a restart, as if it had held until now."""
        self._weight = max(0.0, rps) / self._decay
        self._since = at_s - 20.0 / self._decay
        self._last = at_s

    def _decayed(self, at_s: float) -> float:
        if self._since is None:
            return 0.0
        return self._weight * math.exp(-self._decay * max(0.0, at_s - self._last))


class CountWindow:
    """Events in the last N whole seconds, in N buckets."""

    def __init__(self, seconds: int = RATE_WINDOW_S) -> None:
        self._counts = [0] * seconds
        self._second: int | None = None

    def event(self, at_s: float) -> None:
        self._turn(int(at_s))
        self._counts[int(at_s) % len(self._counts)] += 1

    def total(self, at_s: float) -> int:
        self._turn(int(at_s))
        return sum(self._counts)

    def _turn(self, second: int) -> None:
        """Empties the buckets of the seconds that have passed since the last call."""
        size = len(self._counts)
        if self._second is None:
            self._second = second
        for passed in range(self._second + 1, min(second, self._second + size) + 1):
            self._counts[passed % size] = 0
        if second > self._second + size:
            self._counts = [0] * size
        self._second = max(second, self._second)


class Percentiles(msgspec.Struct, frozen=True):
    """Of one quantity over a model's window."""

    p50: float
    p90: float
    p99: float


class _Model:
    """One model's windows."""

    def __init__(self) -> None:
        self.rate = Rate()
        self.latency_s = Ring()
        self.service_s = Ring()
        self.energy_j = Ring()
        self.memory_bytes = Ring()
        self.rating = Ring()
        self.ttft_s = Ring()
        self.observations = 0

    def rings(self) -> dict[str, Ring]:
        return {
            "latency_s": self.latency_s,
            "service_s": self.service_s,
            "energy_j": self.energy_j,
            "memory_bytes": self.memory_bytes,
            "rating": self.rating,
            "ttft_s": self.ttft_s,
        }

    def history(self) -> History:
        return History(
            latency_s=self.latency_s.mean,
            service_s=self.service_s.mean,
            energy_j=self.energy_j.mean,
            memory_bytes=self.memory_bytes.mean,
            rating=self.rating.mean,
            observations=self.observations,
        )


class _ModelState(msgspec.Struct, frozen=True):
    windows: dict[str, list[float]]
    observations: int
    rate_rps: float


class _State(msgspec.Struct, frozen=True):
    version: int
    rate_rps: float
    models: dict[str, _ModelState]


class _Histories(Mapping[str, History]):
    """A view: only the policies that compare models by their past pay for the means."""

    __slots__ = ("_models",)

    def __init__(self, models: Mapping[str, _Model]) -> None:
        self._models = models

    def __getitem__(self, name: str) -> History:
        return self._models[name].history()

    def __iter__(self) -> Iterator[str]:
        return iter(self._models)

    def __len__(self) -> int:
        return len(self._models)


class Workload:
    """Arrivals and results as they come in; rates and histories on demand. Times are monotonic."""

    def __init__(self) -> None:
        self._rate = Rate()
        self._count = CountWindow()
        self._models: dict[str, _Model] = {}

    def arrived(self, at_s: float, model: str | None = None) -> None:
        """A request came in; `model` where it is known already (a pinned one)."""
        self._rate.event(at_s)
        self._count.event(at_s)
        if model is not None:
            self.chosen(model, at_s)

    def chosen(self, model: str, at_s: float) -> None:
        """The decision for a request fell on a model: its share of the load."""
        self._model(model).rate.event(at_s)

    def observed(self, outcome: Outcome) -> None:
        """A finished request. Latency and energy count only when the answer was complete."""
        if outcome.model is None or outcome.status != "ok":
            return
        model = self._model(outcome.model)
        model.observations += 1
        model.latency_s.add(outcome.total_s)
        model.service_s.add(max(0.0, outcome.total_s - outcome.queue_s - outcome.load_s))
        if outcome.ttft_s is not None:
            model.ttft_s.add(outcome.ttft_s)
        if outcome.energy is not None:
            model.energy_j.add(outcome.energy.joules)
        if outcome.memory_bytes is not None:
            model.memory_bytes.add(outcome.memory_bytes)

    def rated(self, model: str, rating: float) -> None:
        """A rating, 1..5; others are ignored."""
        if 1.0 <= rating <= 5.0:
            self._model(model).rating.add(rating)

    def removed(self, model: str) -> None:
        """The model left the fleet."""
        self._models.pop(model, None)

    def rate_rps(self, at_s: float) -> float:
        """Arrivals per second, half-life 60 s."""
        return self._rate.rps(at_s)

    def window_rps(self, at_s: float) -> float:
        """Arrivals per second over the last 60 whole seconds."""
        return self._count.total(at_s) / RATE_WINDOW_S

    def per_model_rate(self, at_s: float) -> dict[str, float]:
        """Requests per second decided for each model ever chosen."""
        return {name: model.rate.rps(at_s) for name, model in self._models.items()}

    def histories(self) -> Mapping[str, History]:
        """Means over the last 100 observations, for every model seen; computed when looked up."""
        return _Histories(self._models)

    def percentiles(self) -> dict[str, Mapping[str, Percentiles]]:
        """By model and quantity, of what its window holds."""
        return {
            name: {key: percentiles(ring) for key, ring in model.rings().items() if len(ring)}
            for name, model in self._models.items()
        }

    def dump(self, at_s: float) -> bytes:
        """The windows and rates, for a checkpoint."""
        models = {
            name: _ModelState(
                {key: ring.values() for key, ring in model.rings().items()},
                model.observations,
                model.rate.rps(at_s),
            )
            for name, model in self._models.items()
        }
        return msgspec.msgpack.encode(_State(_VERSION, self.rate_rps(at_s), models))

    def load(self, data: bytes, at_s: float) -> bool:
        """Takes up a dump. False, with nothing changed, when it is damaged or of another version."""
        try:
            state = msgspec.msgpack.decode(data, type=_State)
        except msgspec.MsgspecError:
            return False
        if state.version != _VERSION:
            return False
        self._rate.resume(state.rate_rps, at_s)
        for name, saved in state.models.items():
            model = self._model(name)
            model.observations = max(0, saved.observations)
            model.rate.resume(saved.rate_rps, at_s)
            for key, ring in model.rings().items():
                for value in saved.windows.get(key, [])[-WINDOW:]:
                    ring.add(value)
        return True

    def _model(self, name: str) -> _Model:
        model = self._models.get(name)
        if model is None:
            if len(self._models) >= _MODELS:  # a caller that invents names must not grow us without end
                self._models.pop(next(iter(self._models)))
            model = self._models[name] = _Model()
        return model


def percentiles(ring: Ring) -> Percentiles:
    """Nearest-rank p50, p90, p99 of a window that is not empty."""
    p50, p90, p99 = (ring.quantile(share) or 0.0 for share in _QUANTILES)
    return Percentiles(p50, p90, p99)
