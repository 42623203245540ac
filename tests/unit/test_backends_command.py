"""Command templates: filled in without a shell, refused with a reason."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec
import pytest

from calm.backends.command import CommandBackend, command_line, endpoint_of, placeholder_values
from calm.errors import LoadFailed
from calm.records import EngineSpec, ModelCard

WEIGHTS, SOCKET = Path("/w/my model.gguf"), Path("/r/e.sock")


def left_in(directory: Path) -> list[Path]:
    return list(directory.iterdir())


def card(cmd: str | None, **fields: object) -> ModelCard:
    engine = EngineSpec(kind="command", cmd=cmd, slots=3, start_timeout_s=30.0)
    base = ModelCard(name="m", description="d", context=99, engine=engine)
    return msgspec.structs.replace(base, **fields)


def fill(cmd: str | None, weights: Path | None = WEIGHTS) -> list[str]:
    of = card(cmd)
    return command_line(of, placeholder_values(of, weights, 2, 8000, SOCKET))


def test_every_placeholder() -> None:
    words = fill("run {path} {port} {socket} {host} {threads} {context} {slots} {name}")
    assert words == ["run", str(WEIGHTS), "8000", str(SOCKET), "127.0.0.1", "2", "99", "3", "m"]


def test_words_are_split_before_values_go_in() -> None:
    assert fill("run -m {path} --port={port}") == ["run", "-m", str(WEIGHTS), "--port=8000"]
    assert fill("run 'a b' \"$HOME;ls\" {port}") == ["run", "a b", "$HOME;ls", "8000"]


def test_json_in_a_word_is_left_alone() -> None:
    assert fill("""run '{"a": {"b": 1}}' {port}""") == ["run", '{"a": {"b": 1}}', "8000"]


@pytest.mark.parametrize(
    ("cmd", "weights", "complaint"),
    [
        (None, WEIGHTS, "it is empty"),
        ("", WEIGHTS, "it is empty"),
        ("run 'open {port}", WEIGHTS, "No closing quotation"),
        ("run {prot}", WEIGHTS, "unknown placeholder {prot}; there are {path} {port}"),
        ("run -m {path} {port}", None, "the card has no source"),
        ("run -m {path}", WEIGHTS, "must contain {port} or {socket}"),
    ],
)
def test_mistakes_are_named(cmd: str | None, weights: Path | None, complaint: str) -> None:
    with pytest.raises(LoadFailed) as failed:
        fill(cmd, weights)
    assert complaint in str(failed.value)
    assert failed.value.field == "engine.cmd"


def test_a_sandbox_without_network_needs_a_socket() -> None:
    caged = card("run {port}", sandbox=msgspec.convert({"kind": "bubblewrap"}, type(card("x").sandbox)))
    with pytest.raises(LoadFailed, match="no network"):
        command_line(caged, placeholder_values(caged, None, 1, 1, SOCKET))


def test_where_it_is_reached() -> None:
    assert endpoint_of(card("run {port}"), 8000, SOCKET).base_url == "http://127.0.0.1:8000"
    assert endpoint_of(card("run {port}"), 8000, SOCKET).socket is None
    assert endpoint_of(card("run {socket}"), 8000, SOCKET).socket == str(SOCKET)


async def test_an_engine_that_never_answers_is_given_up(tmp_path: Path) -> None:
    sleeper = f"{sys.executable} -I -S -u -c 'print(1234); import time; time.sleep(600)' {{port}}"
    engine = EngineSpec(kind="command", cmd=sleeper, start_timeout_s=0.3)
    slow = ModelCard(name="m", description="d", engine=engine)
    with pytest.raises(LoadFailed, match=r"start_timeout_s = 0\.3") as failed:
        await CommandBackend(tmp_path).start(slow, None, 1)
    assert "last output" in str(failed.value) or "without any output" in str(failed.value)
    assert left_in(tmp_path) == []


async def test_its_environment_is_its_own(tmp_path: Path) -> None:
    code = "import os; print(sorted(os.environ)); raise SystemExit(5)"
    engine = EngineSpec(kind="command", cmd=f'{sys.executable} -I -S -c "{code}" {{port}}', env={"MINE": "1"})
    backend = CommandBackend(tmp_path, inherited={"PATH": "/bin", "OPENAI_API_KEY": "sk-secret"})
    with pytest.raises(LoadFailed, match="exit code 5") as failed:
        await backend.start(ModelCard(name="m", description="d", engine=engine), None, 1)
    assert "'MINE'" in str(failed.value)
    assert "OPENAI" not in str(failed.value)
