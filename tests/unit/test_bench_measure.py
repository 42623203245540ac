"""Measuring scripted engines: what is asked, what comes out, what is kept when something fails."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from calm.backends.fake import FakeBackend, Script
from calm.backends.upstream import HttpUpstream
from calm.bench.measure import Survey, Surveyed
from calm.bench.measure_answers import AnswerBook, Asking, sample, with_answers
from calm.bench.measure_company import factors
from calm.bench.measure_engine import Laboratory, Unwatched, Watch
from calm.bench.measure_plan import QUICK, Effort, company_plan, decode_plan, lanes, prompt_plan
from calm.bench.measure_probe import Answered, send
from calm.bench.measure_texts import WORDS, words
from calm.errors import BadInput, EngineLost, UpstreamRejected
from calm.profile import Length, MachineProfile, ModelProfile, Profile, problems
from calm.records import MeterKind, ModelCard
from calm.workloads.records import Query, Recorded

EFFORT = msgspec.structs.replace(QUICK, idle_s=0.001)
TALK = ("token ",) * 30
MACHINE = MachineProfile(name="a scripted machine", cores=2, notes=("made up",))


class CountingMeter:
    """A joule at every read of a running engine."""

    name = "counting"
    kind: MeterKind = "modelled"

    def __init__(self) -> None:
        self._total_j: dict[str, float] = {}

    def read(self, groups: Mapping[str, Sequence[int]]) -> Mapping[str, float]:
        for name, pids in groups.items():
            if pids:
                self._total_j[name] = self._total_j.get(name, 0.0) + 1.0
        return {name: self._total_j[name] for name in groups if name in self._total_j}


class Counting(Unwatched):
    def __init__(self) -> None:
        self.done_s = 0.0
        self.stages: list[tuple[str, str]] = []

    def stage(self, name: str, what: str) -> None:
        self.stages.append((name, what))

    def advance(self, expected_s: float) -> None:
        self.done_s += expected_s


def card(name: str, **fields: object) -> ModelCard:
    base = {"name": name, "description": "d", "engine": {"slots": 2}, "priors": {"quality": {"default": 0.4}}}
    return msgspec.convert({**base, **fields}, ModelCard)


def script(**fields: object) -> Script:
    return Script(**{"answer": TALK, "tpot_s": 0.001, "pids": (os.getpid(),), "cached_tokens": 3, **fields})  # type: ignore[arg-type]


@asynccontextmanager
async def laboratory(
    tmp_path: Path, backend: FakeBackend, models: Sequence[str], watch: Watch | None = None
) -> AsyncIterator[Laboratory]:
    async with HttpUpstream() as upstream:
        yield Laboratory(
            backends={"llamacpp": backend},
            upstream=upstream,
            meter=CountingMeter(),
            weights=lambda card: None,
            threads=dict.fromkeys(models, 1),
            cores=2,
            effort=EFFORT,
            watch=watch or Unwatched(),
        )


@pytest.fixture
def backend(tmp_path: Path) -> FakeBackend:
    return FakeBackend(default=script(), run_dir=tmp_path)


QUERIES = tuple(
    Query(id=f"q{n}", dataset="set", domain="math", prompt=f"What is {n}?", answer="4", answer_type="number")
    for n in range(5)
)
ASKING = Asking(queries=QUERIES, max_tokens=4, judge=lambda query, text: 1.0 if query.id == "q1" else 0.5)


@pytest.fixture(autouse=True)
def growing_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines that read a token in a millisecond and count four characters as one."""
    real = send

    async def grown(
        upstream: object, endpoint: object, card: ModelCard, prompt: str, *rest: object, **more: object
    ) -> Answered:
        seen = await real(upstream, endpoint, card, prompt, *rest, **more)  # type: ignore[arg-type]
        tokens = 10 + len(prompt) // 4
        return msgspec.structs.replace(seen, prompt_tokens=tokens, prefill_s=(tokens - 3) * 0.001)

    for module in ("measure_engine", "measure_company", "measure_answers"):
        monkeypatch.setattr(f"calm.bench.{module}.send", grown)


