"""Settings: precedence, plain errors, and a reference page that is current."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm.errors import BadInput
from calm.settings import SECTIONS, budget_bytes, fleet_dir, load_settings, parse_bytes

ROOT = Path(__file__).parents[2]


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults_are_safe() -> None:
    settings = load_settings(environ={})
    assert settings.server.host == "127.0.0.1"
    assert settings.server.port == 8420
    assert settings.knowledge.store_prompts is False


def test_file_then_environment_then_flags(tmp_path: Path) -> None:
    file = write(tmp_path / "calm.toml", '[server]\nport = 1\nmax_queue = 7\n[policy]\ngoal = "energy"\n')
    environ = {"CALM_SERVER__PORT": "2", "CALM_SERVER__CORS_ORIGINS": "http://a, http://b"}
    assert load_settings(file, environ).server.port == 2
    settings = load_settings(file, environ, {"server": {"port": 3, "host": None}})
    assert (settings.server.port, settings.server.max_queue, settings.policy.goal) == (3, 7, "energy")
    assert settings.server.cors_origins == ("http://a", "http://b")
    assert settings.server.host == "127.0.0.1"  # a flag that was not given changes nothing


def test_own_goals(tmp_path: Path) -> None:
    file = write(tmp_path / "calm.toml", "[goals.frugal]\nenergy = 1.0\nlatency = 0.0\nquality = 0.1\n")
    assert load_settings(file, {}).goals["frugal"].energy == 1.0


@pytest.mark.parametrize(
    ("text", "field", "said"),
    [
        ("[server]\nprot = 1", "server.prot", "did you mean `port`"),
        ("[sever]\nport = 1", "sever", "server"),
        ('[server]\nport = "x"', "server.port", "int"),
        ("[server]\nport = 70000", "server.port", "65535"),
        ("[server]\ndeadline_s = 0", "server.deadline_s", "> 0"),
        ('[scheduling]\nqueue = "lifo"', "scheduling.queue", "lifo"),
        ("[goals.x]\nspeed = 1", "goals", "speed"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path: Path, text: str, field: str, said: str) -> None:
    with pytest.raises(BadInput) as caught:
        load_settings(write(tmp_path / "calm.toml", text), {})
    assert str(caught.value.field).startswith(field)
    assert said in caught.value.message
    assert "calm.toml" in caught.value.message


def test_a_wrong_environment_variable_is_named() -> None:
    with pytest.raises(BadInput, match="CALM_SERVER") as caught:
        load_settings(environ={"CALM_SERVER__PORT": "many"})
    assert caught.value.field == "server.port"


@pytest.mark.parametrize("text", ["not toml [", "\x00"])
def test_a_file_that_is_no_toml(tmp_path: Path, text: str) -> None:
    with pytest.raises(BadInput, match="not valid TOML"):
        load_settings(write(tmp_path / "calm.toml", text), {})


def test_a_named_file_must_exist(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such config file"):
        load_settings(environ={"CALM_CONFIG": str(tmp_path / "none.toml")})


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("60%", 600),
        ("1GiB", 2**30),
        ("800MB", 800_000_000),
        ("12", 12),
        ("1.5g", 1_500_000_000),
        ("7 kib", 7168),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text, 1000) == size


@given(st.text(max_size=12))
def test_any_text_is_a_size_or_a_plain_error(text: str) -> None:
    try:
        size = parse_bytes(text, 10**9)
    except BadInput:
        return
    assert size >= 0


def test_the_budget_is_a_share_of_free_memory() -> None:
    half = budget_bytes(load_settings(environ={"CALM_MEMORY__BUDGET": "50%"}))
    assert half > 2**27


def test_the_first_use_makes_a_fleet_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    made = fleet_dir(load_settings(environ={}))
    assert {card.name for card in made.glob("*.toml")} == {
        card.name for card in (ROOT / "fleet").glob("*.toml")
    }


def test_every_setting_stands_in_the_reference() -> None:
    made = runpy.run_path(str(ROOT / "scripts" / "settings_reference.py"))["page"]()
    page = (ROOT / "docs" / "reference" / "settings.md").read_text(encoding="utf-8")
    assert page == made, "run `make reference`"
    for section, kind in SECTIONS.items():
        assert f"## [{section}]" in page
        assert all(f"`{name}`" in page for name in kind.__struct_fields__)
