"""What a user's file becomes: three ways to write a row, parts, and every unusable row named."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from calm.errors import BadInput
from calm.specialise.examples import Examples, read_examples


def written(path: Path, *rows: object) -> Path:
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


def read(tmp_path: Path, *rows: object, name: str = "mine.jsonl") -> Examples:
    return read_examples([written(tmp_path / name, *rows)])


def test_a_conversation_teaches_its_last_answer(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "One?"},
                {"role": "assistant", "content": "1"},
                {"role": "user", "content": "Two?"},
                {"role": "assistant", "content": " 2 "},
            ]
        },
    )
    assert [m.content for m in found.rows[0].messages] == ["Be brief.", "One?", "1", "Two?"]
    assert found.rows[0].answer == "2"


def test_prompt_and_completion(tmp_path: Path) -> None:
    row = read(tmp_path, {"prompt": "Sky?", "completion": "blue"}).rows[0]
    assert (row.messages[0].role, row.messages[0].content, row.answer) == ("user", "Sky?", "blue")
    assert row.where == "mine.jsonl:1"


@pytest.mark.parametrize(
    ("row", "prompt", "answer"),
    [
        (
            {"question": "Up?", "choices": ["up", "down"], "answer": "up"},
            "Up?\nOptions: up, down",
            "up",
        ),
        (
            {"question": "Which?", "choices": {"A": "one", "B": "two"}, "answer": "B"},
            "Which?\nA. one\nB. two",
            "B",
        ),
        (
            {"question": "Who?", "context": "Ann ran.", "answer": ["Ann", "ann"], "answer_type": "span"},
            "Ann ran.\n\nWho?",
            "Ann",
        ),
        ({"question": "How many?", "answer": "1,420.0", "answer_type": "number"}, "How many?", "1420"),
        (
            {"question": "Q", "context": "t(a)", "answer": "SELECT  a\n FROM t", "answer_type": "sql"},
            "t(a)\n\nQ",
            "SELECT a FROM t",
        ),
    ],
)
def test_rows_of_the_schema_are_laid_out_like_the_benchmarks(
    tmp_path: Path, row: dict[str, object], prompt: str, answer: str
) -> None:
    found = read(tmp_path, row).rows[0]
    assert (found.messages[0].content, found.answer) == (prompt, answer)
    assert found.query.prompt == prompt


def test_rows_of_a_test_split_are_kept_apart(tmp_path: Path) -> None:
    rows = [{"question": f"Is {w} good?", "answer": "yes", "split": "test"} for w in ("ale", "beer")]
    found = read(tmp_path, *rows, {"question": "Is tea good?", "answer": "yes", "split": "train"})
    assert len(found.of("test")) == 2
    assert len(found.of("train")) + len(found.of("validation")) == 1


def test_a_part_depends_on_the_row_alone(tmp_path: Path) -> None:
    rows = [{"prompt": f"What is {i} and {i}?", "completion": str(2 * i)} for i in range(200)]
    forth = {r.messages[0].content: r.part for r in read(tmp_path, *rows, name="a.jsonl").rows}
    back = {r.messages[0].content: r.part for r in read(tmp_path, *rows[::-1], name="b.jsonl.gz").rows}
    assert forth == back
    assert 5 <= sum(part == "validation" for part in forth.values()) <= 40


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("no json", "JSON is malformed"),
        ({"prompt": "x"}, "it has prompt; wanted"),
        ({"prompt": "x", "completion": "  "}, "the answer is empty"),
        ({"prompt": " ", "completion": "x"}, "nothing is asked"),
        ({"prompt": 3, "completion": "x"}, "Expected `str`"),
        ({"messages": [{"role": "user", "content": "x"}]}, "the last message must be the assistant's"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "Invalid enum value 'tool'"),
        ({"question": "Q", "choices": {"A": "a"}, "answer": "Z"}, "is none of the choices"),
        ({"question": " ", "answer": "x"}, "question or answer is empty"),
        ("[1, 2]", "Expected `object`"),
        ('{"question": "deep", "answer": ' + "[" * 5000, "maximum recursion depth"),
    ],
)
def test_an_unusable_row_is_named_and_the_others_are_read(tmp_path: Path, bad: object, reason: str) -> None:
    good = {"prompt": "Sky?", "completion": "blue"}
    found = read(tmp_path, good, bad, {"prompt": "Sea?", "completion": "blue"})
    assert len(found.rows) == 2
    assert found.bad[0].where == "mine.jsonl:2"
    assert reason in found.bad[0].reason


def test_a_file_of_bad_rows_is_refused_with_the_first_reason(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"0 rows of 2 can be used.*mine.jsonl:1") as caught:
        read(tmp_path, {"a": 1}, {"b": 2})
    assert caught.value.field == "data"


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="0 rows of 0"):
        read(tmp_path)
