"""Joules from CPU time: the meter that works wherever nothing measures power.

    joules = CPU seconds of the group x watts per logical CPU

The watts are the operator's figure, else TDP over logical CPUs from `tdp.py`, else its default. So the figure
is modelled: it follows how long the processors worked and is blind to frequency, vector width and idle power.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from calm.meters.processes import CpuSource, GroupClock
from calm.records import MeterKind


class CpuTimeMeter:
    """Implements ports.Meter. `watts_per_core` is the power of one busy logical CPU."""

    name = "cpu-time"
    kind: MeterKind = "modelled"

    def __init__(self, source: CpuSource, watts_per_core: float) -> None:
        if not 0.0 < watts_per_core < 1000.0:
            raise ValueError(f"watts_per_core must lie between 0 and 1000, not {watts_per_core}")
        self.watts_per_core = watts_per_core
        self._clock = GroupClock(source)

    def read(self, groups: Mapping[str, Sequence[int]]) -> Mapping[str, float]:
        watts = self.watts_per_core
        return {name: used_s * watts for name, used_s in self._clock.read(groups).items()}
