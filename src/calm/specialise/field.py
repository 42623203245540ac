"""The fields of a model (calm.analyze.fields), learned from its own rows: one for each data set among them.

rows -> what a user would type -> line against everyday questions -> [fields.NAME] of the card
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

from calm.analyze.fields import encoded, sense_of
from calm.analyze.fitting import learn_field
from calm.monitor.form import form_of
from calm.ports import Embedder
from calm.records import FieldSpec, Record, Vector
from calm.specialise.examples import Example

FREE = "data"
"""Data set of rows that are conversations or completions: their field has the model's name."""


class Learned(Record, frozen=True, kw_only=True):
    """A field, and how well it tells its questions from others."""

    name: str
    spec: FieldSpec
    rows: int
    recognised: float | None
    """Share of held-out questions it takes for its own."""
    captured: float
    """Share of everyday questions it takes for its own."""


def fields_of(
    rows: Sequence[Example], model: str, embedder: Embedder, untrained: Mapping[str, float]
) -> tuple[Learned, ...]:
    """The fields of the rows' data sets; none for a set of too few rows. `untrained`: quality of a model that has
    not learned them, by data set."""
    return tuple(_learned(rows, model, embedder, untrained))


def _learned(
    rows: Sequence[Example], model: str, embedder: Embedder, untrained: Mapping[str, float]
) -> Iterator[Learned]:
    for dataset in dict.fromkeys(row.query.dataset for row in rows):
        ours = [row for row in rows if row.query.dataset == dataset]
        train = [_asked(row) for row in ours if row.part == "train"]
        held_out = [_asked(row) for row in ours if row.part == "validation"]
        fit = learn_field(train, held_out, partial(sense, embedder))
        if fit is None:
            continue
        spec = FieldSpec(embedder=embedder.name, weights=encoded(fit.line), untrained=untrained.get(dataset))
        yield Learned(
            name=field_name(dataset, model), spec=spec, rows=len(train), recognised=fit.recognised,
            captured=fit.captured,
        )  # fmt: skip


def field_name(dataset: str, model: str) -> str:
    return model if dataset == FREE else dataset


def sense(embedder: Embedder, question: str) -> Vector:
    """What the server compares with fields when it is asked this."""
    return sense_of(embedder.embed(question), form_of(question))


def _asked(row: Example) -> str:
    """The last thing the user says: what the server compares as well."""
    return next(message.content for message in reversed(row.messages) if message.role == "user")
