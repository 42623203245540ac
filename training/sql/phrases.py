"""What productions have in common: conditions and lists, in a question and in its query."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

from training.sql.databases import Column, Table, plural

FEW = 6
"""Numbers below this are counts of things that somebody has."""


class Asked(NamedTuple):
    question: str
    query: str


def condition(t: Table, draw: random.Random, of: str = "") -> tuple[str, str]:
    if draw.random() < 0.5:
        column = draw.choice(t.classes)
        value = draw.choice(column.values)
        said = draw.choice(("with {0} {1}", "whose {0} is {1}", "that have {1} as their {0}"))
        return said.format(column.said, value), f"{of}{column.name} = '{value}'"
    column = draw.choice(t.numbers)
    low, high = column.between
    number = draw.randint(low, high)
    if draw.random() < 0.15:
        more = draw.randint(number, high)
        return (
            f"with a {column.said} between {number} and {more}",
            f"{of}{column.name} BETWEEN {number} AND {more}",
        )
    said, sign = draw.choice(
        (("with a {} greater than {}", ">"), ("whose {} is above {}", ">"), ("with more than {1} as their {0}", ">"),
         ("with a {} smaller than {}", "<"), ("whose {} is below {}", "<"), ("with a {} of at least {}", ">="),
         ("with a {} of {}", "="))
    )  # fmt: skip
    if "year" in column.said:
        said, sign = draw.choice(
            (("with a {} after {}", ">"), ("with a {} before {}", "<"), ("with {} {}", "="))
        )
    return said.format(column.said, number), f"{of}{column.name} {sign} {number}"


def some(t: Table, draw: random.Random, label: bool = True) -> list[Column]:
    rest = [*t.classes, *t.numbers]
    draw.shuffle(rest)
    wanted = draw.choice((1, 1, 2, 2, 3))
    return [t.label, *rest][:wanted] if label and draw.random() < 0.7 else rest[:wanted]


def names(columns: Sequence[Column]) -> str:
    return ", ".join(column.name for column in columns)


def spoken(columns: Sequence[Column], many: bool = False) -> str:
    return listed([plural(column.said) if many and len(columns) == 1 else column.said for column in columns])


def listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
