"""What is measured on each engine, in which order, and about how long it takes: the basis of the progress bar.

The order is drawn once (equal plans for all models), so that a slow minute of the machine does not hit only the
long prompts.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations

from calm.bench.measure_texts import QUESTIONS
from calm.records import ModelCard, Record

PREFILL_TPS, DECODE_TPS, LOAD_S = 100.0, 20.0, 1.5
"""Guesses for a card without priors: only the progress bar believes them."""
CHARS_PER_TOKEN = 4


class Effort(Record, frozen=True, kw_only=True):
    """How thoroughly a model is measured."""

    loads: int = 3
    """Loads that count; one more before them warms the page cache."""
    lengths: tuple[int, ...] = (10, 20, 35, 50, 75, 100, 150, 200, 300, 400, 600)
    """Prompts, in words: about as many tokens."""
    prompts_each: int = 3
    decode_tokens: int = 48
    decode_rounds: int = 3
    every_count: bool = True
    """Decode with 1, 2, 3, ... sequences; else with 1 and with all slots."""
    questions: int = len(QUESTIONS)
    max_tokens: int = 128
    """Longest answer to a question."""
    idle_s: float = 3.0
    groups_each: int = 3
    """Combinations of engines that are tried for each number of them."""
    contention_rounds: int = 3
    contention_words: int = 40
    contention_tokens: int = 24


QUICK = Effort(
    loads=1,
    lengths=(10, 30, 60, 100),
    prompts_each=1,
    decode_tokens=20,
    decode_rounds=1,
    every_count=False,
    questions=3,
    max_tokens=16,
    idle_s=0.5,
    groups_each=1,
    contention_rounds=1,
    contention_words=20,
    contention_tokens=8,
)


def prompt_plan(card: ModelCard, effort: Effort) -> tuple[tuple[int, int], ...]:
    """(words, number) of each prompt to read, in a drawn order; none takes more than half the card's context."""
    fitting = [length for length in effort.lengths if 2 * length <= card.context] or [effort.lengths[0]]
    plan = [
        (length, place * len(fitting) + number)
        for number, length in enumerate(fitting)
        for place in range(effort.prompts_each)
    ]
    random.Random(0).shuffle(plan)
    return tuple(plan)


def decode_plan(card: ModelCard, effort: Effort) -> tuple[int, ...]:
    """How many sequences decode at once in each run, rounds interleaved."""
    counts = range(1, card.concurrency + 1) if effort.every_count else sorted({1, card.concurrency})
    return tuple(counts) * effort.decode_rounds


def company_plan(
    cards: Mapping[str, ModelCard], threads: Mapping[str, int], cores: int, effort: Effort
) -> tuple[tuple[str, ...], ...]:
    """Which local engines work at the same time: pairs, then threes, ... as many as their threads allow."""
    local = [name for name, card in cards.items() if not card.remote and card.host == name]
    found: list[tuple[str, ...]] = []
    for count in range(2, len(local) + 1):
        fitting = (group for group in combinations(local, count) if sum(threads[n] for n in group) <= cores)
        found += list(spread(list(fitting), effort.groups_each))
    return tuple(found)


def spread(groups: list[tuple[str, ...]], most: int) -> Iterator[tuple[str, ...]]:
    """At most so many of them, evenly spaced, so that not all have the same first engine."""
    taken = min(most, len(groups))
    yield from (groups[index * len(groups) // taken] for index in range(taken))


# --- expected seconds -------------------------------------------------------------------------------


def request_s(card: ModelCard, prompt_tokens: float, output_tokens: float) -> float:
    """About how long one request takes, from the card's priors."""
    prefill_tps, decode_tps = card.priors.prefill_tps or PREFILL_TPS, card.priors.decode_tps or DECODE_TPS
    return prompt_tokens / prefill_tps + output_tokens / decode_tps


def load_s(card: ModelCard) -> float:
    return card.priors.load_s or LOAD_S


def timing_s(card: ModelCard, effort: Effort) -> float:
    """Loads, prompts, decoding and questions of one model."""
    loads = (effort.loads + 2) * load_s(card)
    prompts = sum(request_s(card, words, 1) for words, _ in prompt_plan(card, effort))
    decoding = sum(request_s(card, 30 * count, effort.decode_tokens) for count in decode_plan(card, effort))
    questions = effort.questions * request_s(card, 30, effort.max_tokens / 2)
    return loads + prompts + decoding + questions + effort.idle_s


def company_s(group: tuple[str, ...], cards: Mapping[str, ModelCard], effort: Effort) -> float:
    """Loads, and every engine's requests alone and among the others."""
    request = [request_s(cards[name], effort.contention_words, effort.contention_tokens) for name in group]
    return sum(load_s(cards[name]) for name in group) + 2 * effort.contention_rounds * sum(request)


def answers_s(card: ModelCard, prompt_chars: Sequence[int], max_tokens: int) -> float:
    """One load and these queries; 0 for none."""
    if not prompt_chars:
        return 0.0
    return load_s(card) + sum(query_s(card, chars, max_tokens) for chars in prompt_chars)


def query_s(card: ModelCard, prompt_chars: int, max_tokens: int) -> float:
    return request_s(card, prompt_chars / CHARS_PER_TOKEN, max_tokens / 2)


def lanes(threads: Sequence[int], needs_bytes: Sequence[int], cores: int, available_bytes: int) -> int:
    """How many models may be asked at the same time, whichever they are: by threads, and by memory."""
    most = max(1, min(len(threads), cores // max([1, *threads])))
    largest = sorted(needs_bytes, reverse=True)
    while most > 1 and sum(largest[:most]) > available_bytes:
        most -= 1
    return most
