"""Bases and their adapters as a newcomer sees them: in tables, in one card, in an explanation, in doctor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from calm.cli.app import calm
from calm.cli.documents import FleetView, ModelView, OutcomeView, RequestView, StateView
from calm.cli.explain import facts
from calm.cli.fleet_view import print_server, standing
from calm.doctor.engines import check_engines
from calm.doctor.fleet import check_fleet
from calm.registry import load_fleet

SHA = "a" * 64


@pytest.fixture
def fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CALM_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("CALM_CONFIG", str(tmp_path / "calm.toml"))
    monkeypatch.setenv("CALM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("CALM_STATE_DIR", str(tmp_path / "state"))
    directory = tmp_path / "fleet"
    monkeypatch.setenv("CALM_FLEET__DIR", str(directory))
    directory.mkdir()
    (tmp_path / "calm.toml").write_text("")
    put(directory, "smol", "", "bytes = 1_000_000_000")
    put(directory, "other")
    put(directory, "finance", 'adapter_of = "smol"', "bytes = 9_000_000")
    put(directory, "medical", 'adapter_of = "smol"')
    return directory


def put(directory: Path, name: str, more: str = "", source: str = "") -> Path:
    file = directory / f"{name}.toml"
    file.write_text(
        f'name = "{name}"\ndescription = "{name} things"\n{more}\n'
        f'[source]\nparts = ["file:/nowhere/{name}.gguf"]\nsha256 = "{SHA}"\n{source}\n'
    )
    return file


def run(*args: str) -> Result:
    return CliRunner().invoke(calm, args, prog_name="calm")


# --- from the files -------------------------------------------------------------------------------


def test_adapters_stand_indented_below_their_base(fleet: Path) -> None:
    result = run("models", "list")
    names = [line[:10].rstrip() for line in result.stdout.splitlines()[1:]]
    assert [name for name in names if name.strip() in ("smol", "other", "finance", "medical")] == [
        "other", "smol", "  finance", "  medical",
    ]  # fmt: skip
    assert "on smol" in result.stdout
    assert "indented: adapters" in result.stderr
    found = json.loads(run("models", "list", "--json").stdout)["models"]
    assert {entry["name"]: entry["adapter_of"] for entry in found}["finance"] == "smol"


def test_one_card_says_whose_it_is_and_what_it_carries(fleet: Path) -> None:
    finance, smol = run("models", "show", "finance"), run("models", "show", "smol")
    assert "an adapter on smol: engine, context, chat template, memory and state are those of smol" in (
        finance.stderr
    )
    assert "adapter_of" in finance.stdout
    assert "its engine also serves its adapters: finance, medical" in smol.stderr


def test_a_card_added_before_its_base_is_warned_of(fleet: Path, tmp_path: Path) -> None:
    card = put(tmp_path, "law", 'adapter_of = "gemma"')
    result = run("models", "add", str(card))
    assert result.exit_code == 0
    assert "law does not serve yet: no good card of `gemma` is in the fleet" in result.stderr


def test_removing_a_base_names_the_adapters_that_go_with_it(fleet: Path) -> None:
    assert "finance, medical" in run("models", "remove", "smol").stderr


# --- from a server --------------------------------------------------------------------------------


def state(model: str, residency: str, reason: str | None = None) -> StateView:
    return StateView(
        model=model,
        residency=residency,
        in_flight=2,
        slots=4,
        threads=1,
        footprint_bytes=10**9,
        reason=reason,
    )


VIEW = FleetView(
    models=(
        ModelView(name="finance", adapter_of="smol", state=state("smol", "ready")),
        ModelView(name="medical", adapter_of="smol", state=state("medical", "failed", "another shape")),
        ModelView(name="smol", state=state("smol", "ready")),
    ),
    budget_bytes=2 * 10**9,
    used_bytes=10**9,
)


def test_memory_and_requests_are_shown_once_and_a_misfit_with_its_reason(
    capsys: pytest.CaptureFixture[str],
) -> None:
    print_server(VIEW, "http://x")
    said = capsys.readouterr()
    rows = [line.split() for line in said.out.splitlines()]
    assert rows[1][:4] == ["smol", "ready", "1.0", "GB"]
    assert rows[2][:3] == ["finance", "on", "smol"]
    assert rows[3][:2] == ["medical", "failed"]
    assert said.out.count("2/4") == 1
    assert "medical cannot run on smol: another shape" in said.err


def test_an_action_on_an_adapter_says_whose_engine_it_was() -> None:
    assert standing(VIEW.models[0]).startswith("on smol, ready, ")
    assert standing(VIEW.models[1]) == "failed, another shape"


def test_an_explanation_places_the_adapter() -> None:
    request = RequestView(request_id="r", outcome=OutcomeView(model="finance"))
    assert ("model", "finance (adapter on smol)") in facts(request, {"finance": "smol"})
    assert ("model", "finance") in facts(request)


# --- doctor ---------------------------------------------------------------------------------------


def test_doctor_groups_the_fleet_and_weighs_a_family_as_one(fleet: Path) -> None:
    load = load_fleet(fleet)
    checks = {check.name: check for check in check_fleet(fleet, load, 1_000_000_000)}
    assert "other, smol (adapters: finance, medical)" in checks["fleet"].found
    assert "with its 2 adapters" in checks["model smol"].found
    assert set(checks) == {"fleet", "model smol"}


def test_doctor_looks_at_an_engine_once_however_many_adapters_it_carries(fleet: Path) -> None:
    (fleet / "smol.toml").write_text(
        'name = "smol"\ndescription = "d"\n[engine]\nkind = "command"\ncmd = "no-such-engine {port}"\n'
    )
    found = [c for c in check_engines(tuple(load_fleet(fleet).fleet.values())) if "no-such-engine" in c.found]
    assert [check.name for check in found] == ["engine of smol"]
