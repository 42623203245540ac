"""The benchmarks of specialists: what is asked, of whom, in which order, what counts again, and the figures."""

from __future__ import annotations

import argparse
import asyncio
import gzip
import json
import sys
from collections.abc import Mapping
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from calm.backends.fake import FakeBackend, Script
from calm.backends.upstream import HttpUpstream
from calm.bench.measure_answers import AnswerBook
from calm.bench.measure_engine import Laboratory, Unwatched
from calm.bench.measure_plan import Effort
from calm.bench.measure_probe import Answered
from calm.errors import BadInput, LoadFailed
from calm.meters.absent import AbsentMeter
from calm.records import AdapterFile, ModelCard, SourceSpec
from calm.registry.adapters import join
from calm.workloads.answers import read_answers
from calm.workloads.records import Query

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import real_engine, specialists  # noqa: E402
from benchmarks.real_engine import Adding, Reply, Stock  # noqa: E402
from benchmarks.specialists import Ledger, Line, Measured, Turn  # noqa: E402

BASE, OTHER = "smol", "tinyllama-1.1b"


def card(name: str, **fields: object) -> ModelCard:
    return ModelCard(name=name, description=name, **fields)  # type: ignore[arg-type]


def source(digest: str) -> SourceSpec:
    return SourceSpec(parts=("file:/w.gguf",), sha256=digest * 64)


def models() -> dict[str, ModelCard]:
    cards = [
        card(BASE, source=source("a")),
        card("finance", adapter_of=BASE, source=source("b")),
        card("sql-smol", adapter_of=BASE, source=source("c")),
        card(OTHER, source=source("d")),
    ]
    joined, _ = join(cards)
    return {one.name: one for one in joined}


def at_hand() -> Stock:
    return Stock(models(), Path(), {name: Path("/w.gguf") for name in models()})


def question(number: int, dataset: str = "headlines_finance", answer: str = "up") -> Query:
    return Query(
        id=f"{dataset}-{number}", dataset=dataset, domain="finance", prompt=f"Gold {number}?", answer=answer,
        answer_type="label", choices=("up", "down"),
    )  # fmt: skip


def queries(count: int = 6) -> dict[str, tuple[Query, ...]]:
    return {
        name: tuple(question(n, name) for n in range(count)) for name in ("headlines_finance", "spider_dev")
    }


