"""The judge: right answers in every usual form are right, wrong ones wrong, and nothing makes it stumble."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm.workloads.judge import MAX_CHARS, chosen_letter, f1, judge, stated_number
from calm.workloads.records import AnswerType, Query
from calm.workloads.sql import same_query

PARTICLES = ("nucleus", "proton", "neutron", "electron")
REMEDIES = ("Hepatitis A", "Vitamin C", "C. difficile", "Ceftriaxone")


def query(answer_type: AnswerType | None, answer: str | None, choices: tuple[str, ...] = ()) -> Query:
    return Query(
        id="1",
        dataset="d",
        domain="d",
        prompt="?",
        answer=answer,
        answer_type=answer_type,
        choices=choices,
    )


RIGHT: dict[AnswerType, Query] = {
    "choice": query("choice", "B", PARTICLES),
    "label": query("label", "card_not_working", ("card_not_working", "card_lost")),
    "number": query("number", "26.0"),
    "yes/no/maybe": query("yes/no/maybe", "maybe", ("yes", "no", "maybe")),
    "span": query("span", "lower\nlower temperatures"),
    "sql": query("sql", "SELECT count(*) FROM singer"),
    "python": query("python", "return 1"),
}


# --- laws -------------------------------------------------------------------------------------------

texts = st.text(st.characters(), max_size=300) | st.text(
    "ABCDEabyesno#$.,-−0123456789()`\n\t =<>;*'\"", max_size=300
)


@given(st.sampled_from(get_args(AnswerType)), texts)
def test_any_text_is_judged_within_0_and_1(kind: AnswerType, answer: str) -> None:
    quality = judge(RIGHT[kind], answer)
    assert quality is None if kind == "python" else quality is not None and 0.0 <= quality <= 1.0


@given(st.sampled_from([kind for kind in get_args(AnswerType) if kind != "python"]), texts)
def test_any_right_answer_in_its_own_format_is_right(kind: AnswerType, answer: str) -> None:
    """What is right may be any text, too: a label, a span or a number of somebody else's set."""
    assert judge(RIGHT[kind], (RIGHT[kind].answer or "").split("\n")[0]) == 1.0
    if kind in ("label", "span") and answer.strip() and answer.isprintable():
        assert judge(query(kind, answer), answer) == 1.0


@given(st.floats(-1e12, 1e12) | st.integers(-(10**12), 10**12))
def test_any_number_equals_itself(number: float) -> None:
    text = f"{number:,.6f}"
    assert judge(query("number", text), f"Step 1: 2 + 2 = 4.\nThe answer is ${text}.") == 1.0
    assert judge(query("number", text), text) == 1.0


@given(
    st.sampled_from("ABCD"),
    st.sampled_from(("{}", "{}.", "({})", "**{}**", "The answer is {}", "Answer: ({}).")),
)
def test_any_letter_in_any_usual_form(letter: str, form: str) -> None:
    assert chosen_letter(form.format(letter), PARTICLES) == letter


@pytest.mark.parametrize(
    "huge",
    [
        "x" * 10**6,
        "answer is " * 10**5,
        "1," * 10**5,
        "(" * 10**5,
        "\n" * 10**5,
        "A " * 10**5,
        "select " * 10**5,
    ],
)
@pytest.mark.parametrize("kind", get_args(AnswerType))
def test_huge_answers_are_judged_by_their_beginning(kind: AnswerType, huge: str) -> None:
    assert judge(RIGHT[kind], huge) == (None if kind == "python" else 0.0)
    assert judge(RIGHT["number"], "26" + " " * MAX_CHARS + "27") == 1.0


def test_empty_answers_are_wrong_and_unknown_ones_not_judged() -> None:
    for kind in get_args(AnswerType):
        assert judge(RIGHT[kind], "") == (None if kind == "python" else 0.0)
    assert judge(query("number", None), "26") is None
    assert judge(query(None, "26"), "26") is None
    assert judge(query("number", "many"), "26") is None


