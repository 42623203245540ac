"""The fleet as columns: what cards and snapshot say of each model, and columns back into Estimates.

Between the estimators, which work on arrays, and the rest of CALM, which works on one model's record.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from calm.analyze import queueing
from calm.analyze.regression import Array, Rows
from calm.records import Belief, Estimate, ModelCard, Snapshot

Pair = tuple[Array, Array]
"""Mean and standard deviation, (m,) each."""


class Constants:
    """What a card states, by row: prices in dollars a token (NaN: unknown) and the context."""

    def __init__(self) -> None:
        self._columns: Array = np.zeros((0, 3))

    def set(self, row: int, card: ModelCard) -> None:
        missing = row + 1 - len(self._columns)
        if missing > 0:
            self._columns = np.concatenate([self._columns, np.zeros((missing + row // 2, 3))])
        self._columns[row] = (*usd_per_token(card), card.context)

    def context(self, rows: Rows) -> Array:
        return np.asarray(self._columns[rows, 2])

    def cost(self, rows: Rows, prompt: Array, output: Array) -> Array:
        """Dollars of a request, NaN where the card states no price for a model that may have one."""
        prices = self._columns[rows]
        return np.asarray(prices[:, 0] * prompt + prices[:, 1] * output)


def usd_per_token(card: ModelCard) -> tuple[float, float]:
    """(input, output). Our own machine charges nothing; a remote model without a price is unknown."""
    price = card.price
    if price.input_usd_per_mtok is None and price.output_usd_per_mtok is None:
        free = 0.0 if card.placement == "local" else float("nan")
        return free, free
    return (price.input_usd_per_mtok or 0.0) / 1e6, (price.output_usd_per_mtok or 0.0) / 1e6


@dataclass(frozen=True)
class Waits:
    """What stands before each model's first token, and how crowded its engine would be."""

    queue: Array
    cold: Array
    """Share of a load still ahead, 0..1."""
    concurrency: Array
    threads: Array

    @staticmethod
    def read(
        names: Sequence[str],
        cards: Mapping[str, ModelCard],
        snapshot: Snapshot,
        service_s: Mapping[str, float],
        samples: int,
    ) -> Waits:
        """`samples` of one request decode side by side, as requests do."""
        outlook = queueing.Outlook.read(snapshot, service_s)
        models, extra = snapshot.models, max(1, samples) - 1
        columns = [outlook.of(models.get(name), cards[name], extra) for name in names]
        queue, cold, concurrency, threads = np.asarray(columns, np.float64).T.copy()
        return Waits(queue, cold, concurrency, threads)

    def decode_features(self) -> Array:
        x = np.ones((len(self.queue), 3))
        x[:, 1] = np.log(self.concurrency)
        x[:, 2] = np.log(self.threads)
        return x


def product(a: Pair, b: Pair) -> Pair:
    """Mean and sd of the product of two independent quantities."""
    variance = (a[0] * b[1]) ** 2 + (b[0] * a[1]) ** 2 + (a[1] * b[1]) ** 2
    return a[0] * b[0], np.sqrt(variance)


def total(*parts: Pair) -> Pair:
    """Mean and sd of the sum of independent quantities."""
    mean, variance = parts[0][0], parts[0][1] ** 2
    for part in parts[1:]:
        mean = mean + part[0]
        variance = variance + part[1] ** 2
    return mean, np.sqrt(variance)


def beliefs(pair: Pair) -> list[Belief]:
    return [Belief(mean=m, sd=s) for m, s in zip(pair[0].tolist(), pair[1].tolist(), strict=True)]


def known(values: Sequence[Belief], which: Sequence[bool]) -> list[Belief | None]:
    return [value if keep else None for value, keep in zip(values, which, strict=True)]


def dollars(cost: Array) -> list[float | None]:
    return [value if value == value else None for value in cost.tolist()]


def assemble(
    names: Sequence[str],
    *,
    prompt: Array,
    cached: Array,
    output: Pair,
    queue: Array,
    load: Pair,
    prefill: Pair,
    decode: Pair,
    energy: Sequence[Belief | None],
    quality: Pair,
    cost: Array,
) -> list[Estimate]:
    """One Estimate a column; TTFT = queue + load + prefill, total = TTFT + decode."""
    waited = (queue, queueing.RELATIVE_SD * queue)
    first = total(waited, load, prefill)
    columns = zip(
        names,
        prompt.tolist(),
        cached.tolist(),
        beliefs(output),
        beliefs(waited),
        beliefs(load),
        beliefs(prefill),
        beliefs(decode),
        beliefs(first),
        beliefs(total(first, decode)),
        energy,
        beliefs(quality),
        dollars(cost),
        strict=True,
    )
    return [
        Estimate(
            model=model,
            prompt_tokens=prompt_tokens,
            cached_tokens=cached_tokens,
            output_tokens=output_tokens,
            queue_s=queue_s,
            load_s=load_s,
            prefill_s=prefill_s,
            decode_s=decode_s,
            ttft_s=ttft_s,
            total_s=total_s,
            energy_j=energy_j,
            quality=quality_,
            cost_usd=cost_usd,
        )
        for (
            model,
            prompt_tokens,
            cached_tokens,
            output_tokens,
            queue_s,
            load_s,
            prefill_s,
            decode_s,
            ttft_s,
            total_s,
            energy_j,
            quality_,
            cost_usd,
        ) in columns
    ]
