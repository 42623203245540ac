"""`calm profile`: what it refuses before it measures, what it keeps when it is stopped. Engines are scripted."""

from __future__ import annotations

import gzip
import hashlib
import os
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result

from calm.backends.fake import FakeBackend, Script
from calm.cli.group import RootGroup
from calm.cli.profile import profile
from calm.profile import Profile, read_profile, write_profile

CALM = RootGroup(name="calm", commands={"profile": profile})
WEIGHTS = b"GGUF and so on"


class Scripted:
    """Stands where the built-in engine does; remembers what was started."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.scripts: dict[str, Script] = {}

    def __call__(self, run_dir: Path) -> FakeBackend:
        script = Script(answer=("word ",) * 30, tpot_s=0.001, ttft_s=0.001, pids=(os.getpid(),))
        backend = FakeBackend(self.scripts, default=script, run_dir=run_dir)
        backend.started = Starts(self.started)
        return backend


class Starts(list[tuple[str, int]]):
    def __init__(self, names: list[str]) -> None:
        self._names = names

    def append(self, start: tuple[str, int]) -> None:
        self._names.append(start[0])


@pytest.fixture(autouse=True)
def engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scripted:
    """A machine where nothing was configured and nobody else works, with scripted engines."""
    for name in ("CALM_CONFIG", "CALM_DATA"):
        monkeypatch.delenv(name, raising=False)
    for variable in ("CALM_CACHE_DIR", "CALM_STATE_DIR", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(variable, str(tmp_path / variable.lower()))
    monkeypatch.chdir(tmp_path)
    scripted = Scripted()
    monkeypatch.setattr("calm.bench.measure.LlamaCppBackend", scripted)
    monkeypatch.setattr("calm.bench.measure.other_load", lambda: 0.0)
    return scripted


@pytest.fixture
def fleet(tmp_path: Path) -> Path:
    directory = tmp_path / "fleet"
    directory.mkdir()
    for name in ("one", "two"):
        write_card(directory, name)
    return directory


def write_card(directory: Path, name: str, extra: str = "") -> None:
    weights = directory.parent / "model.gguf"
    weights.write_bytes(WEIGHTS)
    (directory / f"{name}.toml").write_text(
        f'name = "{name}"\ndescription = "A small model."\n{extra}\n'
        f'[source]\nparts = ["file:{weights}"]\nsha256 = "{hashlib.sha256(WEIGHTS).hexdigest()}"\n'
        "[engine]\nslots = 2\n[priors.quality]\ndefault = 0.5\n"
    )


def run(*arguments: str) -> Result:
    return CliRunner().invoke(CALM, ["profile", "--quick", *arguments])


def refused(result: Result, *words: str) -> None:
    assert result.exit_code == 1, result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    for word in words:
        assert word in errors[0]


# --- refused before anything is measured ------------------------------------------------------------


def test_an_unknown_model_is_answered_with_the_known_ones(fleet: Path) -> None:
    refused(run("--models", "one,three"), "'three'", "one, two")


def test_models_without_weights_are_named_and_the_command_that_fetches_them(fleet: Path) -> None:
    (fleet.parent / "model.gguf").unlink()
    result = run()
    refused(result, "calm models pull")
    assert "one: its weights are not here" in result.stderr


def test_a_fleet_without_cards(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(run("--fleet", str(tmp_path / "empty")), "no model cards", "--fleet")


def test_models_that_only_embed_are_left_out(fleet: Path, engines: Scripted) -> None:
    write_card(fleet, "vectors", 'capabilities = ["embeddings"]')
    refused(run("--models", "vectors"), "no model is left")
    assert engines.started == []


@pytest.mark.parametrize("flags", [("--answers", "a.jsonl"), ("--keep-answers",)])
def test_answers_need_queries(fleet: Path, flags: tuple[str, ...]) -> None:
    result = run(*flags)
    assert result.exit_code == 2
    assert "--queries" in result.stderr


@pytest.mark.parametrize("queries", ["nonsense", "domains:gsm8k"])
def test_queries_that_are_not_there(fleet: Path, engines: Scripted, queries: str) -> None:
    refused(run("--queries", queries))
    assert engines.started == []


def test_a_broken_profile_is_not_overwritten(fleet: Path, tmp_path: Path) -> None:
    (tmp_path / "profile.toml").write_text("[machine]\n")
    refused(run(), "profile.toml")
    assert (tmp_path / "profile.toml").read_text() == "[machine]\n"


def test_a_place_that_cannot_be_written(fleet: Path, engines: Scripted) -> None:
    refused(run("--out", "missing/profile.toml"), "missing/profile.toml", "No such file")
    assert engines.started == []


# --- measured ---------------------------------------------------------------------------------------


def test_the_file_is_what_was_shown(fleet: Path, tmp_path: Path) -> None:
    result = run("--json")
    assert result.exit_code == 0, result.output
    shown = msgspec.json.decode(result.stdout, type=Profile)
    assert read_profile(tmp_path / "profile.toml") == shown
    assert list(shown.models) == ["one", "two"]
    assert shown.machine.meter is not None
    assert any("--quick" in note for note in shown.machine.notes)


def test_a_table_for_people(fleet: Path) -> None:
    result = run("--models", "two")
    assert result.exit_code == 0, result.output
    assert "two" in result.stdout
    assert "100 MB" in result.stdout or "104.9 MB" in result.stdout
    assert "calm replay" in result.stderr


def test_the_same_command_goes_on_with_the_rest(fleet: Path, engines: Scripted) -> None:
    assert run("--models", "one").exit_code == 0
    engines.started.clear()
    result = run("--json")
    assert result.exit_code == 0
    found = msgspec.json.decode(result.stdout, type=Profile)
    assert list(found.models) == ["one", "two"]
    assert engines.started.count("one") == (1 if len(found.machine.contention) > 1 else 0)
    engines.started.clear()
    assert run("--again", "--models", "two").exit_code == 0
    assert "one" not in engines.started
    assert "two" in engines.started
    assert list(read_profile(Path("profile.toml")).models) == ["one", "two"]


def test_a_profile_of_another_machine_is_kept_unless_told(fleet: Path) -> None:
    assert run("--models", "one").exit_code == 0
    path = Path("profile.toml")
    theirs = read_profile(path)
    elsewhere = msgspec.structs.replace(theirs.machine, name="another machine")
    write_profile(msgspec.structs.replace(theirs, machine=elsewhere), path)
    refused(run(), "another machine", "--again", "--out")
    assert run("--again", "--models", "two").exit_code == 0
    assert list(read_profile(path).models) == ["two"]


def test_a_model_that_does_not_load_is_named_and_the_rest_measured(fleet: Path, engines: Scripted) -> None:
    engines.scripts["one"] = Script(refuse="illegal instruction")
    result = run()
    assert result.exit_code == 0
    assert "one" in result.stderr
    assert "illegal instruction" in result.stderr
    assert list(read_profile(Path("profile.toml")).models) == ["two"]
    engines.scripts["two"] = Script(refuse="illegal instruction")
    refused(run("--again"), "no model could be measured", "illegal instruction")


def test_an_interruption_keeps_what_is_measured(fleet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from calm.bench import measure

    real = measure.time_model

    async def stopped(lab: object, card: object) -> object:
        if card.name == "two":  # type: ignore[attr-defined]
            raise KeyboardInterrupt
        return await real(lab, card)  # type: ignore[arg-type]

    monkeypatch.setattr(measure, "time_model", stopped)
    result = run()
    assert result.exit_code == 130
    assert "has one; missing: two" in result.stderr
    kept = read_profile(Path("profile.toml"))
    assert list(kept.models) == ["one"]
    assert "not measured: two" in kept.machine.notes


def test_queries_are_asked_and_judged(fleet: Path, tmp_path: Path) -> None:
    rows = [
        {"id": f"tiny-{n}", "domain": "math", "split": "test", "question": f"{n} + 1?", "context": None,
         "choices": None, "answer": str(n + 1), "answer_type": "number"}
        for n in range(6)
    ]  # fmt: skip
    folder = tmp_path / "data" / "domain"
    folder.mkdir(parents=True)
    (folder / "tiny.jsonl.gz").write_bytes(
        gzip.compress(b"".join(msgspec.json.encode(row) + b"\n" for row in rows))
    )
    flags = ("--queries", "domains:tiny", "--data", "data", "--sample", "4", "--max-tokens", "3")
    result = run(*flags, "--answers", "answers.jsonl", "--json")
    assert result.exit_code == 0, result.output
    found = msgspec.json.decode(result.stdout, type=Profile)
    for model in found.models.values():
        assert model.quality == {"math": 0.0, "default": 0.0}
        assert model.output_tokens["math"].mean == 3
    assert len(Path("answers.jsonl").read_bytes().splitlines()) == 8
    asked = Path("answers.jsonl").read_bytes()
    assert run(*flags, "--answers", "answers.jsonl").exit_code == 0
    assert Path("answers.jsonl").read_bytes() == asked