async def survey(
    tmp_path: Path, backend: FakeBackend, *names: str, kept: list[Profile] | None = None, **more: object
) -> Surveyed:
    cards = {name: card(name) for name in names}
    watch = more.pop("watch", None)
    async with laboratory(tmp_path, backend, names, watch) as lab:  # type: ignore[arg-type]
        run = Survey(lab, cards, MACHINE, keep=(kept if kept is not None else []).append, **more)  # type: ignore[arg-type]
        if isinstance(watch, Counting):
            watch.expected_s = run.expected_s()  # type: ignore[attr-defined]
        return await run.run()


# --- a whole survey ---------------------------------------------------------------------------------


async def test_every_model_gets_its_figures(tmp_path: Path, backend: FakeBackend) -> None:
    kept: list[Profile] = []
    found = await survey(tmp_path, backend, "a", "b", kept=kept)
    assert not found.problems
    assert list(problems(found.profile)) == []
    for model in found.profile.models.values():
        assert model.prefill_tps == pytest.approx(1000, rel=0.01)
        assert model.template_tokens == pytest.approx(10, abs=0.5)
        assert model.tokens_per_char == pytest.approx(0.25, rel=0.02)
        assert model.cached_tokens == 3
        assert model.memory_bytes == 100 << 20
        assert set(model.decode_tps) == {"1", "2"}
        assert model.load_j == 1.0
        assert model.active_w > 0
        assert model.quality == {"default": 0.4}
        assert model.output_tokens["default"].mean == EFFORT.max_tokens
    assert len(found.profile.machine.contention) == 2
    assert [list(profile.models) for profile in kept] == [["a"], ["a", "b"], ["a", "b"]]
    assert not backend.running


async def test_the_bar_ends_where_it_was_expected_to(tmp_path: Path, backend: FakeBackend) -> None:
    watch = Counting()
    await survey(tmp_path, backend, "a", "b", watch=watch, asking=ASKING)
    assert watch.done_s == pytest.approx(watch.expected_s)  # type: ignore[attr-defined]
    assert [what for name, what in watch.stages if name == "a"] == [
        "load", "prompts", "decode", "questions", "queries",
    ]  # fmt: skip


async def test_a_model_that_fails_is_named_and_left_out(tmp_path: Path, backend: FakeBackend) -> None:
    backend.scripts["bad"] = script(refuse="no such instruction")
    backend.scripts["dies"] = script(die_after=0)
    found = await survey(tmp_path, backend, "a", "bad", "dies")
    assert list(found.profile.models) == ["a"]
    assert "no such instruction" in found.problems["bad"]
    assert set(found.problems) == {"bad", "dies"}
    assert any("bad: " in note for note in found.profile.machine.notes)
    assert not backend.running


async def test_none_left_is_an_error(tmp_path: Path, backend: FakeBackend) -> None:
    backend.scripts["bad"] = script(refuse="no such instruction")
    with pytest.raises(BadInput, match=r"bad: .*no such instruction"):
        await survey(tmp_path, backend, "bad")


async def test_what_is_in_the_profile_is_not_measured_again(tmp_path: Path, backend: FakeBackend) -> None:
    first = await survey(tmp_path, backend, "a", "b")
    before = msgspec.structs.replace(first.profile, models={"a": first.profile.models["a"]})
    backend.started.clear()
    second = await survey(tmp_path, backend, "a", "b", before=before)
    assert second.profile.models["a"] == first.profile.models["a"]
    loads_of_a = [name for name, _ in backend.started].count("a")
    assert loads_of_a == 1, "only to see how it slows b down"
    backend.started.clear()
    machine = msgspec.structs.replace(MACHINE, contention=(1.0, 1.2))
    async with laboratory(tmp_path, backend, ("a", "b")) as lab:
        cards = {name: card(name) for name in ("a", "b")}
        third = await Survey(lab, cards, machine, before=first.profile).run()
    assert backend.started == []
    assert third.profile.machine.contention == (1.0, 1.2)


# --- answers ----------------------------------------------------------------------------------------


async def test_answers_give_lengths_and_quality_by_domain(tmp_path: Path, backend: FakeBackend) -> None:
    book = AnswerBook(tmp_path / "answers.jsonl")
    found = await survey(tmp_path, backend, "a", asking=ASKING, book=book)
    model = found.profile.models["a"]
    assert model.quality == {"math": 0.6, "default": 0.6}
    assert model.output_tokens["math"].mean == 4
    lines = (tmp_path / "answers.jsonl").read_bytes().splitlines()
    rows = [msgspec.json.decode(line, type=Recorded) for line in lines]
    assert {row.query_id for row in rows} == {query.id for query in QUERIES}
    assert all(row.answer is None for row in rows)


