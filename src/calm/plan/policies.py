"""Policies by name, so that who is chosen can be changed by one string, also while the server runs.

A spec is `name` or `name:argument`. Built in: calm, paper, fixed, random, round-robin, least-loaded. Others
come from installed packages through the entry-point group `calm.policies`; such an entry point names a
callable `(argument: str, context: PolicyContext) -> Policy`. See docs/reference/policies.md.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from itertools import pairwise
from math import isfinite
from random import Random

from calm.errors import BadInput, CalmError
from calm.plan.columns import Columns
from calm.plan.paper import PaperPolicy, parse_paper
from calm.plan.score import Tuning, score_all
from calm.plan.shortlist import best_scored
from calm.plan.ties import fair_order, load
from calm.ports import Embedder, Policy
from calm.records import (
    Ask,
    Candidate,
    Estimate,
    Features,
    History,
    ModelCard,
    Snapshot,
    Term,
    Weights,
)

ENTRY_POINT_GROUP = "calm.policies"


@dataclass(frozen=True)
class PolicyContext:
    """What a policy may be built from.

    embedder: makes the sentence embedder the paper's policy compares with; None where there is none.
    models: names in the fleet, None where not known yet; only used to catch a misspelt name early.
    """

    embedder: Callable[[], Embedder] | None = None
    seed: int = 0
    models: Collection[str] | None = None
    tuning: Tuning = field(default_factory=Tuning)


PolicyFactory = Callable[[str, PolicyContext], Policy]


def make_policy(
    spec: str,
    *,
    embedder: Callable[[], Embedder] | None = None,
    seed: int = 0,
    models: Collection[str] | None = None,
    tuning: Tuning | None = None,
) -> Policy:
    """The policy a spec names.

    Raises BadInput (field `policy`) with the choices for an unknown or malformed spec, SourceError when the
    policy needs weights that are not there, CalmError when a plug-in fails to build.
    """
    context = PolicyContext(embedder=embedder, seed=seed, models=models, tuning=tuning or Tuning())
    name, _, argument = spec.strip().partition(":")
    if name in _BUILT_IN:
        return _BUILT_IN[name][1](argument.strip(), context)
    for plug_in in entry_points(group=ENTRY_POINT_GROUP, name=name):
        return _plugged(plug_in, argument.strip(), context)
    raise _wrong(f"no policy {spec!r}; choose one of {', '.join(policy_choices())}")


def policy_choices() -> tuple[str, ...]:
    """Every spec that can be given, with its syntax: built-in ones first, then installed plug-ins."""
    plug_ins = {p.name for p in entry_points(group=ENTRY_POINT_GROUP)} - set(_BUILT_IN)
    return (*(syntax for syntax, _ in _BUILT_IN.values()), *sorted(plug_ins))


def verified(
    ranked: Sequence[Candidate], cards: Mapping[str, ModelCard], policy: str
) -> tuple[Candidate, ...]:
    """The ranking, if it keeps the contract of ports.Policy. Raises CalmError naming what is broken."""
    names = [candidate.model for candidate in ranked]
    scores = [candidate.score for candidate in ranked]
    if len(names) != len(cards) or set(names) != set(cards):
        raise CalmError(f"policy {policy!r} must rank every candidate exactly once")
    if not all(map(isfinite, scores)):
        raise CalmError(f"policy {policy!r} gave a score that is not finite")
    if any(later < earlier for earlier, later in pairwise(scores)):
        raise CalmError(f"policy {policy!r} must return scores in ascending order, best first")
    return tuple(ranked)


# --- built-in policies ---------------------------------------------------------------------------


class CalmPolicy:
    """The QoS score of plan.score with the request's weights."""

    name = "calm"

    def __init__(self, tuning: Tuning | None = None) -> None:
        self._tuning = tuning or Tuning()

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
        return score_all(ask, snapshot, cards, estimates, weights, self._tuning)

    def shortlist(
        self,
        ask: Ask,
        snapshot: Snapshot,
        cards: Mapping[str, ModelCard],
        columns: Columns,
        weights: Weights,
        most: int,
    ) -> list[str]:
        """See plan.shortlist: of a large fleet, those that have to be ranked."""
        return best_scored(ask, snapshot, cards, columns, weights, self._tuning, most)


class FixedPolicy:
    """One model first; the others, least loaded first, only serve when it cannot, specialists last of all: most
    questions are none of theirs."""

    def __init__(self, model: str) -> None:
        self.name = f"fixed:{model}"
        self._model = model

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
        other = [
            0.0 if name == self._model else 1.0 if card.adapter_of is None else 2.0
            for name, card in cards.items()
        ]
        return _by_score("other", names, other, snapshot, ask)


