"""What is wrong with a metadata file, said so that its author can mend it without reading code."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from calm.records import Record


class CardProblem(Record, frozen=True, kw_only=True):
    """One mistake in one file. `field` is dotted (`engine.slots`), None where the whole file is meant."""

    file: str
    field: str | None
    reason: str
    hint: str | None = None

    def __str__(self) -> str:
        where = f"{self.file}: {self.field}" if self.field else self.file
        return f"{where}: {self.reason}" + (f" ({self.hint})" if self.hint else "")


def did_you_mean(word: str, known: Iterable[str]) -> str | None:
    """The nearest known word as a question, None when nothing is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"did you mean `{near[0]}`?" if near else None
