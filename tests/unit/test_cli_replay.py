"""`calm replay`: refusals, what is kept and resumed, and what it prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from calm.cli.group import INTERRUPTED, RootGroup
from calm.cli.replay import replay
from calm.cli.studies import named
from calm.replay.house import run_trial
from calm.report.records import Trial

RUN_TRIAL = "calm.replay.study.run_trial"
CLI = RootGroup(commands={"replay": replay})
CARD = """
name = "{name}"
description = "{name} things"
engine = {{ kind = "command", cmd = "serve --port {{port}}" }}
"""
PROFILE = """
[machine]
name = "made up"
cores = 2
"""
MODEL = """
[models.{name}]
memory_bytes = {bytes}
load_s = 1.0
prefill_tps = 200.0
decode_tps = {{ "1" = 20.0 }}
active_w = 20.0
output_tokens = {{ default = {{ mean = 20.0 }} }}
quality = {{ default = 0.5 }}
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a fleet of two, its profile and a table of queries, and nothing of the user's own.

    Plots take seconds and have tests of their own: a file says that they were to be drawn.
    """
    monkeypatch.setattr("calm.cli.report.draw", lambda _, directory: (directory / "drawn").touch())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("CALM_DATA", raising=False)
    (tmp_path / "fleet").mkdir()
    for name in ("small", "large"):
        (tmp_path / "fleet" / f"{name}.toml").write_text(CARD.format(name=name), encoding="utf-8")
    (tmp_path / "profile.toml").write_text(
        PROFILE
        + MODEL.format(name="small", bytes=1_000_000_000)
        + MODEL.format(name="large", bytes=2_000_000_000),
        encoding="utf-8",
    )
    lines = (
        {
            "id": f"q{i}",
            "task": "math",
            "question": f"What is {i} and {i}?",
            "scores": {"small": 0, "large": 1},
        }
        for i in range(10)
    )
    (tmp_path / "table.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    return tmp_path


BASE = {
    "--fleet": "fleet",
    "--profile": "profile.toml",
    "--queries": "table:table.jsonl",
    "--requests": "8",
    "--duration": "40",
    "--seeds": "1",
    "--jobs": "1",
}


def run(*more: str, **changed: str | None) -> Result:
    """`changed` replaces flags of BASE; None leaves one out."""
    flags = {**BASE, **{f"--{name}": value for name, value in changed.items()}}
    words = [word for flag, value in flags.items() if value is not None for word in (flag, value)]
    return CliRunner().invoke(CLI, ["replay", *words, *more])


def kept(directory: Path) -> list[str]:
    return sorted(path.name for path in (directory / "trials").glob("*.json"))


# --- refusals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "more", "said"),
    [
        ({}, ("--policy", "nope"), "no policy 'nope'"),
        ({}, ("--policy", "fixed:nope"), "no such model; known: large, small"),
        ({}, ("--cache", "mru"), "eviction 'mru' is not known"),
        ({}, ("--goal", "nope"), "nope"),
        ({}, ("--budget", "1GB"), "cannot hold large (2.00 GB)"),
        ({}, ("--budget", "much"), '"much" is no size'),
        ({}, ("--arrivals", "csv:none.csv"), "none.csv: No such file"),
        ({}, ("--arrivals", "worldcup"), "--data"),
        ({}, ("--arrivals", "nope"), '"nope" is no arrival process'),
        ({}, ("--rate", "2"), "give two of --requests, --duration and --rate"),
        ({}, ("--answers", "none.jsonl"), "none.jsonl: No such file"),
        ({"requests": None}, (), "poisson arrivals need two of"),
        ({"duration": "0.001"}, (), "times what the fastest models together can serve at best"),
        ({"duration": None}, ("--rate", "1e9"), "lower --rate"),
        ({"profile": "none.toml"}, (), "none.toml: No such file or directory; `calm profile` measures one"),
        ({"fleet": "none"}, (), "cannot read the fleet directory"),
        ({"queries": "table:none.jsonl"}, (), "none.jsonl: No such file"),
        ({"queries": "nope"}, (), '"nope" is no query source'),
        ({"queries": "domains:gsm8k"}, (), "--data"),
    ],
)
def test_bad_input_is_one_clear_line_before_anything_runs(
    place: Path, changed: dict[str, str | None], more: tuple[str, ...], said: str
) -> None:
    done = run("--out", "study", *more, **changed)
    assert done.exit_code == 1, done.output
    assert done.stdout == ""
    assert said in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert not (place / "study").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("[models.large]", "[models.other]"), "the profile has no large (it has other, small)"),
        (("load_s = 1.0", 'load_s = "x"'), "models.small: Expected `float`, got `str`"),
        (("load_s = 1.0", "load_z = 1.0"), "models.small: "),
        (("[machine]", "[machine"), "profile.toml: "),
        (("cores = 2", "cores = 0"), "machine.cores: must be at least 1"),
        (("active_w = 20.0", "active_w = -1.0"), "models.small.active_w: must be 0 or more"),
    ],
)
def test_a_bad_profile_is_refused_with_the_place(place: Path, change: tuple[str, str], said: str) -> None:
    path = place / "profile.toml"
    path.write_text(path.read_text(encoding="utf-8").replace(*change), encoding="utf-8")
    done = run()
    assert done.exit_code == 1
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_malformed_trace_is_refused_with_its_line(place: Path) -> None:
    (place / "back.csv").write_text("t_s\n0\n5\n3\n", encoding="utf-8")
    done = run("--arrivals", "csv:back.csv")
    assert done.exit_code == 1
    assert "back.csv:4: " in done.stderr


def test_overload_can_be_insisted_on(place: Path) -> None:
    assert run("--overload", duration="0.001").exit_code == 0


def test_one_request_is_a_study_too(place: Path) -> None:
    assert run(requests="1", duration="1").exit_code == 0


# --- running --------------------------------------------------------------------------------------------


def test_a_study_prints_a_row_for_each_candidate_and_keeps_its_trials(place: Path) -> None:
    done = run(
        "--policy", "calm", "--policy", "oracle", "--cache", "lru:1", "--cache", "belady:1", "--out", "s"
    )
    assert done.exit_code == 0, done.output
    rows = [line.split("  ")[0] for line in done.stdout.splitlines()[1:]]
    assert rows == ["calm / lru:1", "calm / belady:1", "oracle / lru:1", "oracle / belady:1"]
    assert "simulated time" in done.stderr
    assert len(kept(place / "s")) == 4
    assert (place / "s" / "results.json").is_file()
    assert (place / "s" / "drawn").is_file()


def test_json_is_one_document_with_figures_and_provenance(place: Path) -> None:
    done = run("--json", "--policy", "oracle")
    document = json.loads(done.stdout)
    assert document["title"] == "calm replay"
    [summary] = document["summaries"]
    assert summary["setup"]["policy"] == "oracle"
    assert summary["figures"]["quality"]["value"] == 1.0, "the table says that large is always right"
    assert document["provenance"]["versions"]["calm"]
    assert any("simulated time" in note for note in document["notes"])


def test_hindsight_is_one_row_and_its_grid_is_kept(place: Path) -> None:
    done = run("--policy", "hindsight", "--out", "s", "--json", requests="3")
    [summary] = json.loads(done.stdout)["summaries"]
    assert summary["setup"]["policy"] == "hindsight"
    assert len(kept(place / "s")) == 15


# --- keeping and resuming ---------------------------------------------------------------------------------


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Which trials were run, by policy and seed."""
    seen: list[tuple[str, int]] = []

    def noting(*arguments: Any, **fields: Any) -> Trial:
        trial = run_trial(*arguments, **fields)
        seen.append((trial.setup.policy, trial.seed))
        return trial

    monkeypatch.setattr(RUN_TRIAL, noting)
    return seen


