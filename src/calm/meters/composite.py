"""One meter out of several that measure different parts of the machine: the GPUs and the CPU packages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from calm.ports import Meter
from calm.records import MeterKind

STRENGTH: Mapping[MeterKind, int] = {"modelled": 0, "attributed": 1, "measured": 2}


class CompositeMeter:
    """Implements ports.Meter: the sum of its parts, named `nvml+rapl`, of the weakest part's kind.

    A group that only some parts see gets their sum: an engine that never touches a GPU has CPU joules alone.
    """

    def __init__(self, parts: Sequence[Meter]) -> None:
        if not parts:
            raise ValueError("a composite meter needs at least one part")
        self._parts = tuple(parts)
        self.name = "+".join(part.name for part in parts)
        self.kind: MeterKind = min((part.kind for part in parts), key=STRENGTH.__getitem__)

    def read(self, groups: Mapping[str, Sequence[int]]) -> Mapping[str, float]:
        total_j: dict[str, float] = {}
        for part in self._parts:
            for name, joules in part.read(groups).items():
                total_j[name] = total_j.get(name, 0.0) + joules
        return total_j
