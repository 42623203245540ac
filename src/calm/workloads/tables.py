"""Routing tables: what other people measured, the quality of every model on every query.

DATA/routing/NAME.jsonl.gz or a file of one's own, one JSON object a line: id, task, question (or prompt), scores
by model; split, score_type, metric and choices where there are. Scores are 0..1. Where `score_type` is
"probability" (RouterDC: the probability of the right option when it is the most probable one, else 0) the
quality is 1 for every score above 0, as its authors evaluate (Chen et al. 2024, arXiv 2409.19886).
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from string import ascii_uppercase
from typing import cast

from calm.errors import BadInput
from calm.records import Record
from calm.workloads.files import REFERENCE, data_file, json_rows, malformed, numbered_lines
from calm.workloads.rows import Row, subject

FIELD = "queries"
SUFFIX = ".jsonl.gz"
MULTIPLE_CHOICE = (None, "em_mc")
"""Values of `metric` with which `choices` are options; with others they are tests of a program."""


class _Line(Record, frozen=True, kw_only=True):
    id: str
    task: str
    split: str | None = None
    question: str | None = None
    prompt: str | None = None
    scores: dict[str, float | None]
    score_type: str | None = None
    metric: str | None = None
    choices: dict[str, str | list[str]] | list[str] | str | None = None
    """LLMRouter writes Python's form of a list or dict into a string."""


def read_table(data: str | None, name: str) -> tuple[Row, ...]:
    """A table of the data directory by its name, or a file by its path (anything with a `/` or `.jsonl` in it).

    Raises BadInput: no data directory, no such table (lists those there are), a malformed line.
    """
    if "/" in name or ".jsonl" in name:
        return _read(Path(name))
    path = data_file(data, "routing", f"{name}{SUFFIX}")
    if not path.is_file():
        known = ", ".join(table_names(data)) or "none"
        raise BadInput(f'no routing table "{name}"; there are: {known}; see {REFERENCE}', field=FIELD)
    return _read(path)


def table_names(data: str | None) -> tuple[str, ...]:
    """The routing tables of a data directory: files whose first row has scores."""
    folder = data_file(data, "routing")
    return tuple(
        path.name.removesuffix(SUFFIX)
        for path in sorted(folder.glob(f"*{SUFFIX}"))
        if '"scores"' in next(numbered_lines(path, FIELD), (0, ""))[1]
    )


@lru_cache(maxsize=8)
def _read(path: Path) -> tuple[Row, ...]:
    return tuple(_row(line, path, number) for number, line in json_rows(path, _Line, FIELD))


def _row(line: _Line, path: Path, number: int) -> Row:
    text = line.question or line.prompt
    if not text:
        raise malformed(path, number, "neither question nor prompt", FIELD)
    scores = {model: score for model, score in line.scores.items() if score is not None}
    for model, score in scores.items():
        if not 0 <= score <= 1:
            raise malformed(path, number, f"score {score} of {model} is not 0..1", FIELD)
    options = _options(line)
    return Row(
        id=line.id,
        dataset=line.task,
        domain=subject(line.task),
        split=_split(line.split),
        question=_unlisted(text),
        choices=options,
        lettered=bool(options),
        scores=_qualities(scores, line.score_type),
    )


def _qualities(scores: Mapping[str, float], score_type: str | None) -> dict[str, float]:
    if score_type == "probability":
        return {model: float(score > 0) for model, score in scores.items()}
    return dict(scores)


def _split(name: str | None) -> str | None:
    """RouterDC calls its test rows `test_id`: in distribution."""
    return "test" if name is not None and name.startswith("test") else name


def _options(line: _Line) -> tuple[str, ...]:
    """A list of texts, an object letter -> text, or Hugging Face's {"text": [...], "label": [...]}."""
    choices = _value(line.choices) if isinstance(line.choices, str) else line.choices
    if line.metric not in MULTIPLE_CHOICE:
        return ()
    if isinstance(choices, Mapping):
        texts = choices.get("text")
        choices = texts if isinstance(texts, list) else list(choices.values())
    if not isinstance(choices, list) or len(choices) > len(ascii_uppercase):
        return ()
    return tuple(str(text) for text in choices)


def _unlisted(text: str) -> str:
    """RouterBench holds each prompt as the written form of a Python list of one string."""
    found = _value(text) if text.startswith("['") or text.startswith('["') else None
    return found[0] if isinstance(found, list) and len(found) == 1 and isinstance(found[0], str) else text


def _value(text: str) -> object:
    """What the written form of a Python value says; None where it is none."""
    try:
        return cast("object", ast.literal_eval(text))
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
