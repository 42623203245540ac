"""What runs the models: the built-in engine, programs on PATH that cards name, and the sandbox."""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from calm.doctor.check import Check, failed, fine, poor
from calm.doctor.machine import CPUINFO
from calm.records import ModelCard

VERSION_S = 5.0
"""How long a program may take to tell its version."""
PROGRAMS = ("llama-server", "ollama", "vllm", "bwrap")
SILENT = frozenset({"vllm"})
"""Not asked for its version: it loads its whole framework for the answer."""

Run = Callable[[Sequence[str]], str]


def check_engines(fleet: Sequence[ModelCard]) -> Iterator[Check]:
    """An adapter has no engine of its own: its base's is looked at once."""
    cards = [card for card in fleet if card.adapter_of is None]
    yield from check_built_in(cards)
    yield from check_programs()
    yield from check_commands(cards)
    yield from check_sandbox(cards)
    yield from check_keys(cards)


def check_built_in(cards: Sequence[ModelCard], cpuinfo: Path = CPUINFO) -> Iterator[Check]:
    """xllamacpp is there, and the processor has the instructions it was built for."""
    needed = any(card.engine.kind == "llamacpp" for card in cards)
    complain = failed if needed else poor
    try:
        found = version("xllamacpp")
    except PackageNotFoundError:
        yield complain(
            "xllamacpp", "not installed: cards of kind llamacpp cannot run", "pip install xllamacpp"
        )
        return
    if lacks_avx2(cpuinfo):
        fix = "use an engine of kind `command` with a llama-server built for this machine"
        yield complain("xllamacpp", f"{found}, but the processor has no AVX2, which it needs", fix)
    else:
        yield fine("xllamacpp", f"{found} (llama.cpp, built in)")


def lacks_avx2(cpuinfo: Path = CPUINFO) -> bool:
    """True for an x86 processor that is known not to have it."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    try:
        flags = re.search(r"^flags\s*:(.*)$", cpuinfo.read_text(), re.MULTILINE)
    except OSError:
        return False
    return flags is not None and "avx2" not in flags[1].split()


def check_programs(
    which: Callable[[str], str | None] = shutil.which, run: Run | None = None
) -> Iterator[Check]:
    """Engines and the sandbox on PATH. None of them is needed, so their absence is no fault."""
    for name in PROGRAMS:
        path = which(name)
        if path is not None:
            told = None if name in SILENT else first_line(run or run_program, [path, "--version"])
            yield fine(name, f"{told} ({path})" if told else path)


def first_line(run: Run, command: Sequence[str]) -> str | None:
    """The first line that has a digit in it: where a version stands, after warnings."""
    lines = [line.strip() for line in run(command).splitlines()]
    return next((line[:100] for line in lines if any(map(str.isdigit, line))), None)


def run_program(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=VERSION_S,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return f"{done.stdout}\n{done.stderr}"


def check_commands(
    cards: Sequence[ModelCard], which: Callable[[str], str | None] = shutil.which
) -> Iterator[Check]:
    """The program that each command card starts."""
    for card in cards:
        program = program_of(card)
        if program is not None and which(program) is None:
            yield poor(
                f"engine of {card.name}",
                f"`{program}` is not on PATH",
                f"install {program}, or correct engine.cmd in {card.name}.toml",
            )


def program_of(card: ModelCard) -> str | None:
    """The first word of the command template; None for other engines and where CALM fills it in."""
    if card.engine.kind != "command" or not card.engine.cmd:
        return None
    try:
        words = shlex.split(card.engine.cmd)
    except ValueError:
        return None
    return words[0] if words and "{" not in words[0] else None


def check_sandbox(
    cards: Sequence[ModelCard], which: Callable[[str], str | None] = shutil.which
) -> Iterator[Check]:
    boxed = [card.name for card in cards if card.sandbox.kind == "bubblewrap"]
    if boxed and which("bwrap") is None:
        fix = 'install bubblewrap (Debian: apt install bubblewrap), or set sandbox.kind = "process"'
        yield failed("sandbox", f"{', '.join(boxed)} asks for bubblewrap, and bwrap is not on PATH", fix)


def check_keys(cards: Sequence[ModelCard]) -> Iterator[Check]:
    """Environment variables that cards name as their API key. Only whether they are set."""
    for card in cards:
        name = card.engine.api_key_env
        if name is not None and not os.environ.get(name):
            yield poor(f"engine of {card.name}", f"{name} is not set", f"export {name}=… before `calm serve`")
