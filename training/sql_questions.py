"""Questions on invented databases with the SQL that answers them, so that a small model learns to read new tables.

    python training/sql_questions.py --rows 2000 --out DIRECTORY/NAME.jsonl

A synchronous grammar (Yu et al. 2021, GraPPa, arXiv 2009.13845): one production draws tables, columns and values and
yields a question and its query together. Words are those of sql_words.toml; no database of Spider is among them. Only
rows that the rule of calm.workloads.held_out gives to the train part are written.

    words -> a database (tables, columns, who refers to whom) -> a production -> question, query -> a row of the schema
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from calm.records import Record
from calm.workloads.held_out import split_of
from calm.workloads.rows import Row

WORDS = Path(__file__).with_name("sql_words.toml")
FEW = 6
"""Numbers below this are counts of things that somebody has."""


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


class Asked(NamedTuple):
    question: str
    query: str


def plural(noun: str) -> str:
    if noun.endswith(("s", "ch", "sh", "x")):
        return f"{noun}es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return f"{noun[:-1]}ies"
    return f"{noun}s"


# --- databases ---


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


# --- productions: a table (and a draw) -> a question and its query ---


def counted(t: Table, draw: random.Random) -> Asked:
    question = draw.choice(
        ("How many {} are there?", "Count the number of {}.", "What is the total number of {}?",
         "How many {} do we have?", "Find the number of {}.")
    )  # fmt: skip
    return Asked(question.format(t.many), f"SELECT count(*) FROM {t.name}")


def shown(t: Table, draw: random.Random) -> Asked:
    columns = some(t, draw)
    question = draw.choice(
        ("What are the {} of all {}?", "List the {} of all the {}.", "Show the {} for each of the {}.",
         "Return the {} of every one of the {}.", "Give the {} of {}.")
    )  # fmt: skip
    return Asked(
        question.format(spoken(columns, many=True), t.many), f"SELECT {names(columns)} FROM {t.name}"
    )


def different(t: Table, draw: random.Random) -> Asked:
    column = draw.choice(t.classes)
    if draw.random() < 0.5:
        question = draw.choice(("How many different {} do the {} have?", "Count the distinct {} of {}.",
                                "What is the number of different {} among the {}?"))  # fmt: skip
        return Asked(
            question.format(plural(column.said), t.many),
            f"SELECT count(DISTINCT {column.name}) FROM {t.name}",
        )
    question = draw.choice(("What are the different {} of the {}?", "List all distinct {} of {}.",
                            "Show every different one of the {} of the {}."))  # fmt: skip
    return Asked(question.format(plural(column.said), t.many), f"SELECT DISTINCT {column.name} FROM {t.name}")


def filtered(t: Table, draw: random.Random) -> Asked:
    said, where = condition(t, draw)
    if draw.random() < 0.25:
        also, other = condition(t, draw)
        word = draw.choice(("and", "or"))
        if other != where:
            said, where = f"{said} {word} {also}", f"{where} {word.upper()} {other}"
    if draw.random() < 0.4:
        question = draw.choice(("How many {} {}?", "Count the {} {}.", "Find the number of {} {}."))
        return Asked(question.format(t.many, said), f"SELECT count(*) FROM {t.name} WHERE {where}")
    columns = some(t, draw)
    question = draw.choice(
        ("What are the {} of the {} {}?", "Show the {} of {} {}.", "Find the {} of all {} {}.")
    )
    return Asked(
        question.format(spoken(columns, many=True), t.many, said),
        f"SELECT {names(columns)} FROM {t.name} WHERE {where}",
    )


def named(t: Table, draw: random.Random) -> Asked:
    columns, who = (
        some(t, draw, label=False),
        draw.choice(("Alpha", "Maple", "Juno", "Orion", "Rivera", "Nova", "Lind")),
    )
    question = draw.choice(
        ("What is the {0} of the {1} {2}?", "What {0} does the {1} called {2} have?",
         "Return the {0} of the {1} whose {3} is {2}.", "Show the {0} of the {1} named {2}.")
    )  # fmt: skip
    return Asked(
        question.format(spoken(columns), t.noun, who, t.label.said),
        f"SELECT {names(columns)} FROM {t.name} WHERE {t.label.name} = '{who}'",
    )


def ordered(t: Table, draw: random.Random) -> Asked:
    columns, by = some(t, draw), draw.choice((*t.numbers, t.label))
    said, how = draw.choice(
        (("ordered by {}", ""), ("in ascending order of {}", " ASC"), ("in descending order of {}", " DESC"),
         ("sorted by {} from highest to lowest", " DESC"), ("from the lowest to the highest {}", " ASC"),
         ("in alphabetical order of {}", ""))
    )  # fmt: skip
    if "alphabetical" in said:
        by = t.label
    elif "highest" in said:
        by = draw.choice(t.numbers)
    question = draw.choice(
        ("List the {} of all {}, {}.", "What are the {} of {} {}?", "Show the {} of the {} {}.")
    )
    return Asked(
        question.format(spoken(columns, many=True), t.many, said.format(by.said)),
        f"SELECT {names(columns)} FROM {t.name} ORDER BY {by.name}{how}",
    )


def extreme(t: Table, draw: random.Random) -> Asked:
    columns, by = some(t, draw), draw.choice(t.numbers)
    word, how = draw.choice(
        (("largest", "DESC"), ("highest", "DESC"), ("smallest", "ASC"), ("lowest", "ASC"))
    )
    question = draw.choice(("What is the {} of the {} with the {} {}?", "Find the {} of the {} with the {} {}.",
                            "Which {1} has the {2} {3}? Give its {0}."))  # fmt: skip
    return Asked(
        question.format(spoken(columns), t.noun, word, by.said),
        f"SELECT {names(columns)} FROM {t.name} ORDER BY {by.name} {how} LIMIT 1",
    )


def summed(t: Table, draw: random.Random) -> Asked:
    wanted = draw.sample(
        (("average", "avg"), ("minimum", "min"), ("maximum", "max"), ("total", "sum")),
        draw.choice((1, 1, 2, 3)),
    )
    column = draw.choice(t.numbers)
    said = listed([word for word, _ in wanted])
    values = ", ".join(f"{function}({column.name})" for _, function in wanted)
    question = draw.choice(
        ("What is the {} {} of all {}?", "Find the {} {} of the {}.", "Return the {} {} across all {}.")
    )
    asked, query = question.format(said, column.said, t.many), f"SELECT {values} FROM {t.name}"
    if draw.random() < 0.3:
        added, where = condition(t, draw)
        return Asked(f"{asked[:-1]} {added}{asked[-1]}", f"{query} WHERE {where}")
    return Asked(asked, query)


def grouped(t: Table, draw: random.Random) -> Asked:
    by = draw.choice(t.classes)
    if draw.random() < 0.35:
        number, (word, function) = (
            draw.choice(t.numbers),
            draw.choice((("average", "avg"), ("maximum", "max"), ("minimum", "min"))),
        )
        question = draw.choice(
            ("What is the {0} {1} of {2} for each {3}?", "Show each {3} and the {0} {1} of its {2}.")
        )
        what = f"{function}({number.name})"
        first = question.startswith("What")
        return Asked(
            question.format(word, number.said, t.many, by.said),
            f"SELECT {', '.join((what, by.name) if first else (by.name, what))} FROM {t.name} GROUP BY {by.name}",
        )
    question = draw.choice(("How many {} are there for each {}?", "Show the number of {} of each {}.",
                            "What is the number of {} per {}?", "Count the {} by {}."))  # fmt: skip
    return Asked(
        question.format(t.many, by.said), f"SELECT {by.name}, count(*) FROM {t.name} GROUP BY {by.name}"
    )


def commonest(t: Table, draw: random.Random) -> Asked:
    by, (word, how) = draw.choice(t.classes), draw.choice((("most", "DESC"), ("fewest", "ASC")))
    if draw.random() < 0.35:
        least = draw.randint(2, FEW)
        question = draw.choice(("Which {} have at least {} {}?", "What {} are shared by {} or more {}?"))
        return Asked(
            question.format(plural(by.said), least, t.many),
            f"SELECT {by.name} FROM {t.name} GROUP BY {by.name} HAVING count(*) >= {least}",
        )
    question = draw.choice(("Which {} has the {} {}?", "What is the {} with the {} {}?"))
    return Asked(
        question.format(by.said, word, t.many),
        f"SELECT {by.name} FROM {t.name} GROUP BY {by.name} ORDER BY count(*) {how} LIMIT 1",
    )


def beyond_average(t: Table, draw: random.Random) -> Asked:
    columns, by = some(t, draw), draw.choice(t.numbers)
    word, sign = draw.choice((("above", ">"), ("below", "<")))
    where = f"{by.name} {sign} (SELECT avg({by.name}) FROM {t.name})"
    if draw.random() < 0.4:
        return Asked(
            f"How many {t.many} have a {by.said} {word} the average?",
            f"SELECT count(*) FROM {t.name} WHERE {where}",
        )
    return Asked(
        f"What are the {spoken(columns, many=True)} of the {t.many} with a {by.said} {word} average?",
        f"SELECT {names(columns)} FROM {t.name} WHERE {where}",
    )


ALONE: Sequence[tuple[Callable[[Table, random.Random], Asked], int]] = (
    (counted, 2), (shown, 3), (different, 2), (filtered, 4), (named, 2), (ordered, 3), (extreme, 3), (summed, 3),
    (grouped, 3), (commonest, 2), (beyond_average, 1),
)  # fmt: skip


# --- productions of two tables: one refers to the other ---


def joined(child: Table, parent: Table) -> str:
    return f"{parent.name} AS T1 JOIN {child.name} AS T2 ON T1.{parent.key} = T2.{parent.key}"


def by_parent(child: Table, parent: Table) -> str:
    return f"SELECT T1.{parent.label.name} FROM {joined(child, parent)} GROUP BY T1.{parent.key}"


def both_shown(child: Table, parent: Table, draw: random.Random) -> Asked:
    other = draw.choice((child.label, *child.numbers, *child.classes))
    question = draw.choice(
        (
            "Show the {0} of each {1} and the {2} of its {3}.",
            "What are the {0} of the {1} and the {2} of their {3}?",
        )
    )
    return Asked(
        question.format(
            parent.label.said, parent.noun if "each" in question else parent.many, other.said, child.many
        ),
        f"SELECT T1.{parent.label.name}, T2.{other.name} FROM {joined(child, parent)}",
    )


def counted_of(child: Table, parent: Table, draw: random.Random) -> Asked:
    question = draw.choice(
        ("How many {0} does each {1} have? Show its {2}.", "Show the {2} of each {1} and its number of {0}.")
    )
    return Asked(
        question.format(child.many, parent.noun, parent.label.said),
        f"SELECT T1.{parent.label.name}, count(*) FROM {joined(child, parent)} GROUP BY T1.{parent.key}",
    )


def most_of(child: Table, parent: Table, draw: random.Random) -> Asked:
    if draw.random() < 0.4:
        least = draw.randint(2, FEW)
        return Asked(
            f"What are the {plural(parent.label.said)} of the {parent.many} with at least {least} {child.many}?",
            f"{by_parent(child, parent)} HAVING count(*) >= {least}",
        )
    question = draw.choice(("Which {1} has the most {0}? Give its {2}.", "What is the {2} of the {1} with the most {0}?",
                            "Find the {2} of the {1} with the largest number of {0}."))  # fmt: skip
    return Asked(
        question.format(child.many, parent.noun, parent.label.said),
        f"{by_parent(child, parent)} ORDER BY count(*) DESC LIMIT 1",
    )


def without(child: Table, parent: Table, draw: random.Random) -> Asked:
    where = f"{parent.key} NOT IN (SELECT {parent.key} FROM {child.name})"
    if draw.random() < 0.4:
        return Asked(
            f"How many {parent.many} do not have any {child.noun}?",
            f"SELECT count(*) FROM {parent.name} WHERE {where}",
        )
    question = draw.choice(
        ("What are the {2} of the {1} that do not have any {0}?", "List the {2} of {1} without any {0}.")
    )
    return Asked(
        question.format(child.noun, parent.many, plural(parent.label.said)),
        f"SELECT {parent.label.name} FROM {parent.name} WHERE {where}",
    )


def filtered_by_other(child: Table, parent: Table, draw: random.Random) -> Asked:
    said, where = condition(child, draw, "T2.")
    question = draw.choice(
        ("What are the {2} of the {1} that have {0} {3}?", "Show the {2} of {1} with {0} {3}.")
    )
    return Asked(
        question.format(child.many, parent.many, plural(parent.label.said), said),
        f"SELECT T1.{parent.label.name} FROM {joined(child, parent)} WHERE {where}",
    )


TOGETHER: Sequence[Callable[[Table, Table, random.Random], Asked]] = (
    both_shown, counted_of, most_of, without, filtered_by_other,
)  # fmt: skip


# --- words ---


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


# --- rows ---


def questions(words: Words, draw: random.Random) -> Iterator[tuple[str, Asked]]:
    """Without end: a schema as it is shown, a question and its query."""
    while True:
        tables = database(words, draw)
        shown_first = list(tables)
        draw.shuffle(shown_first)
        schema = "; ".join(table.listed(draw) for table in shown_first)
        makes, weights = zip(*ALONE, strict=True)
        for _ in range(2):
            if len(tables) > 1 and draw.random() < 0.3:
                yield schema, draw.choice(TOGETHER)(tables[1], tables[0], draw)
            else:
                yield schema, draw.choices(makes, weights)[0](draw.choice(tables), draw)


def rows(wanted: int, seed: int, name: str) -> Iterator[Row]:
    """Rows of the train part of the set they join, no question twice on one database."""
    words = msgspec.toml.decode(WORDS.read_bytes(), type=dict[str, Kind])
    seen: set[tuple[str, str]] = set()
    for schema, asked in questions(words, random.Random(seed)):
        row = Row(
            id=f"invented-{len(seen)}", dataset=name, domain="sql", split="train",
            question=asked.question, context=schema, answer=asked.query, answer_type="sql",
        )  # fmt: skip
        if (schema, asked.question) in seen or split_of(row) != "train":
            continue
        if len(seen) == wanted:
            return
        seen.add((schema, asked.question))
        yield row


def write(wanted: int, seed: int, out: Path) -> None:
    """OUT is DIRECTORY/NAME.jsonl, and NAME the set."""
    fields = ("id", "domain", "split", "question", "context", "answer", "answer_type")
    lines = [
        msgspec.json.encode({field: getattr(row, field) for field in fields})
        for row in rows(wanted, seed, out.stem)
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(b"\n".join([*lines, b""]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=2000, help="questions (default: 2000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="NAME.jsonl: NAME is the set they join")
    given = parser.parse_args()
    write(given.rows, given.seed, given.out)
    print(f"{given.out}: {given.rows} questions", file=sys.stderr)


if __name__ == "__main__":
    main()
