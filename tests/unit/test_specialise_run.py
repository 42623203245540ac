"""The way from rows to a member of the fleet, without the training: what is left out, and what is never half done."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from calm.errors import BadInput
from calm.records import EngineSpec, ModelCard, SourceSpec
from calm.registry import load_fleet
from calm.specialise import run
from calm.specialise.batches import Tokens, spread
from calm.specialise.card import Origin
from calm.specialise.evaluation import Scores
from calm.specialise.examples import Example, Examples, Message
from calm.specialise.recipe import Check, Recipe
from calm.workloads.held_out import Part
from calm.workloads.records import Query

BASE = ModelCard(
    name="base", description="d", context=50, source=SourceSpec(parts=("file:b.gguf",), sha256="0" * 64)
)
SCORES = (
    Scores(dataset="kinds", domain="kinds", rows=2, base=0.0, specialist=0.9, base_s=1.0, specialist_s=1.0),
)


class Quiet:
    def stage(self, what: str, total: int | None = None) -> None: ...

    def advance(self) -> None: ...

    def trained(self, progress: object, steps: int) -> None: ...


class CountingEngine:
    """Reads a row as one token per character."""

    async def tokens(self, rows: Sequence[Example], advance: Callable[[], None]) -> list[Tokens]:
        return [Tokens((1,) * len(row.messages[0].content), (2, 0)) for row in rows]


def example(text: str, part: Part) -> Example:
    query = Query(id=text, dataset="kinds", domain="kinds", prompt=text)
    return Example(where=f"f:{text[:3]}", messages=(Message(role="user", content=text),), answer="x", part=part,
                   query=query)  # fmt: skip


def job(directory: Path, *rows: Example, **recipe: object) -> run.Job:
    origin = Origin(
        name="kinds", base="base", base_licence="MIT", description="Names kinds.", data=("f.jsonl",), data_licence=None,
        limits=None, rows=2, held_out=1, bad=0, command="calm specialise ...",
    )  # fmt: skip
    return run.Job(
        base=BASE, weights=directory / "b.gguf", origin=origin, examples=Examples(rows=rows, bad=()),
        recipe=Recipe(**recipe), directory=directory, state=directory / "state", run_dir=directory, threads=1,
    )  # fmt: skip


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> Callable[[float | Exception], None]:
    """Everything that needs torch or an engine stands in; the argument is the agreement, or why there is none."""
    from types import SimpleNamespace

    @asynccontextmanager
    async def engine(*_: object) -> AsyncIterator[CountingEngine]:
        yield CountingEngine()

    def exported(job: run.Job, model: object, best: object, adapter: Path) -> None:
        adapter.parent.mkdir(parents=True, exist_ok=True)
        adapter.write_bytes(b"new adapter")

    async def asked(*_: object) -> tuple[list[Tokens], tuple[Scores, ...]]:
        return [], SCORES

    progress = SimpleNamespace(best=Check(3, 0.1, 0.9), tokens=10, seconds=1.0)
    monkeypatch.setattr(run, "engine_of", engine)
    monkeypatch.setattr(run, "_model", lambda job: None)
    monkeypatch.setattr(run, "_trained", lambda *_: ({}, progress, 5))
    monkeypatch.setattr(run, "_exported", exported)
    monkeypatch.setattr(run, "_asked", asked)

    def agree(outcome: float | Exception) -> None:
        def agreed(*_: object) -> float:
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        monkeypatch.setattr(run, "_agreed", agreed)

    return agree


ROWS = (
    example("what is tea", "train"),
    example("what is a saw", "train"),
    example("what is ale", "validation"),
)


def test_rows_longer_than_the_context_are_neither_learned_nor_asked(
    tmp_path: Path, untrained: Callable[[float | Exception], None]
) -> None:
    long = [example(f"{part} {'y' * 60}", part) for part in ("train", "validation")]
    read = run._tokenised(job(tmp_path, *ROWS, *long), Quiet())
    assert (len(read.train), len(read.held_out)) == (2, 1)
    assert read.asked == [ROWS[2]]
    assert read.too_long == ("f:tra", "f:val")


def test_what_the_engine_does_not_confirm_leaves_the_specialist_in_force(
    tmp_path: Path, untrained: Callable[[float | Exception], None]
) -> None:
    adapter = tmp_path / "adapters" / "kinds.gguf"
    adapter.parent.mkdir()
    adapter.write_bytes(b"old adapter")
    untrained(run.Disagreement("they differ"))
    with pytest.raises(run.Disagreement):
        run.specialise(job(tmp_path, *ROWS), Quiet())
    assert adapter.read_bytes() == b"old adapter"
    assert not (tmp_path / "kinds.toml").exists()

    untrained(1.0)
    result = run.specialise(job(tmp_path, *ROWS), Quiet())
    assert adapter.read_bytes() == b"new adapter"
    (tmp_path / "base.toml").write_text(
        'name = "base"\ndescription = "d"\n[source]\nparts = ["file:/b.gguf"]\nsha256 = "' + "0" * 64 + '"\n'
    )
    card = load_fleet(tmp_path).fleet["kinds"]
    assert card.source is not None
    assert card.source.sha256 == hashlib.sha256(b"new adapter").hexdigest() == result.made.sha256
    assert (card.source.licence, card.priors.quality) == ("MIT", {"kinds": 0.9, "default": 0.1})
    assert card.chat.answer_tokens == 2 + run.SPARE_TOKENS
    assert not list(tmp_path.glob("state/*"))


def test_answers_nobody_can_judge_claim_no_quality(
    tmp_path: Path, untrained: Callable[[float | Exception], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def unjudged(*_: object) -> tuple[list[Tokens], tuple[Scores, ...]]:
        return [], ()

    untrained(1.0)
    monkeypatch.setattr(run, "_asked", unjudged)
    run.specialise(job(tmp_path, *ROWS), Quiet())
    assert "[priors.quality]" not in (tmp_path / "kinds.toml").read_text()


def test_a_state_is_found_again_for_the_same_rows_and_recipe_only(tmp_path: Path) -> None:
    row, other = Tokens((1,), (2,)), Tokens((1,), (3,))

    def found(train: list[Tokens], held_out: list[Tokens], **recipe: object) -> str:
        return run.fingerprint(job(tmp_path, **recipe), train, held_out)

    same = found([row], [other])
    assert same == found([row], [other])
    assert same not in (found([other], [row]), found([row], [row]), found([row], [other], seed=1))


def test_spread_takes_from_the_whole_file() -> None:
    assert spread(range(10), 20) == list(range(10))
    assert spread(range(10), 3) == [0, 3, 6]


@pytest.mark.parametrize(
    ("card", "reason"),
    [
        (
            ModelCard(name="a", description="", adapter_of="base", source=BASE.source),
            "a is an adapter of base",
        ),
        (ModelCard(name="a", description="", engine=EngineSpec(kind="openai")), "a runs on openai"),
    ],
)
def test_only_models_of_our_own_engine_are_trained_on(card: ModelCard, reason: str) -> None:
    with pytest.raises(BadInput, match=reason) as caught:
        run.check_base(card)
    assert caught.value.field == "base"
