"""Productions on two tables, a child that refers to its parent -> a question and its query."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from training.sql.databases import Table, plural
from training.sql.phrases import FEW, Asked, condition


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