# --- choice -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "options", "letter"),
    [
        ("d", PARTICLES, "D"),
        ("d) electron", PARTICLES, "D"),
        ("D electron", PARTICLES, "D"),
        ("A nucleus", PARTICLES, "A"),
        ("A proton is found there.", PARTICLES, "B"),
        ("The answer is a proton", PARTICLES, "B"),
        ("Answer: D. electron", PARTICLES, "D"),
        ("The correct answer is: **B**", PARTICLES, "B"),
        ("electron", PARTICLES, "D"),
        ("The electron is farthest.", PARTICLES, "D"),
        ("I choose B because of the nucleus", PARTICLES, "B"),
        ("I think it is D", PARTICLES, "D"),
        ("B is wrong. The answer is D", PARTICLES, "D"),
        ("The answer is B and not A", PARTICLES, "B"),
        ("<think>A, or is it B?</think>\nC", PARTICLES, "C"),
        ("E", PARTICLES, None),
        ("I do not know", PARTICLES, None),
        ("C. difficile", REMEDIES, "C"),
        ("Vitamin C", REMEDIES, "B"),
        ("It is vitamin C.", REMEDIES, "B"),
        ("C", ("C", "O2", "CO"), "C"),
        ("charge of -3.", ("charge of +3.", "charge of -3."), "B"),
    ],
)
def test_letters_are_found_where_models_put_them(
    answer: str, options: tuple[str, ...], letter: str | None
) -> None:
    right = query("choice", letter or "A", options)
    assert judge(right, answer) == float(letter is not None)


# --- label and verdict ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "quality"),
    [
        ("cancel_transfer", 1.0),
        ("Cancel transfer.", 1.0),
        ("Intent: cancel transfer", 1.0),
        ("```\ncancel_transfer\n```", 1.0),
        ("Sure!\nThe label is cancel_transfer", 1.0),
        ("cancel_transfer\nIt is no transfer, nor a card_lost.", 1.0),
        ("transfer", 0.0),
        ("cancel_transfer or card_lost", 0.0),
        ("canceltransfer", 0.0),
        ("something else", 0.0),
    ],
)
def test_labels(answer: str, quality: float) -> None:
    labels = ("transfer", "cancel_transfer", "card_lost")
    assert judge(query("label", "cancel_transfer", labels), answer) == quality


@pytest.mark.parametrize(
    ("answer", "quality"),
    [("Yes", 1.0), ("**yes**, no doubt", 1.0), ("no", 0.0), ("Maybe yes", 0.0), ("yesterday", 0.0)],
)
def test_the_first_of_the_three_words_counts(answer: str, quality: float) -> None:
    assert judge(query("yes/no/maybe", "yes"), answer) == quality


# --- number -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("$1,000.", 1000),
        ("26.0", 26),
        ("50%", 50),
        ("The answer is -5", -5),
        ("answer: $5.50 each", 5.5),
        ("She has 3 left.\n#### 12", 12),
        ("#### -1,234", -1234),
        (r"So \boxed{42} it is, 7 more than 35", 42),
        ("8\n\nBecause 5 + 3 = 9 - 1", 8),
        ("First 3, then 4, so 3*4=12", 12),
        ("12 eggs a day.\n9 * 2 = 18", 18),
        ("The answer is 5 + 3 = 8.", 8),
        ("The answer is 10. Note that 2 + 2 = 4", 10),
        ("- 5 apples", 5),
        ("10-5=5", 5),
        ("−7", -7),
        ("none", None),
        ("9" * 400, None),
    ],
)
def test_numbers_are_found_where_models_put_them(answer: str, number: float | None) -> None:
    assert stated_number(answer) == number


def test_numbers_are_equal_within_the_tolerance() -> None:
    assert judge(query("number", "0.3333333333"), "0.333333") == 1.0
    assert judge(query("number", "0.3333333333"), "0.3333") == 0.0


# --- span -------------------------------------------------------------------------------------------


def test_spans_are_judged_as_squad_does() -> None:
    assert f1("The Lower temperatures!", "lower temperature") == pytest.approx(0.5)
    assert f1("the", "a") == 1.0
    assert f1("", "cold") == 0.0
    right = query("span", "lower\nlower temperatures")
    assert judge(right, "lower\nbecause it is higher elsewhere") == 1.0
    assert judge(right, "at lower temperatures") == pytest.approx(0.8)


# --- sql --------------------------------------------------------------------------------------------

