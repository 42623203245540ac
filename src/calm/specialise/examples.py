"""A user's rows as examples to learn from: what is asked, what is right, and in which part the row lies.

Three ways to write a row are understood, told apart by their keys, and may be mixed in one file:

    {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}
    {"prompt": ..., "completion": ...}
    {"question": ..., "context": ..., "choices": ..., "answer": ..., "answer_type": ..., "split": ...}

The last one is the schema of the domain sets (docs/prompts.md). A row that cannot be used is counted and named
with its line, never swallowed; when most rows are bad, the file is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from calm.errors import BadInput
from calm.records import Record
from calm.workloads.files import numbered_lines
from calm.workloads.held_out import Part, group_of, place_of, split_of
from calm.workloads.prompts import render
from calm.workloads.queries import query_of
from calm.workloads.records import Query
from calm.workloads.rows import Row
from calm.workloads.sets import Line, row_of, with_labels

FIELD = "data"
HELD_OUT = 0.1
"""Share of the rows without a split of their own that is held out."""
UNLISTED = 0.25
"""Share of the rows learned without their line of options: users leave it out, and an answer must still end."""
KEYS = "messages; prompt and completion; or question and answer"


class Message(Record, frozen=True, kw_only=True):
    role: Literal["system", "user", "assistant"]
    content: str


class Example(Record, frozen=True, kw_only=True):
    """One row: the conversation so far and the answer to learn."""

    where: str
    """File and line, for messages."""
    messages: tuple[Message, ...]
    answer: str
    part: Part
    query: Query
    """For the judge."""


class BadRow(Record, frozen=True, kw_only=True):
    where: str
    reason: str


class Examples(Record, frozen=True, kw_only=True):
    """What a data set came to."""

    rows: tuple[Example, ...]
    bad: tuple[BadRow, ...]

    def of(self, part: Part) -> tuple[Example, ...]:
        return tuple(row for row in self.rows if row.part == part)


def read_examples(paths: Sequence[Path], held_out: float = HELD_OUT) -> Examples:
    """All rows of all files. Raises BadInput (field `data`): unreadable, no row usable, or more bad than good."""
    rows: list[Example] = []
    bad: list[BadRow] = []
    for path in paths:
        for found in _read(path, held_out):
            (rows if isinstance(found, Example) else bad).append(found)  # type: ignore[arg-type]
    if len(bad) >= len(rows):
        first = f"; the first: {bad[0].where}: {bad[0].reason}" if bad else ""
        raise BadInput(
            f"{len(rows)} rows of {len(rows) + len(bad)} can be used; a row is a JSON object with {KEYS}{first}",
            field=FIELD,
        )
    return Examples(rows=tuple(rows), bad=tuple(bad))


def _read(path: Path, held_out: float) -> Iterator[Example | BadRow]:
    schema: list[tuple[str, Row]] = []
    for number, text in numbered_lines(path, FIELD):
        where = f"{path.name}:{number}"
        try:
            line = msgspec.json.decode(text, type=dict[str, object])
            if "question" in line:
                schema.append((where, _schema_row(line, path, number)))
            else:
                yield _free(line, where, held_out)
        except (msgspec.MsgspecError, RecursionError) as error:
            yield BadRow(where=where, reason=str(error))
        except BadInput as error:
            yield BadRow(where=where, reason=error.message.removeprefix(f"{path}:{number}: "))
    labelled = with_labels(tuple(row for _, row in schema))
    yield from (_asked(where, row, held_out) for (where, _), row in zip(schema, labelled, strict=True))


# --- the schema of the domain sets ------------------------------------------------------------------


def _schema_row(line: Mapping[str, object], path: Path, number: int) -> Row:
    stated = {"id": f"{path.stem}-{number}", "domain": path.name.split(".")[0], **line}
    stated.setdefault("answer_type", "choice" if isinstance(line.get("choices"), dict) else "label")
    row = row_of(msgspec.convert(stated, Line), path.name.split(".")[0], path, number)
    if not row.answer or not row.question.strip():
        raise BadInput("question or answer is empty")
    return row


def _asked(where: str, row: Row, held_out: float) -> Example:
    part = _part(row, held_out)
    return Example(
        where=where,
        messages=(Message(role="user", content=_prompt(row, part)),),
        answer=_taught(row),
        part=part,
        query=query_of(row),
    )


def _prompt(row: Row, part: Part) -> str:
    """The one layout, but some rows are learned without their list of labels."""
    prompt = render(row)
    if part == "train" and not row.lettered and place_of(f"unlisted\n{prompt}") < UNLISTED:
        return render(msgspec.structs.replace(row, choices=()))
    return prompt


def _part(row: Row, held_out: float) -> Part:
    """The benchmarks' rule where the row names a split, else a share of its own."""
    if row.split is not None:
        return split_of(row)
    return "validation" if place_of(group_of(row)) < held_out else "train"


def _taught(row: Row) -> str:
    """The words to learn: of several accepted answers the first, and numbers without an empty fraction."""
    first = (row.answer or "").split("\n")[0] if row.answer_type == "span" else (row.answer or "")
    if row.answer_type == "number":
        first = first.replace(",", "").removesuffix(".0")
    return " ".join(first.split()) if row.answer_type == "sql" else first.strip()


# --- conversations and completions ------------------------------------------------------------------


def _free(line: Mapping[str, object], where: str, held_out: float) -> Example:
    messages, answer = _conversation(line) if "messages" in line else _completion(line)
    if not answer.strip():
        raise BadInput("the answer is empty")
    if not any(message.role == "user" and message.content.strip() for message in messages):
        raise BadInput("nothing is asked")
    prompt = "\n\n".join(message.content for message in messages)
    part = line.get("split") or ("validation" if place_of(prompt) < held_out else "train")
    return Example(
        where=where,
        messages=messages,
        answer=answer.strip(),
        part=msgspec.convert(part, Part),
        query=Query(
            id=where, dataset="data", domain="data", prompt=prompt, answer=answer, answer_type="span"
        ),
    )


def _conversation(line: Mapping[str, object]) -> tuple[tuple[Message, ...], str]:
    messages = msgspec.convert(line["messages"], tuple[Message, ...])
    if not messages or messages[-1].role != "assistant":
        raise BadInput("the last message must be the assistant's: it is what is learned")
    return messages[:-1], messages[-1].content


def _completion(line: Mapping[str, object]) -> tuple[tuple[Message, ...], str]:
    if not {"prompt", "completion"} <= line.keys():
        raise BadInput(f"it has {', '.join(line) or 'no keys'}; wanted: {KEYS}")
    prompt, answer = (msgspec.convert(line[key], str) for key in ("prompt", "completion"))
    return (Message(role="user", content=prompt),), answer
