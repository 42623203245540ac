"""What nobody can have in service, for bounds: policies that see the outcomes, an eviction that sees the future.

oracle        the model whose answer to this query is best; of equally good ones the soonest predicted to end
oracle:calm   our QoS score with the true quality and length of every answer in place of the predicted ones
belady        evicts the model whose next use is farthest away (Belady, IBM Systems Journal 1966), by the
              choices of a first pass of the same trial. The fewest loads possible while models are of one
              size, requests come one at a time and the policy does not look at residency. Else it is a bound
              in name only: under load, where who waits decides which models can go, it loaded once more than
              LRU in 1 of 400 random trials (and less in 112)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from msgspec.structs import replace

from calm.errors import BadInput
from calm.execute.eviction import Rank, Standing
from calm.plan.score import score_all
from calm.ports import Policy
from calm.records import (
    Ask,
    Belief,
    Candidate,
    Estimate,
    Features,
    History,
    ModelCard,
    Snapshot,
    Term,
    Weights,
)
from calm.replay.outcomes import Outcomes

Choice = Callable[
    [Ask, Snapshot, Mapping[str, ModelCard], Mapping[str, Estimate], Weights], tuple[Candidate, ...]
]
NEVER = float("inf")
SOONER = 1e-3
"""Weight of the predicted end against quality: it only orders equally good answers."""


class Clairvoyant:
    """A policy that ranks by what will come out: `choose` gets the true estimates in place of the predicted."""

    def __init__(self, name: str, outcomes: Outcomes, choose: Choice) -> None:
        self.name = name
        self._outcomes = outcomes
        self._choose = choose

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
        return self._choose(ask, snapshot, cards, truths(self._outcomes, ask, estimates), weights)


def oracle(outcomes: Outcomes) -> Policy:
    """Best true quality first; equals by predicted end."""
    return Clairvoyant("oracle", outcomes, best_answer)


def foresight(outcomes: Outcomes) -> Policy:
    """The QoS score on true quality and true length; waiting and loading are still predicted."""
    return Clairvoyant("oracle:calm", outcomes, score_all)


def best_answer(
    ask: Ask,
    snapshot: Snapshot,
    cards: Mapping[str, ModelCard],
    true: Mapping[str, Estimate],
    weights: Weights,
) -> tuple[Candidate, ...]:
    slowest = max((e.total_s.mean for e in true.values()), default=1.0) or 1.0
    found = [oracle_candidate(name, true[name], slowest) for name in cards]
    return tuple(sorted(found, key=lambda c: (c.score, c.model)))


def truths(outcomes: Outcomes, ask: Ask, estimates: Mapping[str, Estimate]) -> dict[str, Estimate]:
    """The estimates with the quality and length that will come out, and what follows from the length."""
    return {name: truth(outcomes, ask, name, estimate) for name, estimate in estimates.items()}


def truth(outcomes: Outcomes, ask: Ask, model: str, estimate: Estimate) -> Estimate:
    answer = outcomes.of(ask.request_id, model)
    share = answer.output_tokens / max(estimate.output_tokens.mean, 1.0)
    decode_s = estimate.decode_s.mean * share
    energy = estimate.energy_j
    whole_s = max(estimate.prefill_s.mean + estimate.decode_s.mean, 1e-9)
    worked = (estimate.prefill_s.mean + decode_s) / whole_s
    return replace(
        estimate,
        output_tokens=Belief(mean=answer.output_tokens, sd=0.0),
        decode_s=Belief(mean=decode_s, sd=0.0),
        total_s=Belief(mean=estimate.ttft_s.mean + decode_s, sd=0.0),
        quality=Belief(mean=answer.quality, sd=0.0),
        energy_j=None if energy is None else Belief(mean=energy.mean * worked, sd=0.0),
    )


def oracle_candidate(model: str, true: Estimate, slowest_s: float) -> Candidate:
    loss, sooner = 1.0 - true.quality.mean, true.total_s.mean / slowest_s
    return Candidate(
        model=model,
        score=loss + SOONER * sooner,
        terms=(
            Term(name="quality", value=true.quality.mean, regret=loss, weight=1.0),
            Term(name="latency", value=true.total_s.mean, regret=sooner, weight=SOONER),
        ),
    )


class BeladyEviction:
    """Keeps what is wanted soonest.

    `order` are the models of the first pass in the order of arrival; `sent` counts each model's requests that
    have reached an engine, so the n-th use of a model is the n-th time it stands in `order`.
    """

    def __init__(self, order: Sequence[str], sent: Mapping[str, int], max_resident: int | None) -> None:
        self.name = "belady" if max_resident is None else f"belady:{max_resident}"
        self.max_resident = max_resident
        self.turn_share = 0.0
        self._sent = sent
        self._places: dict[str, list[int]] = {}
        for place, model in enumerate(order):
            self._places.setdefault(model, []).append(place)

    def keep(self, standing: Standing, at_s: float) -> Rank:
        places, used = self._places.get(standing.model, []), self._sent.get(standing.model, 0)
        following = places[used] if used < len(places) else NEVER
        return -following, standing.last_used_s


def belady_count(spec: str) -> int | None:
    """`belady` or `belady:K`. Raises BadInput (field `cache`)."""
    _, colon, count = spec.partition(":")
    if not colon:
        return None
    if not (count.isascii() and count.isdigit()) or int(count) < 1:
        raise BadInput(
            f"cache {spec!r}: after the colon stands how many models may be resident, 1 or more",
            field="cache",
        )
    return int(count)
