"""`calm models field`: a card learns its questions and keeps everything else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from calm.cli.app import calm
from calm.records import FORM
from calm.registry import load_fleet

CARD = """\
# Ours since May.
name = "gardener"
description = "Knows what ails plants."   # as its users would say

[engine]
kind = "openai"
url = "http://127.0.0.1:9/v1"

[priors.quality]
default = 0.1   # elsewhere
"""
ILLS = ("yellow leaves", "brown spots", "white mould", "drooping stems", "holes in its leaves")
ROWS = [
    {"prompt": f"My {plant} has {ill}, which disease is it?", "completion": "rust"}
    for plant in ("tomato", "rose", "basil", "fern", "orchid", "cactus")
    for ill in ILLS
]


@pytest.fixture
def fleet(tmp_path: Path) -> Path:
    folder = tmp_path / "fleet"
    folder.mkdir()
    (folder / "gardener.toml").write_text(CARD)
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return folder


def run(fleet: Path, *words: str) -> tuple[int, str]:
    rows = str(fleet.parent / "rows.jsonl")
    told = CliRunner().invoke(calm, ["models", "field", *words, "--data", rows, "--fleet", str(fleet)])
    return told.exit_code, told.output


def test_a_card_gets_its_field_and_keeps_its_comments(fleet: Path) -> None:
    code, said = run(fleet, "gardener", "--quality", "0.9", "--untrained", "0.05", "--json")
    assert code == 0, said
    (told,) = json.loads(said)
    assert told["field"] == "gardener"
    assert told["captured"] < 0.05
    text = (fleet / "gardener.toml").read_text()
    for line in ("# Ours since May.", "# as its users would say", "# elsewhere"):
        assert line in text
    card = load_fleet(fleet).fleet["gardener"]
    assert card.fields["gardener"].untrained == 0.05
    assert len(card.fields["gardener"].numbers()) == 256 + FORM + 1
    assert card.priors.quality == {"default": 0.1, "gardener": 0.9}


def test_learning_again_replaces_the_field(fleet: Path) -> None:
    assert run(fleet, "gardener", "--untrained", "0.2")[0] == 0
    assert run(fleet, "gardener")[0] == 0
    assert load_fleet(fleet).fleet["gardener"].fields["gardener"].untrained is None


def test_an_unknown_model_is_refused_with_those_there_are(fleet: Path) -> None:
    code, said = run(fleet, "gardner")
    assert code == 1
    assert "there are: gardener" in said


def test_a_field_that_is_none_is_named_with_what_to_do(fleet: Path) -> None:
    (fleet / "gardener.toml").write_text(
        CARD + '\n[fields.plants]\nembedder = "wordllama-256"\nweights = "AAA"\n'
    )
    load = load_fleet(fleet)
    (problem,) = load.problems
    assert problem.field == "fields.plants.weights"
    assert "calm models field gardener" in (problem.hint or "")


def test_an_unknown_key_of_a_field_is_named(fleet: Path) -> None:
    (fleet / "gardener.toml").write_text(
        CARD + '\n[fields.plants]\nembeder = "wordllama-256"\nweights = "AAAAAA=="\n'
    )
    load = load_fleet(fleet)
    assert [problem.field for problem in load.problems][:1] == ["fields.plants.embeder"]
    assert "embedder" in (load.problems[0].hint or "")