JOIN = "SELECT T1.name FROM singer AS T1 JOIN concert AS T2 ON T1.id = T2.sid WHERE T2.year > 2014"
PLAYERS = "SELECT T1.a FROM p AS T1 JOIN m AS T2 ON T1.i = T2.w"


@pytest.mark.parametrize(
    ("right", "answer"),
    [
        (
            JOIN,
            "select singer.name from concert join singer on concert.sid = singer.id where 2014 < concert.year;",
        ),
        (JOIN, f"Here is the query:\n```sql\n{JOIN}\n```\nIt selects names."),
        (JOIN, f"I would select them so:\n\n{JOIN};\nDone."),
        ("SELECT name, age FROM singer", "SELECT s.age, s.name AS n FROM Singer AS s"),
        ("SELECT count(*) FROM t", "SELECT COUNT(*) AS total FROM t"),
        (
            'SELECT * FROM t WHERE x = "France" AND y != 1',
            "SELECT * FROM t WHERE (y <> 1) AND t.x = 'France'",
        ),
        ("SELECT x FROM t ORDER BY x ASC LIMIT 1", 'SELECT "x" FROM t ORDER BY `x` LIMIT 1'),
        (
            "SELECT c FROM t GROUP BY c ORDER BY count(*) DESC",
            "SELECT c FROM t GROUP BY 1 ORDER BY COUNT(*) DESC",
        ),
        (
            "SELECT c, count(*) FROM t GROUP BY c ORDER BY 2",
            "SELECT c, COUNT(*) AS n FROM t GROUP BY c ORDER BY n",
        ),
        (
            "SELECT a FROM t WHERE id NOT IN (SELECT id FROM u WHERE p = 1 AND q = 2)",
            "SELECT t.a FROM t WHERE NOT t.id IN (SELECT u.id FROM u WHERE q = 2 AND p = 1)",
        ),
        (f"{PLAYERS} INTERSECT {PLAYERS}", " INTERSECT ".join(["SELECT p.a FROM p JOIN m ON p.i = m.w"] * 2)),
        (
            "SELECT T1.b FROM h AS T1 JOIN f AS T2 ON T1.i = T2.s JOIN h AS T3 ON T3.i = T2.f",
            "SELECT x.b FROM h x JOIN f y ON x.i = y.s JOIN h z ON z.i = y.f",
        ),
    ],
)
def test_equal_queries(right: str, answer: str) -> None:
    assert same_query(right, answer)
    assert same_query(right, right)


@pytest.mark.parametrize(
    ("right", "answer"),
    [
        ("SELECT a FROM t", "SELECT b FROM t"),
        ("SELECT a FROM t", "SELECT a FROM u"),
        ("SELECT a FROM t", "SELECT DISTINCT a FROM t"),
        ("SELECT a FROM t", "SELECT a FROM t LIMIT 1"),
        ("SELECT a FROM t ORDER BY a", "SELECT a FROM t ORDER BY a DESC"),
        ("SELECT a FROM t WHERE x < 1", "SELECT a FROM t WHERE x <= 1"),
        ("SELECT a FROM t WHERE x = 'France'", "SELECT a FROM t WHERE x = 'Spain'"),
        ("SELECT a FROM t WHERE x = 1 AND y = 2", "SELECT a FROM t WHERE x = 1 OR y = 2"),
        ("SELECT a FROM t JOIN u ON t.i = u.i", "SELECT a FROM t LEFT JOIN u ON t.i = u.i"),
        ("SELECT T1.a FROM p AS T1 UNION SELECT T1.a FROM q AS T1", "SELECT a FROM p UNION SELECT a FROM p"),
        ("SELECT a FROM t", "I would select the thing"),
        ("SELECT a FROM t", "DELETE FROM t"),
        ("SELECT a FROM t", "SELECT " + "(" * 5000),
    ],
)
def test_other_queries_are_not_equal(right: str, answer: str) -> None:
    assert not same_query(right, answer)


def test_without_sqlglot_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from calm.errors import BadInput

    gone: Any = None
    monkeypatch.setitem(sys.modules, "sqlglot", gone)
    with pytest.raises(BadInput, match="calm-orchestrator\\[bench\\]"):
        judge(RIGHT["sql"], "SELECT 1")
