"""One-step word problems again with other numbers, so that a small model learns the step and not the answer.

    python training/word_problems.py DIR/domain/svamp.jsonl.gz --variants 10 --out DIRECTORY

A problem is used when exactly one operation on two of its numbers gives its answer; its other numbers, there to mislead,
are drawn anew as well. Only rows of the train part are varied, and a variant has the words of its row, so by the rule of
calm.workloads.held_out it belongs to the train part too. The file has the set's name, not compressed.

    text, answer -> the step (i, j, operation) -> other numbers of like size, in the same order of size -> text, answer
"""

from __future__ import annotations

import argparse
import operator
import random
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from calm.workloads.held_out import part_of
from calm.workloads.rows import Row
from calm.workloads.sets import read_set

NUMBER = re.compile(r"(?<![\d.,])\d+(?!\d|[.,]\d)")
SPREAD = 3.0
"""A number of a variant is at most so many times larger or smaller."""
TRIES = 50
OPERATIONS: Mapping[str, Callable[[float, float], float]] = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv,
}  # fmt: skip


class Step(NamedTuple):
    """What is done with which two numbers, by their place in the text."""

    left: int
    right: int
    sign: str

    def result(self, numbers: Sequence[int]) -> float:
        return OPERATIONS[self.sign](numbers[self.left], numbers[self.right])


def step_of(numbers: Sequence[int], answer: float) -> Step | None:
    """The only step that gives the answer; None where there is none, or a choice."""
    if 0 in numbers or len(set(numbers)) < len(numbers):
        return None
    places = range(len(numbers))
    steps = [
        Step(left, right, sign)
        for sign in OPERATIONS
        for left in places
        for right in places
        if left != right and (left < right or sign in "-/")
    ]
    found = [step for step in steps if abs(step.result(numbers) - answer) < 1e-9]
    return found[0] if len(found) == 1 else None


def drawn(numbers: Sequence[int], step: Step, draw: random.Random) -> tuple[int, ...] | None:
    """Other numbers in the same order of size, with a whole and positive result; None when none were found."""
    for _ in range(TRIES):
        new = [max(1, _near(number, draw)) for number in numbers]
        if step.sign == "/":
            new[step.left] = new[step.right] * max(2, _near(step.result(numbers), draw))
        result = step.result(new)
        if _order(new) == _order(numbers) and result > 0 and result == int(result):
            return tuple(new)
    return None


def variants(text: str, answer: float, wanted: int, draw: random.Random) -> Iterator[tuple[str, int]]:
    """At most `wanted` variants of a problem and their answers; none of one that is not a single step."""
    numbers = [int(found.group()) for found in NUMBER.finditer(text)]
    step = step_of(numbers, answer)
    seen = {tuple(numbers)}
    for _ in range(wanted if step is not None else 0):
        new = drawn(numbers, step, draw) if step is not None else None
        if step is None or new is None or new in seen:
            continue
        seen.add(new)
        yield _with(text, new), int(step.result(new))


def rows_of(row: Row, wanted: int, draw: random.Random) -> Iterator[dict[str, object]]:
    """Lines of the schema of the domain sets. A passage before the question stays one."""
    passage = f"{row.context}\n" if row.context else ""
    for number, (text, answer) in enumerate(
        variants(passage + row.question, float(row.answer or "nan"), wanted, draw)
    ):
        context, _, question = text.rpartition("\n") if passage else ("", "", text)
        yield {
            "id": f"{row.id}-{number}", "domain": row.domain, "split": row.split, "question": question,
            "context": context or None, "choices": None, "answer": str(answer), "answer_type": row.answer_type,
        }  # fmt: skip


def _near(number: float, draw: random.Random) -> int:
    return round(number * SPREAD ** draw.uniform(-1.0, 1.0))


def _order(numbers: Sequence[int]) -> list[int]:
    return sorted(range(len(numbers)), key=numbers.__getitem__)


def _with(text: str, numbers: Sequence[int]) -> str:
    left = iter(numbers)
    return NUMBER.sub(lambda _: str(next(left)), text)


def write(source: Path, wanted: int, seed: int, out: Path) -> Path:
    """The variants of a set (DIR/domain/NAME.jsonl.gz) as OUT/NAME.jsonl."""
    name = source.name.removesuffix(".jsonl.gz")
    draw = random.Random(seed)
    rows = part_of(read_set(str(source.parent.parent), name), "train")
    lines = [msgspec.json.encode(line) for row in rows for line in rows_of(row, wanted, draw)]
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.jsonl"
    path.write_bytes(b"\n".join([*lines, b""]))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="DIR/domain/NAME.jsonl.gz")
    parser.add_argument("--variants", type=int, default=10, help="of each problem, at most (default: 10)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="directory for NAME.jsonl")
    given = parser.parse_args()
    path = write(given.source, given.variants, given.seed, given.out)
    print(f"{path}: {len(path.read_bytes().splitlines())} problems", file=sys.stderr)


if __name__ == "__main__":
    main()
