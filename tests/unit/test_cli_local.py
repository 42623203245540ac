"""Commands that need no server: cards, weights, keys, configuration, knowledge; `serve` until it serves."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from calm.cli.app import calm
from calm.cli.logs import set_up_logging, without_secrets
from calm.cli.serve import how_to_ask
from calm.clock import SystemClock
from calm.settings import Settings

WEIGHTS = b"GGUF and so on"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine where nothing was configured, and nobody serves."""
    for name in ("CALM_CONFIG", "CALM_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    for variable, place in (
        ("CALM_STATE_DIR", "state"),
        ("CALM_CACHE_DIR", "cache"),
        ("XDG_CONFIG_HOME", "config"),
    ):
        monkeypatch.setenv(variable, str(tmp_path / place))
    monkeypatch.setenv("CALM_URL", "http://127.0.0.1:1")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def fleet(home: Path) -> Path:
    directory = home / "fleet"
    directory.mkdir()
    write_card(directory / "smol.toml")
    return directory


def write_card(file: Path, *, name: str | None = None, sha256: str | None = None, extra: str = "") -> Path:
    weights = file.parent / "weights" / "model.gguf"
    weights.parent.mkdir(exist_ok=True)
    weights.write_bytes(WEIGHTS)
    file.write_text(
        f'name = "{name or file.stem}"\ndescription = "A small model."\n{extra}\n'
        f'[source]\nparts = ["file:{weights}"]\n'
        f'sha256 = "{sha256 or hashlib.sha256(WEIGHTS).hexdigest()}"\nbytes = {len(WEIGHTS)}\n'
    )
    return file


def run(*args: str) -> Result:
    return CliRunner().invoke(calm, args, prog_name="calm")


# --- models ---------------------------------------------------------------------------------------


def test_without_a_server_the_files_are_listed_and_it_is_said(fleet: Path) -> None:
    (fleet / "bad.toml").write_text('name = "bad"\ndescripton = "x"\n')
    result = run("models", "list")
    assert result.exit_code == 0, result.output
    assert ["smol", "llamacpp", "local", "2048", "chat,", "completion", "cached", "14", "B"] in [
        line.split() for line in result.stdout.splitlines()
    ]
    assert "no server answers" in result.stderr
    assert "bad.toml: descripton: unknown field (did you mean `description`?)" in result.stderr
    found = json.loads(run("models", "list", "--json").stdout)
    assert found["models"][0]["name"] == "smol"
    assert len(found["problems"]) == 2


def test_show_reads_the_card_and_hides_the_environment(fleet: Path) -> None:
    text = 'engine = {kind = "command", cmd = "serve {port}", env = {TOKEN = "hunter22"}}'
    (fleet / "boxed.toml").write_text(f'name = "boxed"\ndescription = "x"\n{text}\n')
    shown = run("models", "show", "boxed").stdout
    assert "engine.env.TOKEN" in shown
    assert "hunter22" not in shown + run("models", "show", "boxed", "--json").stdout
    assert "did you mean `boxed`?" in run("models", "show", "boxd").stderr


def test_add_checks_first_and_names_every_mistake(fleet: Path, home: Path) -> None:
    card = home / "new.toml"
    card.write_text('name = "new"\ndescription = "x"\ncontext = 0\n[engine]\nslot = 2\n')
    result = run("models", "add", str(card))
    assert result.exit_code == 1
    assert "engine.slot: unknown field (did you mean `slots`?)" in result.stderr
    assert "context: must be at least 1" in result.stderr
    assert not (fleet / "new.toml").exists()


def test_add_and_remove(fleet: Path, home: Path) -> None:
    card = write_card(home / "anything.toml", name="new")
    assert run("models", "add", str(card)).exit_code == 0
    assert (fleet / "new.toml").read_bytes() == card.read_bytes()
    again = run("models", "add", str(card))
    assert (again.exit_code, "--replace" in again.stderr) == (1, True)
    assert run("models", "add", str(card), "--replace").exit_code == 0
    assert run("models", "remove", "new").exit_code == 0
    assert not (fleet / "new.toml").exists()
    gone = run("models", "remove", "new")
    assert (gone.exit_code, "no model `new`" in gone.stderr) == (1, True)


def test_pull_verifies_and_reports_each(fleet: Path) -> None:
    write_card(fleet / "wrong.toml", sha256="ab" * 32)
    result = run("models", "pull", "--verify")
    assert result.exit_code == 1
    assert "verified smol" in result.stdout
    assert "failed  wrong" in result.stdout
    assert "does not match its checksum" in result.stdout
    assert "error: 1 file could not be fetched: wrong" in result.stderr
    good = run("models", "pull", "smol", "--json")
    assert (good.exit_code, json.loads(good.stdout)[0]["error"]) == (0, None)
    assert run("models", "pull", "nobody").exit_code == 1


# --- keys -----------------------------------------------------------------------------------------


