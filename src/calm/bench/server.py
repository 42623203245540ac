"""A CALM server of its own for each trial, so that no trial inherits what another one learned or loaded.

The server is a process, started as an operator starts it, with a directory of its own for state, configuration
and sockets; only the weights are shared. It takes the machine's settings from the user's own configuration
(cores, threads, energy, named goals) and everything that a trial compares from the trial's setup.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TypeVar

import msgspec
import psutil
from msgspec.structs import replace

from calm import settings as configuration
from calm.errors import CalmError
from calm.execute.events import Discipline
from calm.plan import goals as goal_book
from calm.report.records import Setup
from calm.settings import FleetSettings, KnowledgeSettings, Logging, Memory, Server, Settings

KEEP_ALL = "none"
"""The cache that evicts nothing: every model is loaded and pinned before the workload begins."""
READY_WITHIN_S = 120.0
STOP_WITHIN_S = 30.0
GRACE_S = 2.0
"""How long the server waits for running answers when it is told to end: a trial that ended has none."""
MAX_QUEUE = 1_000_000
"""Nobody is turned away at the door, as in replay: what a candidate cannot serve in time misses its deadline."""
POLL_S = 0.05
LAST_LINES = 3

T = TypeVar("T")


class ServerFailed(CalmError):
    """The server of a trial did not come up, or ended while it was needed."""

    code = "bench_server_failed"


# --- settings ---------------------------------------------------------------------------------------


def settings_for(
    base: Settings, setup: Setup, *, seed: int, fleet: Path, budget_bytes: int, deadline_s: float
) -> Settings:
    """The settings of one trial's server. Raises BadInput (field `goal`) as `read_aim` does.

    Models are loaded ahead of demand where CALM's own eviction is compared; lru, lfu and fifo load what is
    asked for, as a plain cache does; with `none` the bench loads everything itself.
    """
    aim = goal_book.read_aim(setup.goal, {**goal_book.GOALS, **base.goals})
    return replace(
        base,
        server=Server(port=0, deadline_s=deadline_s, max_queue=MAX_QUEUE, shutdown_grace_s=GRACE_S),
        fleet=FleetSettings(dir=str(fleet), fetch=False),
        memory=Memory(
            budget=str(budget_bytes),
            eviction="calm" if setup.cache == KEEP_ALL else setup.cache,
            preload=preloads(setup.cache),
        ),
        scheduling=replace(base.scheduling, queue=msgspec.convert(setup.queue, Discipline)),
        policy=replace(
            base.policy,
            name=setup.policy,
            goal=aim.goal or configuration.PolicySettings().goal,
            weights=aim.weights,
            quality_floor=aim.quality_floor,
            seed=seed,
        ),
        knowledge=KnowledgeSettings(),
        log=Logging(level="warning"),
    )


def preloads(cache: str) -> bool:
    return cache.partition(":")[0] == "calm"


def as_toml(settings: Settings) -> str:
    """A configuration file; what is None is left out, since TOML has no null."""
    import tomli_w

    return tomli_w.dumps(_without_none(msgspec.to_builtins(settings)))


def _without_none(table: Mapping[str, object]) -> dict[str, object]:
    return {
        key: _without_none(value) if isinstance(value, Mapping) else value
        for key, value in table.items()
        if value is not None
    }


def environment(ours: Mapping[str, str], root: Path, cache: Path) -> dict[str, str]:
    """Ours less every setting of CALM in it, with the trial's own directories and the shared weights."""
    kept = {name: value for name, value in ours.items() if not name.startswith("CALM_")}
    return {
        **kept,
        "CALM_CONFIG": str(root / "calm.toml"),
        "CALM_CACHE_DIR": str(cache),
        "CALM_STATE_DIR": str(root / "state"),
        "XDG_CONFIG_HOME": str(root / "config"),
        "XDG_STATE_HOME": str(root / "state"),
        "XDG_RUNTIME_DIR": str(root / "run"),
    }


# --- the process ------------------------------------------------------------------------------------


@asynccontextmanager
async def trial_directory() -> AsyncIterator[Path]:
    """A private directory, gone afterwards. Its path is short: those of unix sockets have to be."""
    root = Path(tempfile.mkdtemp(prefix="calm-trial-"))
    try:
        for name in ("state", "config", "run"):
            (root / name).mkdir(mode=0o700)
        yield root
    finally:
        shutil.rmtree(root, ignore_errors=True)


class TrialServer:
    """One `calm serve` in a directory of its own. Close with `async with`; nothing of it is left then."""

    def __init__(self, root: Path, settings: Settings) -> None:
        self._root = root
        self._settings = settings
        self._process: asyncio.subprocess.Process | None = None
        self.url = ""

    @property
    def database(self) -> Path:
        """Complete once the server has ended."""
        return self._root / "state" / "knowledge.sqlite3"

    async def __aenter__(self) -> TrialServer:
        """Returns when requests are taken. Raises ServerFailed with the last lines the server wrote."""
        (self._root / "calm.toml").write_text(as_toml(self._settings), encoding="utf-8")
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", "from calm.cli import main; main()", "serve"),
                env=environment(os.environ, self._root, configuration.cache_dir()),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,  # Ctrl-C is ours: the server ends when its trial does
            )
        try:
            self.url = await self._announced()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _announced(self) -> str:
        """Raises ServerFailed."""
        with suppress(TimeoutError):
            async with asyncio.timeout(READY_WITHIN_S):
                while self._running:
                    found = re.search(r"CALM serves at (http://\S+)", self._out.read_text(encoding="utf-8"))
                    if found:
                        return found[1]
                    await asyncio.sleep(POLL_S)
        raise ServerFailed(f"the server did not come up: {self.last_words()}")

    async def while_alive(self, work: Coroutine[None, None, T]) -> T:
        """The work's result. Raises ServerFailed, and cancels the work, as soon as the server has ended."""
        assert self._process is not None
        task, end = asyncio.ensure_future(work), asyncio.ensure_future(self._process.wait())
        try:
            await asyncio.wait((task, end), return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                code = self._process.returncode
                raise ServerFailed(f"the server ended with code {code} in mid-trial: {self.last_words()}")
            return task.result()
        finally:
            await _cancelled(task)
            await _cancelled(end)

    async def close(self) -> None:
        """SIGTERM, then SIGKILL for whatever stays."""
        if self._process is None:
            return
        family = self._family()
        if self._running:
            with suppress(ProcessLookupError):
                self._process.terminate()
        try:
            await asyncio.wait_for(self._process.wait(), STOP_WITHIN_S)
        except TimeoutError:
            with suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()
        for left in family:
            with suppress(psutil.Error):
                left.kill()  # psutil compares start times: never a stranger with the same number

    def last_words(self) -> str:
        """The last lines it wrote, on one line."""
        lines = self._err.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return " | ".join(line.strip() for line in lines[-LAST_LINES:]) or "it said nothing"

    @property
    def _running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    def _family(self) -> list[psutil.Process]:
        assert self._process is not None
        with suppress(psutil.Error):
            return list(psutil.Process(self._process.pid).children(recursive=True))
        return []

    @property
    def _out(self) -> Path:
        return self._root / "server.out"

    @property
    def _err(self) -> Path:
        return self._root / "server.err"


async def _cancelled(task: asyncio.Future[T]) -> None:
    if not task.done():
        task.cancel()
        await asyncio.wait((task,))
