"""Which rows are trained on, which are tuned on, and which are only ever measured: one rule for trainer and bench.

    train        fitted
    validation   early stopping, choice of settings
    test         figures; never fitted, never tuned on

Where a set's authors made a test split, that is the test part, and validation is a share of their train split.
Where they did not (medqa, headlines_finance and spider_dev hold train rows only), the test part is a share as well.

A share is cut by a hash of the row's group, so a row's part depends on nothing but the row: not on the order of the
file, not on other rows, not on the machine. Rows of one group are never divided:

    sql, span   rows that share a context: a schema, a paragraph. Spider's databases are either known or not
    others      rows of the same words, numbers, case and order aside. A ninth of the finance headlines are such
                repetitions ("spot gold quoted at 1,273 in asia trade" stands there 28 times), which would
                otherwise be trained on in one part and counted as a success in another
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from hashlib import sha256
from typing import Literal

from calm.records import Record
from calm.workloads.rows import Row

Part = Literal["train", "validation", "test"]


class Shares(Record, frozen=True, kw_only=True):
    """Parts of the rows that are held out, 0..1; the rest is trained on."""

    validation: float = 0.1
    test: float = 0.0
    salt: int = 0
    """Changes which groups are drawn."""


SHARES = {
    "headlines_finance": Shares(test=0.1),
    "medqa": Shares(test=0.1),
    "spider_dev": Shares(test=0.2, salt=10),
}
"""Sets without a test split of their authors. With ten databases shares are coarse: spider_dev has the first salt of
0, 1, 2, ... whose parts come within five points of 70/10/20 (rows 347/45/130, databases 6/1/3)."""
OFFICIAL, OWN = Shares(), Shares(test=0.1)
"""Rows that somebody called `train`, and rows that nobody divided."""


def split_of(row: Row) -> Part:
    """The part a row belongs to. Pure; equal rows belong to equal parts."""
    if row.split == "test":
        return "test"
    shares = SHARES.get(row.dataset) or (OWN if row.split is None else OFFICIAL)
    place = place_of(f"{row.dataset}\n{shares.salt}\n{group_of(row)}")
    if place < shares.test:
        return "test"
    return "validation" if place < shares.test + shares.validation else "train"


def part_of(rows: Iterable[Row], part: Part) -> tuple[Row, ...]:
    """The rows of one part, in their order."""
    return tuple(row for row in rows if split_of(row) == part)


def group_of(row: Row) -> str:
    """What a row shares with those that must stand in the same part."""
    if row.context and row.answer_type in ("sql", "span"):
        return " ".join(row.context.split())
    return same_words(f"{row.context or ''} {row.question}")


def same_words(text: str) -> str:
    """The words of a text, each once and sorted, without numbers.

    >>> same_words("Gold at $1,273 in Asia"), same_words("in asia: gold at 5")
    ('asia at gold in', 'asia at gold in')
    """
    return " ".join(sorted(set(re.findall(r"[^\W\d_]+", text.casefold())))) or text


def place_of(text: str) -> float:
    """0 <= x < 1, uniform over texts and equal for equal ones on every machine: below a share is inside of it."""
    return int.from_bytes(sha256(text.encode()).digest()[:8]) / 2**64
