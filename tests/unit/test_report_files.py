"""A study's directory: nothing is lost, nothing is mixed, and what is damaged is run again."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import msgspec
import pytest
from tests.unit.report_study import make_study, make_trial

from calm.errors import BadInput
from calm.report.files import (
    StudyDirectory,
    commit,
    fingerprint,
    load_study,
    processor,
    provenance,
    readable_name,
    without_paths,
)
from calm.report.records import Setup, Study

SETUP = Setup(policy="calm", cache="lru:3", scenario="20 min")


@pytest.fixture(scope="module")
def study() -> Study:
    return make_study(policies=("calm", "random"), seeds=2, requests=12)


# --- trials ---------------------------------------------------------------------------------------


def test_a_trial_is_found_again_by_setup_and_seed(tmp_path: Path) -> None:
    trial = make_trial(SETUP, 0, requests=10)
    file = StudyDirectory(tmp_path / "new", "same").keep(trial)
    assert file == tmp_path / "new" / "trials" / "calm_lru-3_20-min_seed0.json"
    again = StudyDirectory(tmp_path / "new", "same")
    assert again.find(SETUP, 0) == trial
    assert again.find(SETUP, 1) is None
    assert again.find(msgspec.structs.replace(SETUP, cache="lru"), 0) is None


def test_kept_again_it_replaces_the_earlier_one(tmp_path: Path) -> None:
    directory = StudyDirectory(tmp_path, "same")
    directory.keep(make_trial(SETUP, 0, requests=10))
    other = make_trial(SETUP, 0, requests=5)
    directory.keep(other)
    assert StudyDirectory(tmp_path, "same").find(SETUP, 0) == other
    assert len(list((tmp_path / "trials").iterdir())) == 1


def test_setups_of_one_readable_name_get_two_files(tmp_path: Path) -> None:
    twin = msgspec.structs.replace(SETUP, cache="lru-3")
    assert readable_name(twin) == readable_name(SETUP)
    directory = StudyDirectory(tmp_path, "same")
    for setup in (SETUP, twin):
        directory.keep(make_trial(setup, 0, requests=4))
    found = StudyDirectory(tmp_path, "same")
    assert [found.find(setup, 0).setup for setup in (SETUP, twin)] == [SETUP, twin]  # type: ignore[union-attr]


def test_a_crash_while_writing_leaves_no_half_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = StudyDirectory(tmp_path, "same")
    trial = make_trial(SETUP, 0, requests=4)
    directory.keep(trial)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(BadInput, match="No space left on device"):
        directory.keep(make_trial(SETUP, 0, requests=8))
    assert StudyDirectory(tmp_path, "same").find(SETUP, 0) == trial
    assert [file.name for file in (tmp_path / "trials").iterdir()] == ["calm_lru-3_20-min_seed0.json"]


@pytest.mark.parametrize("damage", ["", '{"fingerprint":"same","trial":{"setup":', '{"fingerprint":"same"}'])
def test_a_damaged_trial_is_named_left_out_and_run_again(tmp_path: Path, damage: str) -> None:
    trial = make_trial(SETUP, 0, requests=4)
    file = StudyDirectory(tmp_path, "same").keep(trial)
    file.write_text(damage)
    directory = StudyDirectory(tmp_path, "same")
    assert directory.find(SETUP, 0) is None
    assert file.name in directory.damaged[0]
    assert directory.keep(trial) == file
    assert StudyDirectory(tmp_path, "same").damaged == ()


def test_damage_within_the_rows_is_found_when_the_trial_is_read(tmp_path: Path) -> None:
    file = StudyDirectory(tmp_path, "same").keep(make_trial(SETUP, 0, requests=4))
    file.write_text(file.read_text().replace('"status":"ok"', '"status":"fine"', 1))
    directory = StudyDirectory(tmp_path, "same")
    assert directory.find(SETUP, 0) is None
    assert "status" in directory.damaged[0]


def test_other_settings_are_refused_and_say_what_differs(tmp_path: Path) -> None:
    StudyDirectory(tmp_path, fingerprint({"rate_rps": 2, "slots": 4})).keep(make_trial(SETUP, 0, requests=4))
    with pytest.raises(
        BadInput, match=r"other settings \(rate_rps was 2, is 4\); give --out another"
    ) as refused:
        StudyDirectory(tmp_path, fingerprint({"slots": 4, "rate_rps": 4}))
    assert refused.value.field == "out"
    StudyDirectory(tmp_path, fingerprint({"slots": 4, "rate_rps": 2}))


def test_a_file_in_the_directorys_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(BadInput, match="is no directory"):
        StudyDirectory(tmp_path / "out", "same")


# --- the study ------------------------------------------------------------------------------------


def test_a_finished_study_is_loaded_as_it_was(tmp_path: Path, study: Study) -> None:
    directory = StudyDirectory(tmp_path, fingerprint({"rate_rps": 2}))
    for trial in reversed(study.trials):
        directory.keep(trial)
    results = json.loads(directory.finish(study).read_text())
    assert load_study(tmp_path) == study
    assert results["settings"] == {"rate_rps": 2}
    assert [one["label"] for one in results["summaries"]] == ["calm / lru", "random / lru"]
    assert all((tmp_path / entry["file"]).is_file() for entry in results["trials"])
    assert "rows" not in results["trials"][0]


def test_finish_keeps_what_was_not_kept(tmp_path: Path, study: Study) -> None:
    StudyDirectory.reopen(tmp_path).finish(study)
    assert load_study(tmp_path) == study


def test_a_damaged_or_missing_trial_is_a_note(tmp_path: Path, study: Study) -> None:
    StudyDirectory(tmp_path, "same").finish(study)
    files = sorted((tmp_path / "trials").iterdir())
    files[0].write_text("{")
    files[3].unlink()
    loaded = load_study(tmp_path)
    assert loaded.trials == study.trials[1:3]
    assert files[0].name in loaded.notes[0]
    assert any("random / lru, seed 1" in note for note in loaded.notes)


def test_trials_kept_since_come_last(tmp_path: Path, study: Study) -> None:
    directory = StudyDirectory(tmp_path, "same")
    directory.finish(study)
    late = make_trial(study.trials[0].setup, 7, requests=3)
    directory.keep(late)
    assert load_study(tmp_path).trials == (*study.trials, late)


def test_where_no_study_was_finished_it_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="it resumes") as refused:
        load_study(tmp_path)
    assert refused.value.field == "out"


# --- provenance -----------------------------------------------------------------------------------


def test_a_command_line_loses_directories_and_nothing_else() -> None:
    command = 'calm replay --data=/srv/big/sets --arrivals csv:/tmp/a.csv --out "/x/y z" --baseline "paper / lru" http://h/v1'
    assert without_paths(command) == (
        'calm replay --data=sets --arrivals csv:a.csv --out "y z" --baseline "paper / lru" http://h/v1'
    )


def test_provenance_names_versions_and_no_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.node", lambda: "secret-host")
    found = provenance("calm replay")
    assert {"calm", "python", "numpy"} <= set(found.versions)
    assert found.started_at.endswith("+00:00")
    assert "cores" in found.machine
    assert "secret-host" not in found.machine


def test_a_package_in_somebody_elses_checkout_has_no_commit(tmp_path: Path) -> None:
    package = tmp_path / "venv" / "calm"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    assert commit(package) is None
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    assert commit(package) is None


def test_a_processor_without_a_name_is_said_to_have_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("model name\t: Some CPU @ 2 GHz\n")
    assert processor(info) == "Some CPU @ 2 GHz"
    monkeypatch.setattr("platform.processor", lambda: "")
    assert processor(tmp_path / "absent").startswith("unnamed ")
