"""The routing formulas of the CALM paper (arXiv 2602.03632), kept exactly: the baseline ours is measured by.

    score(q, i) = g(sim(q, d_i)) + sum_l lambda_l * dyn_l(i)

    latency, energy      (1 - sim) + lambda * dyn      lowest wins
    confidence           sim + lambda * C              highest wins
    cache                sim + lambda if resident      highest wins

sim is the cosine of MiniLM embeddings of the query and the card's description; dyn the mean of a model's last
100 observations; a model without any counts as latency 0, energy 0, confidence 5 of 5. `Policy.rank` wants
lowest first, so 1 + lambda - score stands for a score where the highest wins: the order is the same, and the
paper's own number is the value of the term `paper`.

Where the paper is silent we chose: latency and energy are min-max normalised over the models being ranked
(all equal: 0); confidence c becomes (c - 1) / 4, which maps its whole scale 1..5 to 0..1; latency is inference
time, as in its STCF: with the wait included, a model's mean says when it was used rather than how fast it is, and
the published effect of pro-latency does not come out (docs/benchmarks.md).

Several metrics at once (`paper:latency+energy:0.1,0.1`) use the paper's proposed, not evaluated, correction
lambda'_l = lambda_l / (1 + sum of |rho(l, l')| over the others), rho Spearman's over the models ranked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from typing import Literal, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from calm.errors import BadInput, CalmError, SourceError
from calm.plan.ties import fair_order
from calm.ports import Embedder
from calm.records import (
    Ask,
    Candidate,
    Estimate,
    Features,
    History,
    ModelCard,
    Snapshot,
    Term,
    Vector,
    Weights,
)

Metric = Literal["latency", "energy", "confidence", "cache"]

DEFAULT_LAMBDA: Mapping[Metric, float] = {"latency": 0.3, "energy": 0.2, "confidence": 0.3, "cache": 0.05}
"""The values of the paper's result tables 4 and 5."""
HIGHEST_WINS: frozenset[Metric] = frozenset({"confidence", "cache"})
REMEMBERED_DESCRIPTIONS = 4096


class Mode(NamedTuple):
    """The metrics that count beside the similarity, and lambda of each; none: the similarity alone."""

    metrics: tuple[Metric, ...] = ()
    lambdas: tuple[float, ...] = ()

    @property
    def highest_wins(self) -> bool:
        return HIGHEST_WINS.issuperset(self.metrics)

    @property
    def spec(self) -> str:
        """The spec that makes this mode again."""
        if not self.metrics:
            return "paper"
        return f"paper:{'+'.join(self.metrics)}:{','.join(f'{value:g}' for value in self.lambdas)}"


def parse_paper(argument: str) -> Mode:
    """`""`, `MODE`, `MODE:LAMBDA`, or several: `latency+energy:0.1,0.1`. Raises BadInput (field `policy`)."""
    if not argument:
        return Mode()
    modes, _, lambdas = argument.partition(":")
    names = modes.split("+")
    wrong = [name for name in names if name not in DEFAULT_LAMBDA]
    if wrong or len(set(names)) != len(names):
        raise _wrong(f"policy paper:{argument}: choose each mode once, of {', '.join(DEFAULT_LAMBDA)}")
    metrics = cast("tuple[Metric, ...]", tuple(names))
    if not lambdas:
        return Mode(metrics, tuple(DEFAULT_LAMBDA[metric] for metric in metrics))
    values = tuple(_lambda(text, argument) for text in lambdas.split(","))
    if len(values) != len(metrics):
        raise _wrong(f"policy paper:{argument}: {len(metrics)} modes but {len(values)} lambdas")
    return Mode(metrics, values)


class PaperPolicy:
    """Ranks by the paper's score. Its own state: the vectors of the descriptions it has met."""

    def __init__(self, mode: Mode, embedder: Embedder) -> None:
        self.name = mode.spec
        self._mode = mode
        self._embedder = embedder
        self._described: dict[str, Vector] = {}

    @classmethod
    def build(cls, mode: Mode, embedder: Callable[[], Embedder] | None) -> PaperPolicy:
        """Makes the embedder now, so that missing weights are told at once. Raises SourceError."""
        if embedder is None:
            raise _no_weights(mode, "none is configured")
        try:
            return cls(mode, embedder())
        except (CalmError, OSError, ImportError, ValueError) as error:
            raise _no_weights(mode, str(error)) from error

    def rank(
        self,
        ask: Ask,
        features: Features,
        snapshot: Snapshot,
        cards: Mapping[str, ModelCard],
        estimates: Mapping[str, Estimate],
        histories: Mapping[str, History],
        weights: Weights,
    ) -> tuple[Candidate, ...]:
        names = list(cards)
        sims = self._similarities(self._query(ask, features), [cards[name].description for name in names])
        raw = [_observed(metric, names, histories, snapshot) for metric in self._mode.metrics]
        columns = [_unit(metric, values) for metric, values in zip(self._mode.metrics, raw, strict=True)]
        lambdas = corrected_lambdas(self._mode.lambdas, columns)
        terms = _terms(self._mode, sims, raw, columns, lambdas)
        scores = [sum(term.contribution for term in row) for row in terms]
        order = fair_order(names, scores, snapshot, ask.request_id)
        return tuple(Candidate(model=names[i], score=scores[i], terms=terms[i]) for i in order)

    def _query(self, ask: Ask, features: Features) -> Vector:
        """The Monitor's embedding when it is by the same embedder, so that a query is embedded once."""
        if features.embedding is not None and features.embedder == self._embedder.name:
            return features.embedding
        return self._embedder.embed(ask.query)

    def _similarities(self, query: Vector, descriptions: Sequence[str]) -> list[float]:
        if len(self._described) > REMEMBERED_DESCRIPTIONS:
            self._described = {
                text: v for text in descriptions if (v := self._described.get(text)) is not None
            }
        return [_cosine(query, self._description(text)) for text in descriptions]

    def _description(self, text: str) -> Vector:
        vector = self._described.get(text)
        if vector is None:
            vector = self._described[text] = self._embedder.embed(text)
        return vector


