"""Writes invented questions and their queries as rows that join a set.

    python -m training.sql --rows 2000 --out DIRECTORY/NAME.jsonl

NAME is the set they join. Only rows that the rule of calm.workloads.held_out gives to its train part are written.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
from training.sql.alone import ALONE
from training.sql.databases import Words, database, known_words
from training.sql.phrases import Asked
from training.sql.together import TOGETHER

from calm.workloads.held_out import split_of
from calm.workloads.rows import Row


def questions(words: Words, draw: random.Random) -> Iterator[tuple[str, Asked]]:
    """Without end: a schema as it is shown, a question and its query."""
    while True:
        tables = database(words, draw)
        shown_first = list(tables)
        draw.shuffle(shown_first)
        schema = "; ".join(table.listed(draw) for table in shown_first)
        makes, weights = zip(*ALONE, strict=True)
        for _ in range(2):
            if len(tables) > 1 and draw.random() < 0.3:
                yield schema, draw.choice(TOGETHER)(tables[1], tables[0], draw)
            else:
                yield schema, draw.choices(makes, weights)[0](draw.choice(tables), draw)


def rows(wanted: int, seed: int, name: str) -> Iterator[Row]:
    """Rows of the train part of the set they join, no question twice on one database."""
    words = known_words()
    seen: set[tuple[str, str]] = set()
    for schema, asked in questions(words, random.Random(seed)):
        row = Row(
            id=f"invented-{len(seen)}", dataset=name, domain="sql", split="train",
            question=asked.question, context=schema, answer=asked.query, answer_type="sql",
        )  # fmt: skip
        if (schema, asked.question) in seen or split_of(row) != "train":
            continue
        if len(seen) == wanted:
            return
        seen.add((schema, asked.question))
        yield row


def write(wanted: int, seed: int, out: Path) -> None:
    """OUT is DIRECTORY/NAME.jsonl, and NAME the set."""
    fields = ("id", "domain", "split", "question", "context", "answer", "answer_type")
    lines = [
        msgspec.json.encode({field: getattr(row, field) for field in fields})
        for row in rows(wanted, seed, out.stem)
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(b"\n".join([*lines, b""]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=2000, help="questions (default: 2000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="NAME.jsonl: NAME is the set they join")
    given = parser.parse_args()
    write(given.rows, given.seed, given.out)
    print(f"{given.out}: {given.rows} questions", file=sys.stderr)


if __name__ == "__main__":
    main()
