"""What `calm doctor` finds, on machines made of files and fakes."""

from __future__ import annotations

import json
import socket
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from calm.cli.app import calm
from calm.doctor.check import Check, guarded
from calm.doctor.engines import (
    check_built_in,
    check_commands,
    check_keys,
    check_programs,
    check_sandbox,
    lacks_avx2,
    program_of,
)
from calm.doctor.fleet import check_fleet
from calm.doctor.machine import check_gpus, has_nvidia, judged_budget, judged_cores, judged_meters
from calm.doctor.service import check_port, judged_keys
from calm.doctor.storage import check_cache, check_knowledge
from calm.errors import BadInput
from calm.meters.absent import AbsentMeter
from calm.meters.choose import MeterProbe, MeterReport
from calm.records import EngineSpec, ModelCard, SandboxSpec, SourceSpec
from calm.registry import CardProblem, Fleet, FleetLoad
from calm.stores.schema import open_writer

SOURCE = SourceSpec(parts=("https://host/model.gguf",), sha256="ab" * 32, bytes=98_000_000)


def card(name: str = "smol", **fields: object) -> ModelCard:
    return ModelCard(name=name, description="x", **{"source": SOURCE, **fields})  # type: ignore[arg-type]


def command_card(cmd: str, name: str = "boxed") -> ModelCard:
    return card(name, engine=EngineSpec(kind="command", cmd=cmd))


