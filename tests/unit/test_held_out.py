"""Which part a row belongs to: the laws of the split, and its sizes on the real sets."""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from calm.workloads.held_out import SHARES, group_of, part_of, place_of, same_words, split_of
from calm.workloads.rows import Row
from calm.workloads.sets import read_set, set_names

DATA = os.environ.get("CALM_DATA")
PAGE = (Path(__file__).parents[2] / "docs" / "prompts.md").read_text(encoding="utf-8")


def row(question: str = "Why?", **fields: object) -> Row:
    whole: dict[str, object] = {"id": "1", "dataset": "mine", "domain": "d", "split": None, **fields}
    return Row(question=question, **whole)  # type: ignore[arg-type]


questions = st.lists(st.text(min_size=1), min_size=1, max_size=30)


@given(questions)
def test_a_part_depends_on_nothing_but_the_row(asked: list[str]) -> None:
    rows = [row(text, id=str(n)) for n, text in enumerate(asked)]
    alone = [split_of(one) for one in rows]
    assert [split_of(one) for one in reversed(rows)] == alone[::-1]
    assert sum(len(part_of(rows, part)) for part in ("train", "validation", "test")) == len(rows)


@given(st.text(), st.sampled_from(["mine", "gsm8k", *SHARES]))
def test_an_official_test_row_stays_one(question: str, dataset: str) -> None:
    assert split_of(row(question, dataset=dataset, split="test")) == "test"


@given(st.text())
def test_an_official_train_row_is_never_tested_on(question: str) -> None:
    assert split_of(row(question, dataset="gsm8k", split="train")) in ("train", "validation")


@given(st.text(max_size=40), st.text(max_size=40))
def test_rows_of_one_schema_stand_in_one_part(first: str, second: str) -> None:
    def of(question: str) -> Row:
        return row(question, dataset="spider_dev", split="train", answer_type="sql", context="singer(Name)")

    assert split_of(of(first)) == split_of(of(second))


def test_headlines_of_the_same_words_stand_in_one_part() -> None:
    first, second = (row(f"Spot gold quoted at {n} in Asia trade") for n in ("$1,273.5", "1,199"))
    assert group_of(first) == group_of(second)
    assert group_of(first) != group_of(row("Spot silver quoted at 17 in Asia trade"))


@given(st.text())
def test_a_group_has_a_name_unless_nothing_was_written(text: str) -> None:
    assert bool(same_words(text)) == bool(text)


def test_about_the_share_is_held_out() -> None:
    counts = Counter(split_of(row(f"question {chr(97 + n % 26)}{chr(97 + n // 26)}x")) for n in range(600))
    assert {part: 0.06 < counts[part] / 600 < 0.14 for part in ("validation", "test")} == {
        "validation": True,
        "test": True,
    }


def test_the_place_of_a_text_is_the_same_on_every_machine() -> None:
    assert place_of("calm") == pytest.approx(0.1691159, abs=1e-6)
    assert 0.0 <= place_of("") < 1.0


@pytest.mark.skipif(DATA is None, reason="CALM_DATA names no directory of the sets")
def test_the_real_sets_divide_as_the_page_says() -> None:
    for name in set_names(DATA):
        found = re.search(rf"^\| {name}.*?\| ([\d,]+).*?\| ([\d,]+).*?\| ([\d,]+)", PAGE, re.MULTILINE)
        if found is None:
            continue
        counts = Counter(map(split_of, read_set(DATA, name)))
        told = [int(count.replace(",", "")) for count in found.groups()]
        assert [counts["train"], counts["validation"], counts["test"]] == told, name


@pytest.mark.skipif(DATA is None, reason="CALM_DATA names no directory of the sets")
@pytest.mark.parametrize("name", SHARES)
def test_no_group_of_a_set_we_divide_is_in_two_parts(name: str) -> None:
    rows = read_set(DATA, name)
    parts = {group_of(one): split_of(one) for one in rows}
    assert all(parts[group_of(one)] == split_of(one) for one in rows)
    renamed = [replace(one, id="other") for one in rows]
    assert list(map(split_of, renamed)) == list(map(split_of, rows))