async def test_a_continued_file_is_not_asked_again(tmp_path: Path, backend: FakeBackend) -> None:
    path = tmp_path / "answers.jsonl"
    done = [
        Recorded(query_id=query.id, model="a", quality=1.0, prompt_tokens=12, output_tokens=9)
        for query in QUERIES[:4]
    ]
    path.write_bytes(b"".join(msgspec.json.encode(row) + b"\n" for row in done) + b'{"query_id": "q4", "mo')
    asking = replace(ASKING, keep_answers=True)
    found = await survey(tmp_path, backend, "a", asking=asking, book=AnswerBook(path))
    assert found.profile.models["a"].quality["math"] == pytest.approx(0.9)
    rows = [msgspec.json.decode(line, type=Recorded) for line in path.read_bytes().splitlines()]
    assert [row.query_id for row in rows] == ["q0", "q1", "q2", "q3", "q4"]
    assert rows[-1].answer == "token " * 4


async def test_what_cannot_be_judged_is_counted_not_recorded(tmp_path: Path, backend: FakeBackend) -> None:
    asking = replace(ASKING, judge=lambda query, text: None)
    found = await survey(tmp_path, backend, "a", asking=asking)
    assert found.profile.models["a"].quality == {"default": 0.4}
    assert "a: 5 queries without a judged answer" in found.profile.machine.notes


def test_a_broken_answers_file_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    row = Recorded(query_id="q", model="a", quality=1.0)
    path.write_bytes(msgspec.json.encode(row) + b"\nnonsense\n")
    with pytest.raises(BadInput, match=r"answers\.jsonl:2: "):
        AnswerBook(path)
    path.write_bytes(b"")
    assert AnswerBook(path).rows == {}


def test_a_sample_is_even_over_datasets_and_always_the_same() -> None:
    queries = [
        Query(id=f"{name}{n}", dataset=name, domain=name, prompt="?")
        for name, size in (("small", 3), ("large", 50))
        for n in range(size)
    ]
    found = sample(queries, 10)
    assert found == sample(queries, 10)
    assert len({query.id for query in found}) == len(found) == 13
    assert sum(query.dataset == "large" for query in found) == 10


def test_answers_that_were_not_counted_change_no_length() -> None:
    row = Recorded(query_id="q0", model="a", quality=0.25)
    profile = with_answers(some_profile(), [(QUERIES[0], row)])
    assert profile.output_tokens == some_profile().output_tokens
    assert profile.quality == {"math": 0.25, "default": 0.25}
    assert profile.tokens_per_char == some_profile().tokens_per_char


def some_profile() -> ModelProfile:
    return ModelProfile(
        memory_bytes=1, load_s=1, prefill_tps=10, decode_tps={"1": 5}, active_w=1,
        output_tokens={"default": Length(mean=7)},
    )  # fmt: skip


# --- one request ------------------------------------------------------------------------------------


async def test_requests_go_out_as_dispatch_sends_them(tmp_path: Path, backend: FakeBackend) -> None:
    stopping = card("a", chat={"stop": ["###"], "trim": True, "answer_tokens": 5})
    backend.scripts["a"] = script(answer=(" one", " two"))
    engine = await backend.start(stopping, None, 1)
    try:
        async with HttpUpstream() as upstream:
            answer = await send(upstream, engine.endpoint, stopping, "Count.", 8)
            await send(upstream, engine.endpoint, stopping, "Count.", 8, endless=True)
    finally:
        await engine.stop()
    assert answer.text == "one two"
    assert (answer.output_tokens, answer.prompt_tokens, answer.read_tokens) == (2, 7, 4)
    assert engine.server is not None
    plain, endless = (seen.body for seen in engine.server.seen)
    assert plain["stop"] == ["###"]
    assert (plain["max_tokens"], endless["max_tokens"]) == (5, 8)
    assert plain["stream"] is True
    assert plain["temperature"] == 0
    assert "ignore_eos" not in plain
    assert endless["ignore_eos"] is True
    assert "stop" not in endless


