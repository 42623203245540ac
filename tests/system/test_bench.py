"""`calm bench` as a user types it: the default fleet on its real engine, one policy, one seed, six requests."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from calm.registry import load_fleet
from calm.report.files import StudyDirectory
from calm.report.records import Setup
from calm.settings import cache_dir

from .conftest import FLEET, eventually

pytestmark = [pytest.mark.models, pytest.mark.timeout(300)]

REQUESTS = 6
PLACES = (("France", "Paris"), ("Italy", "Rome"), ("Spain", "Madrid"), ("Japan", "Tokyo"))


def write_set(file: Path) -> None:
    """Capitals, in the format of the domain sets."""
    file.parent.mkdir(parents=True)
    rows = [
        {
            "id": f"capitals-{n}", "domain": "facts", "split": "test", "context": None,
            "question": f"What is the capital of {land}?", "choices": ["Paris", "Rome", "Madrid", "Tokyo"],
            "answer": capital, "answer_type": "label",
        }
        for n, (land, capital) in enumerate(PLACES)
    ]  # fmt: skip
    file.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


def command(root: Path, *flags: str) -> tuple[list[str], dict[str, str]]:
    """What to type, and the environment of a user without settings."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("CALM_")}
    words = [
        *(sys.executable, "-c", "from calm.cli import main; main()", "bench", "--fleet", str(FLEET)),
        *("--data", str(root / "data"), "--queries", "domains:capitals", "--requests", str(REQUESTS)),
        *("--rate", "2", "--max-tokens", "8", "--seeds", "1", "--budget", "2GB", "--out", str(root / "out")),
        *flags,
    ]
    return words, {**kept, "CALM_CACHE_DIR": str(cache_dir()), "XDG_CONFIG_HOME": str(root / "config")}


def bench(root: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    words, environment = command(root, *flags)
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=280)


def test_a_terminated_campaign_takes_its_server_and_engines_along(weights: Path, tmp_path: Path) -> None:
    write_set(tmp_path / "data" / "domain" / "capitals.jsonl.gz")
    words, environment = command(tmp_path, "--cache", "none")
    with subprocess.Popen(
        words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as campaign:
        family = eventually("the server has started an engine", lambda: engines_of(campaign.pid))
        campaign.terminate()
        assert campaign.wait(60) == 143
    eventually("nothing is left", lambda: not any(one.is_running() for one in family))


def engines_of(pid: int) -> list[psutil.Process]:
    """All below it, once there is more than the server."""
    below = psutil.Process(pid).children(recursive=True)
    return below if len(below) > 1 else []


def test_a_small_campaign_on_real_models_and_the_same_again(weights: Path, tmp_path: Path) -> None:
    write_set(tmp_path / "data" / "domain" / "capitals.jsonl.gz")
    done = bench(tmp_path, "--cache", "none")
    assert done.returncode == 0, done.stderr
    assert "calm / none" in done.stdout
    assert "1/1  calm / none, seed 0: 6 of 6 answered" in done.stderr

    (key,) = StudyDirectory.reopen(tmp_path / "out").kept()
    assert key == (Setup(policy="calm", cache="none"), 0)
    trial = StudyDirectory.reopen(tmp_path / "out").find(*key)
    assert trial is not None
    assert [row.status for row in trial.rows] == ["ok"] * REQUESTS
    assert all(row.hit and row.model and row.quality in (0.0, 1.0) for row in trial.rows)
    assert all(row.prompt_tokens and row.completion_tokens and row.decision_s for row in trial.rows)
    assert (trial.loads, trial.budget_bytes, len(trial.moves)) == (
        0,
        2_000_000_000,
        len(load_fleet(FLEET).fleet),
    )
    assert 0 < trial.peak_bytes <= trial.budget_bytes
    assert trial.meter is None or (trial.energy_j is not None and trial.energy_j > 0)

    again = bench(tmp_path, "--cache", "none")
    assert again.returncode == 0, again.stderr
    assert "1 trial, 1 of them done before" in again.stderr
    assert again.stdout == done.stdout

    other = bench(tmp_path, "--cache", "none", "--deadline", "5")
    assert other.returncode == 1
    assert "deadline_s was 120.0, is 5.0" in other.stderr
