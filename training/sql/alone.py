"""Productions on one table: a table and a draw -> a question and its query."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from training.sql.databases import Table, plural
from training.sql.phrases import FEW, Asked, condition, listed, names, some, spoken


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
