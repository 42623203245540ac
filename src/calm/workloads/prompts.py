"""A row of a set as what a user would type: one plain layout for every set, so that sets differ in content only.

    context

    question
    A. first option
    B. second option

Few labels stand on one line, `Options: up, down, neutral`; more than MAX_LISTED_LABELS are left out, as no
user types 77 labels. The judge takes the answer wherever it stands (judge.py).
"""

from __future__ import annotations

from string import ascii_uppercase

from calm.workloads.rows import Row

MAX_LISTED_LABELS = 20


def render(row: Row) -> str:
    """The prompt. Equal rows give equal prompts."""
    context = (row.context or "").strip()
    parts = [f"{context}\n"] if context else []
    return "\n".join([*parts, row.question.strip(), *_options(row)])


def _options(row: Row) -> list[str]:
    if row.lettered:
        return [f"{letter}. {text}" for letter, text in zip(ascii_uppercase, row.choices, strict=False)]
    if row.choices and len(row.choices) <= MAX_LISTED_LABELS:
        return [f"Options: {', '.join(row.choices)}"]
    return []