class RandomPolicy:
    """A uniformly random order: the baseline every router has to beat. Equal seeds give equal orders."""

    def __init__(self, seed: int) -> None:
        self.name = f"random:{seed}"
        self._random = Random(seed)

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
        names = sorted(cards)
        self._random.shuffle(names)
        return _in_order("draw", names)


class RoundRobinPolicy:
    """Each model in turn, by name; a model that may not serve one request is passed over, not waited for."""

    name = "round-robin"

    def __init__(self) -> None:
        self._last = ""

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
        names = sorted(cards)
        start = bisect_right(names, self._last)
        turn = names[start:] + names[:start]
        self._last = turn[0] if turn else self._last
        return _in_order("turn", turn)


class LeastLoadedPolicy:
    """Fewest requests, sent and waiting, per slot; between equals a resident model before a cold one."""

    name = "least-loaded"

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
        loads = [_load_per_slot(snapshot, cards[name]) for name in names]
        return _by_score("load", names, loads, snapshot, ask)


_COLD = 1e-6
"""Added to a cold model's load: below any real difference of loads, enough to come after a resident one."""


def _load_per_slot(snapshot: Snapshot, card: ModelCard) -> float:
    state = snapshot.models.get(card.name)
    resident = state is not None and state.residency in ("ready", "remote")
    return load(state) / max(card.concurrency, 1) + (0.0 if resident else _COLD)


def _by_score(
    term: str, names: Sequence[str], scores: Sequence[float], snapshot: Snapshot, ask: Ask
) -> tuple[Candidate, ...]:
    order = fair_order(names, scores, snapshot, ask.request_id)
    return tuple(_single(term, names[i], scores[i]) for i in order)


def _in_order(term: str, names: Sequence[str]) -> tuple[Candidate, ...]:
    return tuple(_single(term, name, float(place)) for place, name in enumerate(names))


def _single(term: str, model: str, score: float) -> Candidate:
    return Candidate(
        model=model, score=score, terms=(Term(name=term, value=score, regret=score, weight=1.0),)
    )


# --- building ------------------------------------------------------------------------------------


def _calm(argument: str, context: PolicyContext) -> Policy:
    _no_argument("calm", argument)
    return CalmPolicy(context.tuning)


def _paper(argument: str, context: PolicyContext) -> Policy:
    return PaperPolicy.build(parse_paper(argument), context.embedder)


def _fixed(argument: str, context: PolicyContext) -> Policy:
    if not argument:
        raise _wrong("policy fixed needs a model's name: fixed:NAME")
    if context.models is not None and argument not in context.models:
        raise _wrong(f"policy fixed:{argument}: no such model; known: {', '.join(sorted(context.models))}")
    return FixedPolicy(argument)


def _random(argument: str, context: PolicyContext) -> Policy:
    try:
        return RandomPolicy(int(argument) if argument else context.seed)
    except ValueError:
        raise _wrong(f"policy random:{argument}: the seed must be a whole number") from None


def _round_robin(argument: str, context: PolicyContext) -> Policy:
    _no_argument("round-robin", argument)
    return RoundRobinPolicy()


def _least_loaded(argument: str, context: PolicyContext) -> Policy:
    _no_argument("least-loaded", argument)
    return LeastLoadedPolicy()


_BUILT_IN: Mapping[str, tuple[str, PolicyFactory]] = {
    "calm": ("calm", _calm),
    "paper": ("paper[:MODE[:LAMBDA]]", _paper),
    "fixed": ("fixed:NAME", _fixed),
    "random": ("random[:SEED]", _random),
    "round-robin": ("round-robin", _round_robin),
    "least-loaded": ("least-loaded", _least_loaded),
}


class VerifiedPolicy:
    """A plug-in's policy whose every ranking is checked, so that its mistake is named and not served."""

    def __init__(self, inner: Policy) -> None:
        self.name = inner.name
        self._inner = inner

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
        ranked = self._inner.rank(ask, features, snapshot, cards, estimates, histories, weights)
        return verified(ranked, cards, self.name)


def _plugged(plug_in: EntryPoint, argument: str, context: PolicyContext) -> Policy:
    try:
        policy = plug_in.load()(argument, context)
    except CalmError:
        raise
    except Exception as error:
        raise CalmError(f"policy plug-in {plug_in.name!r} ({plug_in.value}) failed: {error!r}") from error
    if not (isinstance(getattr(policy, "name", None), str) and callable(getattr(policy, "rank", None))):
        raise CalmError(
            f"policy plug-in {plug_in.name!r} ({plug_in.value}) made no policy: name or rank missing"
        )
    return VerifiedPolicy(policy)


def _no_argument(name: str, argument: str) -> None:
    if argument:
        raise _wrong(f"policy {name} takes no argument, not {argument!r}")


def _wrong(message: str) -> BadInput:
    return BadInput(message, field="policy")
