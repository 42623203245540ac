"""Invented questions for SQL: every query runs on its database, and the question says what the query does."""

from __future__ import annotations

import random
import re
import sqlite3
import sys
from pathlib import Path

import msgspec
import pytest

from calm.workloads.held_out import split_of
from calm.workloads.rows import Row
from calm.workloads.sql import same_query

sys.path.insert(0, str(Path(__file__).parents[2]))
from training.sql.__main__ import rows, write
from training.sql.databases import known_words, plural
from training.sql.phrases import listed

from training import make

ROWS = tuple(rows(1500, 0, "spider_dev"))
SPIDER = {
    "singer", "concert", "stadium", "car", "continent", "highschooler", "dog", "pet", "flight", "employee", "shop",
    "template", "course", "teacher", "battle", "death", "cartoon", "tv", "poker", "voter", "contestant", "orchestra",
    "conductor", "property", "treatment", "transcript", "student", "visitor",
}  # fmt: skip
"""Things that Spider's development databases are about."""


def database(schema: str) -> sqlite3.Connection:
    made = sqlite3.connect(":memory:")
    for table in schema.split("; "):
        name, columns = table[:-1].split("(")
        made.execute(
            f"CREATE TABLE {name} ({', '.join(f'{column} NUMERIC' for column in columns.split(', '))})"
        )
    return made


def test_every_query_runs_on_its_database() -> None:
    for row in ROWS:
        assert row.context
        assert row.answer
        database(row.context).execute(row.answer).fetchall()


def test_a_query_asks_for_what_its_question_names() -> None:
    for row in ROWS:
        assert row.answer
        assert "{" not in row.question
        values = re.findall(r"'([^']*)'|(?<=[<>=] )(\d+)", row.answer)
        assert all((text or number) in row.question for text, number in values), row
        if "LIMIT 1" in row.answer:
            assert re.search(r"most|fewest|largest|highest|smallest|lowest", row.question)
        if "NOT IN" in row.answer:
            assert re.search(r"not have any|without any", row.question)


def test_the_grammar_is_varied() -> None:
    assert len({row.context for row in ROWS}) > 600
    for words in (
        "JOIN",
        "GROUP BY",
        "HAVING",
        "ORDER BY",
        "DISTINCT",
        "BETWEEN",
        " AND ",
        " OR ",
        "avg(",
        "NOT IN",
    ):
        assert sum(words in (row.answer or "") for row in ROWS) >= 10, words


def test_rows_are_the_same_again_of_the_train_part_and_none_twice() -> None:
    again = tuple(rows(1500, 0, "spider_dev"))
    assert again == ROWS
    assert {split_of(row) for row in ROWS} == {"train"}
    assert len({(row.context, row.question) for row in ROWS}) == len(ROWS)
    assert tuple(rows(5, 1, "spider_dev")) != ROWS[:5]


def test_no_database_of_spider_is_among_the_words() -> None:
    assert not SPIDER & {noun for kind in known_words().values() for noun in kind.nouns}


def test_written_rows_are_read_back(tmp_path: Path) -> None:
    write(5, 0, tmp_path / "spider_dev.jsonl")
    lines = (tmp_path / "spider_dev.jsonl").read_bytes().splitlines()
    found = [msgspec.json.decode(line) for line in lines]
    assert [line["question"] for line in found] == [row.question for row in ROWS[:5]]
    assert isinstance(msgspec.convert(found[0] | {"dataset": "spider_dev"}, Row), Row)


@pytest.mark.parametrize(
    ("noun", "many"),
    [("book", "books"), ("city", "cities"), ("coach", "coaches"), ("toy", "toys"), ("boss", "bosses")],
)
def test_plurals(noun: str, many: str) -> None:
    assert plural(noun) == many


def test_lists_are_spoken() -> None:
    assert listed(["name"]) == "name"
    assert listed(["name", "age", "city"]) == "name, age and city"


def test_queries_can_be_judged() -> None:
    pytest.importorskip("sqlglot")
    draw = random.Random(0)
    for row in draw.sample(ROWS, 100):
        assert row.answer
        assert same_query(row.answer, row.answer.replace(", ", " ,  "))


def test_the_recipe_calls_it_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make, "MADE", tmp_path / "made")
    monkeypatch.chdir(tmp_path)
    (call,) = make.derived({"invented": {"spider_dev": 5}}, tmp_path)
    assert make.succeeds(call)
    assert len((tmp_path / "made" / "spider_dev.jsonl").read_bytes().splitlines()) == 5
