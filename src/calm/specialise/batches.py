"""In which order rows are learned, and how they are cut to what memory and cores like. Pure, by seed.

A step learns `rows` rows. Rows of a step are of like length (bucketing: pools of a few steps are sorted by length),
the order of steps is random, and a step of many tokens is computed in pieces that fit in memory.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

POOL = 12
"""Steps whose rows are sorted together: more is less mixing, fewer is more unevenness."""


@dataclass(frozen=True)
class Tokens:
    """A row as the engine reads it."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    """With the token that ends it."""

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


def spread(rows: Sequence[T], most: int) -> list[T]:
    """At most so many rows, evenly over the file: files are often sorted.

    >>> spread("abcdef", 3)
    ['a', 'c', 'e']
    """
    if len(rows) <= most:
        return list(rows)
    return [rows[i * len(rows) // most] for i in range(most)]


def epoch(rows: Sequence[Tokens], per_step: int, seed: int, number: int) -> list[list[int]]:
    """The steps of one epoch as indices into `rows`; every row once."""
    draw = random.Random(f"{seed}/{number}")
    order = draw.sample(range(len(rows)), len(rows))
    steps: list[list[int]] = []
    for start in range(0, len(order), per_step * POOL):
        pool = sorted(order[start : start + per_step * POOL], key=lambda i: len(rows[i]))
        steps += [pool[i : i + per_step] for i in range(0, len(pool), per_step)]
    draw.shuffle(steps)
    return steps


def pieces(rows: Sequence[Tokens], most_tokens: int) -> Iterator[list[Tokens]]:
    """Rows in their order, cut so that the padded grid of a piece stays within `most_tokens`; never empty."""
    piece: list[Tokens] = []
    longest = 0
    for row in rows:
        longest = max(longest, len(row))
        if piece and longest * (len(piece) + 1) > most_tokens:
            yield piece
            piece, longest = [], len(row)
        piece.append(row)
    if piece:
        yield piece
