"""The fleet directory as a stream of fleets: an edit serves within a second, a bad edit changes nothing.

Notifications are only a hint to look: on a network or container mount they may not come, and a directory may
be replaced as a whole, so the files' names, sizes and times are compared at every `poll_s` as well.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from pathlib import Path

from watchfiles import awatch

from calm.errors import BadInput
from calm.registry.fleet import Fleet, FleetLoad, card_files, keep_previous, load_fleet
from calm.registry.problems import CardProblem

Signature = tuple[tuple[str, int, int, int], ...]


async def watch_fleet(
    directory: Path,
    current: FleetLoad | None = None,
    *,
    poll_s: float = 1.0,
    debounce_ms: int = 200,
    stop: asyncio.Event | None = None,
) -> AsyncIterator[FleetLoad]:
    """Yields whenever the fleet or its problems differ from the last ones (`current`, else the first).

    A model whose file turned bad keeps its last good card. Ends when `stop` is set or the task is cancelled.
    """
    last = current if current is not None else await asyncio.to_thread(_load, directory, Fleet())
    seen: Signature | None = None
    async with aclosing(_looks(directory, poll_s, debounce_ms, stop or asyncio.Event())) as looks:
        async for _ in looks:
            now = await asyncio.to_thread(signature, directory)
            if now == seen and now is not None:
                continue
            seen = now
            load = await asyncio.to_thread(_load, directory, last.fleet)
            if load != last:
                last = load
                yield load


def signature(directory: Path) -> Signature | None:
    """Cheap and sufficient: a file that keeps name, size, time and inode has not been edited."""
    try:
        stats = [(file.name, file.stat()) for file in card_files(directory)]
    except (BadInput, OSError):
        return None
    return tuple((name, stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in stats)


def _load(directory: Path, previous: Fleet) -> FleetLoad:
    """A directory that cannot be read stops nobody who is serving."""
    try:
        return keep_previous(previous, load_fleet(directory))
    except BadInput as error:
        problem = CardProblem(file=str(directory), field=None, reason=error.message)
        return FleetLoad(previous, (problem,))


async def _looks(
    directory: Path, poll_s: float, debounce_ms: int, stop: asyncio.Event
) -> AsyncGenerator[None, None]:
    """A moment to look: at once, at every change, every `poll_s`; until `stop`."""
    yield
    while not stop.is_set():
        try:
            async for _ in awatch(
                directory,
                watch_filter=None,
                debounce=debounce_ms,
                rust_timeout=int(poll_s * 1000),
                yield_on_timeout=True,
                stop_event=stop,
                recursive=False,
            ):
                yield
        except (OSError, RuntimeError):  # the directory is gone, or this mount cannot be watched
            await _pause(stop, poll_s)
            yield


async def _pause(stop: asyncio.Event, seconds: float) -> None:
    try:
        await asyncio.wait_for(stop.wait(), seconds)
    except TimeoutError:
        pass
