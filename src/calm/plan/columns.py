"""A large fleet's predictions as columns: what limits and scores compare, without a record for each model.

The Analyzer's answer for a large fleet offers them beside being a mapping of Estimates; nothing here asks who
made it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from calm.records import Estimate

Array = NDArray[np.float64]


@runtime_checkable
class Columns(Protocol):
    """Predictions of many models in the order of their names. NaN where a number is unknown."""

    @property
    def queue_s(self) -> Array: ...

    @property
    def total_s(self) -> Array: ...

    @property
    def total_sd_s(self) -> Array: ...

    @property
    def energy_j(self) -> Array: ...

    @property
    def cost_usd(self) -> Array: ...

    @property
    def quality(self) -> Array: ...

    @property
    def quality_sd(self) -> Array: ...

    def only(self, names: Sequence[str]) -> Mapping[str, Estimate]:
        """Of some models, in the order given."""
        ...


def columns_of(estimates: Mapping[str, Estimate]) -> Columns | None:
    """None for a mapping that is nothing else."""
    return None if isinstance(estimates, dict) or not isinstance(estimates, Columns) else estimates


class Figures(NamedTuple):
    """What one model's prediction is held against a caller's limits by."""

    model: str
    total_s: float
    energy_j: float | None
    cost_usd: float | None


def figures(estimates: Mapping[str, Estimate]) -> Iterable[Figures]:
    """Those of every model, in the order of `estimates`."""
    columns = columns_of(estimates)
    if columns is None:
        return map(_of_record, estimates.values())
    joules, dollars = (map(_known, column.tolist()) for column in (columns.energy_j, columns.cost_usd))
    return map(Figures, estimates, columns.total_s.tolist(), joules, dollars)


def only(estimates: Mapping[str, Estimate], names: Sequence[str]) -> Mapping[str, Estimate]:
    """The estimates of some models, as columns if they were."""
    columns = columns_of(estimates)
    return {name: estimates[name] for name in names} if columns is None else columns.only(names)


def _of_record(estimate: Estimate) -> Figures:
    joules = None if estimate.energy_j is None else estimate.energy_j.mean
    return Figures(estimate.model, estimate.total_s.mean, joules, estimate.cost_usd)


def _known(value: float) -> float | None:
    return value if value == value else None
