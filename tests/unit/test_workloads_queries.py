"""Queries: domain sets and routing tables in one shape, prompts laid out alike, and only what is known for all."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from calm.errors import BadInput
from calm.workloads.held_out import part_of
from calm.workloads.names import names_in
from calm.workloads.prompts import render
from calm.workloads.queries import Selection, load_queries
from calm.workloads.records import WorkloadSpec
from calm.workloads.rows import Row, subject
from calm.workloads.sets import read_set

FLEET = ("small", "large")


def pack(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("\n".join(json.dumps(row) for row in rows).encode()))
    return path


def line(number: int, **changes: Any) -> dict[str, Any]:
    base = {
        "id": f"q-{number}",
        "domain": "math",
        "split": "train",
        "question": f"What is {number} + 0?",
        "context": None,
        "choices": None,
        "answer": str(number),
        "answer_type": "number",
        "solution": "unread",
    }
    return base | changes


def scored(number: int, task: str = "gsm8k", **changes: Any) -> dict[str, Any]:
    base = {"id": f"t-{number}", "task": task, "split": "train", "question": "Why?", "cluster_id": 1}
    return base | {"scores": {"org/Small": 0.5, "large": 1.0}} | changes


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    pack(folder / "domain" / "sums.jsonl.gz", [line(i, split="test" if i % 2 else "train") for i in range(4)])
    intents = [line(i, domain="banking_intent", answer_type="label", answer=a) for i, a in enumerate("bca")]
    pack(folder / "domain" / "intents.jsonl.gz", intents)
    table = [scored(1), scored(2, "mbpp", split="test_id"), scored(3, scores={"org/Small": 1.0})]
    pack(folder / "routing" / "table7.jsonl.gz", table)
    pack(folder / "routing" / "prompts.jsonl.gz", [{"idx": 0}])
    return folder


def load(data: Path, queries: str, fleet: tuple[str, ...] = FLEET, **changes: Any) -> Selection:
    return load_queries(WorkloadSpec(queries=queries, data=str(data), **changes), fleet)


def refused(data: Path, queries: str, fleet: tuple[str, ...] = FLEET, **changes: Any) -> BadInput:
    with pytest.raises(BadInput) as caught:
        load(data, queries, fleet, **changes)
    assert "\n" not in caught.value.message
    return caught.value


# --- domain sets --------------------------------------------------------------------------------------


def test_a_domain_set_becomes_queries(data: Path) -> None:
    found = load(data, "domains:sums")
    assert [query.id for query in found.queries] == ["q-0", "q-1", "q-2", "q-3"]
    first = found.queries[0]
    assert (first.dataset, first.domain, first.prompt) == ("sums", "math", "What is 0 + 0?")
    assert (first.answer, first.answer_type, first.choices, dict(first.known)) == ("0", "number", (), {})
    assert found.notes == ()


def test_splits(data: Path) -> None:
    assert [query.id for query in load(data, "domains:sums", split="test").queries] == ["q-1", "q-3"]
    held_out = {query.id for query in load(data, "domains:sums", split="held-out").queries}
    assert held_out == {row.id for row in part_of(read_set(str(data), "sums"), "test")} >= {"q-1", "q-3"}
    assert "intents: no rows of split test" in refused(data, "domains:sums,intents", split="test").message
    everything = load(data, "domains:all", split="test")
    assert everything.notes == ("without intents: no rows of split test",)


def test_labels_without_choices_are_chosen_among_all_labels_of_the_file(data: Path) -> None:
    for query in load(data, "domains:intents").queries:
        assert query.choices == ("a", "b", "c")
        assert query.domain == "banking"


def test_choices_named_otherwise_are_letters_in_their_order(data: Path) -> None:
    row = line(1, answer_type="choice", choices={"1": "ice", "2": "fire"}, answer="2")
    pack(data / "domain" / "odd.jsonl.gz", [row])
    (query,) = load(data, "domains:odd").queries
    assert (query.answer, query.choices) == ("B", ("ice", "fire"))
    assert query.prompt.endswith("\nA. ice\nB. fire")


def test_several_accepted_spans_are_lines(data: Path) -> None:
    row = line(
        1, answer_type="span", context="Lower is better.", answer=["lower", "lower\ntemperatures", "lower"]
    )
    pack(data / "domain" / "spans.jsonl.gz", [row])
    (query,) = load(data, "domains:spans").queries
    assert query.answer == "lower\nlower temperatures"
    assert query.prompt == "Lower is better.\n\nWhat is 1 + 0?"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (line(1, answer_type="choice", choices={"A": "x"}, answer="B"), "'B' is none of the choices"),
        (line(1, answer_type="poem"), "poem"),
        (line(1, question=None), "$.question"),
    ],
)
def test_faults_of_a_set_are_told_with_file_and_line(data: Path, row: dict[str, Any], reason: str) -> None:
    path = pack(data / "domain" / "bad.jsonl.gz", [line(0), row])
    error = refused(data, "domains:bad")
    assert f"{path}:2: " in error.message
    assert reason in error.message


def test_unknown_names_are_answered_with_those_there_are(data: Path) -> None:
    assert "there are: intents, sums" in refused(data, "domains:gsm9k").message
    assert "there are: table7" in refused(data, "table:table8").message
    assert "the table has: gsm8k, mbpp" in refused(data, "table:table7:poems").message
    for queries in ("", "domains", "domains:", "table:", "questions:sums"):
        assert "domains:NAME" in refused(data, queries).message
    assert "names no set" in refused(data, "domains:,").message


def test_without_data_the_flag_is_named() -> None:
    for queries in ("domains:sums", "domains:all", "table:routerdc7"):
        with pytest.raises(BadInput, match="give --data DIR or set CALM_DATA"):
            load_queries(WorkloadSpec(queries=queries), FLEET)


# --- routing tables -----------------------------------------------------------------------------------


def test_a_table_says_the_quality_of_every_fleet_model(data: Path) -> None:
    found = load(data, "table:table7")
    assert [query.id for query in found.queries] == ["t-1", "t-2"]
    assert {model: known.quality for model, known in found.queries[0].known.items()} == {
        "small": 0.5,
        "large": 1.0,
    }
    assert [query.domain for query in found.queries] == ["math", "code"]
    assert found.notes == ("table7: 1 of 3 queries left out, no score of every model of the fleet",)


def test_tasks_and_splits_of_a_table(data: Path) -> None:
    assert [query.id for query in load(data, "table:table7:mbpp").queries] == ["t-2"]
    assert [query.id for query in load(data, "table:table7", split="test").queries] == ["t-2"]
    assert "no rows of split test" in refused(data, "table:table7:gsm8k", split="test").message


def test_a_fleet_the_table_does_not_know_is_told_both_lists(data: Path) -> None:
    message = refused(data, "table:table7", ("small", "huge")).message
    assert "table: large, org/Small; fleet: small, huge" in message


def test_a_table_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(
        '{"id": "1", "task": "Odd Job", "prompt": "Why?", "scores": {"small": 0, "large": null}}\n'
    )
    found = load(tmp_path, f"table:{path}:Odd Job", ("small",))
    assert (found.queries[0].domain, found.queries[0].known["small"].quality) == ("odd_job", 0.0)
    assert "no row has a score" in refused(tmp_path, f"table:{path}").message


def test_probabilities_count_as_right_when_above_0(data: Path) -> None:
    row = scored(1, score_type="probability", scores={"small": 0.51, "large": 0.0})
    pack(data / "routing" / "p.jsonl.gz", [row])
    known = load(data, "table:p").queries[0].known
    assert (known["small"].quality, known["large"].quality) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("choices", "metric", "ending"),
    [
        (["x", "y"], "em_mc", "Why?\nA. x\nB. y"),
        (str(["x", "y"]), "em_mc", "Why?\nA. x\nB. y"),
        ({"text": ["x", "y"], "label": ["A", "B"]}, "em_mc", "Why?\nA. x\nB. y"),
        (str({"labels": ["A", "B"], "text": ["x", "y"]}), "em_mc", "Why?\nA. x\nB. y"),
        ({"A": "x", "B": "y"}, None, "Why?\nA. x\nB. y"),
        (["assert f(1) == 2"], "code_eval", "Why?"),
        ("((", "em_mc", "Why?"),
        (None, "em_mc", "Why?"),
    ],
)
def test_choices_of_tables_in_all_their_forms(data: Path, choices: object, metric: str, ending: str) -> None:
    pack(data / "routing" / "forms.jsonl.gz", [scored(1, choices=choices, metric=metric)])
    assert load(data, "table:forms").queries[0].prompt == ending


def test_a_prompt_written_as_a_python_list_is_the_string_in_it(data: Path) -> None:
    pack(data / "routing" / "b.jsonl.gz", [scored(1, question=None, prompt=str(["Who's\nthere?"]))])
    assert load(data, "table:b").queries[0].prompt == "Who's\nthere?"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (scored(1, scores={"small": 1.5}), "not 0..1"),
        (scored(1, question=""), "neither question nor prompt"),
        ({"id": "1"}, "task"),
    ],
)
def test_faults_of_a_table_are_told_with_file_and_line(data: Path, row: dict[str, Any], reason: str) -> None:
    path = pack(data / "routing" / "bad.jsonl.gz", [scored(0), row])
    error = refused(data, "table:bad")
    assert f"{path}:2: " in error.message
    assert reason in error.message


def test_names_match_whole_or_after_the_last_slash() -> None:
    theirs = ["meta-llama/Meta-Llama-3-8B", "other/small", "small"]
    assert names_in(["META-llama-3-8b"], theirs) == {"META-llama-3-8b": "meta-llama/Meta-Llama-3-8B"}
    assert names_in(["small", "8b"], theirs) == {"small": "small"}


# --- answers files ------------------------------------------------------------------------------------


def recorded(query: str, model: str, quality: float, **more: Any) -> dict[str, Any]:
    return {"query_id": query, "model": model, "quality": quality, **more}


def test_answers_fill_what_is_known_and_leave_out_the_rest(data: Path) -> None:
    lines = [
        recorded("q-0", "small", 0.0),
        recorded("q-0", "org/large", 1.0, output_tokens=7),
        recorded("q-1", "small", 1.0),
        recorded("q-0", "small", 0.25, answer="0"),
        recorded("q-0", "stranger", 1.0),
    ]
    path = pack(data / "answers.jsonl.gz", lines)
    found = load(data, "domains:sums", answers=str(path))
    (query,) = found.queries
    assert (query.known["small"].quality, query.known["large"].output_tokens) == (0.25, 7)
    assert query.known["large"].model == "large"
    assert found.notes == (
        "answers.jsonl.gz: 3 of 4 queries left out, no answer of every model of the fleet",
    )


def test_answers_override_a_table(data: Path) -> None:
    path = pack(data / "answers.jsonl.gz", [recorded("t-1", "small", 0.75, output_tokens=3)])
    found = load(data, "table:table7:gsm8k", answers=str(path))
    assert {model: known.quality for model, known in found.queries[0].known.items()} == {
        "small": 0.75,
        "large": 1.0,
    }


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (recorded("q-0", "small", 2.0), "quality 2.0 is not 0..1"),
        (recorded("q-0", "small", 1.0, output_tokens=-1), "0 or more"),
        ({"query_id": "q-0"}, "model"),
    ],
)
def test_faults_of_answers_are_told_with_file_and_line(data: Path, row: dict[str, Any], reason: str) -> None:
    path = pack(data / "answers.jsonl.gz", [recorded("q-0", "small", 1.0), row])
    error = refused(data, "domains:sums", answers=str(path))
    assert f"{path}:2: " in error.message
    assert reason in error.message
    assert error.field == "answers"


def test_answers_of_other_models_are_refused_with_both_lists(data: Path) -> None:
    path = pack(data / "answers.jsonl.gz", [recorded("q-0", "small", 1.0)])
    error = refused(data, "domains:sums", answers=str(path))
    assert "file: small; fleet: small, large" in error.message
    assert "missing.jsonl" in refused(data, "domains:sums", answers=str(data / "missing.jsonl")).message


# --- prompts and names of subjects ---------------------------------------------------------------------


def row(**changes: Any) -> Row:
    base: dict[str, Any] = {
        "id": "1",
        "dataset": "d",
        "domain": "d",
        "split": None,
        "question": "Up or down?",
    }
    return Row(**(base | changes))


def test_few_labels_are_listed_and_many_are_not() -> None:
    assert render(row(choices=("up", "down"))) == "Up or down?\nOptions: up, down"
    assert render(row(choices=tuple(map(str, range(21))))) == "Up or down?"


def test_every_part_of_a_prompt_has_its_place() -> None:
    whole = row(context=" Prices. ", choices=("up", "down"), lettered=True)
    assert render(whole) == "Prices.\n\nUp or down?\nA. up\nB. down"


def test_subjects_are_domains_the_analyzer_knows() -> None:
    from calm.analyze.domains import DESCRIPTORS, canonical
    from calm.workloads.rows import _SUBJECTS

    own = {"reading"}
    assert set(_SUBJECTS.values()) - own <= DESCRIPTORS.keys()
    assert all(canonical(name) == name for name in _SUBJECTS.values())
    assert subject("Agentverse-MGSM") == "math"
