"""docs/prompts.md: every example on the page is what the code does."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest

from calm.workloads.judge import judge
from calm.workloads.prompts import MAX_LISTED_LABELS, render
from calm.workloads.queries import query_of
from calm.workloads.records import Query
from calm.workloads.rows import Row
from calm.workloads.sets import read_set

PAGE = (Path(__file__).parents[2] / "docs" / "prompts.md").read_text(encoding="utf-8")
SECTIONS = {
    title: body
    for title, body in re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    if "```json" in body
}


def block(title: str, language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)\n```", SECTIONS[title], re.DOTALL)
    assert found is not None
    return found[1]


def replies() -> list[tuple[str, str, float]]:
    cells = re.compile(r"^\| `(.+)` \| ([0-9.]+) \|$", re.MULTILINE)
    return [
        (title, reply.replace("\\n", "\n"), float(quality))
        for title, body in SECTIONS.items()
        for reply, quality in cells.findall(body)
    ]


def row_of(title: str, folder: Path) -> Row:
    """The example as the first row of a set; beside it, for `of many`, rows with labels enough to be left out."""
    line = json.loads(block(title, "json"))
    others = [{**line, "id": f"other-{n}", "answer": f"intent_{n}"} for n in range(MAX_LISTED_LABELS)]
    lines = [line, *(others if "of many" in title else [])]
    (folder / "domain").mkdir()
    with gzip.open(folder / "domain" / "example.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(each) + "\n" for each in lines)
    return read_set(str(folder), "example")[0]


def query(title: str, folder: Path) -> Query:
    return query_of(row_of(title, folder))


def test_the_page_has_an_example_of_every_type_that_is_judged() -> None:
    types = {json.loads(block(title, "json"))["answer_type"] for title in SECTIONS}
    assert types == {"label", "choice", "yes/no/maybe", "number", "span", "sql"}
    assert len(replies()) > 40


@pytest.mark.parametrize("title", SECTIONS)
def test_rows_are_laid_out_as_the_page_shows(title: str, tmp_path: Path) -> None:
    assert render(row_of(title, tmp_path)) == block(title, "text")


@pytest.mark.parametrize(("title", "reply", "quality"), replies())
def test_replies_are_judged_as_the_page_says(title: str, reply: str, quality: float, tmp_path: Path) -> None:
    assert judge(query(title, tmp_path), reply) == pytest.approx(quality)


@pytest.mark.parametrize("title", SECTIONS)
def test_the_answer_itself_first_thing_in_the_reply_is_right(title: str, tmp_path: Path) -> None:
    asked = query(title, tmp_path)
    answer = (asked.answer or "").split("\n")[0]
    assert judge(asked, answer) == 1.0
    assert judge(asked, f"{answer}\n\nThat is what I think.") == 1.0
