"""Any model server that a command line starts: llama-server, vLLM, a script of one's own.

The template in `engine.cmd` is split like a shell would and its placeholders are filled in afterwards, word
by word, so no value can add an argument and no shell is involved. The engine listens on the loopback port or
the unix socket it is given and answers 200 at `engine.health` when it is ready. Its adapters are those it was
started with, and those it loads when asked (`served_adapters`).
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from calm.backends.engine import (
    SOCKET_NAME,
    ChildEngine,
    absolute,
    bring_up,
    free_port,
    make_home,
    remove_home,
)
from calm.backends.process import clean_environment
from calm.backends.sandbox import confined
from calm.backends.served_adapters import find_adapters
from calm.backends.upstream import HttpUpstream
from calm.errors import LoadFailed
from calm.records import AdapterFile, Endpoint, ModelCard

HOST = "127.0.0.1"
PLACEHOLDER = re.compile(r"\{([a-z_]+)\}")


class CommandBackend:
    """Starts engines by their command template. `run_dir` is where their sockets and private files lie."""

    def __init__(self, run_dir: Path, *, inherited: Mapping[str, str] = os.environ) -> None:
        self._run_dir = run_dir
        self._inherited = inherited

    async def start(
        self, card: ModelCard, weights: Path | None, threads: int, adapters: Sequence[AdapterFile] = ()
    ) -> ChildEngine:
        engine = await self._start(card, weights, threads)
        try:
            async with HttpUpstream() as upstream:
                found = await find_adapters(
                    upstream,
                    engine.endpoint,
                    adapters,
                    same_machine=True,
                    timeout_s=card.engine.start_timeout_s,
                )
        except BaseException:
            await engine.kill()
            raise
        return engine.carry(found.adapters, found.refused, found.base)

    async def _start(self, card: ModelCard, weights: Path | None, threads: int) -> ChildEngine:
        home = make_home(self._run_dir)
        try:
            port = free_port()
            values = placeholder_values(card, weights, threads, port, home / SOCKET_NAME)
            command = confined(card, command_line(card, values), home, weights)
            environment = clean_environment(self._inherited, card.engine.env)
            endpoint = endpoint_of(card, port, home / SOCKET_NAME)
            return await bring_up(card, command, environment, endpoint, home, card.engine.health)
        except BaseException:
            remove_home(home)
            raise


def placeholder_values(
    card: ModelCard, weights: Path | None, threads: int, port: int, socket: Path
) -> dict[str, str]:
    values = {
        "port": str(port),
        "socket": str(socket),
        "host": HOST,
        "threads": str(threads),
        "context": str(card.context),
        "slots": str(card.engine.slots),
        "name": card.name,
    }
    return values if weights is None else {**values, "path": str(absolute(weights))}


def command_line(card: ModelCard, values: Mapping[str, str]) -> list[str]:
    """The template's words with their placeholders filled in. Raises LoadFailed for what cannot work."""
    words = _split(card)
    named = {name for word in words for name in PLACEHOLDER.findall(word)}
    if unknown := named - values.keys() - {"path"}:
        known = " ".join(f"{{{name}}}" for name in ("path", *values))
        raise _mistake(card, f"unknown placeholder {{{min(unknown)}}}; there are {known}")
    if "path" in named - values.keys():
        raise _mistake(card, "it uses {path}, but the card has no source")
    if not named & {"port", "socket"}:
        raise _mistake(card, "it must contain {port} or {socket}, or CALM cannot reach the engine")
    if card.sandbox.kind == "bubblewrap" and "socket" not in named:
        raise _mistake(card, "sandbox.kind = bubblewrap leaves no network: let it listen on {socket}")
    return [PLACEHOLDER.sub(lambda match: values[match[1]], word) for word in words]


def endpoint_of(card: ModelCard, port: int, socket: Path) -> Endpoint:
    model = card.engine.upstream_model or card.name
    if "{socket}" in (card.engine.cmd or ""):
        return Endpoint(base_url="http://localhost", model=model, socket=str(socket))
    return Endpoint(base_url=f"http://{HOST}:{port}", model=model)


def _split(card: ModelCard) -> list[str]:
    try:
        words = shlex.split(card.engine.cmd or "")
    except ValueError as error:
        raise _mistake(card, str(error)) from None
    if not words:
        raise _mistake(card, "it is empty; e.g. llama-server -m {path} --port {port}")
    return words


def _mistake(card: ModelCard, what: str) -> LoadFailed:
    return LoadFailed(f"model {card.name}: engine.cmd: {what}", field="engine.cmd")