def data_directory(tmp_path: Path, rows: list[dict[str, object]], name: str = "headlines_finance") -> str:
    (tmp_path / "domain").mkdir(exist_ok=True)
    with gzip.open(tmp_path / "domain" / f"{name}.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return str(tmp_path)


def headline(number: int, answer: str = "up", split: str = "test") -> dict[str, object]:
    return {
        "id": f"h{number}", "domain": "finance", "split": split, "question": f"Gold {number}", "context": None,
        "choices": ["up", "down"], "answer": answer, "answer_type": "label",
    }  # fmt: skip


def answered(text: str = "up", seconds: float = 0.5, tokens: int = 2) -> Answered:
    return Answered(
        prompt_chars=7, prompt_tokens=30, cached_tokens=0, prefill_s=0.3, sent_s=1.0,
        tokens_s=tuple(1.0 + seconds * (n + 1) / tokens for n in range(tokens)), ended_s=1.0 + seconds, text=text,
    )  # fmt: skip


# --- what is asked ----------------------------------------------------------------------------------


def test_a_specialist_is_asked_its_own_sets_and_everybody_else_all() -> None:
    cards, sets = models(), list(specialists.SETS)
    assert specialists.sets_for(cards["finance"], sets, False) == ("headlines_finance",)
    assert specialists.sets_for(cards["sql-smol"], sets, False) == ("spider_dev",)  # a suffix names the base
    assert specialists.sets_for(cards[BASE], sets, False) == tuple(sets)
    assert specialists.sets_for(cards["finance"], sets, True) == tuple(sets)


def test_every_model_answers_a_block_before_the_next_begins_in_changing_order() -> None:
    asked = dict.fromkeys((BASE, "finance", OTHER), ("headlines_finance",))
    turns = specialists.plan(asked, {"headlines_finance": queries(12)["headlines_finance"]}, block=4, seed=3)
    assert len(turns) == 36
    rounds = [turns[at : at + 12] for at in range(0, 36, 12)]
    for part in rounds:
        assert len({turn.query.id for turn in part}) == 4
        assert {turn.model for turn in part} == set(asked)
    orders = {tuple(dict.fromkeys(turn.model for turn in part)) for part in rounds}
    assert len(orders) > 1
    assert turns == specialists.plan(
        asked, {"headlines_finance": queries(12)["headlines_finance"]}, block=4, seed=3
    )


def test_the_same_rows_are_drawn_whatever_their_order_and_more_rows_are_more_of_them(tmp_path: Path) -> None:
    rows = [headline(n) for n in range(30)]
    data = data_directory(tmp_path, rows)
    first = specialists.chosen_rows(data, "headlines_finance", 5, seed=1)
    more = specialists.chosen_rows(data, "headlines_finance", 9, seed=1)
    assert more[:5] == first
    other = data_directory(tmp_path / "b", rows[::-1]) if (tmp_path / "b").mkdir() is None else ""
    assert [row.id for row in specialists.chosen_rows(other, "headlines_finance", 5, seed=1)] == [
        row.id for row in first
    ]


def test_train_rows_are_never_asked_and_sets_without_a_test_part_are_refused(tmp_path: Path) -> None:
    data = data_directory(tmp_path, [headline(n, split="train") for n in range(3)], "mine")
    with pytest.raises(BadInput, match="no test part"):
        specialists.chosen_rows(data, "mine", None, seed=0)


def test_the_majority_answer_is_that_of_the_rows_trained_on(tmp_path: Path) -> None:
    train = [headline(n, "down", "train") for n in range(40)]
    data = data_directory(tmp_path, [*train, *(headline(n + 100, "up", "test") for n in range(90))], "mine")
    assert specialists.majority(data, "mine") == "down"


# --- what is kept -----------------------------------------------------------------------------------


def ledger(path: Path, weights: Mapping[str, str] | None = None, threads: int = 1) -> Ledger:
    return Ledger(path, weights or {"finance": "b+a"}, {"finance": threads})


def test_answers_are_on_disk_at_once_and_are_not_asked_again(tmp_path: Path) -> None:
    path = tmp_path / "out" / "answers.jsonl"
    turns = [Turn("finance", question(n)) for n in range(3)]
    first = ledger(path)
    first.add(turns[0], 1.0, Reply(answered(), 2.5))
    path.write_bytes(path.read_bytes() + b'{"query_id": "torn')
    again = ledger(path)
    assert again.todo(turns) == turns[1:]
    kept = again.of("finance", [turn.query for turn in turns])
    assert kept[0].energy_j == 2.5
    assert kept[0].latency_s == pytest.approx(0.5)
    assert kept[0].output_tokens == 2
    assert read_answers(path, ["finance"])["headlines_finance-0"]["finance"].quality == 1.0


@pytest.mark.parametrize(("weights", "threads"), [("new+a", 1), ("b+new", 1), ("b+a", 2)])
def test_answers_of_other_weights_or_threads_do_not_count(tmp_path: Path, weights: str, threads: int) -> None:
    path = tmp_path / "answers.jsonl"
    turn = Turn("finance", question(0))
    ledger(path).add(turn, 1.0, Reply(answered(), None))
    assert ledger(path, {"finance": weights}, threads).todo([turn]) == [turn]


def test_a_refused_prompt_is_a_wrong_answer_without_figures(tmp_path: Path) -> None:
    kept = ledger(tmp_path / "a.jsonl")
    kept.add(Turn("finance", question(0)), 0.0, None, "too long")
    row = kept.rows["finance", "headlines_finance-0"]
    assert (row.quality, row.latency_s, row.energy_j, row.error) == (0.0, None, None, "too long")


def test_the_digest_tells_retrained_adapters_other_bases_and_other_templates_apart() -> None:
    told = at_hand()
    assert told.digest(told.cards["finance"]) != told.digest(told.cards["sql-smol"])
    own = told.digest(told.cards[BASE])
    assert told.digest(told.cards["finance"]) == f"{'b' * 12}+{own}"
    chat = replace(told.cards[BASE], chat=replace(told.cards[BASE].chat, template="{{ messages }}"))
    assert told.digest(chat) != own


# --- the figures ------------------------------------------------------------------------------------


def measured(at: int, quality: float, seconds: float, joules: float) -> Measured:
    return Measured(
        query_id=str(at), model="m", quality=quality, dataset="d", weights="w", threads=1, max_tokens=8,
        latency_s=seconds, energy_j=joules, prompt_tokens=30, output_tokens=2,
    )  # fmt: skip


def test_a_line_compares_with_the_reference_row_by_row() -> None:
    theirs = {at: measured(at, 0.0, 4.0 + at, 8.0) for at in range(5)}
    own = {at: measured(at, 1.0, (4.0 + at) / 8, 1.0) for at in range(4)}
    found = specialists.line("d", "finance", own, theirs)
    assert found.rows == 4
    assert found.latency_ratio is not None
    assert found.latency_ratio.value == pytest.approx(1 / 8)
    assert found.energy_ratio is not None
    assert found.energy_ratio.value == pytest.approx(1 / 8)
    assert found.quality_gain is not None
    assert (found.quality_gain.value, found.quality_gain.n) == (1.0, 4)
    assert specialists.line("d", OTHER, theirs, theirs).latency_ratio is None


def test_a_specialist_meets_the_goal_only_with_both_ratios() -> None:
    theirs = {at: measured(at, 0.0, 8.0, 8.0) for at in range(3)}
    quick = specialists.line("d", "m", {at: measured(at, 1.0, 1.0, 1.0) for at in range(3)}, theirs)
    thirsty = specialists.line("d", "m", {at: measured(at, 1.0, 1.0, 4.0) for at in range(3)}, theirs)
    assert specialists.versus(quick)[-1] == "yes"
    assert specialists.versus(thirsty)[-1] == "no"


def test_the_report_names_the_goal_refusals_and_what_a_reader_must_know() -> None:
    theirs = {at: measured(at, 0.0, 8.0, 8.0) for at in range(3)}
    own = specialists.line("svamp", "math", {0: measured(0, 1.0, 1.0, 1.0)}, theirs)
    rows: list[Line] = [replace(own, refused=2), specialists.line("svamp", OTHER, theirs, theirs)]
    text = specialists.report(rows, ["math"], OTHER, {"math": 1})
    assert "both under 0.25" in text
    assert "math on svamp: 2" in text
    assert specialists.REMARKS["svamp"] in text


def test_always_giving_one_answer_has_a_quality_and_no_latency() -> None:
    rows = [question(0, answer="up"), question(1, answer="down")]
    found = specialists.majority_line("headlines_finance", "up", rows, {})
    assert found.quality is not None
    assert found.quality.value == 0.5
    assert found.latency_s is None


# --- on an engine that is none ----------------------------------------------------------------------


def laboratory(backend: FakeBackend, upstream: HttpUpstream, cards: Mapping[str, ModelCard]) -> Laboratory:
    return Laboratory(
        backends={"llamacpp": backend}, upstream=upstream, meter=AbsentMeter(), weights=lambda _: Path("/w.gguf"),
        threads=dict.fromkeys(cards, 1), cores=1, effort=Effort(), watch=Unwatched(),
    )  # fmt: skip


async def test_specialists_answer_on_one_engine_and_every_turn_is_kept(tmp_path: Path) -> None:
    cards = {name: one for name, one in models().items() if name != OTHER}
    backend = FakeBackend({BASE: Script(answer=("down",)), "finance": Script(answer=("up",))})
    turns = [Turn(name, question(n)) for name in (BASE, "finance") for n in range(2)]
    async with HttpUpstream() as upstream:
        lab = laboratory(backend, upstream, cards)
        async with real_engine.resident(lab, cards, cards) as ready:
            assert backend.started == [(BASE, 1)]
            kept = Ledger(tmp_path / "a.jsonl", dict.fromkeys(cards, "w"), dict.fromkeys(cards, 1))
            await specialists.go(lab, ready, turns, kept)
    assert {(row.model, row.quality) for row in kept.rows.values()} == {(BASE, 0.0), ("finance", 1.0)}
    assert kept.todo(turns) == []
    assert len(AnswerBook(tmp_path / "a.jsonl").rows) == 4
    assert not backend.running


async def test_an_adapter_that_the_engine_refuses_ends_the_benchmark_and_leaves_no_engine() -> None:
    cards = models()
    backend = FakeBackend({"finance": Script(refuse="another shape")})
    async with HttpUpstream() as upstream:
        with pytest.raises(LoadFailed, match="finance: another shape"):
            await real_engine.start(laboratory(backend, upstream, cards), cards[BASE], [cards["finance"]])
    assert not backend.running


async def test_nothing_read_for_one_question_is_used_for_the_next() -> None:
    backend = FakeBackend()
    async with HttpUpstream() as upstream:
        adding = Adding(upstream, real_engine.UNCACHED)
        engine = await backend.start(
            models()[BASE], None, 1, [AdapterFile(card=models()["finance"], weights=None)]
        )
        endpoint = engine.adapters()["finance"]
        async with adding.post(endpoint, "/v1/chat/completions", b'{"messages": [], "lora": [1]}') as reply:
            await reply.read()
        assert engine.server is not None
        body = engine.server.seen[-1].body
        await engine.stop()
    told = msgspec.json.decode(body) if isinstance(body, bytes) else body
    assert (told["cache_prompt"], told["lora"]) == (False, [1])


# --- cards by hand ----------------------------------------------------------------------------------


def test_adapters_are_named_with_their_base_and_file(tmp_path: Path) -> None:
    file = tmp_path / "finance.gguf"
    file.write_bytes(b"GGUF")
    found, path = real_engine.adapter_card(f"finance@smollm2-135m={file}")
    assert (found.name, found.adapter_of, path) == ("finance", "smollm2-135m", file)
    for wrong in ("finance", "finance=x.gguf", f"@smollm2-135m={file}"):
        with pytest.raises(BadInput, match="NAME@BASE=FILE"):
            real_engine.adapter_card(wrong)
    with pytest.raises(BadInput, match="no such file"):
        real_engine.adapter_card("a@b=/nowhere.gguf")


def test_an_unknown_model_is_named_with_those_there_are() -> None:
    with pytest.raises(BadInput, match=r"no model 'gpt'.*there are: smol, finance"):
        at_hand().chosen(["gpt"])


def test_the_command_takes_adapters_one_by_one_or_together() -> None:
    options = specialists.parse(["--data", "d", "--adapters", "a@b=c", "d@e=f", "--adapter", "g@h=i"])
    assert isinstance(options, argparse.Namespace)
    assert options.adapters == ["a@b=c", "d@e=f", "g@h=i"]
    assert asyncio.iscoroutinefunction(specialists.measure)
