"""Word problems with other numbers: what is varied still has the answer that is taught."""

from __future__ import annotations

import gzip
import random
import sys
from pathlib import Path

import msgspec
import pytest

from calm.workloads.held_out import group_of, split_of
from calm.workloads.rows import Row

sys.path.insert(0, str(Path(__file__).parents[2]))
from training.word_problems import Step, drawn, rows_of, step_of, variants, write

TOWERS = (
    "Randy has 90 blocks. He uses 89 of them for a house and 63 for a tower. How many more for the house?"
)


@pytest.mark.parametrize(
    ("numbers", "answer", "step"),
    [
        ((90, 89, 63), 26, Step(1, 2, "-")),
        ((15, 18, 97), 33, Step(0, 1, "+")),
        ((14, 30), 420, Step(0, 1, "*")),
        ((6, 42), 7, Step(1, 0, "/")),
        ((2, 2), 4, None),  # the same number twice: nobody knows which
        ((2, 1, 4), 2, None),  # 2 * 1 and 4 / 2
        ((3, 4, 6), 13, None),  # not one step
        ((), 5, None),
    ],
)
def test_the_step_is_found_where_there_is_only_one(
    numbers: tuple[int, ...], answer: float, step: Step | None
) -> None:
    assert step_of(numbers, answer) == step


@pytest.mark.parametrize(
    ("numbers", "step"),
    [((90, 89, 63), Step(1, 2, "-")), ((6, 42), Step(1, 0, "/")), ((14, 30), Step(0, 1, "*"))],
)
def test_new_numbers_keep_their_order_and_give_a_whole_positive_answer(
    numbers: tuple[int, ...], step: Step
) -> None:
    for seed in range(200):
        new = drawn(numbers, step, random.Random(seed))
        assert new is not None
        assert min(new) >= 1
        assert step.result(new) > 0
        assert step.result(new) == int(step.result(new))
        assert sorted(range(len(new)), key=new.__getitem__) == sorted(
            range(len(numbers)), key=numbers.__getitem__
        )


def test_variants_differ_in_their_numbers_alone() -> None:
    found = list(variants(TOWERS, 26.0, 8, random.Random(0)))
    assert len({text for text, _ in found}) == len(found) >= 6
    for text, answer in found:
        numbers = [int(word) for word in text.split() if word.isdigit()]
        assert numbers[1] - numbers[2] == answer
        assert [w for w in text.split() if not w.isdigit()] == [w for w in TOWERS.split() if not w.isdigit()]


def test_decimals_and_thousands_are_left_alone() -> None:
    assert not list(variants("It costs 2.50 and he has 1,000. How much is left?", 997.5, 4, random.Random(0)))


def test_a_variant_lies_in_the_part_of_its_row() -> None:
    row = Row(
        id="a", dataset="svamp", domain="math", split="train", context="Ann has 12 pears.",
        question="She eats 5. How many are left?", choices=(), answer="7", answer_type="number",
    )  # fmt: skip
    for line in rows_of(row, 5, random.Random(0)):
        varied = msgspec.structs.replace(row, context=line["context"], question=line["question"])
        assert group_of(varied) == group_of(row)
        assert split_of(varied) == split_of(row)
        assert line["question"] != row.question


def test_only_train_rows_are_varied(tmp_path: Path) -> None:
    domain = tmp_path / "domain"
    domain.mkdir()
    lines = [
        {"id": f"{split}-{i}", "domain": "math", "split": split, "context": None, "choices": None,
         "question": f"{split} {'abcdefghijklmnop'[i]} has {i + 20} figs and gives {i + 3} away. How many are left?",
         "answer": "17", "answer_type": "number"}
        for split in ("train", "test") for i in range(16)
    ]  # fmt: skip
    with gzip.open(domain / "svamp.jsonl.gz", "wb") as file:
        file.write(b"\n".join(msgspec.json.encode(line) for line in lines))
    path = write(domain / "svamp.jsonl.gz", 3, 0, tmp_path / "made")
    said = [msgspec.json.decode(line) for line in path.read_bytes().splitlines()]
    assert path.name == "svamp.jsonl"
    assert said
    assert all(line["question"].startswith("train") and line["split"] == "train" for line in said)
    assert len({line["id"] for line in said}) == len(said)
