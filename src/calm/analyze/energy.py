"""Joules of a request: a fixed part, a part for each prompt token read and one for each token written.

    J = e0 + ep * uncached prompt tokens + ed * output tokens        (relative noise)

Linear in both token counts at a given batch size, as measured over models and machines by Wilkins et al.
2024 (arXiv 2407.04014) and by the ML.ENERGY benchmark. A model whose card states no energy and that was
never metered has no estimate: it is None, never 0.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from calm.analyze.regression import Array, Prior, RelativeLearner, Rows, RowState
from calm.records import Belief

PROMPT_OVER_OUTPUT = 0.2  # a prompt token is read in a batch, so it costs about a fifth of a written one
FIXED_TOKENS = 4.0  # the fixed part, in output tokens

Case = tuple[float, float]
"""(uncached prompt tokens, output tokens over all samples)."""

_PRIOR = Prior(mean=(1.0, 1.0, 1.0), strength=(0.3, 0.15, 0.1), noise_sd=0.25)


class Energy:
    """Joules of one request, None until stated or measured."""

    name = "energy_j"

    def __init__(self) -> None:
        self._learner = RelativeLearner(_PRIOR)
        self.known: NDArray[np.bool_] = np.zeros(0, np.bool_)

    def add(self, row: int, joules_per_token: float | None = None) -> None:
        self._learner.grow(row + 1)
        extra = len(self._learner.unit) - len(self.known)
        self.known = np.concatenate([self.known, np.zeros(extra, np.bool_)])
        stated = joules_per_token is not None and joules_per_token > 0
        self.known[row] = stated
        self._learner.reset(row, _units(joules_per_token if stated and joules_per_token else 1.0))

    def predict(
        self, rows: Rows, uncached: Array, output: Array, output_sd: Array
    ) -> tuple[Array, Array, NDArray[np.bool_]]:
        """(mean, sd, known); the answer's own uncertainty is carried through the joules a token."""
        x = np.ones((len(rows), 3))
        x[:, 1] = uncached
        x[:, 2] = output
        mean, sd = self._learner.predict(rows, x)
        per_token = np.maximum(self._learner.bank.coefficients[rows, 2], 0.0) * self._learner.unit[rows, 2]
        return mean, np.sqrt(sd**2 + (per_token * output_sd) ** 2), self.known[rows]

    def predict_one(self, row: int, x: Case) -> Belief | None:
        return self._learner.predict_one(row, (1.0, *x)) if self.known[row] else None

    def learn_one(self, row: int, x: Case, joules: float) -> bool:
        """The first observation of an unknown model sets its scale. False for what no meter can mean."""
        if not (0.0 < joules < float("inf") and np.isfinite(x).all() and min(x) >= 0 and sum(x) > 0):
            return False
        if not self.known[row]:
            tokens = FIXED_TOKENS + PROMPT_OVER_OUTPUT * x[0] + x[1]
            self._learner.reset(row, _units(joules / tokens))
            self.known[row] = True
        return self._learner.learn_one(row, (1.0, *x), joules)

    def state(self, row: int) -> RowState | None:
        return self._learner.state(row)

    def restore(self, row: int, state: RowState) -> bool:
        restored = self._learner.restore(row, state)
        self.known[row] |= restored
        return restored


def _units(joules_per_token: float) -> tuple[float, float, float]:
    return FIXED_TOKENS * joules_per_token, PROMPT_OVER_OUTPUT * joules_per_token, joules_per_token
