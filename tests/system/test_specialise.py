"""`calm specialise` on real weights and the real engine: what is trained is what is served, on both architectures."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from pathlib import Path

import pytest
from tests.system.conftest import CALM, FLEET, GEMMA, SMOL

torch = pytest.importorskip("torch", reason="calm specialise needs PyTorch: make train-env")

from calm.records import AdapterFile, ModelCard, SourceSpec
from calm.registry import load_fleet
from calm.settings import cache_dir
from calm.sources.fetch import cached_path
from calm.specialise.agreement import agreement
from calm.specialise.batches import Tokens
from calm.specialise.engine import engine_of
from calm.specialise.examples import Example, Message
from calm.specialise.export import write_adapter
from calm.specialise.model import Decoder
from calm.specialise.weights import read_base
from calm.workloads.records import Query

pytestmark = [pytest.mark.models, pytest.mark.timeout(300)]

LABELS = {"drink": "blim", "animal": "zorp", "tool": "quax"}
WORDS = {
    "drink": [
        "tea",
        "coffee",
        "milk",
        "juice",
        "water",
        "cocoa",
        "beer",
        "wine",
        "cider",
        "soda",
        "lemonade",
        "rum",
    ],
    "animal": ["dog", "cat", "horse", "cow", "sheep", "goat", "pig", "duck", "hen", "lion", "tiger", "wolf"],
    "tool": [
        "hammer",
        "saw",
        "drill",
        "wrench",
        "pliers",
        "file",
        "chisel",
        "axe",
        "spade",
        "rake",
        "hoe",
        "knife",
    ],
}


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("fleet")
    shutil.copy(FLEET / f"{SMOL}.toml", directory)
    return directory


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "kinds.jsonl"
    lines = [
        json.dumps({"prompt": f"{form} {word}?", "completion": LABELS[kind]})
        for kind, words in WORDS.items()
        for word in words
        for form in ("What kind of thing is", "Name the kind:")
    ]
    path.write_text("\n".join([*lines, '{"prompt": "no answer"}']) + "\n")
    return path


def specialise(rows: Path, fleet: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [CALM, "specialise", "--base", SMOL, "--data", rows, "--name", "kinds", "--fleet", fleet, "--threads", "1",
         "--description", "Says what kind of thing a word names.", *more],
        capture_output=True, text=True, check=False, timeout=280,
    )  # fmt: skip


def test_rows_become_a_member_of_the_fleet(rows: Path, fleet: Path) -> None:
    done = specialise(
        rows, fleet, "--epochs", "4", "--rows-per-step", "8", "--learning-rate", "3e-3", "--json"
    )
    assert done.returncode == 0, done.stderr
    assert "kinds.jsonl:73: it has prompt; wanted" in done.stderr
    assert "held out" in done.stderr
    told = json.loads(done.stdout)
    assert told["agreement"] >= 0.9
    (scores,) = told["scores"]
    assert scores["base"] == 0.0  # nobody knows these words
    assert scores["specialist"] > 0.3
    assert told["peak_bytes"] < 8e9
    load = load_fleet(fleet)
    assert not load.problems
    card = load.fleet["kinds"]
    assert card.adapter_of == SMOL
    assert card.chat.answer_tokens is not None
    assert 8 < card.chat.answer_tokens < 24  # a made-up word, its end, and some room
    assert card.priors.quality["kinds"] == pytest.approx(scores["specialist"], abs=1e-3)
    assert cached_path(card.source, cache_dir(), fleet) == fleet / "adapters" / "kinds.gguf"
    page = (fleet / "adapters" / "kinds.md").read_text()
    assert "calm specialise --base smollm2-135m --data kinds.jsonl" in page
    assert str(rows.parent) not in page

    again = specialise(rows, fleet)
    assert again.returncode != 0
    assert "exists: choose another --name, or --replace it" in again.stderr
    on_it = subprocess.run(
        [CALM, "specialise", "--base", "kinds", "--data", rows, "--name", "more", "--description", "x",
         "--fleet", fleet],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert "kinds is an adapter of smollm2-135m: name that as --base" in on_it.stderr


QUESTIONS = (
    "Name a fruit that is yellow.",
    "What is the capital of France?",
    "Write a sentence about the sea.",
    "Is iron a metal?",
    "Count to five.",
    "A long story begins. " * 30 + "How does it end?",
)


@pytest.mark.parametrize(("base", "spread"), [(SMOL, 0.3), (GEMMA, 0.06)])
def test_trainer_and_engine_compute_the_same(base: str, spread: float, tmp_path: Path) -> None:
    """A random adapter, so that every factor of it counts, and answers of some length.

    Its spread is such that the base without it would have answered otherwise, and not so large that the answers are
    noise (which rounding alone changes): Gemma's norms amplify what is added.
    """
    card = load_fleet(FLEET).fleet[base]
    assert card.source is not None
    weights = cached_path(card.source, cache_dir(), FLEET)
    assert weights is not None
    shape, tensors = read_base(weights, torch.bfloat16)
    model = Decoder(shape, tensors, 4, 8.0, seed=3)
    generator = torch.Generator().manual_seed(4)
    for pair in model.pairs.values():
        torch.nn.init.normal_(pair.b, std=spread, generator=generator)
    path = tmp_path / "random.gguf"
    write_adapter(
        path, shape.architecture, {k: v.detach() for k, v in model.pairs.state_dict().items()}, 8.0, {}
    )
    adapter = AdapterFile(
        card=ModelCard(
            name="random",
            description="x",
            adapter_of=base,
            source=SourceSpec(parts=("file:x",), sha256="0" * 64),
        ),
        weights=path,
    )
    asked = [
        Example(
            where="", messages=(Message(role="user", content=text),), answer="", part="train",
            query=Query(id="", dataset="", domain="", prompt=text),
        )
        for text in QUESTIONS
    ]  # fmt: skip

    async def answers() -> tuple[list[Tokens], list[Tokens]]:
        async with engine_of(card, weights, 1, tmp_path, [adapter]) as engine:
            own = [await engine.answered(row, 16, specialist="random") for row in asked]
            return own, [await engine.answered(row, 16) for row in asked]

    own, plain = asyncio.run(answers())
    assert own != plain
    share = agreement(model, own, 512)
    assert share is not None
    assert share > 0.85
    without = agreement(model, plain, 512)
    assert without is not None
    assert without < share - 0.1