# --- dyn_l ---------------------------------------------------------------------------------------


def _observed(
    metric: Metric, names: Sequence[str], histories: Mapping[str, History], snapshot: Snapshot
) -> list[float]:
    """The metric of each model in its own unit; the paper's cold start where nothing was observed."""
    unseen = History()
    known = [histories.get(name, unseen) for name in names]
    match metric:
        case "latency":
            return [_or(history.service_s, 0.0) for history in known]
        case "energy":
            return [_or(history.energy_j, 0.0) for history in known]
        case "confidence":
            return [_or(history.rating, 5.0) for history in known]
        case "cache":
            return [float(_resident(snapshot, name)) for name in names]


def _or(value: float | None, start: float) -> float:
    return value if value is not None and isfinite(value) else start


def _resident(snapshot: Snapshot, name: str) -> bool:
    state = snapshot.models.get(name)
    return state is not None and state.residency in ("ready", "remote")


def _unit(metric: Metric, values: Sequence[float]) -> list[float]:
    """To 0..1: see the module's docstring for the choices."""
    match metric:
        case "confidence":
            return [min(1.0, max(0.0, (value - 1.0) / 4.0)) for value in values]
        case "cache":
            return list(values)
        case "latency" | "energy":
            low = min(values, default=0.0)
            span = max(values, default=0.0) - low
            return [(value - low) / span if span > 0 else 0.0 for value in values]


def corrected_lambdas(lambdas: Sequence[float], columns: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """lambda'_l = lambda_l / (1 + sum over l' != l of |rho(l, l')|); one metric alone keeps its lambda."""
    if len(columns) < 2:
        return tuple(lambdas)
    ranks = [_ranks(np.asarray(column, dtype=np.float64)) for column in columns]
    return tuple(
        value / (1.0 + sum(abs(_pearson(ranks[i], other)) for j, other in enumerate(ranks) if j != i))
        for i, value in enumerate(lambdas)
    )


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks from 0, equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts, dtype=np.float64)
    mean_ranks: NDArray[np.float64] = (ends - (counts + 1) / 2.0)[inverse]
    return mean_ranks


def _pearson(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Correlation; 0 where one of them does not vary. Of ranks, it is Spearman's rho."""
    da, db = a - a.mean(), b - b.mean()
    norm = float(np.sqrt((da @ da) * (db @ db)))
    return float(da @ db) / norm if norm > 0 else 0.0


# --- the score -----------------------------------------------------------------------------------


def _terms(
    mode: Mode,
    sims: Sequence[float],
    raw: Sequence[Sequence[float]],
    columns: Sequence[Sequence[float]],
    lambdas: Sequence[float],
) -> list[tuple[Term, ...]]:
    """Per model: similarity, every metric, and the paper's own score at weight 0."""
    rows: list[tuple[Term, ...]] = []
    for i, sim in enumerate(sims):
        row = [Term(name="similarity", value=sim, regret=1.0 - sim, weight=1.0)]
        paper = sim if mode.highest_wins else 1.0 - sim
        for metric, values, units, weight in zip(mode.metrics, raw, columns, lambdas, strict=True):
            up = metric in HIGHEST_WINS
            regret = 1.0 - units[i] if up else units[i]
            row.append(Term(name=metric, value=values[i], regret=regret, weight=weight))
            paper += weight * (units[i] if up == mode.highest_wins else 1.0 - units[i] if up else units[i])
        row.append(Term(name="paper", value=paper, regret=0.0, weight=0.0))
        rows.append(tuple(row))
    return rows


def _cosine(a: Vector, b: Vector) -> float:
    """Both are unit vectors, or all zero for a text without content (then 0)."""
    value = float(a @ b)
    return min(1.0, max(-1.0, value)) if isfinite(value) else 0.0


def _lambda(text: str, argument: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise _wrong(f"policy paper:{argument}: lambda {text!r} is not a number") from None
    if not isfinite(value) or value < 0:
        raise _wrong(f"policy paper:{argument}: lambda must be a number of at least 0")
    return value


def _wrong(message: str) -> BadInput:
    return BadInput(message, field="policy")


def _no_weights(mode: Mode, reason: str) -> SourceError:
    return SourceError(
        f"policy {mode.spec!r} compares MiniLM embeddings and the embedder is missing ({reason}); "
        "fetch it with `calm models pull --assets`, or choose another policy",
        field="policy",
    )
