"""A scripted engine for tests: it does over real HTTP what an engine does, when and how the test says.

Without it every test of the executor, dispatch or the gateway would need weights and seconds. Two pieces:

    script = Script(answer=("Hello", " world"), tpot_s=0.001)
    async with FakeEngineServer(script) as server:           # an OpenAI-compatible server, nothing else
        endpoint = server.endpoint("smol")                   # give it to an Upstream
        ...
        server.seen[-1].body["temperature"]                  # every request body as it arrived
        server.in_flight, server.peak_in_flight, server.cancelled

    backend = FakeBackend({"smol": Script(load_s=0.01, footprint_bytes=200 << 20)})
    engine = await backend.start(card, None, threads=1)      # an EngineBackend; one server per engine
    await engine.crash("out of memory")                      # now died() returns, connections are cut
    backend.started, backend.stopped, backend.running        # what was asked of it, in order

`Script` is mutable on purpose: change `server.script.error_status = 500` between requests. A gate (an
`asyncio.Event`) stops a load or an answer until the test sets it, so that no test needs to sleep:
`Script(load_gate=gate)` holds `start`, `Script(token_gate=gate)` holds every answer before its first token.
`FakeBackend(listen=False)` opens no socket at all, for tests of residency alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path

from calm.backends.fake_server import FakeEngineServer, Script, Seen, pause
from calm.errors import LoadFailed
from calm.records import Endpoint, ModelCard

__all__ = ["FakeBackend", "FakeEngine", "FakeEngineServer", "Script", "Seen"]


class FakeEngine:
    """A RunningEngine over a FakeEngineServer (`server` is None when the backend does not listen)."""

    def __init__(self, backend: FakeBackend, card: ModelCard, script: Script, threads: int) -> None:
        self.card = card
        self.threads = threads
        self.script = script
        self.server: FakeEngineServer | None = None
        self.stopped = False
        self._backend = backend
        self._death: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    @property
    def endpoint(self) -> Endpoint:
        model = self.card.engine.upstream_model or self.card.name
        return (
            self.server.endpoint(model)
            if self.server
            else Endpoint(base_url="http://fake.invalid", model=model)
        )

    def pids(self) -> tuple[int, ...]:
        return () if self.stopped else self.script.pids

    def footprint_bytes(self) -> int | None:
        return 0 if self.stopped else self.script.footprint_bytes

    async def died(self) -> str:
        return await asyncio.shield(self._death)

    async def crash(self, reason: str = "scripted crash") -> None:
        """Die as an engine does: connections are cut, then `died()` returns `reason`."""
        await self._close()
        if not self._death.done():
            self._death.set_result(reason)

    async def stop(self) -> None:
        if not self.stopped:
            self._backend.stopped.append(self.card.name)
        await self._close()

    async def _close(self) -> None:
        self.stopped = True
        self._backend.running.pop(self.card.name, None)
        if self.server:
            await self.server.stop()


class FakeBackend:
    """An EngineBackend whose engines follow the Script of their card's name (`default` for any other).

    `run_dir` makes the engines listen on unix sockets in it instead of loopback ports. `started` holds
    (name, threads) in the order asked, `cancelled` the loads that were cancelled, `stopped` the orderly
    stops, `running` the live engines by name.
    """

    def __init__(
        self,
        scripts: Mapping[str, Script] | None = None,
        *,
        default: Script | None = None,
        listen: bool = True,
        run_dir: Path | None = None,
    ) -> None:
        self.scripts = dict(scripts or {})
        self.started: list[tuple[str, int]] = []
        self.cancelled: list[str] = []
        self.stopped: list[str] = []
        self.running: dict[str, FakeEngine] = {}
        self._default = default or Script()
        self._listen = listen
        self._run_dir = run_dir

    def script(self, name: str) -> Script:
        return self.scripts.get(name, self._default)

    async def start(self, card: ModelCard, weights: Path | None, threads: int) -> FakeEngine:
        script = self.script(card.name)
        self.started.append((card.name, threads))
        engine = FakeEngine(self, card, script, threads)
        try:
            await self._load(card, script)
            if self._listen:
                engine.server = FakeEngineServer(script, socket=self._socket(card.name), model=card.name)
                await engine.server.start()
        except asyncio.CancelledError:
            self.cancelled.append(card.name)
            raise
        self.running[card.name] = engine
        return engine

    async def _load(self, card: ModelCard, script: Script) -> None:
        if script.load_gate:
            await script.load_gate.wait()
        await pause(script.load_s)
        if script.refuse is None or script.refuse_times == 0:
            return
        if script.refuse_times is not None:
            script.refuse_times -= 1
        raise LoadFailed(f"model {card.name}: {script.refuse}")

    def _socket(self, name: str) -> Path | None:
        return self._run_dir / f"{name}.sock" if self._run_dir else None
