"""The watched fleet directory: edits arrive, mistakes are reported and change nothing."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from calm.registry import FleetLoad, load_fleet
from calm.sources.watch import watch_fleet

PATIENCE_S = 30.0
Until = Callable[[Callable[[FleetLoad], bool]], Awaitable[FleetLoad]]


def write(directory: Path, name: str, description: str = "d") -> None:
    source = f'[source]\nparts = ["file:/m"]\nsha256 = "{"a" * 64}"\n'
    text = f'name = "{name}"\ndescription = "{description}"\n{source}'
    temporary = directory / f".{name}"
    temporary.write_text(text)
    temporary.replace(directory / f"{name}.toml")


@asynccontextmanager
async def watching(directory: Path) -> AsyncIterator[Until]:
    """A reader that waits until a load satisfies a condition."""
    stop = asyncio.Event()
    loads: asyncio.Queue[FleetLoad] = asyncio.Queue()

    current = load_fleet(directory)  # before the caller edits anything

    async def pump() -> None:
        async for load in watch_fleet(directory, current, poll_s=0.2, debounce_ms=50, stop=stop):
            loads.put_nowait(load)

    async def until(condition: Callable[[FleetLoad], bool]) -> FleetLoad:
        async with asyncio.timeout(PATIENCE_S):
            while True:
                load = await loads.get()
                if condition(load):
                    return load

    task = asyncio.create_task(pump())
    try:
        yield until
    finally:
        stop.set()
        await asyncio.wait_for(task, PATIENCE_S)


async def test_cards_come_change_and_go(tmp_path: Path) -> None:
    write(tmp_path, "a")
    async with watching(tmp_path) as until:
        write(tmp_path, "b")
        await until(lambda load: list(load.fleet) == ["a", "b"])
        write(tmp_path, "a", "other")
        await until(lambda load: load.fleet["a"].description == "other")
        (tmp_path / "b.toml").unlink()
        await until(lambda load: list(load.fleet) == ["a"])


async def test_a_mistake_is_reported_and_the_last_good_card_serves(tmp_path: Path) -> None:
    write(tmp_path, "a")
    async with watching(tmp_path) as until:
        (tmp_path / "a.toml").write_text("name = ")
        load = await until(lambda load: bool(load.problems))
        assert list(load.fleet) == ["a"]
        write(tmp_path, "a", "mended")
        load = await until(lambda load: not load.problems)
        assert load.fleet["a"].description == "mended"


async def test_a_directory_that_vanishes_and_returns(tmp_path: Path) -> None:
    fleet = tmp_path / "fleet"
    fleet.mkdir()
    write(fleet, "a")
    async with watching(fleet) as until:
        shutil.rmtree(fleet)
        load = await until(lambda load: any(p.file == str(fleet) for p in load.problems))
        assert list(load.fleet) == ["a"]
        fleet.mkdir()
        write(fleet, "b")
        await until(lambda load: list(load.fleet) == ["b"])
