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

    backend = FakeBackend({"finance": Script(answer=("up",)), "odd": Script(refuse="another shape")})
    engine = await backend.start(card, None, 1, adapters)    # AdapterFiles: each follows its own Script
    engine.adapters()                                        # {"finance": Endpoint(adapter=0, ...)}
    engine.refused()                                         # {"odd": "another shape"}: never fails the base

`Script` is mutable on purpose: change `server.script.error_status = 500` between requests. A gate (an
`asyncio.Event`) stops a load or an answer until the test sets it, so that no test needs to sleep:
`Script(load_gate=gate)` holds `start`, `Script(token_gate=gate)` holds every answer before its first token.
`FakeBackend(listen=False)` opens no socket at all, for tests of residency alone. `FakeBackend(by_name=True)`
serves adapters as vLLM does, by the model's name, where llama.cpp (the default) wants `lora` in the body.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path

from msgspec.structs import replace

from calm.backends.fake_server import FakeEngineServer, Script, Seen, pause
from calm.errors import LoadFailed
from calm.records import AdapterFile, Endpoint, ModelCard

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
        self._adapters: dict[str, int | None] = {}
        self._refused: dict[str, str] = {}
        self._death: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    @property
    def endpoint(self) -> Endpoint:
        return self._endpoint(self.card.engine.upstream_model or self.card.name)

    def adapters(self) -> dict[str, Endpoint]:
        return {
            name: replace(self._endpoint(name), adapter=number) for name, number in self._adapters.items()
        }

    def refused(self) -> dict[str, str]:
        return dict(self._refused)

    def take(self, name: str, script: Script, *, by_name: bool) -> bool:
        """Carry an adapter, or refuse it as its script says."""
        if refusal := script.refusal():
            self._refused[name] = refusal
            return False
        self._adapters[name] = None if by_name else len(self._adapters)
        return True

    def _endpoint(self, model: str) -> Endpoint:
        if self.server:
            return self.server.endpoint(model)
        return Endpoint(base_url="http://fake.invalid", model=model)

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
    (name, threads) in the order asked, `given` the adapters of each of these starts, `cancelled` the loads
    that were cancelled, `stopped` the orderly stops, `running` the live engines by name.
    """

    def __init__(
        self,
        scripts: Mapping[str, Script] | None = None,
        *,
        default: Script | None = None,
        listen: bool = True,
        run_dir: Path | None = None,
        by_name: bool = False,
    ) -> None:
        self.scripts = dict(scripts or {})
        self.started: list[tuple[str, int]] = []
        self.given: list[tuple[str, ...]] = []
        self.cancelled: list[str] = []
        self.stopped: list[str] = []
        self.running: dict[str, FakeEngine] = {}
        self._default = default or Script()
        self._listen = listen
        self._run_dir = run_dir
        self._by_name = by_name

    def script(self, name: str) -> Script:
        return self.scripts.get(name, self._default)

    async def start(
        self, card: ModelCard, weights: Path | None, threads: int, adapters: Sequence[AdapterFile] = ()
    ) -> FakeEngine:
        script = self.script(card.name)
        self.started.append((card.name, threads))
        self.given.append(tuple(adapter.card.name for adapter in adapters))
        engine = FakeEngine(self, card, script, threads)
        try:
            await self._load(card, script)
            carried = self._carry(engine, adapters)
            if self._listen:
                socket = self._socket(card.name)
                engine.server = FakeEngineServer(script, socket=socket, model=card.name, adapters=carried)
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
        if refusal := script.refusal():
            raise LoadFailed(f"model {card.name}: {refusal}")

    def _carry(self, engine: FakeEngine, adapters: Sequence[AdapterFile]) -> dict[str, Script]:
        """The scripts of the adapters the engine takes, in the order of their numbers."""
        asked = {adapter.card.name: self.script(adapter.card.name) for adapter in adapters}
        return {
            name: script for name, script in asked.items() if engine.take(name, script, by_name=self._by_name)
        }

    def _socket(self, name: str) -> Path | None:
        return self._run_dir / f"{name}.sock" if self._run_dir else None