def test_finished_trials_are_not_run_again(place: Path, ran: list[tuple[str, int]]) -> None:
    first = run("--out", "s", "--policy", "calm", "--json")
    again = run("--out", "s", "--policy", "calm", "--policy", "random", "--json", seeds="2")
    assert (first.exit_code, again.exit_code) == (0, 0)
    assert ran == [("calm", 0), ("random", 0), ("calm", 1), ("random", 1)]
    [before], [now, _] = (json.loads(done.stdout)["summaries"] for done in (first, again))
    assert now["seeds"] == [0, 1]
    assert before["seeds"] == [0]


def test_an_interrupted_study_keeps_what_is_done_and_goes_on(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def interrupted_at_the_third(*arguments: Any, **fields: Any) -> Trial:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return run_trial(*arguments, **fields)

    monkeypatch.setattr(RUN_TRIAL, interrupted_at_the_third)
    stopped = run("--out", "s", seeds="4")
    assert stopped.exit_code == INTERRUPTED
    assert "2 of 4 trials are kept in s; the same command again" in stopped.stderr
    assert len(kept(place / "s")) == 2
    done = run("--out", "s", seeds="4")
    assert done.exit_code == 0
    assert len(calls) == 3 + 2
    assert len(kept(place / "s")) == 4


def test_without_a_directory_an_interruption_says_how_to_keep(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> Trial:
        raise KeyboardInterrupt

    monkeypatch.setattr(RUN_TRIAL, interrupted)
    stopped = run()
    assert stopped.exit_code == INTERRUPTED
    assert "give --out DIR" in stopped.stderr


@pytest.mark.parametrize(
    ("changed", "more", "said"),
    [
        ({"requests": "9"}, (), "requests was 8, is 9"),
        ({}, ("--budget", "2GB"), "budget_bytes was 3000000000, is 2000000000"),
        ({}, ("--feedback", "0"), "feedback was 1.0, is 0.0"),
    ],
)
def test_a_directory_never_mixes_settings(
    place: Path, changed: dict[str, str | None], more: tuple[str, ...], said: str
) -> None:
    assert run("--out", "s").exit_code == 0
    other = run("--out", "s", *more, **changed)
    assert other.exit_code == 1
    assert said in other.stderr


@pytest.mark.parametrize("file", ["profile.toml", "table.jsonl", "trace.csv", "fleet/small.toml"])
def test_a_file_that_changed_is_other_settings(place: Path, file: str) -> None:
    (place / "trace.csv").write_text("t_s\n" + "\n".join(map(str, range(0, 90, 5))), encoding="utf-8")

    def study_of_trace() -> Result:
        return run("--out", "s", "--arrivals", "csv:trace.csv")

    assert study_of_trace().exit_code == 0
    path = place / file
    changes = {
        "profile.toml": ("load_s = 1.0", "load_s = 1.5"),
        "table.jsonl": ("What is 3", "What was 3"),
        "trace.csv": ("\n85", "\n86"),
        "fleet/small.toml": ("things", "matters"),
    }
    path.write_text(path.read_text(encoding="utf-8").replace(*changes[file]), encoding="utf-8")
    assert "holds trials of other settings" in study_of_trace().stderr


def test_specs_of_files_lose_their_directories_and_name_their_content(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("t_s\n0\n", encoding="utf-8")
    assert named("poisson") == "poisson"
    assert named("table:routerdc7:gsm8k") == "table:routerdc7:gsm8k"
    said = named(f"csv:{tmp_path}/a.csv")
    assert said.startswith("csv:a.csv (")
    assert named(f"table:{tmp_path}/a.csv:math").startswith("table:a.csv:math (")
    (tmp_path / "a.csv").write_text("t_s\n1\n", encoding="utf-8")
    assert named(f"csv:{tmp_path}/a.csv") != said
