"""Fields: which questions are a specialist's own, learned from questions it was made for.

A domain (domains.py) is known by a few words and takes in whatever sounds like it: "the price of gold" is finance, and
so is "the capital of France". A specialist knows much less than a domain: headlines about gold, in one form. Its
field is a line through the sense of questions that tells its own from everyday ones (fitting.py,
`calm models field`):

    P(f | question) = exp(z_f) / (1 + sum_g exp(z_g)),    z_f = (w_f . sense + b_f) / 0.5

The sense of a question is its embedding, what it is about, and beside it its form (calm.monitor.form), how it is laid
out: a passage and a question under it, tables and a question, a word problem.

What no field claims is left to the domains. A card carries its fields as base64 of 16-bit floats, w then b, for one
embedder; under another one, or of another length, they say nothing and the domains decide alone.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from calm.records import FORM, FieldSpec, Vector

Line = NDArray[np.float32]
"""(dimensions + form + 1,): w, then b."""

_TEMPERATURE = 0.5
"""A ridge makes lines cautious; this makes up for it (docs/decisions/0004-prediction.md)."""
FORM_WEIGHT = 0.3
"""Of a number of the form beside one of the embedding, whose length is 1."""
_LARGEST = 30.0
"""Beyond this a logit is a certainty; keeps exponentials in range."""


def sense_of(embedding: Vector, form: Sequence[float] | None) -> Vector:
    """(dimensions + FORM,): the embedding, then the weighted form; where nobody read it that of a short question, 0."""
    laid_out = np.zeros(FORM, np.float32) if form is None else FORM_WEIGHT * np.asarray(form, np.float32)
    return np.concatenate([embedding, laid_out], dtype=np.float32)


def encoded(line: Line) -> str:
    """As it stands on a card; `FieldSpec.numbers` reads it."""
    return base64.b64encode(np.asarray(line, "<f2").tobytes()).decode()


class FieldSpace:
    """All fields of a fleet; rebuilt when a card comes or goes."""

    def __init__(self, embedder: str, dimensions: int) -> None:
        self._embedder, self._width = embedder, dimensions + FORM
        self.names: tuple[str, ...] = ()
        self.untrained: Mapping[str, float] = {}
        """Quality of who has not learned a field, by name, where a card says so."""
        self._weights: NDArray[np.float32] = np.zeros((0, self._width), np.float32)
        self._bias: NDArray[np.float32] = np.zeros(0, np.float32)

    def learn(self, cards: Iterable[Mapping[str, FieldSpec]]) -> None:
        """The fields of these cards and no others. Where several cards know a field, the mean of their lines."""
        lines: dict[str, list[Line]] = {}
        untrained: dict[str, list[float]] = {}
        for fields in cards:
            for name, field in fields.items():
                line = self._line(field)
                if line is None:
                    continue
                lines.setdefault(name, []).append(line)
                if field.untrained is not None:
                    untrained.setdefault(name, []).append(field.untrained)
        self.names = tuple(sorted(lines))
        self.untrained = {name: sum(found) / len(found) for name, found in untrained.items()}
        rows = [np.mean(lines[name], axis=0, dtype=np.float32) for name in self.names]
        both = np.asarray(rows, np.float32).reshape(len(rows), self._width + 1)
        self._weights, self._bias = np.ascontiguousarray(both[:, :-1]), both[:, -1].copy()

    def reads(self, field: FieldSpec) -> bool:
        """Whether it was learned with this embedder, and with the numbers of the form that there are now."""
        return self._line(field) is not None

    def _line(self, field: FieldSpec) -> Line | None:
        if field.embedder != self._embedder:
            return None
        line = np.asarray(field.numbers(), np.float32)
        return line if len(line) == self._width + 1 else None

    def shares(self, sense: Vector) -> NDArray[np.float32]:
        """Probability of each field, (fields,); what they leave of 1 is everything else."""
        logits = (self._weights.dot(sense) + self._bias) / _TEMPERATURE
        odds = np.exp(np.minimum(logits, _LARGEST))
        return np.asarray(odds / (1.0 + odds.sum()), np.float32)