def test_keys_are_made_once_listed_without_them_and_revoked(home: Path) -> None:
    made = run("keys", "create", "alice")
    key = made.stdout.strip()
    assert key.startswith("calm-")
    listed = run("keys", "list")
    assert "alice" in listed.stdout
    assert key not in listed.output + (home / "state" / "keys.toml").read_text()
    assert "exists" in run("keys", "create", "alice").stderr
    assert json.loads(run("keys", "create", "ops", "--admin", "--json").stdout)["role"] == "admin"
    assert run("keys", "revoke", "alice").exit_code == 0
    assert [entry["name"] for entry in json.loads(run("keys", "list", "--json").stdout)] == ["ops"]
    assert run("keys", "revoke", "alice").exit_code == 1


# --- config ---------------------------------------------------------------------------------------


def test_config_show_says_where_each_value_comes_from(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = home / "calm.toml"
    file.write_text(
        '[server]\nport = 9000\nhost = "::1"\n[memory]\nbudget = "1GiB"\n[goals.night]\nenergy = 1\n'
    )
    monkeypatch.setenv("CALM_SERVER__PORT", "9001")
    result = run("config", "show", "--config", str(file), "--budget", "2GiB", "--json")
    found = {entry["name"]: (entry["value"], entry["origin"]) for entry in json.loads(result.stdout)}
    assert found["server.port"] == (9001, "environment CALM_SERVER__PORT")
    assert found["server.host"] == ("::1", f"file {file}")
    assert found["memory.budget"] == ("2GiB", "flag")
    assert found["memory.eviction"] == ("calm", "default")
    assert found["goals.night"][1] == f"file {file}"
    fields = sum(
        len(getattr(Settings(), s).__struct_fields__) for s in Settings.__struct_fields__ if s != "goals"
    )
    assert len(found) == fields + 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[server]\nprot = 1\n", "did you mean `port`?"),
        ('[memory]\nbudget = "lots"\n', "is no size"),
        ('[memory]\neviction = "mru"\n', "mru"),
        ('[policy]\nname = "clam"\n', "clam"),
        ('[policy]\nname = "paper:nonsense"\n', "nonsense"),
        ('[policy]\ngoal = "fast"\n', "no goal `fast`; there are balanced"),
        ("[policy]\nquality_floor = 70\n", "policy.quality_floor"),
        ("[policy]\nquality_floor = 0\n", "policy.quality_floor"),
        ("[policy]\nquality_floor = nan\n", "policy.quality_floor"),
        ("[goals.mine]\nlatency = -1\n", "goals.mine.latency"),
        ("[server\n", "not valid TOML"),
    ],
)
def test_config_check_names_setting_and_reason(home: Path, text: str, words: str) -> None:
    file = home / "calm.toml"
    file.write_text(text)
    result = run("config", "check", str(file))
    assert (result.exit_code, words in result.stderr) == (1, True), result.output
    assert result.stderr.startswith("error: ")


def test_config_check_of_a_good_and_of_a_missing_file(home: Path) -> None:
    file = home / "calm.toml"
    file.write_text(
        '[policy]\ngoal = "night"\nquality_floor = 0.7\n[goals.night]\nenergy = 1\nlatency = 0\nquality = 0\n'
    )
    assert run("config", "check", str(file)).stdout == f"ok: {file}\n"
    assert json.loads(run("config", "check", "--json").stdout) == {"ok": True, "file": None}
    assert "no such config file" in run("config", "check", str(home / "none.toml")).stderr


# --- knowledge ------------------------------------------------------------------------------------


def test_knowledge_is_read_from_the_file(home: Path) -> None:
    from calm.stores.sqlite import SqliteStore

    assert "no knowledge database" in run("knowledge", "summary").stderr
    (home / "state").mkdir()
    path = home / "state" / "knowledge.sqlite3"
    SqliteStore(
        path, store_prompts=False, retention_days=None, max_requests=None, clock=SystemClock()
    ).close()
    assert "nothing stored yet" in run("knowledge", "summary").stdout
    assert json.loads(run("knowledge", "summary", "--json").stdout)["requests"] == 0
    out = home / "out"
    assert run("knowledge", "export", "--out", str(out)).exit_code == 0
    assert {file.name for file in out.iterdir()} == {"requests.parquet", "feedback.parquet", "events.parquet"}
    assert run("knowledge", "export", "--out", str(out)).exit_code == 1
    assert run("knowledge", "export", "--out", str(out), "--force", "--since", "2026-11-01").exit_code == 0
    assert run("knowledge", "export", "--out", str(out), "--since", "yesterday").exit_code == 2


# --- serve ----------------------------------------------------------------------------------------


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """`calm.wiring` that is ready at once and returns."""
    seen: list[Settings] = []

    async def run_server(settings: Settings, *, on_ready: Callable[[str], None]) -> None:
        seen.append(settings)
        on_ready(f"http://127.0.0.1:{settings.server.port}")

    module = types.ModuleType("calm.wiring")
    module.run_server = run_server  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "calm.wiring", module)
    monkeypatch.setattr("calm.cli.logs.set_up_logging", lambda *_: None)
    return seen


