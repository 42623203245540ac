"""Prompt tokens as each model's own tokenizer counts them, learned from `usage.prompt_tokens`.

The Monitor's estimate knows scripts but no vocabulary. Each model corrects it by a factor, and by an amount
for each turn: the chat template's own tokens.
"""

from __future__ import annotations

from calm.analyze.regression import Array, Prior, RelativeLearner, Rows, RowState
from calm.records import Belief, Features

TEMPLATE_TOKENS_PER_TURN = 10.0

_PRIOR = Prior(mean=(1.0, 1.0), strength=(0.5, 0.5), noise_sd=0.15)

Case = tuple[float, float]
"""(turns, model-independent token estimate)."""


def case(features: Features) -> Case:
    return float(max(1, features.turns)), features.prompt_tokens


class TokenCounter:
    """tokens = template * turns + factor * estimate."""

    name = "prompt_tokens"

    def __init__(self) -> None:
        self._learner = RelativeLearner(_PRIOR)

    def add(self, row: int) -> None:
        self._learner.grow(row + 1)
        self._learner.reset(row, (TEMPLATE_TOKENS_PER_TURN, 1.0))

    def predict(self, rows: Rows, x: Array) -> tuple[Array, Array]:
        """Features (m, 2) as in `Case`; mean and sd in tokens."""
        return self._learner.predict(rows, x)

    def predict_one(self, row: int, x: Case) -> Belief:
        return self._learner.predict_one(row, x)

    def learn_one(self, row: int, x: Case, tokens: float) -> bool:
        return tokens >= 1 and self._learner.learn_one(row, x, tokens)

    def state(self, row: int) -> RowState | None:
        return self._learner.state(row)

    def restore(self, row: int, state: RowState) -> bool:
        return self._learner.restore(row, state)
