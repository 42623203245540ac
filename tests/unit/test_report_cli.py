"""`calm report`, and what replay and bench end with."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from tests.unit.report_study import make_study

from calm.cli.group import RootGroup
from calm.cli.report import report, show
from calm.report.files import StudyDirectory, load_study
from calm.report.records import Study

CLI = RootGroup(commands={"report": report})


@pytest.fixture(scope="module")
def study() -> Study:
    return make_study(policies=("calm", "random"), seeds=2, requests=12)


@pytest.fixture
def directory(tmp_path: Path, study: Study) -> Path:
    StudyDirectory(tmp_path, "same").finish(study)
    return tmp_path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(CLI, ["report", *map(str, arguments)])


def test_the_table_is_printed_and_the_plots_drawn(directory: Path) -> None:
    done = run(directory)
    assert done.exit_code == 0, done.output
    assert "calm / lru" in done.stdout
    assert "peak memory" in done.stdout
    assert "SLO: completed within 10.0 s" in done.stderr
    assert (directory / "pareto.svg").is_file()


def test_a_baseline_adds_ratios(directory: Path) -> None:
    done = run(directory, "--no-plots", "--baseline", "random / lru")
    assert "against random / lru" in done.stdout
    assert not list(directory.glob("*.png"))


def test_markdown_is_for_a_document(directory: Path) -> None:
    lines = run(directory, "--no-plots", "--markdown", "--baseline", "random / lru").stdout.splitlines()
    assert lines[0].startswith("| policy / cache | mean |")
    assert any(line.startswith("- SLO") for line in lines)


def test_wide_has_intervals(directory: Path) -> None:
    assert "decision p99" in run(directory, "--no-plots", "--markdown", "--wide").stdout


def test_json_has_summaries_and_comparisons(directory: Path) -> None:
    found = json.loads(run(directory, "--no-plots", "--json", "--baseline", "random / lru").stdout)
    assert [one["label"] for one in found["summaries"]] == ["calm / lru", "random / lru"]
    assert found["comparisons"][0]["ratios"]["mean_s"]["n"] == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [((), "results.json: No such file"), (("--baseline", "nobody / none"), "no setup is called")],
)
def test_a_mistake_is_one_line(directory: Path, arguments: tuple[str, ...], said: str) -> None:
    if not arguments:
        (directory / "results.json").unlink()
    done = run(directory, "--no-plots", *arguments)
    assert done.exit_code == 1
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert said in done.stderr


def test_a_run_ends_with_table_results_and_plots(
    tmp_path: Path, study: Study, capsys: pytest.CaptureFixture[str]
) -> None:
    show(study, tmp_path / "out", as_json=False)
    assert "random / lru" in capsys.readouterr().out
    assert load_study(tmp_path / "out") == study
    assert (tmp_path / "out" / "latency.png").is_file()


def test_without_a_directory_nothing_is_written(
    tmp_path: Path, study: Study, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    show(study, None, as_json=True)
    assert json.loads(capsys.readouterr().out)["title"] == study.title
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_figures_are_kept_and_it_says_what_to_install(
    tmp_path: Path, study: Study, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    show(study, tmp_path, as_json=False)
    assert "pip install 'calm-orchestrator[bench]'" in capsys.readouterr().err
    assert load_study(tmp_path) == study
