"""Joules of a request: a fixed part, a part for each prompt token read and one for each token written.

    J = e0 + ep * uncached prompt tokens + ed * output tokens        (relative noise)

Linear in both token counts at a given batch size, as measured over models and machines by Wilkins et al.
2024 (arXiv 2407.04014) and by the ML.ENERGY benchmark. A model whose card states no energy and that was
never metered has no estimate: it is None, never 0.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from calm.analyze.evidence import Prior, RowState
from calm.analyze.maths import ONE, Maths, N, Pair, Span
from calm.analyze.regression import Posterior, RelativeLearner, belief, relative
from calm.records import Belief

PROMPT_OVER_OUTPUT = 0.2  # a prompt token is read in a batch, so it costs about a fifth of a written one
FIXED_TOKENS = 4.0  # the fixed part, in output tokens

Case = tuple[float, float]
"""(uncached prompt tokens, output tokens over all samples)."""

_PRIOR = Prior(mean=(1.0, 1.0, 1.0), strength=(0.3, 0.15, 0.1), noise_sd=0.25)


class Energy(RelativeLearner):
    """Joules of one request, None until stated or measured."""

    name = "energy_j"

    def __init__(self) -> None:
        super().__init__(_PRIOR)
        self._known: NDArray[np.bool_] = np.zeros(0, np.bool_)

    def known(self, row: int) -> bool:
        """Stated by the card or measured at least once."""
        return self._known.item(row)

    def known_of(self, rows: Span) -> NDArray[np.bool_]:
        """The same of many."""
        return self._known[rows].copy()

    def add(self, row: int, joules_per_token: float | None = None) -> None:
        missing = row + 1 - len(self._known)
        if missing > 0:
            self._known = np.concatenate([self._known, np.zeros(missing + row // 2, np.bool_)])
        stated = joules_per_token if joules_per_token is not None and joules_per_token > 0 else None
        self._known[row] = stated is not None
        self._bank.reset(row, units=_units(stated or 1.0))

    def predict_one(self, row: int, x: Case) -> Belief | None:
        return belief(relative(ONE, self.of(row), (1.0, *x))) if self.known(row) else None

    def learn_one(self, row: int, x: Case, joules: float) -> bool:
        """The first observation of an unknown model sets its scale. False for what no meter can mean."""
        uncached, output = x
        sensible = 0.0 <= uncached < math.inf and 0.0 <= output < math.inf and uncached + output > 0
        if not (sensible and 0.0 < joules < math.inf):
            return False
        if not self.known(row):
            tokens = FIXED_TOKENS + PROMPT_OVER_OUTPUT * uncached + output
            self._bank.reset(row, units=_units(joules / tokens))
            self._known[row] = True
        return self._learn(row, (1.0, uncached, output), joules)

    def restore(self, row: int, state: RowState) -> bool:
        restored = super().restore(row, state)
        if restored:
            self._known[row] = True
        return restored


def energy_j(m: Maths[N], of: Posterior[N], uncached: N, output: Pair[N]) -> Pair[N]:
    """Mean and sd; the answer's own uncertainty is carried through the joules a token."""
    mean, sd = relative(m, of, (1.0, uncached, output[0]))
    through = m.larger(of.weights[2], 0.0) * output[1]
    return mean, m.sqrt(sd * sd + through * through)


def _units(joules_per_token: float) -> tuple[float, float, float]:
    return FIXED_TOKENS * joules_per_token, PROMPT_OVER_OUTPUT * joules_per_token, joules_per_token
