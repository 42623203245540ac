"""Puts the operator's isolation in front of an engine's command line.

`bubblewrap` gives an engine a read-only view of the machine, no network at all, and no sight of other
processes; only its private directory, where its unix socket and its TMPDIR lie, is writable. Engines that are
asked over a unix socket need no network, which is why this works.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from calm.errors import LoadFailed
from calm.records import ModelCard


def confined(card: ModelCard, command: Sequence[str], home: Path, weights: Path | None) -> list[str]:
    """The command to run instead of `command`. Raises LoadFailed when the sandbox cannot be had."""
    wrapped = [*card.sandbox.wrapper, *command]
    if card.sandbox.kind == "process":
        return wrapped
    program = shutil.which("bwrap")
    if program is None:
        raise LoadFailed(
            f"model {card.name}: sandbox.kind = bubblewrap needs the program bwrap, which is not installed "
            "(Debian, Ubuntu: apt install bubblewrap); or set sandbox.kind = process",
            field="sandbox.kind",
        )
    return [program, *bubblewrap_arguments(home, weights), *wrapped]


def bubblewrap_arguments(home: Path, weights: Path | None) -> list[str]:
    arguments = ["--die-with-parent", "--unshare-net", "--unshare-pid", "--unshare-ipc", "--new-session"]
    arguments += ["--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc"]
    if weights is not None:
        arguments += ["--ro-bind", str(weights), str(weights)]
    return [*arguments, "--bind", str(home), str(home), "--setenv", "TMPDIR", str(home), "--"]