def test_serve_turns_flags_into_settings_and_says_how_to_ask(fleet: Path, served: list[Settings]) -> None:
    flags = (
        "--port",
        "9000",
        "--policy",
        "random",
        "--goal",
        "energy",
        "--budget",
        "1GiB",
        "--log-level",
        "error",
    )
    result = run("serve", "--fleet", str(fleet), *flags)
    assert result.exit_code == 0, result.output
    (settings,) = served
    assert (settings.server.port, settings.policy.name, settings.policy.goal) == (9000, "random", "energy")
    assert (settings.memory.budget, settings.log.level, settings.fleet.dir) == ("1GiB", "error", str(fleet))
    for words in (
        "curl http://127.0.0.1:9000/v1/chat/completions",
        "--url http://127.0.0.1:9000",
        "OpenAI(base_url",
    ):
        assert words in result.stdout


def test_serve_goes_on_without_a_model_that_cannot_be_had(fleet: Path, served: list[Settings]) -> None:
    (fleet / "lost.toml").write_text(
        'name = "lost"\ndescription = "x"\n[source]\nparts = ["file:/nowhere/x.gguf"]\n'
        f'sha256 = "{"0" * 64}"\n'
    )
    result = run("serve", "--fleet", str(fleet))
    assert (result.exit_code, len(served)) == (0, 1)
    assert "warning: lost: /nowhere/x.gguf does not exist" in result.stderr


def test_serve_refuses_to_start_with_nothing_to_serve(home: Path, served: list[Settings]) -> None:
    empty = home / "empty"
    empty.mkdir()
    assert "has no model cards" in run("serve", "--fleet", str(empty)).stderr
    (empty / "lost.toml").write_text(
        'name = "lost"\ndescription = "x"\n[source]\nparts = ["file:/nowhere/x.gguf"]\n'
        f'sha256 = "{"0" * 64}"\n'
    )
    assert "no model's weights could be fetched" in run("serve", "--fleet", str(empty)).stderr
    (empty / "lost.toml").write_text("name = 3")
    assert "no card in" in run("serve", "--fleet", str(empty)).stderr
    assert not served


def test_serve_without_fetching_asks_no_one(
    fleet: Path, served: list[Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CALM_FLEET__FETCH", "false")
    monkeypatch.setattr("calm.cli.weights.fetch", lambda *_, **__: pytest.fail("fetched"))
    write_card(fleet / "lost.toml", sha256="ab" * 32)
    assert run("serve", "--fleet", str(fleet)).exit_code == 0


def test_serve_refuses_an_open_door_before_it_fetches(fleet: Path, served: list[Settings]) -> None:
    result = run("serve", "--fleet", str(fleet), "--host", "0.0.0.0")
    assert (result.exit_code, "calm keys create" in result.stderr) == (1, True)
    assert run("serve", "--fleet", str(fleet), "--host", "0.0.0.0", "--insecure").exit_code == 0


def test_how_to_ask_names_an_address_that_can_be_called() -> None:
    assert "curl http://127.0.0.1:8420/v1" in how_to_ask("http://0.0.0.0:8420")
    keyed = how_to_ask("http://127.0.0.1:8420", keyed=True)
    assert "Bearer $CALM_API_KEY" in keyed
    assert 'os.environ["CALM_API_KEY"]' in keyed
    assert "--url" not in keyed


# --- logging --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "GET https://bob:hunter22@host/simple/",
        "headers {'Authorization': 'Bearer hunter22.hunter22'}",
        "key calm-hunter22" + "x" * 35,
        "token=hunter22 is wrong",
        'api_key: "hunter22"',
        "HF_TOKEN hf_hunter22hunter22hunter22",
    ],
)
def test_secrets_do_not_reach_the_log(text: str) -> None:
    assert "hunter22" not in without_secrets(text)


def test_plain_text_is_logged_as_it_is() -> None:
    text = "smol: loading -> ready (17 tokens, key=3) at http://127.0.0.1:8420/v1"
    assert without_secrets(text) == text


def test_log_lines_are_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    chatty = logging.getLogger("aiohttp").level
    try:
        set_up_logging("info", stream)
        logging.captureWarnings(False)
        logging.getLogger("calm.test").info("up at %s", "http://u:hunter22@h")
        logging.getLogger("calm.test").warning("careful")
        logging.getLogger("calm.test").debug("unseen")
    finally:
        root.handlers[:] = before
        root.setLevel(level)
        logging.getLogger("aiohttp").setLevel(chatty)
    first, second = stream.getvalue().splitlines()
    assert first.endswith(" calm.test: up at http://[hidden]@h")
    assert second.endswith(" warning calm.test: careful")
