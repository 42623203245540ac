"""How the estimators' parts make one prediction: the request's numbers in, an Estimate for each model out.

`forecast` is the whole formula. It is written once and runs for a single model on floats (`maths.ONE`) or for
a fleet on columns (`maths.MANY`); `as_estimate` turns one model's numbers into the record the rest of CALM knows,
and `Forecasts` does so for a fleet's when somebody looks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count
from typing import Generic, NamedTuple

import numpy as np
from numpy.typing import NDArray

from calm.analyze.energy import energy_j
from calm.analyze.latency import prefill_s, tpot_s
from calm.analyze.lengths import Case as LengthCase
from calm.analyze.lengths import output_tokens
from calm.analyze.maths import Array, Maths, N, Pair, product
from calm.analyze.queueing import RELATIVE_SD, Wait
from calm.analyze.regression import Posterior
from calm.analyze.tokens import Case as PromptCase
from calm.analyze.tokens import prompt_tokens
from calm.records import Belief, Estimate, ModelCard


class Stated(NamedTuple, Generic[N]):
    """What a card states: dollars a token (NaN where unknown), the context and the longest answer in tokens."""

    input_usd: N
    output_usd: N
    context: N
    longest: N
    """Infinite where the card sets no limit."""


class Known(NamedTuple, Generic[N]):
    """Everything believed of a model, or of many as columns."""

    prompt: Posterior[N]
    output: Posterior[N]
    load_s: Pair[N]
    prefill: Posterior[N]
    decode: Posterior[N]
    energy: Posterior[N]
    stated: Stated[N]


class Question(NamedTuple):
    """What is the same for every model."""

    prompt: PromptCase
    length: LengthCase
    samples: int
    max_tokens: int | None
    writes: bool
    """False for embeddings: nothing is decoded."""


def stated(card: ModelCard) -> Stated[float]:
    """Our own machine charges nothing; a remote model without a price is unknown."""
    price = card.price
    tokens = float(card.context), float(card.chat.answer_tokens or "inf")
    if price.input_usd_per_mtok is None and price.output_usd_per_mtok is None:
        free = 0.0 if card.placement == "local" else float("nan")
        return Stated(free, free, *tokens)
    prices = price.input_usd_per_mtok or 0.0, price.output_usd_per_mtok or 0.0
    return Stated(prices[0] / 1e6, prices[1] / 1e6, *tokens)


def forecast(
    m: Maths[N], question: Question, known: Known[N], wait: Wait[N], held: N | None
) -> tuple[N, ...]:
    """The numbers of `as_estimate`, in its order. `held`: tokens the engines' KV caches are expected to hold,
    None when nobody holds any.

    TTFT = queue + load + prefill, total = TTFT + decode; spreads add as variances.
    """
    prompt = prompt_tokens(m, known.prompt, question.prompt)
    cached = prompt * 0.0 if held is None else m.larger(m.smaller(prompt - 1.0, held), 0.0)
    uncached = prompt - cached
    one = _sample(m, question, known, prompt)
    output, output_sd = one[0] * question.samples, one[1] * question.samples
    queue, queue_sd = wait.queue_s, RELATIVE_SD * wait.queue_s
    load, load_sd = known.load_s[0] * wait.cold, known.load_s[1] * wait.cold
    prefill, prefill_sd = prefill_s(m, known.prefill, uncached, wait.concurrency, wait.threads)
    decode, decode_sd = product(m, one, tpot_s(m, known.decode, wait.concurrency, wait.threads))
    first = queue + load + prefill
    spread = queue_sd * queue_sd + load_sd * load_sd + prefill_sd * prefill_sd
    joules, joules_sd = energy_j(m, known.energy, uncached, (output, output_sd))
    cost = known.stated.input_usd * prompt + known.stated.output_usd * output
    return (
        prompt, cached, output, output_sd, queue, queue_sd, load, load_sd, prefill, prefill_sd,
        decode, decode_sd, first, m.sqrt(spread), first + decode, m.sqrt(spread + decode_sd * decode_sd),
        joules, joules_sd, cost,
    )  # fmt: skip


def _sample(m: Maths[N], question: Question, known: Known[N], prompt: N) -> Pair[N]:
    """Output tokens of one sample, cut at max_tokens, at the card's limit and at the room the context leaves."""
    if not question.writes:
        return prompt * 0.0, prompt * 0.0
    room = m.smaller(m.larger(known.stated.context - prompt, 1.0), known.stated.longest)
    cap = room if question.max_tokens is None else m.smaller(room, max(1.0, question.max_tokens))
    return output_tokens(m, known.output, question.length, cap)


def as_estimate(model: str, numbers: tuple[float, ...], metered: bool, quality: float, sd: float) -> Estimate:
    """The record. `metered`: the model's joules are stated or measured. A cost of NaN is unknown."""
    prompt, cached, output, output_sd, queue, queue_sd, load, load_sd, prefill, prefill_sd = numbers[:10]
    decode, decode_sd, ttft, ttft_sd, total, total_sd, joules, joules_sd, cost = numbers[10:]
    return Estimate(
        model=model,
        prompt_tokens=prompt,
        cached_tokens=cached,
        output_tokens=Belief(mean=output, sd=output_sd),
        queue_s=Belief(mean=queue, sd=queue_sd),
        load_s=Belief(mean=load, sd=load_sd),
        prefill_s=Belief(mean=prefill, sd=prefill_sd),
        decode_s=Belief(mean=decode, sd=decode_sd),
        ttft_s=Belief(mean=ttft, sd=ttft_sd),
        total_s=Belief(mean=total, sd=total_sd),
        energy_j=Belief(mean=joules, sd=joules_sd) if metered else None,
        quality=Belief(mean=quality, sd=sd),
        cost_usd=cost if cost == cost else None,
    )


class Forecasts(Mapping[str, Estimate]):
    """A large fleet's predictions, kept as columns: a model's record is made when it is looked up.

    A record costs more than the numbers in it, and of a thousand a decision looks at a few dozen. What is
    compared over the whole fleet is read as columns, in the order of the names; NaN stands for unknown.
    """

    def __init__(
        self,
        names: Iterable[str],
        numbers: Sequence[Array],
        metered: NDArray[np.bool_],
        quality: Array,
        quality_sd: Array,
    ) -> None:
        """`numbers` as `forecast` returns them, the rest as `as_estimate` takes it."""
        self._places = dict(zip(names, count(), strict=False))
        self._made: dict[str, Estimate] = {}
        self._numbers, self._metered = numbers, metered
        *_, total_s, total_sd_s, joules, _, cost_usd = numbers
        self.queue_s = numbers[4]
        self.total_s, self.total_sd_s = total_s, total_sd_s
        self.energy_j = np.where(metered, joules, np.nan)
        self.cost_usd = cost_usd
        self.quality, self.quality_sd = quality, quality_sd

    def __getitem__(self, name: str) -> Estimate:
        found = self._made.get(name)
        if found is None:
            place = self._places[name]
            numbers = tuple([column.item(place) for column in self._numbers])
            rest = self._metered.item(place), self.quality.item(place), self.quality_sd.item(place)
            found = self._made[name] = as_estimate(name, numbers, *rest)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def only(self, names: Sequence[str]) -> Forecasts:
        """Those of some models."""
        places = [self._places[name] for name in names]
        numbers = [column[places] for column in self._numbers]
        return Forecasts(names, numbers, self._metered[places], self.quality[places], self.quality_sd[places])
