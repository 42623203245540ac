"""The form of a question: what a layout looks like in numbers, and that any text has one."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm.monitor.features import extract
from calm.monitor.form import LIMIT, form_of
from calm.records import FORM, Ask

PASSAGE = "The tower was built in 1889.\nIt is 330 metres high.\n\nHow high is the tower?"
TABLES = "singer(id, name); concert(concert_id, singer_id)\n\nHow many singers are there?"
OPTIONS = "Gold up 2%.\n\nWhere does the price go?\nOptions: up, down, neutral, none"
POLAR = "Forty walked. They had less pain.\n\nAfter a year: does walking help?\nOptions: yes, no"
LETTERS = "Which is a planet?\nA. Mars\nB. Sirius\nC. Halley"


@given(st.text())
def test_any_text_has_a_form_within_bounds(text: str) -> None:
    form = form_of(text)
    assert len(form) == FORM
    assert all(math.isfinite(number) and abs(number) <= LIMIT for number in form)


def test_a_long_text_is_read_in_bounded_time_and_its_end_counts() -> None:
    assert form_of("word " * 100_000 + "\n\nWhy?")[8] == form_of("word " * 100_000 + "\n\nWhy?")[14] == 1.0


@pytest.mark.parametrize(
    ("number", "has", "has_not"),
    [
        (1, PASSAGE, LETTERS),  # a blank line
        (2, PASSAGE, TABLES),  # digits
        (4, TABLES, PASSAGE),  # brackets
        (6, TABLES, PASSAGE),  # semicolons
        (8, PASSAGE, OPTIONS),  # ends with a question
        (9, OPTIONS, LETTERS),  # a line of options
        (10, LETTERS, OPTIONS),  # lettered options
        (13, POLAR, PASSAGE),  # answered by yes or no, whatever stands before it or is offered
        (14, PASSAGE, POLAR),  # who, what, when
        (15, TABLES, PASSAGE),  # how many
    ],
)
def test_layouts_differ(number: int, has: str, has_not: str) -> None:
    assert form_of(has)[number] > form_of(has_not)[number]


def test_surrounding_space_is_no_form() -> None:
    assert form_of(f"\n\n {PASSAGE} \n") == form_of(PASSAGE)


def test_without_an_embedder_nobody_reads_the_form() -> None:
    ask = Ask(
        request_id="r", kind="chat", query=PASSAGE, prompt_chars=80, body={}, requires=frozenset({"chat"})
    )
    assert extract(ask, None, lambda _: "en").form is None
