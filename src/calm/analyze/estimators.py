"""The estimators of tokens, seconds and joules side by side: one row of each belongs to one model.

They are primed, read, saved and restored together, so that nobody else has to know how many there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from calm.analyze.energy import Energy
from calm.analyze.evidence import RowState
from calm.analyze.latency import Decode, LoadTime, Prefill, load_s
from calm.analyze.lengths import LengthPredictor
from calm.analyze.maths import MANY, ONE, Array, Span
from calm.analyze.prediction import Known, Stated, stated
from calm.analyze.quality import Quality
from calm.analyze.tokens import TokenCounter
from calm.records import ModelCard


class Estimator(Protocol):
    """What all estimators share: a row's state out and in. Features and observations are each one's own."""

    @property
    def name(self) -> str: ...

    def state(self, row: int) -> RowState | None:
        """None while the row still holds its prior."""
        ...

    def restore(self, row: int, state: RowState) -> bool:
        """False, and the row as it was, when the state does not fit."""
        ...


class Estimators:
    """Whoever teaches one of them says so with `learned`, because what is believed of a model is kept."""

    def __init__(self, quality: Quality) -> None:
        self.tokens = TokenCounter()
        self.lengths = LengthPredictor()
        self.load = LoadTime()
        self.prefill = Prefill()
        self.decode = Decode()
        self.energy = Energy()
        self.quality = quality
        self._all: tuple[Estimator, ...] = (
            self.tokens,
            self.lengths,
            self.load,
            self.prefill,
            self.decode,
            self.energy,
        )
        self._stated: Array = np.zeros((len(Stated._fields), 0))
        self._known: dict[int, Known[float]] = {}

    def prime(self, row: int, card: ModelCard) -> None:
        """Back to what the card says."""
        self.tokens.add(row)
        self.lengths.add(row, card.priors.output_tokens)
        self.load.add(row, card)
        self.prefill.add(row, card)
        self.decode.add(row, card)
        self.energy.add(row, card.priors.energy_j_per_token)
        self.quality.add(row, card)
        missing = row + 1 - self._stated.shape[1]
        if missing > 0:
            blank = np.zeros((len(self._stated), missing + row // 2))
            self._stated = np.concatenate([self._stated, blank], axis=1)
        self._stated[:, row] = stated(card)
        self.learned(row)

    def learned(self, row: int) -> None:
        """Something of the row has changed."""
        self._known.pop(row, None)

    def of(self, row: int) -> Known[float]:
        """What is believed of one model."""
        known = self._known.get(row)
        if known is None:
            known = self._known[row] = Known(
                self.tokens.of(row),
                self.lengths.of(row),
                load_s(ONE, self.load.of(row)),
                self.prefill.of(row),
                self.decode.of(row),
                self.energy.of(row),
                Stated(*self._stated[:, row].tolist()),
            )
        return known

    def over(self, rows: Span) -> Known[Array]:
        """The same of many, as columns."""
        return Known(
            self.tokens.over(rows),
            self.lengths.over(rows),
            load_s(MANY, self.load.over(rows)),
            self.prefill.over(rows),
            self.decode.over(rows),
            self.energy.over(rows),
            Stated(*self._stated[:, rows]),
        )

    def states(self, row: int) -> dict[str, RowState]:
        """What was learned, by estimator; those that still hold their prior are left out."""
        states = {part.name: part.state(row) for part in self._all}
        told = {name: state for name, state in states.items() if state is not None}
        return told | self.quality.states(row)

    def restore(self, row: int, states: Mapping[str, RowState]) -> None:
        """Estimators whose state is missing or does not fit stay as they are."""
        for part in self._all:
            state = states.get(part.name)
            if state is not None:
                part.restore(row, state)
        self.quality.restore(row, states)
        self.learned(row)
