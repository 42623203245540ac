"""What the local backends share: a private directory, waiting for health, and the running engine itself."""

from __future__ import annotations

import asyncio
import shutil
import socket
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from calm.backends.process import Child, describe_exit, resident_bytes
from calm.backends.upstream import HttpUpstream
from calm.errors import EngineLost, LoadFailed
from calm.records import Endpoint, ModelCard

# sockaddr_un.sun_path holds 108 bytes with its final NUL on Linux, 104 on macOS and the BSDs.
SOCKET_PATH_BYTES = 103
# llama.cpp takes a host name for a unix socket by this ending.
SOCKET_NAME = "e.sock"
FIRST_POLL_S, LONGEST_POLL_S = 0.01, 0.25
PROBE_TIMEOUT_S = 5.0


class ChildEngine:
    """A RunningEngine that is a guarded child of ours; `carry` tells it which adapters it took."""

    def __init__(self, child: Child, endpoint: Endpoint, home: Path, stop_timeout_s: float) -> None:
        self._child = child
        self._endpoint = endpoint
        self._home = home
        self._stop_timeout_s = stop_timeout_s
        self._asked_to_stop = False
        self._adapters: Mapping[str, Endpoint] = {}
        self._refused: Mapping[str, str] = {}

    @property
    def endpoint(self) -> Endpoint:
        return self._endpoint

    def adapters(self) -> Mapping[str, Endpoint]:
        return self._adapters

    def refused(self) -> Mapping[str, str]:
        return self._refused

    def carry(
        self, adapters: Mapping[str, Endpoint], refused: Mapping[str, str], base: Endpoint | None = None
    ) -> Self:
        """Which adapters the engine serves, and why it does not serve the others, by name.

        `base` is where the base is asked, when that differs from an engine without adapters.
        """
        self._adapters, self._refused = adapters, refused
        self._endpoint = base or self._endpoint
        return self

    def pids(self) -> tuple[int, ...]:
        return self._child.pids()

    def footprint_bytes(self) -> int | None:
        return resident_bytes(self.pids())

    async def died(self) -> str:
        code = await self._child.wait()
        if self._asked_to_stop:
            await asyncio.Event().wait()
        return with_last_words(describe_exit(code), self._child)

    async def stop(self) -> None:
        self._asked_to_stop = True
        await self._child.stop(self._stop_timeout_s)
        remove_home(self._home)

    async def kill(self) -> None:
        """End it without its leave, also when the caller is cancelled meanwhile."""
        self._asked_to_stop = True
        await _finish(self._child)
        remove_home(self._home)


def make_home(run_dir: Path) -> Path:
    """A fresh directory only this user can enter, short enough for a unix socket inside it."""
    run_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    for parent in (run_dir, Path(tempfile.gettempdir())):
        home = Path(tempfile.mkdtemp(prefix="calm-", dir=parent)).resolve()
        if len(bytes(home / SOCKET_NAME)) <= SOCKET_PATH_BYTES:
            return home
        home.rmdir()
    raise LoadFailed(f"{run_dir} is too long a path for a unix socket: choose a shorter run directory")


def absolute(path: Path) -> Path:
    """Engines may run in another directory; links stay as they are."""
    return path.absolute()


def remove_home(home: Path) -> None:
    shutil.rmtree(home, ignore_errors=True)


def free_port() -> int:
    """A loopback port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def bring_up(
    card: ModelCard,
    command: list[str],
    environment: dict[str, str],
    endpoint: Endpoint,
    home: Path,
    health: str,
) -> ChildEngine:
    """Spawn, wait until the engine answers its health check, or leave nothing behind."""
    child = await Child.spawn(command, environment, nice=card.sandbox.nice, cleanup=home)
    try:
        await _until_healthy(card, child, endpoint, health)
    except BaseException:
        await _finish(child)
        raise
    return ChildEngine(child, endpoint, home, card.engine.stop_timeout_s)


async def _finish(child: Child) -> None:
    """Kill and reap even when the caller is cancelled a second time meanwhile."""
    killing = asyncio.ensure_future(child.kill())
    while not killing.done():
        try:
            await asyncio.shield(killing)
        except asyncio.CancelledError:
            continue


async def _until_healthy(card: ModelCard, child: Child, endpoint: Endpoint, health: str) -> None:
    polling = asyncio.create_task(_poll(endpoint, health))
    exit_ = asyncio.create_task(child.wait())
    try:
        done, _ = await asyncio.wait(
            (polling, exit_), timeout=card.engine.start_timeout_s, return_when=asyncio.FIRST_COMPLETED
        )
    finally:
        polling.cancel()
        exit_.cancel()
        await asyncio.gather(polling, exit_, return_exceptions=True)
    if exit_ in done:
        reason = f"model {card.name}: the engine ended while starting, {describe_exit(exit_.result())}"
        raise LoadFailed(with_last_words(reason, child))
    if polling not in done:
        reason = (
            f"model {card.name}: no healthy answer from {health} within "
            f"engine.start_timeout_s = {card.engine.start_timeout_s:g} s"
        )
        raise LoadFailed(with_last_words(reason, child))


async def _poll(endpoint: Endpoint, health: str) -> None:
    pause_s = FIRST_POLL_S
    async with HttpUpstream(connect_timeout_s=PROBE_TIMEOUT_S) as upstream:
        while not await _answers(upstream, endpoint, health):
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 1.5, LONGEST_POLL_S)


async def _answers(upstream: HttpUpstream, endpoint: Endpoint, health: str) -> bool:
    try:
        async with asyncio.timeout(PROBE_TIMEOUT_S), upstream.get(endpoint, health) as reply:
            await reply.read()
            return reply.status == 200
    except (EngineLost, TimeoutError):
        return False


def with_last_words(reason: str, child: Child) -> str:
    words = child.last_words()
    return f"{reason}; its last output:\n{words}" if words else f"{reason}, without any output"
