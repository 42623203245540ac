"""A workload: even over its datasets, equal for equal seeds, and true to the real data where that lies."""

from __future__ import annotations

import gzip
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm.errors import BadInput
from calm.workloads.judge import judge
from calm.workloads.records import Query, WorkloadSpec
from calm.workloads.workload import draw, open_source

FLEET = ("small", "large")


def queries(sizes: list[int]) -> list[Query]:
    return [
        Query(id=f"{s}-{i}", dataset=str(s), domain=str(s), prompt="?")
        for s, size in enumerate(sizes)
        for i in range(size)
    ]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data" / "domain"
    folder.mkdir(parents=True)
    for name, size in (("sums", 30), ("words", 4)):
        rows = [
            {"id": f"{name}-{i}", "domain": name, "question": "?", "answer": "1", "answer_type": "number"}
            for i in range(size)
        ]
        (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    return tmp_path / "data"


# --- laws -------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(1, 300), st.integers(0, 10**6))
def test_every_dataset_is_asked_equally_often(sizes: list[int], count: int, seed: int) -> None:
    drawn = draw(queries(sizes), count, np.random.default_rng(seed))
    asked = Counter(query.dataset for query in drawn)
    assert len(drawn) == count
    assert max(asked.values()) - min(asked.get(str(s), 0) for s in range(len(sizes))) <= 1


@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(1, 300), st.integers(0, 10**6))
def test_nothing_is_asked_again_before_all_of_its_dataset_was(
    sizes: list[int], count: int, seed: int
) -> None:
    times = Counter(query.id for query in draw(queries(sizes), count, np.random.default_rng(seed)))
    for query in queries(sizes):
        of_its_set = [n for name, n in times.items() if name.startswith(f"{query.dataset}-")]
        assert times[query.id] >= max(of_its_set, default=0) - 1


# --- seeds ------------------------------------------------------------------------------------------


def test_equal_seeds_give_equal_workloads_and_others_others(data: Path) -> None:
    spec = WorkloadSpec(queries="domains:sums,words", data=str(data), requests=40, duration_s=60.0)
    source = open_source(spec, FLEET)
    assert source.workload(3) == source.workload(3) == open_source(spec, FLEET).workload(3)
    assert source.workload(3).arrivals_s != source.workload(4).arrivals_s
    assert source.workload(3).queries != source.workload(4).queries


def test_the_load_changes_the_times_and_not_the_questions(data: Path) -> None:
    slow, fast = (
        open_source(
            WorkloadSpec(queries="domains:all", data=str(data), requests=20, duration_s=duration_s), FLEET
        ).workload(7)
        for duration_s in (60.0, 6.0)
    )
    assert slow.queries == fast.queries
    assert slow.duration_s == 60.0
    assert fast.duration_s == 6.0


def test_a_workload_is_named_by_its_specs_without_paths(data: Path) -> None:
    trace = data / "own.csv"
    trace.write_text("0\n1\n2\n")
    spec = WorkloadSpec(
        arrivals=f"csv:{trace}", queries="domains:sums,words", data=str(data), requests=2, duration_s=1.0
    )
    assert open_source(spec, FLEET).workload(0).name == "csv:own.csv x domains:sums,words"


def test_whatever_is_wrong_is_said_when_the_source_is_opened(data: Path) -> None:
    with pytest.raises(BadInput, match="say how much"):
        open_source(WorkloadSpec(queries="domains:sums", data=str(data)), FLEET)
    with pytest.raises(BadInput, match="no domain set"):
        open_source(WorkloadSpec(queries="domains:none", data=str(data), requests=1, rate_rps=1.0), FLEET)


# --- the real data ----------------------------------------------------------------------------------

REAL = os.environ.get("CALM_DATA", "")
real = pytest.mark.skipif(not REAL, reason="CALM_DATA names no directory of third-party data")


@real
@pytest.mark.parametrize(
    "arrivals", ["worldcup", "azure", "mooncake", "servegen", "servegen:deepseek-r1", "servegen:m-mid"]
)
def test_real_traces_give_the_load_asked_for(arrivals: str) -> None:
    spec = WorkloadSpec(arrivals=arrivals, queries="domains:all", data=REAL, requests=500, duration_s=1200.0)
    source = open_source(spec, FLEET)
    workload = source.workload(0)
    assert (len(workload.arrivals_s), workload.arrivals_s[0], workload.duration_s) == (500, 0.0, 1200.0)
    assert workload != source.workload(1)


@real
def test_real_domain_sets_are_even_and_their_own_answers_are_right() -> None:
    source = open_source(WorkloadSpec(queries="domains:all", data=REAL, requests=600, rate_rps=1.0), FLEET)
    asked = Counter(query.dataset for query in source.workload(0).queries)
    assert set(asked.values()) == {50}
    for query in source.workload(0).queries:
        said = (query.answer or "").split("\n")[0]
        assert judge(query, said) == (None if query.answer_type == "python" else 1.0), query


@real
@pytest.mark.parametrize(
    ("table", "model", "rows"),
    [
        ("routerdc7", "meta-llama-3-8b", 15_343),
        ("llmrouter9", "qwen2.5-7b-instruct", 5_608),
        ("routerbench11_subset", "mistral-7b-chat", 3_150),
    ],
)
def test_real_tables_know_the_quality_of_their_models(table: str, model: str, rows: int) -> None:
    spec = WorkloadSpec(queries=f"table:{table}", data=REAL, requests=100, rate_rps=1.0)
    source = open_source(spec, (model,))
    assert len(source.queries) == rows
    mean = sum(query.known[model].quality for query in source.queries) / rows
    assert 0.2 < mean < 0.8
