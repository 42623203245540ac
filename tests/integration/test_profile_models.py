"""`calm profile` on a real engine: the figures make sense together. Needs the cached SmolLM2."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from calm.cli.group import RootGroup
from calm.cli.profile import profile
from calm.profile import Profile, read_profile
from calm.registry import load_fleet
from calm.settings import cache_dir
from calm.sources.fetch import cached_path

pytestmark = pytest.mark.models

FLEET = Path(__file__).parents[2] / "fleet"
SMOL = "smollm2-135m"


@pytest.fixture
def fleet(tmp_path: Path) -> Path:
    card = load_fleet(FLEET).fleet[SMOL]
    assert card.source is not None
    if cached_path(card.source, cache_dir(), FLEET) is None:
        pytest.skip("no SmolLM2 weights: run `calm models pull`")
    directory = tmp_path / "fleet"
    directory.mkdir()
    shutil.copy(FLEET / f"{SMOL}.toml", directory)
    return directory


def test_a_real_model_is_measured(fleet: Path, tmp_path: Path) -> None:
    out = tmp_path / "profile.toml"
    calm = RootGroup(name="calm", commands={"profile": profile})
    flags = ["profile", "--fleet", str(fleet), "--quick", "--out", str(out), "--json"]
    result = CliRunner().invoke(calm, flags)
    assert result.exit_code == 0, result.output
    found = read_profile(out)
    assert found == msgspec.json.decode(result.stdout, type=Profile)
    model = found.models[SMOL]
    card = load_fleet(fleet).fleet[SMOL]
    assert card.memory_hint_bytes is not None
    assert model.prefill_tps > model.decode_tps["1"] > 0
    assert set(model.decode_tps) == {"1", str(card.concurrency)}
    assert card.memory_hint_bytes / 2 < model.memory_bytes < 2 * card.memory_hint_bytes
    assert 0 < model.unload_s < model.load_s
    assert 5 < model.template_tokens < 60, "ChatML around every prompt"
    assert 0 <= model.cached_tokens <= model.template_tokens
    assert 0.1 < model.tokens_per_char < 0.5
    assert model.output_tokens["default"].mean >= 1
    assert found.machine.cores >= 1
    assert found.machine.versions["xllamacpp"]
    if found.machine.meter != "absent":
        assert model.active_w > model.idle_w >= 0
        assert model.load_j > 0
