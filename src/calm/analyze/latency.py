"""Seconds to load, to prefill and for each decoded token, for each model, learned from what was served.

    load    lognormal, prior from the card's load_s or from the weights' bytes
    prefill a + b * uncached + c * uncached * (concurrency - 1), noise relative; scaled by the thread count
    TPOT    exp(w0 + w1 log concurrency + w2 log threads), noise lognormal

Prefill is compute-bound and linear in the tokens that the KV cache lacks; decode is bound by memory
bandwidth, so a batch shares each read of the weights (Orca, Yu et al. OSDI 2022; Sarathi-Serve, Agrawal et
al. OSDI 2024). How much it shares, and what a thread brings, differs by machine: that is what w1 and w2
learn.
"""

from __future__ import annotations

import math

from calm.analyze.evidence import Prior
from calm.analyze.maths import ONE, Maths, N, Pair
from calm.analyze.regression import LogLearner, Posterior, RelativeLearner, belief, lognormal, relative
from calm.records import Belief, ModelCard

# Priors for a card that states nothing; small quantised models on a server CPU, one thread (field tests:
# 98 MB at 88 tokens/s, 253 MB at 54).
DECODE_BYTES_PER_S = 9e9
PREFILL_OVER_DECODE = 5.0
UNKNOWN_DECODE_TPS = 30.0
REMOTE_DECODE_TPS = 60.0
REMOTE_LATENCY_S = 0.3
LOCAL_LATENCY_S = 0.01
DISK_BYTES_PER_S = 400e6
LOAD_OVERHEAD_S = 0.3
UNKNOWN_LOAD_S = 5.0

PREFILL_THREAD_EXPONENT = 0.9

PrefillCase = tuple[float, float, int]
"""(uncached prompt tokens, concurrency on the engine itself included, threads)."""
DecodeCase = tuple[float, int]
"""(concurrency, threads)."""

_LOAD_PRIOR = Prior(mean=(math.log(UNKNOWN_LOAD_S),), strength=(0.5,), noise_sd=0.3)
_PREFILL_PRIOR = Prior(mean=(1.0, 1.0, 0.5), strength=(0.1, 0.1, 0.5), noise_sd=0.25)
_DECODE_PRIOR = Prior(mean=(0.0, 0.8, -0.5), strength=(0.15, 1.0, 2.0), noise_sd=0.15)
_REMOTE_BATCH_EXPONENT = 0.1
_LOCAL_BATCH_EXPONENT = 0.8


def weights_bytes(card: ModelCard) -> int | None:
    """Size of the weights as far as the card says."""
    stated = card.source.bytes if card.source is not None else None
    return stated or card.memory_hint_bytes


def prior_decode_tps(card: ModelCard) -> float:
    """Tokens per second of one sequence on one thread: stated, else from bytes and memory bandwidth."""
    if card.priors.decode_tps:
        return card.priors.decode_tps
    if card.remote:
        return REMOTE_DECODE_TPS
    size = weights_bytes(card)
    return UNKNOWN_DECODE_TPS if not size else min(400.0, max(1.0, DECODE_BYTES_PER_S / size))


def prior_prefill_tps(card: ModelCard) -> float:
    """Prompt tokens per second on one thread."""
    return card.priors.prefill_tps or PREFILL_OVER_DECODE * prior_decode_tps(card)


def prior_load_s(card: ModelCard) -> float:
    """Seconds from cold to ready."""
    if card.priors.load_s:
        return card.priors.load_s
    size = weights_bytes(card)
    return UNKNOWN_LOAD_S if not size else LOAD_OVERHEAD_S + size / DISK_BYTES_PER_S


class LoadTime(LogLearner):
    """Seconds a cold model needs until it answers."""

    name = "load_s"

    def __init__(self) -> None:
        super().__init__(_LOAD_PRIOR, forgetting=0.9)

    def add(self, row: int, card: ModelCard) -> None:
        self._bank.reset(row, (math.log(prior_load_s(card)),))

    def predict_one(self, row: int, x: tuple[float] = (1.0,)) -> Belief:
        return belief(lognormal(ONE, self.of(row), x))

    def learn_one(self, row: int, x: tuple[float], seconds: float) -> bool:
        return self._learn(row, x, seconds)


def load_s(m: Maths[N], of: Posterior[N]) -> Pair[N]:
    """Mean and sd of a whole load."""
    return lognormal(m, of, (1.0,))


class Prefill(RelativeLearner):
    """Seconds from the engine's start on a prompt to the first token."""

    name = "prefill_s"

    def __init__(self) -> None:
        super().__init__(_PREFILL_PRIOR)

    def add(self, row: int, card: ModelCard) -> None:
        overhead = REMOTE_LATENCY_S if card.remote else LOCAL_LATENCY_S
        per_token = 1.0 / prior_prefill_tps(card)
        self._bank.reset(row, units=(overhead, per_token, 0.1 * per_token if card.remote else per_token))

    def predict_one(self, row: int, x: PrefillCase) -> Belief:
        return belief(prefill_s(ONE, self.of(row), *_served(x)))

    def learn_one(self, row: int, x: PrefillCase, seconds: float) -> bool:
        return seconds > 0 and self._learn(row, _prefill_features(*_served(x)), seconds)


def prefill_s(m: Maths[N], of: Posterior[N], uncached: N, concurrency: N, threads: N) -> Pair[N]:
    """Mean and sd. All three as in `PrefillCase`, concurrency and threads at least 1."""
    return relative(m, of, _prefill_features(uncached, concurrency, threads))


def _prefill_features(uncached: N, concurrency: N, threads: N) -> tuple[float, N, N]:
    work = uncached * threads**-PREFILL_THREAD_EXPONENT
    return 1.0, work, work * (concurrency - 1.0)


def _served(x: PrefillCase) -> tuple[float, float, float]:
    """Within the domain of the formula, whatever an engine reported."""
    return max(0.0, x[0]), max(1.0, x[1]), float(max(1, x[2]))


class Decode(LogLearner):
    """Seconds for each further token (TPOT) of one sequence."""

    name = "tpot_s"

    def __init__(self) -> None:
        super().__init__(_DECODE_PRIOR)

    def add(self, row: int, card: ModelCard) -> None:
        batch = _REMOTE_BATCH_EXPONENT if card.remote else _LOCAL_BATCH_EXPONENT
        threads = 0.0 if card.remote else _DECODE_PRIOR.mean[2]
        self._bank.reset(row, (-math.log(prior_decode_tps(card)), batch, threads))

    def predict_one(self, row: int, x: DecodeCase) -> Belief:
        return belief(lognormal(ONE, self.of(row), _decode_features(x)))

    def learn_one(self, row: int, x: DecodeCase, seconds: float) -> bool:
        return self._learn(row, _decode_features(x), seconds)


def tpot_s(m: Maths[N], of: Posterior[N], concurrency: N, threads: N) -> Pair[N]:
    """Mean and sd for concurrency and threads of at least 1."""
    return lognormal(m, of, (1.0, m.log(concurrency), m.log(threads)))


def _decode_features(x: DecodeCase) -> tuple[float, float, float]:
    concurrency, threads = x
    return 1.0, math.log(max(1.0, concurrency)), math.log(max(1, threads))
