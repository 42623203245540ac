"""Every command the documentation shows is run, or at least parsed, so that none of them rots.

A fence marked `sh` is run by bash against a real server, with the address in it replaced by that server's; a
fence marked `python` is run by Python. The examples of the command-line reference are parsed by the commands
themselves. What cannot run in a test stands in NOT_RUN with the reason.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from calm.cli.app import calm

from .conftest import Server

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(sh|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)
NOT_RUN = {
    "make serve": "the server fixture is what it starts; make bench-fresh runs it in a fresh clone",
    "make test": "this is it",
    "make bench-": "a benchmark: minutes, and figures rather than a pass",
    "source .venv": "the test's PATH has the environment's programs",
    "sudo ": "changes the machine",
}


def fences(language: str) -> Iterator[tuple[str, str]]:
    for page in PAGES:
        for number, found in enumerate(FENCE.finditer(page.read_text(encoding="utf-8")), 1):
            if found[1] == language:
                yield f"{page.relative_to(ROOT)}#{number}", found[2]


def runnable(script: str) -> str:
    """The script without the lines that NOT_RUN names."""
    return "\n".join(line for line in script.splitlines() if not line.lstrip().startswith(tuple(NOT_RUN)))


@pytest.mark.models
@pytest.mark.parametrize(
    ("place", "script"), list(fences("sh")), ids=lambda value: str(value).split("\n")[0][:60]
)
def test_a_shell_command_of_the_docs_works(place: str, script: str, server: Server, tmp_path: Path) -> None:
    text = runnable(script)
    if not text.strip():
        pytest.skip(f"{place}: " + next(why for start, why in NOT_RUN.items() if start in script))
    card = (ROOT / "fleet" / "smollm2-135m.toml").read_text(encoding="utf-8")
    (tmp_path / "my-model.toml").write_text(card.replace('"smollm2-135m"', '"my-model"'), encoding="utf-8")
    shutil.copytree(ROOT / "fleet", tmp_path / "fleet")
    ran = run(["bash", "-euo", "pipefail", "-c", text], server, tmp_path)
    assert ran.returncode == 0, f"{place}:\n{text}\n{ran.stdout}{ran.stderr}"


@pytest.mark.models
@pytest.mark.parametrize(
    ("place", "script"), list(fences("python")), ids=lambda value: str(value).split("\n")[0][:60]
)
def test_a_python_example_of_the_docs_works(place: str, script: str, server: Server, tmp_path: Path) -> None:
    ran = run([sys.executable, "-c", script], server, tmp_path)
    assert ran.returncode == 0, f"{place}:\n{script}\n{ran.stdout}{ran.stderr}"


def run(command: list[str], server: Server, directory: Path) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "CALM_URL": server.url,
        "CALM_STATE_DIR": str(directory / "state"),
        "XDG_CONFIG_HOME": str(directory / "config"),
    }
    command = [part.replace("http://127.0.0.1:8420", server.url) for part in command]
    return subprocess.run(
        command, env=environment, cwd=directory, capture_output=True, text=True, timeout=100, check=False
    )


def examples() -> list[str]:
    """The indented example lines of the command-line reference, joined over line continuations."""
    page = (ROOT / "docs" / "reference" / "cli.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^Example:\n\n((?:    .*\n)+)", page, re.MULTILINE)
    lines = re.sub(r"\\\n *", " ", "".join(blocks)).splitlines()
    return [line.strip() for line in lines if "calm " in line]


@pytest.mark.parametrize("line", examples())
def test_an_example_of_the_command_line_reference_parses(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-model.toml").touch()  # examples may name files that exist at the reader's
    alone = re.split(r" {3,}", line.replace("$(", " ").replace(")", " ").strip())[0]  # less what explains it
    words = shlex.split(alone, comments=True)
    words = words[words.index("calm") + 1 :]
    words = words[: words.index("|")] if "|" in words else words
    command: click.Command = calm
    context = click.Context(calm, info_name="calm")
    while isinstance(command, click.Group) and words:
        name, found, words = command.resolve_command(context, words)
        assert found is not None, line
        command, context = found, click.Context(found, parent=context, info_name=name)
    command.make_context(context.info_name, words, parent=context.parent)


def test_every_verb_has_help_with_an_example() -> None:
    def verbs(command: click.Command, path: str) -> Iterator[tuple[str, click.Command]]:
        if isinstance(command, click.Group):
            for name, child in command.commands.items():
                yield from verbs(child, f"{path} {name}")
        else:
            yield path, command

    without = [path for path, command in verbs(calm, "calm") if "Example" not in (command.help or "")]
    assert without == []