@pytest.mark.parametrize(("status", "error"), [(400, UpstreamRejected), (503, EngineLost)])
async def test_refusals(tmp_path: Path, backend: FakeBackend, status: int, error: type[Exception]) -> None:
    backend.scripts["a"] = script(error_status=status)
    engine = await backend.start(card("a"), None, 1)
    try:
        async with HttpUpstream() as upstream:
            with pytest.raises(error, match="scripted failure"):
                await send(upstream, engine.endpoint, card("a"), "Count.", 8)
    finally:
        await engine.stop()


# --- plans ------------------------------------------------------------------------------------------


def test_prompts_fit_the_context_and_are_all_different() -> None:
    plan = prompt_plan(card("a", context=300), Effort())
    assert max(length for length, _ in plan) == 150
    texts = [words(*step) for step in plan]
    assert len(set(texts)) == len(texts)
    assert all(len(text.split()) == length for text, (length, _) in zip(texts, plan, strict=True))
    assert len(WORDS) == len(set(WORDS))


def test_every_number_of_sequences_is_tried() -> None:
    four = card("a", engine={"slots": 4})
    assert decode_plan(four, Effort(decode_rounds=1)) == (1, 2, 3, 4)
    assert decode_plan(four, QUICK) == (1, 4)
    assert decode_plan(card("a", engine={"slots": 1}), QUICK) == (1,)


def test_only_engines_whose_threads_fit_work_at_once() -> None:
    cards = {name: card(name) for name in "abc"}
    assert len(company_plan(cards, dict.fromkeys("abc", 1), 2, Effort())) == 3
    assert company_plan(cards, dict.fromkeys("abc", 2), 2, Effort()) == ()
    three = company_plan(cards, dict.fromkeys("abc", 1), 3, Effort())
    assert three[-1] == ("a", "b", "c")
    away = card("d", engine={"kind": "openai", "url": "https://d.example"})
    assert company_plan({"a": cards["a"], "d": away}, {"a": 1, "d": 0}, 2, Effort()) == ()


def test_contention_never_falls_with_company() -> None:
    assert factors({2: [0.9, 1.3, 1.2], 3: [1.1]}) == (1.0, 1.2, 1.2)
    assert factors({3: [2.0]}) == (1.0,)


def test_models_are_asked_side_by_side_where_threads_and_memory_allow() -> None:
    assert lanes([1, 1, 1], [10, 10, 10], 2, 100) == 2
    assert lanes([2, 2], [10, 10], 2, 100) == 1
    assert lanes([1, 1, 1], [60, 60, 10], 2, 100) == 1
    assert lanes([], [], 2, 0) == 1


# --- adapters ---------------------------------------------------------------------------------------


async def test_a_specialist_is_measured_on_its_bases_engine(tmp_path: Path, backend: FakeBackend) -> None:
    """Its figures are its own; its memory and its load are what it adds to its base."""
    finance = card("finance", adapter_of="a", memory_hint_bytes=9_000_000)
    cards = {"a": card("a"), "finance": finance}
    async with laboratory(tmp_path, backend, ["a"]) as lab:
        lab = dataclasses.replace(lab, bases={"a": cards["a"]})
        found = (await Survey(lab, cards, MACHINE, asking=ASKING).run()).profile.models
    assert {name for name, _ in backend.started} == {"a"}
    assert ("finance",) in backend.given
    assert found["finance"].memory_bytes == 9_000_000
    assert (found["finance"].load_s, found["finance"].load_j) == (0.0, 0.0)
    assert found["a"].load_s > 0
    assert found["finance"].prefill_tps == pytest.approx(1000, rel=0.01)
    assert found["finance"].quality["math"] == pytest.approx(0.6)


async def test_a_specialist_of_another_shape_is_named_and_left_out(
    tmp_path: Path, backend: FakeBackend
) -> None:
    backend.scripts["odd"] = script(refuse="its rank is odd")
    cards = {"a": card("a"), "odd": card("odd", adapter_of="a")}
    async with laboratory(tmp_path, backend, ["a"]) as lab:
        lab = dataclasses.replace(lab, bases={"a": cards["a"]})
        found = await Survey(lab, cards, MACHINE).run()
    assert list(found.profile.models) == ["a"]
    assert found.problems == {"odd": "odd cannot run on a: its rank is odd"}
