"""What the small regressions and the wide one share: priors, the noise with its guards, the stored form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from calm.analyze.maths import Array
from calm.analyze.quadratic import full

_CLIP_SD = 4.0
_CLIP_AFTER = 3
_SHIFT_MEMORY = 0.8
_SHIFT_CLIP_SD = 3.0
_SHIFT_LIMIT = 1.5  # 4.5 standard deviations of the statistic under white noise
_SHIFT_KEEP = 0.1


@dataclass(frozen=True)
class Prior:
    """What is believed before any data. `strength[i]`: pseudo-observations that hold coefficient i."""

    mean: tuple[float, ...]
    strength: tuple[float, ...]
    noise_sd: float
    noise_strength: float = 4.0

    @property
    def noise(self) -> tuple[float, float]:
        """The inverse-gamma's a and b."""
        return self.noise_strength, self.noise_strength * self.noise_sd**2


class RowState(msgspec.Struct, frozen=True, array_like=True):
    """One row's posterior, as stored in a checkpoint: float64 arrays as bytes, the precision packed."""

    vector: bytes
    precision: bytes
    noise: tuple[float, float]
    observations: int
    shift: float
    base: bytes
    unit: bytes = b""


@dataclass(slots=True)
class Noise:
    """A row's plain numbers: the noise's strength a and total b, the count, the shift statistic."""

    strength: float
    total: float
    observations: int = 0
    shift: float = 0.0

    @property
    def variance(self) -> float:
        return self.total / self.strength

    def judged(self, error: float, sd: float) -> tuple[float, float]:
        """The residual as far as it counts, and the share of the memory that survives it."""
        if self.observations < _CLIP_AFTER:
            return error, 1.0
        error = min(max(error, -_CLIP_SD * sd), _CLIP_SD * sd)
        return error, _SHIFT_KEEP if self._shifted(error / sd) else 1.0

    def learn(self, square: float, keep: float, start: tuple[float, float]) -> None:
        self.strength = keep * self.strength + (1 - keep) * start[0] + 1.0
        self.total = keep * self.total + (1 - keep) * start[1] + square
        self.observations += 1

    def _shifted(self, standardised: float) -> bool:
        """One more residual; True when they have stayed on one side for too long."""
        step = min(max(standardised, -_SHIFT_CLIP_SD), _SHIFT_CLIP_SD)
        self.shift = _SHIFT_MEMORY * self.shift + (1 - _SHIFT_MEMORY) * step
        if abs(self.shift) <= _SHIFT_LIMIT:
            return False
        self.shift = 0.0
        return True


def as_bytes(numbers: Sequence[float] | Array) -> bytes:
    return np.asarray(numbers, np.float64).tobytes()


def read_state(state: RowState, d: int) -> tuple[Array, Array, Array] | None:
    """(vector, packed precision, base), None when the state does not fit d features or is not sane."""
    sizes = len(state.vector), len(state.precision), len(state.base)
    if sizes != (8 * d, 8 * (d * (d + 1) // 2), 8 * d):
        return None
    vector, precision, base = map(np.frombuffer, (state.vector, state.precision, state.base))
    numbers = (vector, precision, base, np.asarray([*state.noise, state.shift]))
    if not all(np.isfinite(part).all() for part in numbers):
        return None
    if min(state.noise) <= 0 or state.observations < 1 or not _positive(full(precision, d)):
        return None
    return vector, precision, base


def _positive(matrix: Array) -> bool:
    try:
        np.linalg.cholesky(matrix)
    except np.linalg.LinAlgError:
        return False
    return True
