"""Invented databases: one to three tables of things, people, places, events and groups, named in one style."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from calm.records import Record

WORDS = Path(__file__).with_name("words.toml")


class Kind(Record, frozen=True):
    """What is recorded of a kind of thing; a table of sql_words.toml."""

    nouns: tuple[str, ...]
    labels: tuple[str, ...]
    classes: dict[str, tuple[str, ...]]
    """A column by what it is called, and values of it."""
    numbers: dict[str, tuple[int, int]]
    """A column and the range of its values."""


Words = Mapping[str, Kind]


class Column(NamedTuple):
    said: str
    """As a question calls it."""
    name: str
    """As the table calls it."""
    values: Sequence[str] = ()
    between: tuple[int, int] = (0, 0)


class Table(NamedTuple):
    noun: str
    name: str
    key: str
    label: Column
    classes: Sequence[Column]
    numbers: Sequence[Column]
    parent: Table | None = None

    @property
    def many(self) -> str:
        return plural(self.noun)

    def listed(self, draw: random.Random) -> str:
        """`name(key, column, ...)`, as a schema is shown."""
        columns = [column.name for column in (*self.classes, *self.numbers)]
        draw.shuffle(columns)
        refers = [self.parent.key] if self.parent else []
        return f"{self.name}({', '.join([self.key, self.label.name, *columns, *refers])})"


def plural(noun: str) -> str:
    if noun.endswith(("s", "ch", "sh", "x")):
        return f"{noun}es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return f"{noun[:-1]}ies"
    return f"{noun}s"


def known_words() -> Words:
    return msgspec.toml.decode(WORDS.read_bytes(), type=dict[str, Kind])


def database(words: Words, draw: random.Random) -> list[Table]:
    """One to three tables named in one style; the second refers to the first."""
    spell = draw.choice((_snake, _capital, _title_last, _camel))
    nouns = [(kind, noun) for kind in words for noun in words[kind].nouns]
    found: list[Table] = []
    for kind, noun in draw.sample(nouns, draw.choice((1, 2, 2, 3, 3))):
        of, parent = words[kind], found[0] if len(found) == 1 else None
        many = draw.random() < 0.4
        prefix = f"{noun} " if draw.random() < 0.25 else ""
        label = draw.choice(of.labels)
        classes = draw.sample(sorted(of.classes), draw.randint(1, 3))
        numbers = draw.sample(sorted(of.numbers), draw.randint(1, 3))
        found.append(
            Table(
                noun,
                spell(plural(noun) if many else noun),
                spell(f"{noun} id") if parent is None or draw.random() < 0.7 else spell("id"),
                Column(label, spell(prefix + label)),
                [Column(word, spell(word), of.classes[word]) for word in classes],
                [Column(word, spell(word), (), of.numbers[word]) for word in numbers],
                parent,
            )
        )
    return found


def _snake(words: str) -> str:
    return words.replace(" ", "_")


def _capital(words: str) -> str:
    return "_".join("ID" if word == "id" else word.capitalize() for word in words.split())


def _title_last(words: str) -> str:
    first, *rest = words.split()
    return "_".join([first.capitalize(), *rest])


def _camel(words: str) -> str:
    first, *rest = words.split()
    return first + "".join(word.capitalize() for word in rest)
