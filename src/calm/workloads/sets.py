"""Domain sets: DATA/domain/NAME.jsonl.gz, questions with what is right.

One JSON object a line: id, domain, split, question, context, choices, answer, answer_type. `choices` is an object
(letter -> text), a list of labels, or null; `answer` a string, or a list of accepted spans.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from string import ascii_uppercase

import msgspec

from calm.errors import BadInput
from calm.records import Record
from calm.workloads.files import data_file, json_rows, malformed
from calm.workloads.records import AnswerType
from calm.workloads.rows import Row, subject

FIELD = "queries"
SUFFIX = ".jsonl.gz"


class Line(Record, frozen=True, kw_only=True):
    """A line as it stands in the file."""

    id: str
    domain: str
    split: str | None = None
    question: str
    context: str | None = None
    choices: dict[str, str] | list[str] | None = None
    answer: str | list[str]
    answer_type: AnswerType


def set_names(data: str | None) -> tuple[str, ...]:
    """The domain sets of a data directory, sorted. Raises BadInput when there is no directory."""
    folder = data_file(data, "domain")
    return tuple(sorted(path.name.removesuffix(SUFFIX) for path in folder.glob(f"*{SUFFIX}")))


def read_set(data: str | None, name: str) -> tuple[Row, ...]:
    """One set. Raises BadInput: no data directory, no such set (lists those there are), a malformed line."""
    known = set_names(data)
    if name not in known:
        raise BadInput(f'no domain set "{name}"; there are: {", ".join(known) or "none"}', field=FIELD)
    return _read(data_file(data, "domain", f"{name}{SUFFIX}"), name)


@lru_cache(maxsize=64)
def _read(path: Path, name: str) -> tuple[Row, ...]:
    rows = tuple(row_of(line, name, path, number) for number, line in json_rows(path, Line, FIELD))
    return with_labels(rows)


def row_of(line: Line, name: str, path: Path, number: int) -> Row:
    """What a line says. Raises BadInput where its answer is none of its choices."""
    choices, answer = line.choices, line.answer
    if isinstance(choices, dict):
        answer = _letter(choices, answer, path, number)
    return Row(
        id=line.id,
        dataset=name,
        domain=subject(line.domain),
        split=line.split,
        question=line.question,
        context=line.context,
        choices=tuple(choices.values()) if isinstance(choices, dict) else tuple(choices or ()),
        lettered=isinstance(choices, dict),
        answer=answer if isinstance(answer, str) else accepted(answer),
        answer_type=line.answer_type,
    )


def accepted(spans: list[str]) -> str:
    """Several accepted answers as one string, one per line: what the judge of spans takes apart again."""
    return "\n".join(dict.fromkeys(" ".join(span.split()) for span in spans))


def _letter(choices: dict[str, str], answer: str | list[str], path: Path, number: int) -> str:
    """Options may be called 1, 2, 3 in the file; here they are A, B, C in their order."""
    if not isinstance(answer, str) or answer not in choices or len(choices) > len(ascii_uppercase):
        raise malformed(path, number, f"answer {answer!r} is none of the choices", FIELD)
    return ascii_uppercase[list(choices).index(answer)]


def with_labels(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    """Rows that ask for a label without saying which there are: all labels of the file, sorted."""
    labels = tuple(sorted({row.answer for row in rows if row.answer_type == "label" and row.answer}))
    return tuple(
        msgspec.structs.replace(row, choices=labels)
        if row.answer_type == "label" and not row.choices
        else row
        for row in rows
    )
