"""Prompt tokens as each model's own tokenizer counts them, learned from `usage.prompt_tokens`.

The Monitor's estimate knows scripts but no vocabulary. Each model corrects it by a factor, and by an amount
for each turn: the chat template's own tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

from calm.analyze.evidence import Prior
from calm.analyze.maths import ONE, Maths, N
from calm.analyze.regression import Posterior, RelativeLearner, belief, relative, relative_mean
from calm.records import Belief, Features

TEMPLATE_TOKENS_PER_TURN = 10.0

_PRIOR = Prior(mean=(1.0, 1.0), strength=(0.5, 0.5), noise_sd=0.15)

Case = tuple[float, float]
"""(turns, model-independent token estimate)."""


def case(features: Features) -> Case:
    return float(max(1, features.turns)), features.prompt_tokens


class TokenCounter(RelativeLearner):
    """tokens = template * turns + factor * estimate."""

    name = "prompt_tokens"

    def __init__(self) -> None:
        super().__init__(_PRIOR)

    def add(self, row: int) -> None:
        self._bank.reset(row, units=(TEMPLATE_TOKENS_PER_TURN, 1.0))

    def predict_one(self, row: int, x: Case) -> Belief:
        return belief(relative(ONE, self.of(row), x))

    def learn_one(self, row: int, x: Case, tokens: float) -> bool:
        return tokens >= 1 and self._learn(row, x, tokens)


def prompt_tokens(m: Maths[N], of: Posterior[N], x: Sequence[N | float]) -> N:
    """Tokens, for features as in `Case`."""
    return relative_mean(m, of, x)
