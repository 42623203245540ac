"""The meter of a machine that cannot be metered: it sees nothing, so every energy stays unknown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from calm.records import MeterKind


class AbsentMeter:
    """Implements ports.Meter by leaving out every group. Its `kind` never reaches a reading."""

    name = "absent"
    kind: MeterKind = "modelled"

    def read(self, groups: Mapping[str, Sequence[int]]) -> Mapping[str, float]:
        return {}