def by_name(checks: Sequence[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


# --- the machine ----------------------------------------------------------------------------------


def test_more_threads_than_cores_is_a_warning() -> None:
    assert [judged_cores("2", 2, chosen).status for chosen in (None, 2, 3)] == ["ok", "ok", "warn"]


def test_a_budget_beyond_what_is_there_is_a_warning() -> None:
    gib = 1 << 30
    assert judged_budget("", 2 * gib, 4 * gib, None).status == "ok"
    assert judged_budget("", 5 * gib, 4 * gib, None).status == "warn"
    assert "control group leaves" in judged_budget("", 2 * gib, 4 * gib, gib).found
    assert judged_budget("", 100_000_000, 4 * gib, None).status == "warn"


def bus(root: Path, vendor: str, kind: str) -> Path:
    device = root / "0000:00:05.0"
    device.mkdir()
    (device / "vendor").write_text(f"{vendor}\n")
    (device / "class").write_text(f"{kind}\n")
    return root


@pytest.mark.parametrize(
    ("vendor", "kind", "there"),
    [("0x10de", "0x030200", True), ("0x10de", "0x040300", False), ("0x8086", "0x030000", False)],
)
def test_an_nvidia_card_is_seen_without_its_driver(
    tmp_path: Path, vendor: str, kind: str, there: bool
) -> None:
    assert has_nvidia(bus(tmp_path, vendor, kind)) is there
    assert not has_nvidia(tmp_path / "none")


def test_no_gpu_is_no_fault(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("calm.doctor.machine.nvidia_gpus", lambda: ([], "no driver"))
    assert next(check_gpus(tmp_path)).status == "ok"
    assert next(check_gpus(bus(tmp_path, "0x10de", "0x030000"))).fix is not None


class Modelled:
    name = "cpu-time"
    kind = "modelled"

    def read(self, groups: object) -> dict[str, float]:
        return {}


PROBES = (
    MeterProbe(name="nvml", available=False, reason="no driver", fix="install it"),
    MeterProbe(name="rapl-powercap", available=False, reason="no permission", fix="chmod"),
    MeterProbe(name="cpu-time", available=True, reason="3 W per core"),
)


def test_meters_say_which_is_used_and_how_to_get_a_better_one() -> None:
    report = MeterReport(Modelled(), PROBES)  # type: ignore[arg-type]
    found = by_name(list(judged_meters(report, has_gpu=False)))
    assert found["energy"].found == "uses cpu-time (modelled): 3 W per core"
    assert (found["meter nvml"].status, found["meter rapl-powercap"].status) == ("ok", "warn")
    assert found["meter rapl-powercap"].fix == "chmod"
    assert by_name(list(judged_meters(report, has_gpu=True)))["meter nvml"].status == "warn"


def test_no_meter_at_all_is_a_warning() -> None:
    found = by_name(list(judged_meters(MeterReport(AbsentMeter(), PROBES[:2]), has_gpu=False)))
    assert found["energy"].status == "warn"


# --- engines --------------------------------------------------------------------------------------


def test_a_processor_without_avx2_fails_only_where_the_engine_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_text("processor : 0\nflags\t\t: fpu sse4_2 avx\n")
    new.write_text("processor : 0\nflags\t\t: fpu avx avx2\n")
    assert lacks_avx2(old)
    assert not lacks_avx2(new)
    assert not lacks_avx2(tmp_path / "none")
    assert next(check_built_in([card()], old)).status == "fail"
    assert next(check_built_in([], old)).status == "warn"
    assert next(check_built_in([card()], new)).status == "ok"
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert not lacks_avx2(old)


def test_programs_on_path_tell_their_version() -> None:
    asked: list[str] = []

    def run(command: Sequence[str]) -> str:
        asked.append(command[0])
        return "warning: no config\nversion: 6123 (abc)\n"

    places = {"llama-server": "/opt/llama-server", "vllm": "/opt/vllm"}
    found = by_name(list(check_programs(places.get, run)))
    assert found["llama-server"].found == "version: 6123 (abc) (/opt/llama-server)"
    assert found["vllm"].found == "/opt/vllm"
    assert asked == ["/opt/llama-server"]
    assert "bwrap" not in found


@pytest.mark.parametrize(
    ("cmd", "program"),
    [
        ("llama-server -m {path}", "llama-server"),
        ('"/opt/my server/run" {port}', "/opt/my server/run"),
        ("{path} --port {port}", None),
        ("'unclosed {port}", None),
    ],
)
def test_the_program_of_a_command(cmd: str, program: str | None) -> None:
    assert program_of(command_card(cmd)) == program


def test_what_cards_need_and_the_machine_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = list(check_commands([command_card("nobody {port}"), card()], {}.get))
    assert [check.status for check in lacking] == ["warn"]
    boxed = card(sandbox=SandboxSpec(kind="bubblewrap"))
    assert [check.status for check in check_sandbox([boxed], {}.get)] == ["fail"]
    assert not list(check_sandbox([card()], {}.get))
    cloud = card(
        "cloud", source=None, engine=EngineSpec(kind="openai", url="http://h", api_key_env="CLOUD_KEY")
    )
    monkeypatch.delenv("CLOUD_KEY", raising=False)
    assert "CLOUD_KEY is not set" in next(check_keys([cloud])).found
    monkeypatch.setenv("CLOUD_KEY", "hunter22")
    assert not list(check_keys([cloud]))


# --- the fleet ------------------------------------------------------------------------------------


def test_bad_cards_and_models_that_never_fit_are_warnings_and_no_card_at_all_a_failure(
    tmp_path: Path,
) -> None:
    problem = CardProblem(file=str(tmp_path / "bad.toml"), field="context", reason="must be at least 1")
    load = FleetLoad(Fleet([card(memory_hint_bytes=3_000_000_000)]), (problem,))
    found = by_name(list(check_fleet(tmp_path, load, 1_000_000_000)))
    assert [found[name].status for name in ("fleet", "card bad.toml", "model smol")] == ["ok", "warn", "warn"]
    assert "3.0 GB" in found["model smol"].found
    assert next(check_fleet(tmp_path, FleetLoad(Fleet()), None)).status == "fail"


# --- storage --------------------------------------------------------------------------------------


def test_missing_weights_say_how_to_fetch_them(tmp_path: Path) -> None:
    found = by_name(list(check_cache(tmp_path / "cache", tmp_path, {"smol": card()})))
    assert found["weights of smol"].fix == "calm models pull smol"
    assert "98.0 MB" in found["weights of smol"].found


def test_a_disk_too_small_for_the_weights_is_a_failure(tmp_path: Path) -> None:
    huge = card(source=SourceSpec(parts=SOURCE.parts, sha256=SOURCE.sha256, bytes=1 << 60))
    found = by_name(list(check_cache(tmp_path, tmp_path, {"smol": huge})))
    assert found["weights"].status == "fail"


def test_a_damaged_database_is_told_and_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "knowledge.sqlite3"
    assert next(check_knowledge(path)).status == "ok"
    path.write_bytes(b"this is no database" * 100)
    check = next(check_knowledge(path))
    assert (check.status, "recover" in (check.fix or "")) == ("warn", True)
    assert path.read_bytes() == b"this is no database" * 100


def test_a_good_database_says_how_much_is_in_it_and_one_of_a_newer_calm_is_a_failure(tmp_path: Path) -> None:
    path = tmp_path / "knowledge.sqlite3"
    open_writer(path, 0.0).close()
    assert "0 requests" in next(check_knowledge(path)).found
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("INSERT INTO schema_version VALUES (9999, 'of a newer CALM', 0.0)")
    assert next(check_knowledge(path)).status == "fail"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("DELETE FROM schema_version")
    assert next(check_knowledge(path)).status == "warn"


# --- the door -------------------------------------------------------------------------------------


def test_a_port_is_free_or_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        taken.listen()
        taken.settimeout(0.0)
        assert check_port("127.0.0.1", port).status == "fail"
    assert check_port("127.0.0.1", port).status == "ok"
    assert check_port("127.0.0.1", 0).status == "ok"


def test_an_open_door_without_keys_is_a_warning() -> None:
    assert judged_keys("127.0.0.1", 0).status == "ok"
    assert judged_keys("0.0.0.0", 0).status == "warn"
    assert judged_keys("0.0.0.0", 2).status == "ok"


def test_a_check_that_stumbles_is_a_finding() -> None:
    def stumble() -> list[Check]:
        raise BadInput("nonsense")

    def unreadable() -> list[Check]:
        raise PermissionError(13, "Permission denied", "/x")

    assert [(c.status, c.found) for c in guarded("a", stumble)] == [("fail", "nonsense")]
    assert [c.found for c in guarded("a", unreadable)] == ["cannot be looked at: /x Permission denied"]


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("CALM_CONFIG", raising=False)
    for variable, place in (
        ("CALM_STATE_DIR", "state"),
        ("CALM_CACHE_DIR", "cache"),
        ("XDG_CONFIG_HOME", "config"),
    ):
        monkeypatch.setenv(variable, str(tmp_path / place))
    monkeypatch.setenv("CALM_SERVER__PORT", "0")
    directory = tmp_path / "fleet"
    directory.mkdir()
    text = 'name = "remote"\ndescription = "x"\n[engine]\nkind = "openai"\nurl = "http://127.0.0.1:9/v1"\n'
    (directory / "remote.toml").write_text(text)
    return directory


def run(*args: str) -> Result:
    return CliRunner().invoke(calm, ("doctor", *args), prog_name="calm")


def test_doctor_exits_0_without_a_failure_and_writes_nothing(fleet: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    result = run("--fleet", str(fleet), "--json")
    report = json.loads(result.stdout)
    assert (result.exit_code, report["ok"]) == (0, True), result.output
    names = {check["name"] for check in report["checks"]}
    assert {
        "config",
        "cores",
        "memory",
        "GPUs",
        "energy",
        "xllamacpp",
        "fleet",
        "cache",
        "knowledge",
        "keys",
        "port",
    } <= names
    assert sorted(tmp_path.rglob("*")) == before


def test_doctor_goes_on_after_a_broken_configuration_and_exits_1(fleet: Path, tmp_path: Path) -> None:
    file = tmp_path / "calm.toml"
    file.write_text("[server]\nprot = 3\n")
    result = run("--fleet", str(fleet), "--config", str(file))
    assert result.exit_code == 1
    assert "fail  config: " in result.stdout
    assert "did you mean `port`?" in result.stdout
    assert "-> correct it" in result.stdout
    assert "ok    cores: " in result.stdout
    assert result.stdout.splitlines()[-1].startswith("1 failure, ") or "failures" in result.stdout


def test_doctor_tells_an_unreadable_fleet(tmp_path: Path, fleet: Path) -> None:
    result = run("--fleet", str(tmp_path / "nowhere"))
    assert (result.exit_code, "cannot read the fleet directory" in result.stdout) == (1, True)
